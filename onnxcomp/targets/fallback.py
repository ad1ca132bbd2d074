"""Why ONNX Runtime's CPU provider runs a site in float: its rules for integer kernels, one function each.

A rule looks at one operator of the lowered graph and yields a sentence for each way in which it is broken. They are
asked in order, from what makes the others pointless (an operator without an integer kernel) to the finest (a ReLU that
a zero point does not absorb). Measured on ONNX Runtime 1.31.1; every rule has a probe in the tests.

Limits: CPU provider, x86-64; tensors inside control flow are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from onnxcomp.graph.edit import Constant, Node, Tensor
from onnxcomp.graph.fold import input_at
from onnxcomp.targets.regions import clip_bounds

MOVES = frozenset({
    "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that move values and compute none: ONNX Runtime pulls Q and DQ through them."""

SELECTIONS = MOVES | {"ArgMax", "DepthToSpace", "GatherElements", "MaxPool", "ReduceMax", "ReduceMin", "Resize"}
"""Operators whose output is a selection of their input: integers in, integers out, if both share one scale."""

_PRODUCTS = frozenset({"MatMul", "Gemm"})
STORED = frozenset({
    "Conv", "Add", "Mul", "Concat", "Where", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool",
})  # fmt: skip
"""Operators with an integer kernel that needs a QuantizeLinear behind it."""


@dataclass(frozen=True)
class Case:
    """One operator of the lowered graph that was meant to run on integers."""

    node: Node
    outputs: frozenset[str]
    """The names of the graph's outputs."""


def explain(case: Case, version: str) -> str:
    """One sentence: the first rule that does not hold, or that ONNX Runtime `version` did not fuse the operator."""
    reasons = (reason for rule in RULES for reason in rule(case))
    return next(reasons, f"ONNX Runtime {version} did not fuse it.")


def is_quantized(tensor: Tensor) -> bool:
    """Whether the tensor comes from DequantizeLinear or consists of codes of at most 8 bits."""
    return _dequantizer(tensor) is not None or _code_type(tensor) in (np.uint8, np.int8)


def no_integer_kernel(case: Case) -> Iterator[str]:
    """Only some operators have an integer kernel at all; ConvInteger has, but a slow one, and MatMulInteger always."""
    if case.node.op not in _PRODUCTS | STORED | SELECTIONS | {"MatMulInteger", "ConvInteger"}:
        yield f"ONNX Runtime has no integer kernel for {case.node.op}."


def input_not_quantized(case: Case) -> Iterator[str]:
    """Every input must come from DequantizeLinear, constants too; a bias is asked separately."""
    for tensor in _operands(case.node):
        # A float weight of a Conv between quantized activations is quantized by ONNX Runtime itself.
        if not is_quantized(tensor) and not (case.node.op == "Conv" and _is_constant(tensor)):
            yield f"Its {_role(case.node, tensor)} '{tensor.name}' is not quantized."


def sixteen_bits(case: Case) -> Iterator[str]:
    """No kernel computes with 16-bit codes."""
    for tensor, kind in _code_types(case.node):
        if kind in ("int16", "uint16"):
            yield f"Its {_role(case.node, tensor)} has 16-bit codes, for which there is no integer kernel."


def four_bit_type(case: Case) -> Iterator[str]:
    """int4 codes stay integers only behind a Cast to int8, uint4 codes not at all."""
    for tensor, kind in _code_types(case.node):
        if kind in ("int4", "uint4", "int2", "uint2") and _is_constant(tensor):
            yield f"Its {kind} weight goes straight into DequantizeLinear; behind a Cast to int8 it would fuse."
        elif kind in ("int4", "uint4", "int2", "uint2"):
            yield f"Its input is quantized to {kind}; QuantizeLinear to uint8 and an integer Clip would fuse."


def half_precision(case: Case) -> Iterator[str]:
    """Around float16 scales ONNX Runtime inserts Casts, and nothing fuses."""
    for tensor in _operands(case.node):
        source = _dequantizer(tensor)
        if source is not None and source.inputs[1].dtype == np.float16:
            yield f"The scale of '{tensor.name}' is float16; only float32 scales fuse on the CPU."


def signed_constant(case: Case) -> Iterator[str]:
    """On x86 signed activations are rewritten to unsigned ones, constants are not, and the two must agree."""
    for tensor, kind in _code_types(case.node):
        if case.node.op in ("Add", "Mul") and kind == "int8" and _is_constant(tensor):
            yield f"Its constant operand '{tensor.name}' is int8; quantized to uint8 it would fuse."


