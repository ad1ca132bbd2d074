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
from typing import Any, final

import numpy as np

from onnxcomp.graph.convert import packed_int4
from onnxcomp.graph.edit import DOMAIN, Constant, Graph, Node, Tensor, Variable, insert_after, insert_before, remove
from onnxcomp.graph.sites import Site
from onnxcomp.graph.tidy import is_load_time
from onnxcomp.numerics.affine import Scheme, along, from_range
from onnxcomp.targets.base import Plan, Settings, Target
from onnxcomp.targets.regions import clip_bounds, is_operand, plan_with_regions

TINY = np.float32(1e-12)
"""Floor of a range measured at run time, so that an all-zero tensor does not divide by zero."""
FLOAT, INT8 = 1, 3
"""ONNX's numbers of two element types."""


@final
class OrtX86(Target):
    """See the module."""

    name = "ort-x86"

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
            if node.op in ("Conv", "Gemm") and _would_be_quantized(node):
                _put_behind(graph, node, "Sum", "float")


@dataclass
class _Nodes:
    """New nodes that stand for one: they are called after `name` and their operator, what they make after it too."""

    name: str
    made: list[Node] = field(default_factory=list)

    def __call__(self, op: str, output: str | Tensor, *inputs: Tensor, dtype: type = np.float32, **attrs: object) -> Tensor:
        """Add one node that makes `output`, a tensor or the last part of the name of a new one."""
        if isinstance(output, str):
            output = Variable(f"{self.name}/{output}", dtype=np.dtype(dtype))
        self.made.append(Node(op, f"{self.name}/{op}", attrs=attrs, inputs=list(inputs), outputs=[output]))
        return output


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
            if node.outputs[0].outputs or id(node.outputs[0]) in results:  # else the runtime would compute it all the same
                insert_before(self.graph, node, self._weight(node) if node.op == "Dequantize" else self._activation(node))
            remove(self.graph, node)
        for node in [n for n in self.graph.nodes if n.op == "Sum"]:
            self._scale_once(node)

    def _constant(self, name: str, value: object, dtype: type) -> Constant:
        if name not in self.shared:
            self.shared[name] = Constant(name, np.array(value, dtype=dtype))
        return self.shared[name]

    # --- activations -------------------------------------------------------------------------------------------------

    def _activation(self, node: Node) -> list[Node]:
        """The quantizer of one tensor, by its granularity.

        static    scale and zero point are the node's own
        dynamic   a range measured over the tensor: the runtime's own operator at 8 bits, a symmetric scale below
        token     a range per token: x/s is quantized with scale 1, and the product is multiplied by s behind the MatMul, so
                  the kernel itself stays the ordinary integer one
        residual  see `_residual`
        """
        x, y, bits, granularity = node.inputs[0], node.outputs[0], node.attrs["bits"], node.attrs["granularity"]
        new, middle = _Nodes(y.name), self._constant(f"onnxcomp/middle.u{bits}", 2 ** (bits - 1), np.uint8)
        if granularity == "static":
            new.name = node.name.rpartition("/fakequantize")[0] or y.name  # the edit's own name, which a tensor's may follow
            digit = self._quantize(new, x, node.inputs[1], node.inputs[2], bits, y)
        elif granularity == "residual":
            digit = self._residual(new, node, middle)
        elif granularity == "token":
            scale, one = self._measured_scale(new, node), self._constant("onnxcomp/one", 1.0, np.float32)
            unit, levels = new("Div", "unit", x, scale), Variable(f"{y.name}/levels", dtype=np.dtype(np.float32))
            new.name = levels.name
            digit = self._quantize(new, unit, one, middle, bits, levels, scale)
        elif bits < 8 or node.attrs["ratio"] != 1:
            digit = self._quantize(new, x, self._measured_scale(new, node), middle, bits, y)
        else:
            codes, zero_point = (Variable(f"{y.name}/{n}", dtype=np.dtype(np.uint8)) for n in ("codes", "zero_point"))
            scale = Variable(f"{y.name}/scale", dtype=np.dtype(np.float32))
            new("DynamicQuantizeLinear", codes, x)
            new.made[0].outputs += [scale, zero_point]
            digit = _Digit(x, new("DequantizeLinear", y, codes, scale, zero_point), scale)
        self.digits[y.name] = digit
        if digit.value is not y:
            self._read_levels(y, digit)
        return new.made

    def _quantize(
        self, new: _Nodes, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, y: str | Tensor, token: Tensor | None = None
    ) -> _Digit:
        """Q, an integer Clip below 8 bits, DQ."""
        codes = new("QuantizeLinear", "codes", x, scale, zero_point, dtype=np.uint8)
        if bits < 8:
            low = self._constant("onnxcomp/zero.u8", 0, np.uint8)
            high = self._constant(f"onnxcomp/max.u{bits}", 2**bits - 1, np.uint8)
            codes = new("Clip", f"codes.u{bits}", codes, low, high, dtype=np.uint8)
        return _Digit(x, new("DequantizeLinear", y, codes, scale, zero_point), scale, token)

    def _measured_scale(self, new: _Nodes, node: Node) -> Tensor:
        """Scale = max(ratio * max|x| / qmax, tiny), over the last axis or over everything."""
        per_token = node.attrs["granularity"] == "token"
        axes = [self._constant("onnxcomp/last-axis", [-1], np.int64)] if per_token else []
        factor = Constant(f"{new.name}/factor", np.array(node.attrs["ratio"] / (2 ** (node.attrs["bits"] - 1) - 1), np.float32))
        largest = new("ReduceMax", "max", new("Abs", "abs", node.inputs[0]), *axes, keepdims=int(per_token))
        unfloored = new("Mul", "unfloored", largest, factor)
        return new("Max", "scale", unfloored, self._constant("onnxcomp/tiny", TINY, np.float32))

    def _residual(self, new: _Nodes, node: Node, middle: Constant) -> _Digit:
        """What the quantizer that makes the second input has left of the first, with a step finer by the factor `finer`, or
        a static range of its own. Readers with one step share it.
        """
        before, bits, finer, ranges = self.digits[node.inputs[1].name], node.attrs["bits"], node.attrs["finer"], node.inputs[2:]
        key = tuple(float(t.values) for t in ranges) or (finer, float(bits))
        if key not in before.next:
            rest = new("Sub", "rest", before.source, before.value)
            if not ranges:
                ranges = [new("Mul", "scale", before.scale, Constant(f"{new.name}/finer", np.array(finer, np.float32))), middle]
            before.next[key] = self._quantize(new, rest, ranges[0], ranges[1], bits, "value", before.token)
        return before.next[key]

    def _read_levels(self, y: Tensor, digit: _Digit) -> None:
        """Let the products that read `y` read the digit instead, and multiply them by its scale of each token."""
        for consumer in [n for n in list(y.outputs) if n.domain != DOMAIN]:
            consumer.inputs[[t is y for t in consumer.inputs].index(True)] = digit.value
            result = consumer.outputs[0]
            if digit.token is None or result.name.endswith("/unscaled"):
                continue
            assert consumer.op in ("MatMul", "Sum"), "per-token ranges stand in front of a MatMul, or a sum of their terms"
            _put_behind(self.graph, consumer, "Mul", "unscaled", digit.token)

    def _scale_once(self, node: Node) -> None:
        """Multiply a sum of products by the scale of each token, instead of every product."""
        makers = [t.inputs[0] for t in node.inputs if t.inputs and len(t.outputs) == 1]
        scaled = [m for m in makers if m.op == "Mul" and m.inputs[0].name.endswith("/unscaled")]
        if len(scaled) != len(node.inputs) or len({id(mul.inputs[1]) for mul in scaled}) != 1:
            return
        scale, name = scaled[0].inputs[1], scaled[0].name  # the layer's own name, for the product behind the sum now
        node.inputs = [mul.inputs[0] for mul in scaled]
        for mul in scaled:
            remove(self.graph, mul)
        _put_behind(self.graph, node, "Mul", "unscaled", scale, name=name)

    # --- weights and biases --------------------------------------------------------------------------------------------

    def _weight(self, node: Node) -> list[Node]:
        """Stored codes, then DequantizeLinear per channel; 4 bits and fewer are stored as int4 and cast. In front of an
        operator with float activations Cast and Mul, which the runtime folds when it loads the file, so that it runs at
        float speed; a DequantizeLinear there is computed at every run, or becomes a kernel of lower accuracy.
        """
        codes, scale = node.inputs
        y, axis, new = node.outputs[0], node.attrs["axis"], _Nodes(node.outputs[0].name)
        stored: Tensor = packed_int4(codes.name, codes.values) if node.attrs["bits"] <= 4 else codes
        if any(reader.op == "Sum" or not _is_quantized(reader.inputs[0]) for reader in y.outputs):
            factor = Constant(scale.name, along(scale.values, axis, len(codes.shape)))
            new("Mul", y, new("Cast", "codes.f32", stored, to=FLOAT), factor)
            return new.made
        if stored is not codes:
            stored = new("Cast", "codes.i8", stored, dtype=np.int8, to=INT8)
        zero_point = Constant(f"{y.name}/zero_point", np.zeros(scale.shape, np.int8))
        new("DequantizeLinear", y, stored, scale, zero_point, axis=axis)
        return new.made

    def _integer_bias(self, conv: Node) -> None:
        """Give a Conv with quantized input and weight an int32 bias of scale s_x * s_w, as its kernel expects."""
        weight = _weight_codes(conv)
        if weight is None or len(conv.inputs) < 3 or not isinstance(conv.inputs[2], Constant) or not _is_static(conv.inputs[0]):
            return
        bias, input_scale = conv.inputs[2].values.astype(np.float64), np.float64(conv.inputs[0].inputs[0].inputs[1].values)
        _widen_dead_channels(weight, np.abs(bias) / (input_scale * 2.0**30))
        step = (input_scale * weight.inputs[1].values.astype(np.float64)).astype(np.float32)
        stored = {"i32": np.rint(bias / step).astype(np.int32), "scale": step, "zero_point": np.zeros(step.shape, np.int32)}
        self._read_stored(conv, 2, "int32-bias", stored, axis=0)

    def _integer_operand(self, node: Node) -> None:
        """Store the constant operand of an integer Add or Mul in 8 bits; its kernel takes no float one."""
        constants = [i for i, t in enumerate(node.inputs) if is_operand(node, t)]
        reader = _only_reader(node.outputs[0])
        if reader is not None and reader.op in ("Relu", "Clip"):
            reader = _only_reader(reader.outputs[0]) or reader
        if len(constants) != 1 or not _is_static(node.inputs[1 - constants[0]]) or reader is None or reader.domain != DOMAIN:
            return
        values = node.inputs[constants[0]].values
        q = from_range(values.min(), values.max(), Scheme(8))
        stored = {"codes": q.quantize(values), "scale": q.scale, "zero_point": q.zero_point}
        self._read_stored(node, constants[0], "operand", stored)

    def _read_stored(self, node: Node, index: int, label: str, stored: Mapping[str, np.ndarray], **attrs: Any) -> None:
        """Let `node` read DequantizeLinear of the stored codes, scale and zero point in place of its input at `index`."""
        new = _Nodes(f"{node.name}/{label}")
        node.inputs[index] = Variable(new.name, dtype=np.dtype(np.float32))
        constants = [Constant(f"{new.name}.{key}", values) for key, values in stored.items()]
        new("DequantizeLinear", node.inputs[index], *constants, **attrs)
        insert_before(self.graph, node, new.made)

    def _split_gemm(self, node: Node) -> None:
        """Write a plain Gemm as MatMul and Sum."""
        assert not node.attrs.get("transB", 0), "prepare() has transposed the weight"
        node.op = "MatMul"
        node.attrs.clear()
        if len(node.inputs) == 3:
            _put_behind(self.graph, node, "Sum", "product", node.inputs.pop())


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
    low, high = clip_bounds(clip)
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
    reader = first = _only_reader(node.outputs[0])
    while reader is not None and reader.op in ("Add", "Sum", "Mul") and reader.outputs[0].outputs:
        if reader.op == "Add" or (reader.op == "Sum" and any(is_load_time(t) for t in reader.inputs)):
            reader.op = "Sum"
            return
        reader = _only_reader(reader.outputs[0])
    if first is not None and first.op == "Add":
        first.op = "Sum"
    elif node.outputs[0].outputs and (first is None or first.op in ("Relu", "Clip")):
        _put_behind(graph, node, "Sum", "product")


