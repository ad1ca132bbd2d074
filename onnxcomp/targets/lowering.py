"""The lowering: abstract quantizers become standard operators, in the encoding that a target asks for.

    activation   x -> QuantizeLinear -> Clip of the codes -> DequantizeLinear         (no Clip at 8 bits, or one of the values)
    weight       int4 initializer -> Cast(int8) -> DequantizeLinear                   (int8 initializer above 4 bits)
                 float initializer -> QuantizeLinear -> DequantizeLinear              (of products cut into heads, where asked)
                 2, 3, 5, 6 bits: bytes -> Cast -> Gather(table) (-> Add) -> Reshape  (computed when the file is loaded)
                 in blocks, and tables: see `nbits`
    MatMul, Gemm -> MatMul with float output, bias by Sum
    Conv         -> int32 bias, or the float one
    further term -> Sub(x, DequantizeLinear's output) -> Q with a step of its own, once for all who read it

Signed codes are the unsigned ones less 2^(b - 1), so they stand for the same values. Where every zero point must be in the
middle, a quantizer that a method has made without that gets the step that reaches as far as its longer side did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcomp.graph.convert import packed_int4
from onnxcomp.graph.edit import DOMAIN, Constant, Graph, Node, Nodes, Tensor, Variable, insert_before, remove
from onnxcomp.numerics.affine import QParams, Scheme, along, coarsened, from_range
from onnxcomp.numerics.planes import pack, planes, table
from onnxcomp.targets import nbits
from onnxcomp.targets.base import Encoding
from onnxcomp.targets.filling import fill_channels, weight_codes
from onnxcomp.targets.regions import is_operand
from onnxcomp.targets.rules import is_cut_into_heads, maker
from onnxcomp.targets.settle import only_reader, put_behind, tail

TINY = np.float32(1e-12)
"""Floor of a range measured at run time, so that an all-zero tensor does not divide by zero."""
OPERANDS = (
    "Add", "Concat", "ConvTranspose", "Div", "Expand", "InstanceNormalization", "LayerNormalization", "Max", "Mul", "PRelu",
    "Pow", "Sub", "Sum", "Where",
)  # fmt: skip
"""Operators whose constants are codes where every operator reads codes."""
FLOAT, INT8, INT32 = 1, 3, 6
"""ONNX's numbers of element types."""


