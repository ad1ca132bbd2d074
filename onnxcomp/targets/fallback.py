"""Why ONNX Runtime's CPU provider runs a site in float: its rules for integer kernels.

Each rule looks at one operator of the lowered graph and is one sentence. They are asked in order, from what makes the
others pointless (an operator without an integer kernel) to the finest (a ReLU that a zero point does not absorb).
Measured on ONNX Runtime 1.31.1; every sentence has a probe in the tests.

Limits: CPU provider, x86-64; tensors inside control flow are not followed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

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

STORED = frozenset({
    "Conv", "Add", "Mul", "Concat", "Where", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool",
})  # fmt: skip
"""Operators with an integer kernel that needs a QuantizeLinear behind it."""

_PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger")


@dataclass(frozen=True)
class Case:
    """One operator of the lowered graph that was meant to run on integers."""

    node: Node
    outputs: frozenset[str]
    """The names of the graph's outputs."""


def explain(case: Case, version: str) -> str:
    """One sentence: the first rule that does not hold, or that ONNX Runtime `version` did not fuse the operator."""
    reasons = chain(_ask_inputs(case.node), _ask_product(case.node), _ask_output(case))
    return next(reasons, f"ONNX Runtime {version} did not fuse it.")


def is_quantized(tensor: Tensor) -> bool:
    """Whether the tensor comes from DequantizeLinear or consists of codes of at most 8 bits."""
    return _dequantizer(tensor) is not None or _type(tensor) in ("int8", "uint8")


def _ask_inputs(node: Node) -> Iterator[str]:
    """ConvInteger has an integer kernel, but a slow one, and MatMulInteger always runs on one."""
    if node.op not in {*_PRODUCTS, *STORED, *SELECTIONS}:
        yield f"ONNX Runtime has no integer kernel for {node.op}."
    for tensor in _operands(node):
        source, codes, is_constant = _dequantizer(tensor), _codes(tensor), _is_constant(tensor)
        role = "input" if not is_constant else "weight" if node.op in _PRODUCTS else "constant operand"
        # A float weight of a Conv between quantized activations is quantized by ONNX Runtime itself.
        if not is_quantized(tensor) and not (node.op == "Conv" and is_constant):
            yield f"Its {role} '{tensor.name}' is not quantized."
        if codes in ("int16", "uint16"):
            yield f"Its {role} has 16-bit codes, for which there is no integer kernel."
        if codes in ("int4", "uint4", "int2", "uint2") and is_constant:
            yield f"Its {codes} weight goes straight into DequantizeLinear; behind a Cast to int8 it would fuse."
        elif codes in ("int4", "uint4", "int2", "uint2"):
            yield f"Its input is quantized to {codes}; QuantizeLinear to uint8 and an integer Clip would fuse."
        # ONNX Runtime puts Casts around float16 scales.
        if source is not None and source.inputs[1].dtype == np.float16:
            yield f"The scale of '{tensor.name}' is float16; only float32 scales fuse on the CPU."
        # On x86 signed activations are rewritten to unsigned ones, constants are not, and the two must agree.
        if node.op in ("Add", "Mul") and codes == "int8" and is_constant:
            yield f"Its constant operand '{tensor.name}' is int8; quantized to uint8 it would fuse."


def _ask_product(node: Node) -> Iterator[str]:
    """QGemm knows neither alpha nor beta, and takes the weight's zero point from its DequantizeLinear."""
    for key in ("alpha", "beta"):
        if node.op == "Gemm" and node.attrs.get(key, 1.0) != 1.0:
            yield f"Its {key} is {node.attrs[key]:g}; only a Gemm with alpha and beta 1 fuses."
    source, bias = _dequantizer(node.inputs[1]) if node.op == "Gemm" else None, input_at(node, 2)
    if source is not None and len(source.inputs) < 3:
        yield "The DequantizeLinear of its weight has no zero point; a Gemm needs one, of the scale's shape."
    if node.op in ("Conv", "Gemm") and bias is not None and _codes(bias) not in ("int32", ""):
        yield f"Its bias is stored as {_codes(bias)}; only an int32 bias fuses."
    if node.op == "Gemm" and bias is not None and _codes(bias) == "" and not _quantizers(node.outputs[0]):
        yield "Its bias is float and no QuantizeLinear follows; an int32 bias would fuse."
    readers = node.outputs[0].outputs if node.op == "MatMul" else []
    if [reader.op for reader in readers] == ["Add"] and any(isinstance(tensor, Constant) for tensor in readers[0].inputs):
        yield "The Add behind it makes it a Gemm with a float bias; Sum in its place, or an int32 bias, would fuse."


