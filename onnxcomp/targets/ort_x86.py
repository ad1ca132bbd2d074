"""ONNX Runtime on x86-64: unsigned activations, signed weights per output channel, int8 kernels at every width.

    activation   x -> QuantizeLinear(u8) -> Clip(0, 2^b - 1) -> DequantizeLinear      (no Clip at 8 bits)
    weight       int4 initializer -> Cast(int8) -> DequantizeLinear                   (int8 initializer above 4 bits)
    MatMul, Gemm -> MatMul with float output, bias by Sum                             (MatMulIntegerToFloat)
    Conv         -> int32 bias, quantized output                                      (QLinearConv)
    further term -> Sub(x, DequantizeLinear's output) -> Q with a step of its own, once for all who read it

Every rule was read from the runtime's optimized models, and the tests probe it: an integer Clip behind Q keeps the
kernels, a float Clip or a 4-bit type in front of the operator loses them; the Cast of the int4 weight is folded when the
session loads; `Sum` is never fused into a float Gemm, `Add` is as soon as shapes are known; a ReLU in front of Q
disappears where the zero point is the smallest code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from onnxcomp.graph.convert import packed_int4
from onnxcomp.graph.edit import DOMAIN, Constant, Graph, Node, Tensor, Variable, insert_after, insert_before, remove
from onnxcomp.graph.sites import Site
from onnxcomp.graph.tidy import is_load_time
from onnxcomp.numerics.affine import Scheme, from_range
from onnxcomp.targets.base import Plan, Settings, Target
from onnxcomp.targets.regions import clip_bounds, is_operand, lower_bound, plan_with_regions

TINY = np.float32(1e-12)
"""Floor of a range measured at run time, so that an all-zero tensor does not divide by zero."""
FLOAT, INT8 = 1, 3
"""ONNX's numbers of two element types."""


