"""Why ONNX Runtime's CPU provider runs a site in float: its rules for integer kernels, one function each.

A rule looks at one operator of the lowered graph and returns a sentence, or None where its condition holds. They are
asked in order, from what makes the others pointless (an operator without an integer kernel) to the finest (a ReLU that
a zero point does not absorb). Measured on ONNX Runtime 1.31.1; every rule has a probe in the tests.

Limits: CPU provider, x86-64; tensors inside control flow are not followed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcomp.graph.edit import Constant
from onnxcomp.graph.kernels import Node
from onnxcomp.graph.types import Tensor

MOVES = frozenset({
    "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that move values and compute none: ONNX Runtime pulls Q and DQ through them."""

SELECTIONS = MOVES | {"ArgMax", "DepthToSpace", "GatherElements", "MaxPool", "ReduceMax", "ReduceMin", "Resize"}
"""Operators whose output is a selection of their input: integers in, integers out, if both share one scale."""

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_STORED = frozenset(
    {"Conv", "Add", "Mul", "Concat", "Where", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool"}
)
"""Operators with an integer kernel that needs a QuantizeLinear behind it."""

_CODE_RANGES = {np.dtype(np.uint8): (0, 255), np.dtype(np.int8): (-128, 127)}


@dataclass(frozen=True)
class Case:
    """One operator of the lowered graph that was meant to run on integers."""

    node: Node
    outputs: frozenset[str]
    """The names of the graph's outputs."""


def explain(case: Case, version: str) -> str:
    """One sentence: the first rule that does not hold, or that ONNX Runtime `version` did not fuse the operator."""
    for rule in RULES:
        reason = rule(case)
        if reason is not None:
            return reason
    return f"ONNX Runtime {version} did not fuse it."


def is_quantized(tensor: Tensor) -> bool:
    """Whether the tensor comes from DequantizeLinear or consists of codes of at most 8 bits."""
    return _codes(tensor) is not None or _code_type(tensor) in _CODE_RANGES


def no_integer_kernel(case: Case) -> str | None:
    """Only some operators have an integer kernel at all; ConvInteger has, but a slow one, and MatMulInteger always."""
    if case.node.op in _PRODUCTS | _STORED | SELECTIONS | {"MatMulInteger", "ConvInteger"}:
        return None
    return f"ONNX Runtime has no integer kernel for {case.node.op}."


def input_not_quantized(case: Case) -> str | None:
    """Every input must come from DequantizeLinear, constants too; a bias is asked separately."""
    for tensor in _operands(case.node):
        if is_quantized(tensor):
            continue
        if not _is_constant(tensor):
            return f"Its input '{tensor.name}' is not quantized."
        # A float weight of a Conv between quantized activations is quantized by ONNX Runtime itself.
        if case.node.op != "Conv":
            kind = "weight" if case.node.op in _PRODUCTS else "constant operand"
            return f"Its {kind} '{tensor.name}' is not quantized."
    return None


def sixteen_bits(case: Case) -> str | None:
    """No kernel computes with 16-bit codes."""
    for tensor in _operands(case.node):
        if _code_type(_codes(tensor)) in (np.dtype(np.int16), np.dtype(np.uint16)):
            kind = "weight" if _is_constant(tensor) else "input"
            return f"Its {kind} has 16-bit codes, for which there is no integer kernel."
    return None


def four_bit_type(case: Case) -> str | None:
    """int4 codes stay integers only behind a Cast to int8, uint4 codes not at all."""
    for tensor in _operands(case.node):
        kind = _code_type(_codes(tensor))
        if kind is None or kind.name not in ("int4", "uint4", "int2", "uint2"):
            continue
        if _is_constant(tensor):
            return f"Its {kind.name} weight goes straight into DequantizeLinear; behind a Cast to int8 it would fuse."
        return f"Its input is quantized to {kind.name}; QuantizeLinear to uint8 and an integer Clip would fuse."
    return None


def half_precision(case: Case) -> str | None:
    """Around float16 scales ONNX Runtime inserts Casts, and nothing fuses."""
    for tensor in _operands(case.node):
        producer = _producer(tensor)
        if producer is not None and producer.op == "DequantizeLinear" and producer.inputs[1].dtype == np.float16:
            return f"The scale of '{tensor.name}' is float16; only float32 scales fuse on the CPU."
    return None


def signed_constant(case: Case) -> str | None:
    """On x86 signed activations are rewritten to unsigned ones, constants are not, and the two must agree."""
    if case.node.op not in ("Add", "Mul"):
        return None
    for tensor in _operands(case.node):
        if _is_constant(tensor) and _code_type(_codes(tensor)) == np.int8:
            return f"Its constant operand '{tensor.name}' is int8; quantized to uint8 it would fuse."
    return None


def scaled_gemm(case: Case) -> str | None:
    """QGemm knows neither alpha nor beta."""
    for key in ("alpha", "beta"):
        value = case.node.attrs.get(key, 1.0)
        if case.node.op == "Gemm" and value != 1.0:
            return f"Its {key} is {value:g}; only a Gemm with alpha and beta 1 fuses."
    return None


def weight_without_zero_point(case: Case) -> str | None:
    """QGemm takes the weight's zero point from its DequantizeLinear."""
    if case.node.op != "Gemm":
        return None
    producer = _producer(case.node.inputs[1])
    if producer is not None and producer.op == "DequantizeLinear" and len(producer.inputs) < 3:
        return "The DequantizeLinear of its weight has no zero point; a Gemm needs one, of the scale's shape."
    return None


def bias_type(case: Case) -> str | None:
    """A quantized bias is int32, and a Gemm with a float bias needs a QuantizeLinear behind it."""
    if case.node.op not in ("Conv", "Gemm") or len(case.node.inputs) < 3 or case.node.inputs[2].is_empty():
        return None
    bias = case.node.inputs[2]
    kind = _code_type(_codes(bias))
    if kind is not None and kind != np.int32:
        return f"Its bias is stored as {kind.name}; only an int32 bias fuses."
    if kind is None and case.node.op == "Gemm" and not _quantizers(case.node.outputs[0]):
        return "Its bias is float and no QuantizeLinear follows; an int32 bias would fuse."
    return None


def bias_add(case: Case) -> str | None:
    """MatMul and the Add of a constant become a Gemm, which is float unless the bias is int32."""
    if case.node.op != "MatMul" or len(case.node.outputs[0].outputs) != 1:
        return None
    add = case.node.outputs[0].outputs[0]
    if add.op != "Add" or not any(isinstance(t, Constant) for t in add.inputs):
        return None
    return "The Add behind it makes it a Gemm with a float bias; Sum in its place, or an int32 bias, would fuse."


def output_not_stored(case: Case) -> str | None:
    """Integer kernels other than MatMul and Gemm write integers: exactly one QuantizeLinear reads their result."""
    if case.node.op not in _STORED:
        return None
    tensor = _tail(case.node)
    between = [case.node.outputs[0], tensor]
    for output in between:
        if output.name in case.outputs:
            return f"Its output '{output.name}' is a graph output, so it is computed in float."
    quantizers = _quantizers(tensor)
    others = [reader for reader in tensor.outputs if reader.op != "QuantizeLinear"]
    if others:
        also = "also " if quantizers else ""
        return f"Its output '{tensor.name}' is {also}read in float by {_label(others[0])}."
    if len(quantizers) > 1:
        return f"Its output '{tensor.name}' is quantized {len(quantizers)} times; one QuantizeLinear must serve all."
    return None


def clip_not_absorbed(case: Case) -> str | None:
    """A ReLU or Clip in front of QuantizeLinear vanishes only if the codes cannot leave its bounds."""
    tensor = _tail(case.node)
    quantizers = _quantizers(tensor)
    if case.node.op not in _STORED or tensor is case.node.outputs[0] or not quantizers:
        return None
    clip, inputs = tensor.inputs[0], quantizers[0].inputs
    scale, zero_point = _scalar(inputs[1]), _scalar(inputs[2]) if len(inputs) > 2 else np.zeros((), np.uint8)
    if zero_point is None or zero_point.dtype not in _CODE_RANGES or (clip.op == "Clip" and scale is None):
        return f"The {clip.op} behind it stays: the range of its QuantizeLinear is not constant."
    (low, high), point = _CODE_RANGES[zero_point.dtype], int(zero_point)
    if clip.op == "Relu" or scale is None:
        if point == low:
            return None
        return f"The Relu behind it stays: the zero point of its QuantizeLinear is {point}, not {low}."
    reach = (low - point) * float(scale), (high - point) * float(scale)
    bounds = _bound(clip, 1, -np.inf), _bound(clip, 2, np.inf)
    if bounds[0] <= reach[0] and reach[1] <= bounds[1]:
        return None
    return (
        f"The Clip to [{bounds[0]:g}, {bounds[1]:g}] behind it stays: "
        f"its QuantizeLinear reaches from {reach[0]:g} to {reach[1]:g}."
    )


def scales_differ(case: Case) -> str | None:
    """A selection of values runs on integers if nothing has to be rescaled."""
    if case.node.op not in SELECTIONS:
        return None
    source, quantizers = _producer(case.node.inputs[0]), _quantizers(case.node.outputs[0])
    if source is None or not quantizers or _parameters(source) == _parameters(quantizers[0]):
        return None
    return "Its input and its output do not share one scale and zero point."


def signed_activations(case: Case) -> str | None:
    """On x86 int8 activations are rewritten to uint8, but not those that two operators read: the types then differ."""
    stored = _quantizers(_tail(case.node))
    kinds = [_code_type(_codes(t)) for t in _operands(case.node) if not _is_constant(t)]
    kinds += [_code_type(q.outputs[0]) for q in stored]
    if case.node.op in _STORED and np.dtype(np.int8) in kinds:
        return "Its activations are int8, which ONNX Runtime rewrites only in part; uint8 ones would fuse."
    return None


Rule = Callable[[Case], str | None]

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


def _codes(tensor: Tensor) -> Tensor | None:
    producer = _producer(tensor)
    return producer.inputs[0] if producer is not None and producer.op == "DequantizeLinear" else None


def _code_type(codes: Tensor | None) -> np.dtype | None:
    """The type of integer codes, from the operators that make or read them; None for what holds no codes."""
    if codes is None:
        return None
    if isinstance(codes, Constant):
        return _type(codes)
    for node in (*codes.inputs, *codes.outputs):
        if node.op in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2:
            wanted = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
            if wanted is codes:
                return _type(node.inputs[2])
    if codes.inputs and codes.inputs[0].op in {"QuantizeLinear", "DynamicQuantizeLinear"}:
        return np.dtype(np.uint8)
    return _type(codes)


def _type(tensor: Tensor) -> np.dtype | None:
    # Where no array type exists, graphsurgeon answers with the number that ONNX gives the type.
    return None if tensor.dtype is None or isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)


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


def _bound(clip: Node, index: int, default: float) -> float:
    """The constant input `index` of a Clip, or `default` where it has none."""
    value = _scalar(clip.inputs[index]) if index < len(clip.inputs) else None
    return default if value is None else float(value)


def _label(node: Node) -> str:
    return f"{node.name} ({node.op})" if node.name else node.op