def _would_be_quantized(node: Node) -> bool:
    """Whether the runtime would take a float layer between integers, weight per tensor, for one that should be integer."""
    reader = _only_reader(node.outputs[0])
    if reader is not None and reader.op in ("Relu", "Clip"):
        reader = _only_reader(reader.outputs[0])
    is_float = isinstance(node.inputs[1], Constant) and any(n.op == "DequantizeLinear" for n in node.inputs[0].inputs)
    return is_float and reader is not None and reader.op == "QuantizeLinear"


def _put_behind(graph: Graph, node: Node, op: str, suffix: str, *others: Tensor, name: str = "") -> None:
    """Let an operator on what `node` makes, and on `others`, make it in its place; `suffix` names the value before."""
    y = node.outputs[0]
    node.outputs[0] = Variable(f"{y.name}/{suffix}", dtype=y.dtype)
    new = Node(op, name or f"{node.name}/{op}", inputs=[node.outputs[0], *others], outputs=[y])
    insert_after(graph, node, [new])


def _only_reader(tensor: Tensor) -> Node | None:
    return tensor.outputs[0] if len(tensor.outputs) == 1 else None


def _widen_dead_channels(weight: Node, least: np.ndarray) -> None:
    """Raise a channel's scale to `least` where its weights are so small that its bias would not fit into 32 bits: such
    weights are below 2^-30 of the bias, so what they lose is nothing beside it.
    """
    codes, scale = weight.inputs
    wide = np.maximum(scale.values, least.astype(np.float32))
    if np.array_equal(wide, scale.values):
        return
    narrower = along(scale.values.astype(np.float64) / wide, weight.attrs["axis"], len(codes.shape))
    rounded = np.rint(codes.values * narrower).astype(np.int8)
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