def scaled_gemm(case: Case) -> Iterator[str]:
    """QGemm knows neither alpha nor beta."""
    for key in ("alpha", "beta"):
        value = case.node.attrs.get(key, 1.0)
        if case.node.op == "Gemm" and value != 1.0:
            yield f"Its {key} is {value:g}; only a Gemm with alpha and beta 1 fuses."


def weight_without_zero_point(case: Case) -> Iterator[str]:
    """QGemm takes the weight's zero point from its DequantizeLinear."""
    source = _dequantizer(case.node.inputs[1]) if case.node.op == "Gemm" else None
    if source is not None and len(source.inputs) < 3:
        yield "The DequantizeLinear of its weight has no zero point; a Gemm needs one, of the scale's shape."


def bias_type(case: Case) -> Iterator[str]:
    """A quantized bias is int32, and a Gemm with a float bias needs a QuantizeLinear behind it."""
    bias = input_at(case.node, 2) if case.node.op in ("Conv", "Gemm") else None
    kind = None if bias is None else _code_type(_codes(bias))
    if kind is not None and kind != np.int32:
        yield f"Its bias is stored as {kind.name}; only an int32 bias fuses."
    if bias is not None and kind is None and case.node.op == "Gemm" and not _quantizers(case.node.outputs[0]):
        yield "Its bias is float and no QuantizeLinear follows; an int32 bias would fuse."


def bias_add(case: Case) -> Iterator[str]:
    """MatMul and the Add of a constant become a Gemm, which is float unless the bias is int32."""
    readers = case.node.outputs[0].outputs
    is_pair = case.node.op == "MatMul" and [reader.op for reader in readers] == ["Add"]
    if is_pair and any(isinstance(tensor, Constant) for tensor in readers[0].inputs):
        yield "The Add behind it makes it a Gemm with a float bias; Sum in its place, or an int32 bias, would fuse."


def output_not_stored(case: Case) -> Iterator[str]:
    """Integer kernels other than MatMul and Gemm write integers: exactly one QuantizeLinear reads their result."""
    if case.node.op not in STORED:
        return
    tensor = _tail(case.node)
    for output in (case.node.outputs[0], tensor):
        if output.name in case.outputs:
            yield f"Its output '{output.name}' is a graph output, so it is computed in float."
    quantizers = _quantizers(tensor)
    for reader in tensor.outputs:
        if reader.op != "QuantizeLinear":
            also = "also " if quantizers else ""
            yield f"Its output '{tensor.name}' is {also}read in float by {_label(reader)}."
    if len(quantizers) > 1:
        yield f"Its output '{tensor.name}' is quantized {len(quantizers)} times; one QuantizeLinear must serve all."


def clip_not_absorbed(case: Case) -> Iterator[str]:
    """A ReLU or Clip in front of QuantizeLinear vanishes only if the codes cannot leave its bounds."""
    tensor = _tail(case.node)
    quantizers = _quantizers(tensor)
    if case.node.op not in STORED or tensor is case.node.outputs[0] or not quantizers:
        return
    clip, inputs = tensor.inputs[0], quantizers[0].inputs
    scale, zero_point = _scalar(inputs[1]), _scalar(inputs[2]) if len(inputs) > 2 else np.zeros((), np.uint8)
    if zero_point is None or zero_point.dtype not in (np.uint8, np.int8) or (clip.op == "Clip" and scale is None):
        yield f"The {clip.op} behind it stays: the range of its QuantizeLinear is not constant."
        return
    least, most, point = np.iinfo(zero_point.dtype).min, np.iinfo(zero_point.dtype).max, int(zero_point)
    if clip.op == "Relu" and point != least:
        yield f"The Relu behind it stays: the zero point of its QuantizeLinear is {point}, not {least}."
    if clip.op == "Clip" and scale is not None:
        low, high = (least - point) * float(scale), (most - point) * float(scale)
        bounds = [open_end if b is None else b for b, open_end in zip(clip_bounds(clip), (-np.inf, np.inf), strict=True)]
        if low < bounds[0] or bounds[1] < high:
            limits = f"[{bounds[0]:g}, {bounds[1]:g}]"
            yield f"The Clip to {limits} behind it stays: its QuantizeLinear reaches from {low:g} to {high:g}."


def scales_differ(case: Case) -> Iterator[str]:
    """A selection of values runs on integers if nothing has to be rescaled."""
    source, quantizers = _producer(case.node.inputs[0]), _quantizers(case.node.outputs[0])
    if case.node.op not in SELECTIONS or source is None or not quantizers:
        return
    if _parameters(source) != _parameters(quantizers[0]):
        yield "Its input and its output do not share one scale and zero point."