@final
class OrtX86(Target):
    """See the module."""

    name = "ort-x86"
    summary = "ONNX Runtime on x86-64 CPUs: u8 activations, s8 weights per channel, int8 kernels at any width."

    def plan(self, graph: Graph, sites: Sequence[Site], settings: Mapping[str, Settings]) -> Plan:
        return plan_with_regions(graph, sites, settings)

    def requirements(self, plan: Plan) -> tuple[str, ...]:
        """Found by running such files: the Cast from int4 is there from 1.23 on, the rest of opset 21 from 1.18 on."""
        packed = any(site.weight is not None and plan.settings[site.name].weight_bits <= 4 for site in plan.sites)
        return (
            f"ONNX Runtime {'1.23' if packed else '1.18'} or newer, with graph optimizations enabled (the default).",
            "A CPU with VNNI for exact 8-bit products. On older AVX2 CPUs sums of two products may saturate: set the session "
            'option session.x64quantprecision = "1" there.',
        )

    def lower(self, graph: Graph) -> Graph:
        _Lowering(graph).run()
        self.settle(graph)
        return graph

    def settle(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "QuantizeLinear" and all(isinstance(t, Constant) for t in node.inputs[1:]):
                _absorb(graph, node)
            if node.op == "MatMul" and is_load_time(node.inputs[1]) and any(t.inputs for t in node.inputs[1:]):
                _keep_integer(graph, node)


@dataclass(frozen=True)
class _Digit:
    """A lowered quantizer, for the next one that takes up what it has left."""

    source: Tensor
    """What it quantizes: the tensor itself, or over the scale of each token."""
    value: Tensor
    """Its output."""
    scale: Tensor
    token: Tensor | None = None
    """The scale of each token, which stands behind the products."""
    next: dict[tuple[float, ...], _Digit] = field(default_factory=dict)
    """What has been lowered behind it, by step: readers share it."""


@dataclass
class _Lowering:
    """One graph on its way to standard operators; constants that many nodes read exist once."""

    graph: Graph
    shared: dict[str, Constant] = field(default_factory=dict)
    digits: dict[str, _Digit] = field(default_factory=dict)
    """The lowered quantizers by the name of their abstract output."""

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "Conv":
                self._integer_bias(node)
            if node.op in ("Add", "Mul"):
                self._integer_operand(node)
            if node.op == "Gemm" and _weight_codes(node) is not None:
                self._split_gemm(node)
        results = {id(t) for t in self.graph.outputs}
        for node in [n for n in self.graph.nodes if n.domain == DOMAIN]:
            if not node.outputs[0].outputs and id(node.outputs[0]) not in results:
                remove(self.graph, node)  # the runtime would compute it all the same
            elif node.op == "Dequantize":
                self._weight(node)
            else:
                lower = {"static": self._static, "dynamic": self._dynamic, "token": self._token, "residual": self._residual}
                lower[node.attrs["granularity"]](node)
        for node in [n for n in self.graph.nodes if n.op == "Sum"]:
            self._scale_once(node)

    def _constant(self, name: str, value: object, dtype: type) -> Constant:
        if name not in self.shared:
            self.shared[name] = Constant(name, np.array(value, dtype=dtype))
        return self.shared[name]

    def _replace(self, node: Node, new: Sequence[Node]) -> None:
        insert_before(self.graph, node, new)
        remove(self.graph, node)

    # --- activations -------------------------------------------------------------------------------------------------

    def _static(self, node: Node) -> None:
        """Q, an integer Clip below 8 bits, DQ."""
        x, scale, zero_point = node.inputs
        y = node.outputs[0]
        self.digits[y.name] = _Digit(x, y, scale)
        name = node.name.rpartition("/fakequantize")[0] or y.name  # the edit's own name, which a tensor's may follow
        self._replace(node, self._quantize(name, x, scale, zero_point, node.attrs["bits"], y))

    def _quantize(self, name: str, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, y: Tensor) -> list[Node]:
        codes = Variable(f"{name}/codes", dtype=np.dtype(np.uint8))
        nodes = [_node("QuantizeLinear", name, [x, scale, zero_point], codes)]
        if bits < 8:
            low = self._constant("onnxcomp/zero.u8", 0, np.uint8)
            high = self._constant(f"onnxcomp/max.u{bits}", 2**bits - 1, np.uint8)
            clipped = Variable(f"{name}/codes.u{bits}", dtype=np.dtype(np.uint8))
            nodes.append(_node("Clip", name, [codes, low, high], clipped))
            codes = clipped
        return [*nodes, _node("DequantizeLinear", name, [codes, scale, zero_point], y)]

    def _dynamic(self, node: Node) -> None:
        """A range measured at run time, per tensor: DynamicQuantizeLinear for 8 bits, a computed symmetric scale below."""
        x, y, bits = node.inputs[0], node.outputs[0], node.attrs["bits"]
        if bits < 8 or node.attrs["ratio"] != 1:
            nodes, scale = self._measured_scale(y.name, x, bits, node.attrs["ratio"], per_token=False)
            self.digits[y.name] = _Digit(x, y, scale)
            self._replace(node, nodes + self._quantize(y.name, x, scale, self._middle(bits), bits, y))
            return
        codes, zero_point = (Variable(f"{y.name}/{n}", dtype=np.dtype(np.uint8)) for n in ("codes", "zero_point"))
        scale = Variable(f"{y.name}/scale", dtype=np.dtype(np.float32))
        quantize = _node("DynamicQuantizeLinear", y.name, [x], codes)
        quantize.outputs += [scale, zero_point]
        self.digits[y.name] = _Digit(x, y, scale)
        self._replace(node, [quantize, _node("DequantizeLinear", y.name, [codes, scale, zero_point], y)])

    def _measured_scale(self, name: str, x: Tensor, bits: int, ratio: float, *, per_token: bool) -> tuple[list[Node], Variable]:
        """Scale = max(ratio * max|x| / qmax, tiny), over the last axis or over everything."""
        names = ("abs", "max", "unfloored", "scale")
        absolute, largest, unfloored, scale = (Variable(f"{name}/{n}", dtype=np.dtype(np.float32)) for n in names)
        factor = Constant(f"{name}/factor", np.array(ratio / (2 ** (bits - 1) - 1), np.float32))
        axes = [self._constant("onnxcomp/last-axis", [-1], np.int64)] if per_token else []
        nodes = [
            _node("Abs", name, [x], absolute),
            _node("ReduceMax", name, [absolute, *axes], largest, keepdims=int(per_token)),
            _node("Mul", name, [largest, factor], unfloored),
            _node("Max", name, [unfloored, self._constant("onnxcomp/tiny", TINY, np.float32)], scale),
        ]
        return nodes, scale

    def _token(self, node: Node) -> None:
        """A range per token at run time: x/s is quantized with scale 1, and the product is multiplied by s behind the
        MatMul, so the kernel itself stays the ordinary integer one.
        """
        x, y, bits = node.inputs[0], node.outputs[0], node.attrs["bits"]
        nodes, scale = self._measured_scale(y.name, x, bits, node.attrs["ratio"], per_token=True)
        unit, levels = (Variable(f"{y.name}/{n}", dtype=np.dtype(np.float32)) for n in ("unit", "levels"))
        nodes.append(_node("Div", y.name, [x, scale], unit))
        one = self._constant("onnxcomp/one", 1.0, np.float32)
        nodes += self._quantize(levels.name, unit, one, self._middle(bits), bits, levels)
        self.digits[y.name] = _Digit(unit, levels, one, scale)
        self._read_levels(y, levels, scale)
        self._replace(node, nodes)

    def _residual(self, node: Node) -> None:
        """What the quantizer that makes the second input has left of the first, with a step finer by the factor `finer`, or
        a static range of its own. Readers with one step share it.
        """
        before, y, bits, finer = self.digits[node.inputs[1].name], node.outputs[0], node.attrs["bits"], node.attrs["finer"]
        key = tuple(float(t.values) for t in node.inputs[2:]) or (finer, float(bits))
        if key not in before.next:
            rest, value, scale = (Variable(f"{y.name}/{n}", dtype=np.dtype(np.float32)) for n in ("rest", "value", "scale"))
            nodes, ranges = [_node("Sub", y.name, [before.source, before.value], rest)], (scale, self._middle(bits))
            if len(node.inputs) == 4:
                ranges = (node.inputs[2], node.inputs[3])
            else:
                factor = Constant(f"{y.name}/finer", np.array(finer, np.float32))
                nodes.append(_node("Mul", y.name, [before.scale, factor], scale))
            insert_before(self.graph, node, [*nodes, *self._quantize(y.name, rest, *ranges, bits, value)])
            before.next[key] = _Digit(rest, value, ranges[0], before.token)
        found = self.digits[y.name] = before.next[key]
        self._read_levels(y, found.value, found.token)
        remove(self.graph, node)

    def _read_levels(self, y: Tensor, levels: Tensor, scale: Tensor | None) -> None:
        """Let the products that read `y` read `levels` instead, and multiply them by the `scale` of each token."""
        for consumer in [n for n in list(y.outputs) if n.domain != DOMAIN]:
            consumer.inputs[[t is y for t in consumer.inputs].index(True)] = levels
            result = consumer.outputs[0]
            if scale is None or result.name.endswith("/unscaled"):
                continue
            assert consumer.op in ("MatMul", "Sum"), "per-token ranges stand in front of a MatMul, or a sum of their terms"
            unscaled = Variable(f"{result.name}/unscaled", dtype=result.dtype)
            consumer.outputs[0] = unscaled
            insert_after(self.graph, consumer, [_node("Mul", consumer.name, [unscaled, scale], result)])

    def _scale_once(self, node: Node) -> None:
        """Multiply a sum of products by the scale of each token, instead of every product."""
        makers = [t.inputs[0] for t in node.inputs if t.inputs and len(t.outputs) == 1]
        scaled = [m for m in makers if m.op == "Mul" and m.inputs[0].name.endswith("/unscaled")]
        if len(scaled) != len(node.inputs) or len({id(mul.inputs[1]) for mul in scaled}) != 1:
            return
        scale, result, name = scaled[0].inputs[1], node.outputs[0], scaled[0].name
        node.inputs = [mul.inputs[0] for mul in scaled]
        for mul in scaled:
            remove(self.graph, mul)
        node.outputs[0] = Variable(f"{result.name}/unscaled", dtype=result.dtype)
        last = Node("Mul", name, inputs=[node.outputs[0], scale], outputs=[result])  # the layer's own, behind the sum now
        insert_after(self.graph, node, [last])

    def _middle(self, bits: int) -> Constant:
        return self._constant(f"onnxcomp/middle.u{bits}", 2 ** (bits - 1), np.uint8)

    # --- weights and biases --------------------------------------------------------------------------------------------

    def _weight(self, node: Node) -> None:
        """Stored codes, then DequantizeLinear per channel; 4 bits and fewer are stored as int4 and cast. In front of an
        operator with float activations Cast and Mul, which the runtime folds when it loads the file, so that it runs at
        float speed; a DequantizeLinear there is computed at every run, or becomes a kernel of lower accuracy.
        """
        codes, scale = node.inputs
        y, axis = node.outputs[0], node.attrs["axis"]
        stored = packed_int4(codes.name, codes.values) if node.attrs["bits"] <= 4 else codes
        if any(reader.op == "Sum" or not _is_quantized(reader.inputs[0]) for reader in y.outputs):
            shape = [-1 if i == axis else 1 for i in range(len(codes.shape))]
            floats = Variable(f"{y.name}/codes.f32", dtype=np.dtype(np.float32))
            factor = Constant(scale.name, scale.values.reshape(shape))
            cast = _node("Cast", y.name, [stored], floats, to=FLOAT)
            self._replace(node, [cast, _node("Mul", y.name, [floats, factor], y)])
            return
        nodes, widened = [], stored
        if stored is not codes:
            widened = Variable(f"{y.name}/codes.i8", dtype=np.dtype(np.int8))
            nodes.append(_node("Cast", y.name, [stored], widened, to=INT8))
        zero_point = Constant(f"{y.name}/zero_point", np.zeros(scale.shape, np.int8))
        self._replace(node, [*nodes, _node("DequantizeLinear", y.name, [widened, scale, zero_point], y, axis=axis)])

    def _integer_bias(self, conv: Node) -> None:
        """Give a Conv with quantized input and weight an int32 bias of scale s_x * s_w, as its kernel expects."""
        weight, source = _weight_codes(conv), conv.inputs[0].inputs
        if weight is None or len(conv.inputs) < 3 or not isinstance(conv.inputs[2], Constant):
            return
        if len(source) != 1 or source[0].attrs.get("granularity") != "static":
            return
        bias, input_scale = conv.inputs[2].values.astype(np.float64), np.float64(source[0].inputs[1].values)
        _widen_dead_channels(weight, np.abs(bias) / (input_scale * 2.0**30))
        step = (input_scale * weight.inputs[1].values.astype(np.float64)).astype(np.float32)
        codes = np.rint(bias / step)
        stored = Constant(f"{conv.name}/int32-bias.i32", codes.astype(np.int32))
        scale = Constant(f"{conv.name}/int32-bias.scale", step)
        zero = Constant(f"{conv.name}/int32-bias.zero_point", np.zeros(step.shape, np.int32))
        conv.inputs[2] = Variable(f"{conv.name}/int32-bias", dtype=np.dtype(np.float32))
        name = f"{conv.name}/int32-bias"
        insert_before(self.graph, conv, [_node("DequantizeLinear", name, [stored, scale, zero], conv.inputs[2], axis=0)])

    def _integer_operand(self, node: Node) -> None:
        """Store the constant operand of an integer Add or Mul in 8 bits; its kernel takes no float one."""
        constants = [i for i, t in enumerate(node.inputs) if is_operand(node, t)]
        reader = node.outputs[0].outputs[0] if len(node.outputs[0].outputs) == 1 else None
        if reader is not None and reader.op in ("Relu", "Clip") and len(reader.outputs[0].outputs) == 1:
            reader = reader.outputs[0].outputs[0]
        if len(constants) != 1 or not _is_static(node.inputs[1 - constants[0]]) or reader is None or reader.domain != DOMAIN:
            return
        values, name = node.inputs[constants[0]].values, f"{node.name}/operand"
        q = from_range(values.min(), values.max(), Scheme(8))
        stored = [Constant(f"{name}.codes", q.quantize(values)), Constant(f"{name}.scale", q.scale)]
        node.inputs[constants[0]] = Variable(name, dtype=np.dtype(np.float32))
        zero_point = Constant(f"{name}.zero_point", q.zero_point)
        insert_before(self.graph, node, [_node("DequantizeLinear", name, [*stored, zero_point], node.inputs[constants[0]])])

    def _split_gemm(self, node: Node) -> None:
        """Write a plain Gemm as MatMul and Sum."""
        assert not node.attrs.get("transB", 0), "prepare() has transposed the weight"
        node.op = "MatMul"
        node.attrs.clear()
        if len(node.inputs) < 3:
            return
        bias, y = node.inputs.pop(), node.outputs[0]
        product = Variable(f"{y.name}/product", dtype=y.dtype)
        node.outputs[0] = product
        insert_after(self.graph, node, [_node("Sum", node.name, [product, bias], y)])


def _absorb(graph: Graph, quantize: Node) -> None:
    """Drop the Relu or Clip in front of a static quantizer where its bounds lie outside the codes' range."""
    x, scale, zero_point = quantize.inputs
    if len(x.inputs) != 1 or len(x.outputs) != 1 or any(t is x for t in graph.outputs):
        return
    clip, reader = x.inputs[0], quantize.outputs[0].outputs[0]
    if clip.op not in ("Relu", "Clip") or any(isinstance(t, Variable) and not t.is_empty() for t in clip.inputs[1:]):
        return
    step, zero = float(scale.values), int(zero_point.values)
    largest = 255 if reader.op != "Clip" else int(reader.inputs[2].values)
    low, high = lower_bound(clip), clip_bounds(clip)[1] if clip.op == "Clip" else None
    if low is not None and -zero * step < low:
        return
    # The largest code may exceed the bound by a rounding of its scale: no value in between has another code.
    if high is not None and (largest - zero) * step > high * (1 + 1e-6):
        return
    quantize.inputs[0] = clip.inputs[0]
    remove(graph, clip)
    if not x.name.endswith("/before-quantize"):
        dequantize = reader if reader.op != "Clip" else reader.outputs[0].outputs[0]
        dequantize.outputs[0].name = x.name  # the tensor's name goes on naming its best approximation


def _keep_integer(graph: Graph, node: Node) -> None:
    """Keep the runtime from fusing a product of quantized operands with what reads it into a float operator: an Add
    becomes a Sum, and in front of a ReLU, or of several readers, stands a Sum of one.
    """
    y = node.outputs[0]
    while len(y.outputs) == 1 and y.outputs[0].op in ("Add", "Sum", "Mul") and y.outputs[0].outputs[0].outputs:
        reader = y.outputs[0]
        if reader.op == "Add" or (reader.op == "Sum" and any(is_load_time(t) for t in reader.inputs)):
            reader.op = "Sum"
            return
        y = reader.outputs[0]
    y = node.outputs[0]
    if len(y.outputs) == 1 and y.outputs[0].op not in ("Relu", "Clip", "Add"):
        return
    if len(y.outputs) == 1 and y.outputs[0].op == "Add":
        y.outputs[0].op = "Sum"
    elif y.outputs:
        raw = Variable(f"{y.name}/product", dtype=y.dtype)
        node.outputs[0] = raw
        insert_after(graph, node, [_node("Sum", node.name, [raw], y)])


def _node(op: str, prefix: str, inputs: Sequence[Tensor], output: Tensor, **attrs: object) -> Node:
    return Node(op, f"{prefix}/{op}", attrs=dict(attrs), inputs=list(inputs), outputs=[output])


def _widen_dead_channels(weight: Node, least: np.ndarray) -> None:
    """Raise a channel's scale to `least` where its weights are so small that its bias would not fit into 32 bits: such
    weights are below 2^-30 of the bias, so what they lose is nothing beside it.
    """
    codes, scale = weight.inputs
    wide = np.maximum(scale.values, least.astype(np.float32))
    if np.array_equal(wide, scale.values):
        return
    shape = [-1 if i == weight.attrs["axis"] else 1 for i in range(codes.values.ndim)]
    rounded = np.rint(codes.values * (scale.values.astype(np.float64) / wide).reshape(shape)).astype(np.int8)
    weight.inputs[0], weight.inputs[1] = Constant(codes.name, rounded), Constant(scale.name, wide)


def _weight_codes(node: Node) -> Node | None:
    """The abstract Dequantize that makes the node's weight."""
    makers = node.inputs[1].inputs
    return makers[0] if len(makers) == 1 and makers[0].op == "Dequantize" and makers[0].domain == DOMAIN else None


def _is_static(tensor: Tensor) -> bool:
    """Whether a static abstract quantizer makes `tensor`."""
    return len(tensor.inputs) == 1 and tensor.inputs[0].attrs.get("granularity") == "static"


def _is_quantized(tensor: Tensor) -> bool:
    return len(tensor.inputs) == 1 and tensor.inputs[0].op in ("FakeQuantize", "DequantizeLinear")


TARGET = OrtX86()