def lower(graph: Graph, encoding: Encoding) -> None:
    """Write the abstract quantizers of `graph` as standard operators, in place."""
    _Lowering(graph, encoding).run()


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
    encoding: Encoding
    shared: dict[str, Constant] = field(default_factory=dict)
    digits: dict[str, _Digit] = field(default_factory=dict)
    """The lowered quantizers by the name of their abstract output."""
    filled: dict[str, list[int]] = field(default_factory=dict)
    """How codes are filled up, by the name of the quantizer's output."""

    def run(self) -> None:
        if self.encoding.depthwise > 1:
            fill_channels(self.graph, self.encoding.depthwise)
        for node in list(self.graph.nodes):
            if node.op == "Conv" or (node.op == "Gemm" and self._is_closed):
                self._integer_bias(node)
            if node.op in ("Add", "Mul") and not self._is_closed:
                self._integer_operand(node)
            if node.op in OPERANDS and self._is_closed:
                self._integer_constants(node)
            if node.op == "Gather" and self._is_closed:
                self._integer_table(node)
            if node.op == "Gemm" and _is_stored(node.inputs[1]) and not self._is_closed:
                self._split_gemm(node)
            if node.op == "Conv" and self.encoding.channels > 1:
                self._fill_channels(node)
        results = {id(t) for t in self.graph.outputs}
        for node in [n for n in self.graph.nodes if n.domain == DOMAIN]:
            if node.outputs[0].outputs or id(node.outputs[0]) in results:  # else the runtime would compute it all the same
                insert_before(self.graph, node, self._weight(node) if node.op == "Dequantize" else self._activation(node))
            remove(self.graph, node)
        for node in [n for n in self.graph.nodes if n.op == "Sum"]:
            self._scale_once(node)

    @property
    def _is_closed(self) -> bool:
        """Whether every operator reads and makes codes, constants included."""
        return self.encoding.where == "units"

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
        new, scheme = Nodes(y.name), self._scheme(bits)
        middle = self._constant(f"onnxcomp/middle.{self._kind(bits)}", scheme.midpoint, scheme.dtype)
        if granularity == "static":
            new.name = node.name.rpartition("/fakequantize")[0] or y.name  # the edit's own name, which a tensor's may follow
            scale, zero_point = self._stored(node, 1)
            digit = self._quantize(new, x, scale, zero_point, bits, y)
        elif granularity == "residual":
            digit = self._residual(new, node, middle)
        elif granularity == "token":
            scale, one = self._measured_scale(new, node), self._constant("onnxcomp/one", 1.0, np.float32)
            unit, levels = new("Div", "unit", x, scale), Variable(f"{y.name}/levels", dtype=np.dtype(np.float32))
            new.name = levels.name
            digit = self._quantize(new, unit, one, middle, bits, levels, scale)
        elif bits != 8 or node.attrs["ratio"] != 1 or self.encoding.signed:
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
        self, new: Nodes, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, y: str | Tensor, token: Tensor | None = None
    ) -> _Digit:
        """Q, DQ, and below 8 bits a Clip of the codes or of the values."""
        kind, scheme, clipped = self._kind(bits), self._scheme(bits), x
        ends = scheme.qmin, scheme.qmax
        if bits < 8 and self.encoding.clip == "values":
            assert isinstance(scale, Constant), "the bounds of values are known before they are"
            assert isinstance(zero_point, Constant), "so is their zero"
            if self._is_closed:  # the Clip is a unit like any other
                wide = Nodes(f"{new.name}/wide", new.made)
                codes = wide("QuantizeLinear", "codes", x, scale, zero_point, dtype=scheme.dtype)
                clipped = wide("DequantizeLinear", "value", codes, scale, zero_point)
            span = {f"{new.name}/{n}": scale.values * (end - int(zero_point.values)) for n, end in zip("ab", ends, strict=True)}
            clipped = new("Clip", "clipped", clipped, *(self._constant(name, end, np.float32) for name, end in span.items()))
        codes = new("QuantizeLinear", "codes", clipped, scale, zero_point, dtype=scheme.dtype)
        if bits < 8 and self.encoding.clip == "codes":
            names = (f"onnxcomp/min.{kind}" if scheme.qmin else "onnxcomp/zero.u8", f"onnxcomp/max.{kind}")
            bounds = [self._constant(*pair, scheme.dtype) for pair in zip(names, ends, strict=True)]
            codes = new("Clip", f"codes.{kind}", codes, *bounds, dtype=scheme.dtype)
        if isinstance(y, Variable) and y.name in self.filled:
            pads = Constant(f"{new.name}/pads", np.array(self.filled[y.name], np.int64))
            codes = new("Pad", "codes.filled", codes, pads, zero_point, dtype=scheme.dtype)
        return _Digit(x, new("DequantizeLinear", y, codes, scale, zero_point), scale, token)

    def _kind(self, bits: int) -> str:
        """Codes in names: `u4`, or `i4` where they are signed."""
        return f"{'i' if self.encoding.signed else 'u'}{bits}"

    def _scheme(self, bits: int) -> Scheme:
        """Activation codes of so many bits as they are written down."""
        return Scheme(bits, self.encoding.signed)

    def _stored(self, node: Node, first: int) -> tuple[Tensor, Tensor]:
        """The static scale and zero point of an abstract quantizer, inputs from the `first` on, as they are stored."""
        bits, (scale, zero) = node.attrs["bits"], node.inputs[first : first + 2]
        half, signed, code = 2 ** (bits - 1), self.encoding.signed, int(zero.values)
        if self.encoding.symmetric and code != half:
            reach = np.float32(max(code, 2 * half - 1 - code) / (half - 1))
            scale, code = self._constant(scale.name, scale.values * reach, np.float32), half
        return scale, self._constant(zero.name, code - half if signed else code, self._scheme(bits).dtype)

    def _measured_scale(self, new: Nodes, node: Node) -> Tensor:
        """Scale = max(ratio * max|x| / qmax, tiny), over the last axis or over everything."""
        per_token = node.attrs["granularity"] == "token"
        axes = [self._constant("onnxcomp/last-axis", [-1], np.int64)] if per_token else []
        factor = Constant(f"{new.name}/factor", np.array(node.attrs["ratio"] / (2 ** (node.attrs["bits"] - 1) - 1), np.float32))
        largest = new("ReduceMax", "max", new("Abs", "abs", node.inputs[0]), *axes, keepdims=int(per_token))
        unfloored = new("Mul", "unfloored", largest, factor)
        return new("Max", "scale", unfloored, self._constant("onnxcomp/tiny", TINY, np.float32))

    def _residual(self, new: Nodes, node: Node, middle: Constant) -> _Digit:
        """What the quantizer that makes the second input has left of the first, with a step finer by the factor `finer`, or
        a static range of its own. Readers with one step share it.
        """
        before, bits, finer, ranges = self.digits[node.inputs[1].name], node.attrs["bits"], node.attrs["finer"], node.inputs[2:]
        ranges = self._stored(node, 2) if ranges else ()
        key = tuple(float(t.values) for t in ranges) or (finer, float(bits))
        if key not in before.next:
            rest = new("Sub", "rest", before.source, before.value)
            if not ranges and isinstance(before.scale, Constant):
                ranges = (self._constant(f"{new.name}/scale", before.scale.values * np.float32(finer), np.float32), middle)
            if not ranges:
                ranges = new("Mul", "scale", before.scale, Constant(f"{new.name}/finer", np.array(finer, np.float32))), middle
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
            put_behind(self.graph, consumer, "Mul", "unscaled", digit.token)

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
        put_behind(self.graph, node, "Mul", "unscaled", scale, name=name)

    # --- weights and biases --------------------------------------------------------------------------------------------

    def _weight(self, node: Node) -> list[Node]:
        """Stored codes, then DequantizeLinear per channel; 4 bits and fewer are stored as int4, which ONNX Runtime wants cast.
        In front of an operator with float activations it gets Cast and Mul, which it folds when it loads the file, so that it
        runs at float speed; a DequantizeLinear there is computed at every run, or becomes a kernel of lower accuracy.
        """
        if "block" in node.attrs:
            return nbits.lower(self.graph, node, self.encoding, self._looked_up)
        codes, scale = node.inputs
        y, axis, new, zero = node.outputs[0], node.attrs["axis"], Nodes(node.outputs[0].name), np.zeros(scale.shape, np.int8)
        bits, width = node.attrs["bits"], nbits.stored_bits(node.attrs["bits"], codes.values.size, self.encoding)
        is_native = width == 4 and self.encoding.packed == "native"
        stored = codes if width != 4 else packed_int4(codes.name, codes.values)
        if width not in (4, 8):
            stored = self._looked_up(new, codes, bits)
        floats = [r for r in y.outputs if r.op == "Sum" or maker(r.inputs[0]) not in ("FakeQuantize", "DequantizeLinear")]
        floats = list(y.outputs) if node.attrs.get("float") else floats
        if floats and (self.encoding.fused or self.encoding.tables):
            is_all = len(floats) == len(y.outputs)
            value = y if is_all else Variable(f"{y.name}/float", dtype=np.dtype(np.float32))
            for reader in floats:
                reader.inputs[next(i for i, t in enumerate(reader.inputs) if t is y)] = value
            factor = Constant(scale.name if is_all else f"{scale.name}.float", along(scale.values, axis, len(codes.shape)))
            scaled = Nodes(value.name, new.made)
            scaled("Mul", value, scaled("Cast", "codes.f32", stored, to=FLOAT), factor)
            if is_all:
                return new.made
        if width == 4 and not is_native:
            stored = new("Cast", "codes.i8", stored, dtype=np.int8, to=INT8)
        zero_point = packed_int4(f"{y.name}/zero_point", zero) if is_native else Constant(f"{y.name}/zero_point", zero)
        if self.encoding.heads == "float" and any(r.op == "MatMul" and is_cut_into_heads(r.outputs[0]) for r in y.outputs):
            values = Constant(f"{y.name}/values", codes.values * along(scale.values, axis, len(codes.shape)))
            stored = new("QuantizeLinear", "codes", values, scale, zero_point, dtype=np.int8, axis=axis)
        new("DequantizeLinear", y, stored, scale, zero_point, axis=axis)
        return new.made

    def _looked_up(self, new: Nodes, codes: Tensor, bits: int, ids: Tensor | None = None) -> Tensor:
        """Codes of a width that has no type, in planes of bits that tables turn into codes; see `numerics.planes`. `ids`: of
        these rows alone.
        """
        total, name, lengths = None, new.name, codes.shape if ids is None else (*[0] * len(ids.shape), *codes.shape[1:])
        for w, shift in planes(bits):
            new.name, packed = f"{name}/bits{shift}", pack(codes.values, (w, shift))
            packed = packed if ids is None else packed.reshape(len(codes.values), -1, *packed.shape[1:])
            stored = Constant(f"{codes.name}.bits{shift}", packed)
            if ids is not None:
                stored = nbits.rows(new, "bytes", stored, ids)
            meaning = self._constant(f"onnxcomp/plane.{bits}.{shift}", table(bits, (w, shift)), np.int8)
            part = new("Gather", "plane", meaning, new("Cast", "i32", stored, dtype=np.int32, to=INT32), dtype=np.int8)
            total = part if total is None else new("Add", "total", total, part, dtype=np.int8)
        assert total is not None
        new.name, shape = name, "onnxcomp/shape." + "x".join(map(str, lengths))
        return new("Reshape", "codes.i8", total, self._constant(shape, lengths, np.int64), dtype=np.int8)

    def _fill_channels(self, conv: Node) -> None:
        """Fill the channels of a Conv's static input up with its zero, and those of its weight with 0."""
        weight, x = weight_codes(conv), conv.inputs[0]
        if weight is None or not _is_static(x) or len(x.outputs) != 1 or len(weight.outputs[0].outputs) != 1:
            return
        codes = weight.inputs[0].values
        lacking = -codes.shape[1] % self.encoding.channels
        if not lacking or conv.attrs.get("group", 1) != 1 or codes.shape[1] != 3:
            return
        widths = [(0, lacking if axis == 1 else 0) for axis in range(codes.ndim)]
        weight.inputs[0] = Constant(weight.inputs[0].name, np.pad(codes, widths))
        self.filled[x.name] = [width for pair in zip(*widths, strict=True) for width in pair]
        x.shape = weight.outputs[0].shape = None

    def _integer_bias(self, conv: Node) -> None:
        """Give a Conv with quantized input and weight an int32 bias of scale s_x * s_w, as its kernel expects. Where the bias
        stays float, ONNX Runtime does that when it loads the file, and must find scales that 32 bits are enough for.
        """
        weight = weight_codes(conv)
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        if weight is None or weight.attrs.get("float") or not isinstance(bias, Constant) or not _is_static(conv.inputs[0]):
            return
        bias, input_scale = bias.values.astype(np.float64), np.float64(conv.inputs[0].inputs[0].inputs[1].values)
        (codes, scale), least = weight.inputs, np.abs(bias) / (input_scale * 2.0**30)
        if (scale.values < least.astype(np.float32)).any():  # weights that are nothing beside the bias
            coarse = coarsened(codes.values, scale.values, least, weight.attrs["axis"])
            weight.inputs[0], weight.inputs[1] = Constant(codes.name, coarse[0]), Constant(scale.name, coarse[1])
        if self.encoding.bias == "float":
            return
        self._store_bias(conv, bias, input_scale * weight.inputs[1].values.astype(np.float64), axis=0)

    def _store_bias(self, node: Node, bias: np.ndarray, step: np.ndarray, **attrs: int) -> None:
        step = step.astype(np.float32)
        stored = {"i32": np.rint(bias / step).astype(np.int32), "scale": step, "zero_point": np.zeros(step.shape, np.int32)}
        self._read_stored(node, 2, "int32-bias", stored, **attrs)

    def _integer_operand(self, node: Node) -> None:
        """Store the constant operand of an integer Add or Mul; its kernel takes no float one."""
        constants = [i for i, t in enumerate(node.inputs) if is_operand(node, t)]
        reader = only_reader(tail(node))
        if len(constants) != 1 or not _is_static(node.inputs[1 - constants[0]]) or reader is None or reader.domain != DOMAIN:
            return
        self._store(node, constants[0], node.inputs[constants[0]].values)

    def _integer_constants(self, node: Node) -> None:
        """Store every float constant that the node reads; a third one that is a bias in 32 bits, as it must be."""
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, Constant) or tensor.dtype != np.float32 or 0 in tensor.shape:
                continue
            if node.op in ("ConvTranspose", "InstanceNormalization") and index == 2 and _is_static(node.inputs[0]):
                scales = (node.inputs[0].inputs[0].inputs[1].values, node.inputs[1].inputs[0].inputs[1].values)
                self._store_bias(node, tensor.values, np.asarray(np.prod(scales, dtype=np.float64)))
            else:
                self._store(node, index, tensor.values)

    def _integer_table(self, node: Node) -> None:
        """Store the table that the node picks from in the codes of what it makes, which are moved then."""
        table, made = node.inputs[0], [t for n in node.outputs[0].outputs for t in n.outputs]
        if isinstance(table, Constant) and table.dtype == np.float32 and len(made) == 1 and _is_static(made[0]):
            quantize = made[0].inputs[0]
            scale, zero = (t.values for t in self._stored(quantize, 1))
            codes = QParams(self._scheme(quantize.attrs["bits"]), scale, zero).quantize(table.values)
            self._read_stored(node, 0, "table", {"codes": codes, "scale": scale, "zero_point": zero})

    def _store(self, node: Node, index: int, values: np.ndarray) -> None:
        """In 8 bits, or beside wider codes in as many; a norm takes 8 bits in any case."""
        around = [*node.inputs, *(t for made in node.outputs for n in made.outputs for t in n.outputs)]
        beside = [t.inputs[0].attrs["bits"] for t in around if _is_static(t)] if "Norm" not in node.op else []
        q = from_range(values.min(), values.max(), Scheme(max([8, *beside]), self.encoding.signed, self.encoding.symmetric))
        stored = {"codes": q.quantize(values), "scale": q.scale, "zero_point": q.zero_point}
        self._read_stored(node, index, f"operand-{index}" if self._is_closed else "operand", stored)

    def _read_stored(self, node: Node, index: int, label: str, stored: Mapping[str, np.ndarray], **attrs: Any) -> None:
        """Let `node` read DequantizeLinear of the stored codes, scale and zero point in place of its input at `index`."""
        new = Nodes(f"{node.name}/{label}")
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
            put_behind(self.graph, node, "Sum" if self.encoding.fused else "Add", "product", node.inputs.pop())


def _is_stored(weight: Tensor) -> bool:
    """Whether the weight is made of codes, or a sum of such terms."""
    makers = [node for node in weight.inputs if node.op in ("Dequantize", "Sum")]
    return any(node.domain == DOMAIN or all(map(_is_stored, node.inputs)) for node in makers)


def _is_static(tensor: Tensor) -> bool:
    """Whether a static abstract quantizer makes `tensor`."""
    return len(tensor.inputs) == 1 and tensor.inputs[0].attrs.get("granularity") == "static"