def signed_activations(case: Case) -> Iterator[str]:
    """On x86 int8 activations are rewritten to uint8, but not those that two operators read: the types then differ."""
    kinds = [_code_type(_codes(t)) for t in _operands(case.node) if not _is_constant(t)]
    kinds += [_code_type(quantizer.outputs[0]) for quantizer in _quantizers(_tail(case.node))]
    if case.node.op in STORED and np.dtype(np.int8) in kinds:
        yield "Its activations are int8, which ONNX Runtime rewrites only in part; uint8 ones would fuse."


Rule = Callable[[Case], Iterator[str]]

RULES: tuple[Rule, ...] = (
    no_integer_kernel,
    input_not_quantized,
    sixteen_bits,
    four_bit_type,
    half_precision,
    signed_constant,
    scaled_gemm,
    weight_without_zero_point,
    bias_type,
    bias_add,
    output_not_stored,
    clip_not_absorbed,
    scales_differ,
    signed_activations,
)


def _operands(node: Node) -> list[Tensor]:
    """The inputs that carry activations and weights: two for a product or Conv, all for a join, one for a selection."""
    inputs = node.inputs
    if node.op in SELECTIONS:
        inputs = inputs[:1]
    elif node.op in _PRODUCTS | {"Conv", "ConvInteger", "MatMulInteger"}:
        inputs = inputs[:2]
    return [tensor for tensor in inputs if not tensor.is_empty()]


def _role(node: Node, tensor: Tensor) -> str:
    if not _is_constant(tensor):
        return "input"
    return "weight" if node.op in _PRODUCTS | {"Conv"} else "constant operand"


def _parameters(node: Node) -> list[str]:
    """The names of the scale and zero point of a QuantizeLinear or DequantizeLinear."""
    return [tensor.name for tensor in node.inputs[1:]]


def _producer(tensor: Tensor) -> Node | None:
    """The operator that computes the tensor, moves of it left aside."""
    node = tensor.inputs[0] if tensor.inputs else None
    while node is not None and node.op in MOVES:
        node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    return node


def _is_constant(tensor: Tensor) -> bool:
    """Whether the tensor is a constant, or one that was dequantized, cast or moved."""
    while tensor.inputs and tensor.inputs[0].op in MOVES | {"DequantizeLinear", "Cast"}:
        tensor = tensor.inputs[0].inputs[0]
    return isinstance(tensor, Constant)


def _dequantizer(tensor: Tensor) -> Node | None:
    """The DequantizeLinear that the tensor comes from, moves of it left aside."""
    producer = _producer(tensor)
    return producer if producer is not None and producer.op == "DequantizeLinear" else None


def _codes(tensor: Tensor) -> Tensor | None:
    source = _dequantizer(tensor)
    return None if source is None else source.inputs[0]


def _code_types(node: Node) -> list[tuple[Tensor, str]]:
    """The operands that come from codes, and the names of the codes' types."""
    found = [(tensor, _code_type(_codes(tensor))) for tensor in _operands(node)]
    return [(tensor, kind.name) for tensor, kind in found if kind is not None]


def _code_type(codes: Tensor | None) -> np.dtype | None:
    """The type of integer codes, from the operators that make or read them; None for what holds no codes."""
    if codes is None or isinstance(codes, Constant):
        return _type(codes)
    makers = [node for node in codes.inputs if node.op == "QuantizeLinear"]
    readers = [node for node in codes.outputs if node.op == "DequantizeLinear" and node.inputs[0] is codes]
    for node in (*makers, *readers):
        if len(node.inputs) > 2:
            return _type(node.inputs[2])
    if makers or any(node.op == "DynamicQuantizeLinear" for node in codes.inputs):
        return np.dtype(np.uint8)
    return _type(codes)


def _type(tensor: Tensor | None) -> np.dtype | None:
    # Where no array type exists, graphsurgeon answers with the number that ONNX gives the type.
    return None if tensor is None or tensor.dtype is None or isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)


def _tail(node: Node) -> Tensor:
    """The operator's output, or that of the ReLU or Clip which alone reads it."""
    tensor = node.outputs[0]
    if len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Relu", "Clip"):
        return tensor.outputs[0].outputs[0]
    return tensor


def _quantizers(tensor: Tensor) -> list[Node]:
    return [reader for reader in tensor.outputs if reader.op == "QuantizeLinear"]


def _scalar(tensor: Tensor) -> np.ndarray | None:
    """The value of a constant with one element, without axes."""
    if not isinstance(tensor, Constant) or np.size(tensor.values) != 1:
        return None
    return np.asarray(tensor.values).reshape(())


def _label(node: Node) -> str:
    return f"{node.name} ({node.op})" if node.name else node.op
