"""Why ONNX Runtime's CPU provider runs a site in float: its rules for integer kernels.

Each rule looks at one operator of the lowered graph and is one sentence. They are asked in order, from what makes the
others pointless (a float input) to the finest (a ReLU that a zero point does not absorb). Measured on ONNX Runtime
1.31.1; every sentence has a probe in the tests.

Limits: CPU provider, x86-64; what the lowering never writes (16-bit codes, say, or a float16 scale) has no rule; tensors
inside control flow are not followed.
"""

from collections.abc import Collection, Iterator
from itertools import chain

import numpy as np

from onnxcomp.graph.edit import Constant, Node, Tensor
from onnxcomp.targets.regions import clip_bounds

STORED = frozenset({
    "Conv", "Add", "Mul", "Concat", "Where", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool",
})  # fmt: skip
"""Operators with an integer kernel that needs a QuantizeLinear behind it."""


def explain(node: Node, outputs: Collection[str], version: str) -> str:
    """Why an operator of the lowered graph, which was meant to run on integers, does not; `outputs` are the graph's.

    One sentence: the first rule that does not hold, or that ONNX Runtime `version` did not fuse the operator.
    """
    reasons = chain(_ask_inputs(node), _ask_readers(node), _ask_output(node, outputs))
    return next(reasons, f"ONNX Runtime {version} did not fuse it.")


def _ask_inputs(node: Node) -> Iterator[str]:
    """What it multiplies or joins comes from DequantizeLinear; the bias of a Conv may be float."""
    is_product = node.op in ("Conv", "MatMul")
    for tensor in node.inputs[:2] if is_product else node.inputs:
        role = "input" if not isinstance(tensor, Constant) else "weight" if is_product else "constant operand"
        if [maker.op for maker in tensor.inputs] != ["DequantizeLinear"]:
            yield f"Its {role} '{tensor.name}' is not quantized."


def _ask_readers(node: Node) -> Iterator[str]:
    """A product and what is added to it are fused into one operator, which is float if the addend is."""
    readers = node.outputs[0].outputs if node.op == "MatMul" else []
    if [reader.op for reader in readers] == ["Add"] and any(isinstance(tensor, Constant) for tensor in readers[0].inputs):
        yield "The Add behind it makes it a Gemm with a float bias; Sum in its place, or an int32 bias, would fuse."


def _ask_output(node: Node, outputs: Collection[str]) -> Iterator[str]:
    """Integer kernels other than MatMul write integers: exactly one QuantizeLinear reads their result."""
    tensor = _tail(node)
    quantizers = [reader for reader in tensor.outputs if reader.op == "QuantizeLinear"]
    if node.op not in STORED:
        return
    for output in (node.outputs[0], tensor):
        if output.name in outputs:
            yield f"Its output '{output.name}' is a graph output, so it is computed in float."
    for reader in tensor.outputs:
        if reader.op != "QuantizeLinear":
            label = f"{reader.name} ({reader.op})" if reader.name else reader.op
            yield f"Its output '{tensor.name}' is {'also ' if quantizers else ''}read in float by {label}."
    if len(quantizers) > 1:
        yield f"Its output '{tensor.name}' is quantized {len(quantizers)} times; one QuantizeLinear must serve all."
    if quantizers and tensor is not node.outputs[0]:
        yield from _ask_clip(tensor.inputs[0], *quantizers[0].inputs[1:])


def _ask_clip(clip: Node, scale: Tensor, zero_point: Tensor) -> Iterator[str]:
    """A ReLU or Clip in front of QuantizeLinear vanishes only if the codes, which are unsigned, cannot leave its bounds."""
    if not isinstance(scale, Constant) or not isinstance(zero_point, Constant):
        yield f"The {clip.op} behind it stays: the range of its QuantizeLinear is not constant."
        return
    step, zero = float(scale.values), int(zero_point.values)
    if clip.op == "Relu" and zero != 0:
        yield f"The Relu behind it stays: the zero point of its QuantizeLinear is {zero}, not 0."
    if clip.op == "Clip":
        low, high = -zero * step, (255 - zero) * step
        bottom, top = (end if bound is None else bound for bound, end in zip(clip_bounds(clip), (-np.inf, np.inf), strict=True))
        if low < bottom or top < high:
            yield f"The Clip to [{bottom:g}, {top:g}] behind it stays: its QuantizeLinear reaches from {low:g} to {high:g}."


def _tail(node: Node) -> Tensor:
    """The operator's output, or that of the ReLU or Clip which alone reads it."""
    readers = node.outputs[0].outputs
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op in ("Relu", "Clip") else node.outputs[0]