def _ask_output(case: Case) -> Iterator[str]:
    """Integer kernels other than MatMul and Gemm write integers: exactly one QuantizeLinear reads their result.

    A selection of values runs on integers if nothing is rescaled.
    """
    node, tensor = case.node, _tail(case.node)
    quantizers = _quantizers(tensor)
    if node.op in STORED:
        for output in (node.outputs[0], tensor):
            if output.name in case.outputs:
                yield f"Its output '{output.name}' is a graph output, so it is computed in float."
        for reader in tensor.outputs:
            if reader.op != "QuantizeLinear":
                label = f"{reader.name} ({reader.op})" if reader.name else reader.op
                yield f"Its output '{tensor.name}' is {'also ' if quantizers else ''}read in float by {label}."
        if len(quantizers) > 1:
            yield f"Its output '{tensor.name}' is quantized {len(quantizers)} times; one QuantizeLinear must serve all."
        if quantizers and tensor is not node.outputs[0]:
            yield from _ask_clip(tensor.inputs[0], quantizers[0])
        # On x86 int8 activations are rewritten to uint8, but not those that two operators read: the types then differ.
        codes = [_codes(x) for x in _operands(node) if not _is_constant(x)] + [_type(q.outputs[0]) for q in quantizers]
        if "int8" in codes:
            yield "Its activations are int8, which ONNX Runtime rewrites only in part; uint8 ones would fuse."
    ends = [_dequantizer(node.inputs[0]), *_quantizers(node.outputs[0])[:1]] if node.op in SELECTIONS else []
    if len({tuple(parameter.name for parameter in end.inputs[1:]) for end in ends if end is not None}) > 1:
        yield "Its input and its output do not share one scale and zero point."


def _ask_clip(clip: Node, quantizer: Node) -> Iterator[str]:
    """A ReLU or Clip in front of QuantizeLinear vanishes only if the codes cannot leave its bounds."""
    scale, point = (*(_scalar(tensor) for tensor in quantizer.inputs[1:]), np.uint8(0))[:2]
    if point is None or point.dtype not in (np.uint8, np.int8) or (clip.op == "Clip" and scale is None):
        yield f"The {clip.op} behind it stays: the range of its QuantizeLinear is not constant."
        return
    limits = np.iinfo(point.dtype)
    if clip.op == "Relu" and point != limits.min:
        yield f"The Relu behind it stays: the zero point of its QuantizeLinear is {point}, not {limits.min}."
    if clip.op == "Clip" and scale is not None:
        low, high = (limits.min - int(point)) * float(scale), (limits.max - int(point)) * float(scale)
        bottom, top = (end if bound is None else bound for bound, end in zip(clip_bounds(clip), (-np.inf, np.inf), strict=True))
        if low < bottom or top < high:
            yield f"The Clip to [{bottom:g}, {top:g}] behind it stays: its QuantizeLinear reaches from {low:g} to {high:g}."


def _operands(node: Node) -> list[Tensor]:
    """The inputs that carry activations and weights: two of a product, all of a join, one of a selection."""
    count = 1 if node.op in SELECTIONS else 2 if node.op in _PRODUCTS else None
    return [tensor for tensor in node.inputs[:count] if not tensor.is_empty()]


def _is_constant(tensor: Tensor) -> bool:
    """Whether the tensor is a constant, or one that was dequantized, cast or moved."""
    while tensor.inputs and tensor.inputs[0].op in MOVES | {"DequantizeLinear", "Cast"}:
        tensor = tensor.inputs[0].inputs[0]
    return isinstance(tensor, Constant)


def _dequantizer(tensor: Tensor) -> Node | None:
    """The DequantizeLinear that the tensor comes from, moves of it left aside."""
    while tensor.inputs and tensor.inputs[0].op in MOVES:
        tensor = tensor.inputs[0].inputs[0]
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" else None


def _codes(tensor: Tensor) -> str:
    """The type of the codes that the tensor comes from, empty for one that comes from none."""
    source = _dequantizer(tensor)
    return "" if source is None else _type(source.inputs[0])


def _type(codes: Tensor) -> str:
    """The type of integer codes, from the operators that make or read them; empty where nothing tells it."""
    makers = [node for node in codes.inputs if node.op in ("QuantizeLinear", "DynamicQuantizeLinear")]
    readers = [node for node in codes.outputs if node.op == "DequantizeLinear" and node.inputs[0] is codes]
    dtypes = [tensor.dtype for tensor in (*(node.inputs[2] for node in (*makers, *readers) if len(node.inputs) > 2), codes)]
    if makers and len(dtypes) == 1:
        return "uint8"
    # Where no array type exists, graphsurgeon answers with the number that ONNX gives the type.
    return "" if dtypes[0] is None or isinstance(dtypes[0], int) else np.dtype(dtypes[0]).name


def _tail(node: Node) -> Tensor:
    """The operator's output, or that of the ReLU or Clip which alone reads it."""
    readers = node.outputs[0].outputs
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op in ("Relu", "Clip") else node.outputs[0]


def _quantizers(tensor: Tensor) -> list[Node]:
    return [reader for reader in tensor.outputs if reader.op == "QuantizeLinear"]


def _scalar(tensor: Tensor) -> np.ndarray | None:
    """The value of a constant with one element, without axes."""
    is_scalar = isinstance(tensor, Constant) and np.size(tensor.values) == 1
    return np.asarray(tensor.values).reshape(()) if is_scalar else None
