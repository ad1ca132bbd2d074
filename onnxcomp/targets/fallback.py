"""Why ONNX Runtime's CPU provider runs a site in float: its rules for integer kernels.

Each rule looks at one operator of a lowered graph that was meant to run on integers. They are asked in order, from what makes
the others pointless (a float input) to the finest (a ReLU that a zero point does not absorb). Measured on ONNX Runtime
1.31.1; every sentence has a probe in the tests.

Limits: CPU provider, x86-64; tensors inside control flow are not followed.
"""

import functools
from collections.abc import Iterator

import numpy as np

from onnxcomp.graph.edit import Constant, Node
from onnxcomp.graph.sites import LAYER_OPS
from onnxcomp.targets.base import Results, Rule
from onnxcomp.targets.regions import clip_bounds
from onnxcomp.targets.rules import in_blocks, is_stored, maker
from onnxcomp.targets.settle import tail

STORED = ("Conv", "Add", "Mul", "Concat", "Where", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool")
"""Operators with an integer kernel that needs a QuantizeLinear behind it."""


def explain(node: Node, results: Results, version: str) -> str:
    """Why an operator of the lowered graph, which was meant to run on integers, does not; `results` are the graph's outputs.

    One sentence: the first rule that does not hold, or that ONNX Runtime `version` did not fuse the operator.
    """
    rules = (dequantized_weight, *(() if in_blocks(node) else _RULES))
    reasons = (reason for rule in rules for reason, _ in rule(node, results))
    return next(reasons, f"ONNX Runtime {version} did not fuse it.")


def float_operand(node: Node, results: Results) -> Iterator[tuple[str, str]]:
    """What it multiplies or joins comes from DequantizeLinear; the bias of a Conv may be float."""
    is_product = node.op in ("Conv", "MatMul")
    for tensor in node.inputs[:2] if is_product else node.inputs:
        role = "input" if not isinstance(tensor, Constant) else "weight" if is_product else "constant operand"
        if [maker.op for maker in tensor.inputs] != ["DequantizeLinear"]:
            yield f"Its {role} '{tensor.name}' is not quantized.", "Put QuantizeLinear and DequantizeLinear in front of it."


def float_addend(node: Node, results: Results) -> Iterator[tuple[str, str]]:
    """A product and what is added to it are fused into one operator, which is float if the addend is."""
    readers = node.outputs[0].outputs if node.op == "MatMul" else []
    if [reader.op for reader in readers] == ["Add"] and any(isinstance(tensor, Constant) for tensor in readers[0].inputs):
        yield "The Add behind it makes it a Gemm with a float bias.", "Write Sum in place of the Add, or store an int32 bias."


def float_result(node: Node, results: Results) -> Iterator[tuple[str, str]]:
    """Integer kernels other than MatMul write integers: exactly one QuantizeLinear reads their result."""
    tensor = tail(node)
    quantizers = [reader for reader in tensor.outputs if reader.op == "QuantizeLinear"]
    if node.op not in STORED:
        return
    for output in (node.outputs[0], tensor):
        if output.name in results:
            yield f"Its output '{output.name}' is a graph output, so it is computed in float.", "Leave it in float."
    for reader in tensor.outputs:
        if reader.op != "QuantizeLinear":
            label, also = f"{reader.name} ({reader.op})" if reader.name else reader.op, "also " if quantizers else ""
            remedy = "Quantize its output once, and let every reader read that."
            yield f"Its output '{tensor.name}' is {also}read in float by {label}.", remedy
    if len(quantizers) > 1:
        remedy = "Let one QuantizeLinear serve all."
        yield f"Its output '{tensor.name}' is quantized {len(quantizers)} times.", remedy


def unabsorbed_clip(node: Node, results: Results) -> Iterator[tuple[str, str]]:
    """A ReLU or Clip in front of QuantizeLinear vanishes only if the codes cannot leave its bounds."""
    quantizers = [reader for reader in tail(node).outputs if reader.op == "QuantizeLinear"]
    if node.op not in STORED or not quantizers or tail(node) is node.outputs[0]:
        return
    clip, (scale, zero_point) = tail(node).inputs[0], quantizers[0].inputs[1:]
    if not isinstance(scale, Constant) or not isinstance(zero_point, Constant):
        yield f"The {clip.op} behind it stays: the range of its QuantizeLinear is not constant.", "Fix the range."
        return
    step, zero, codes = float(scale.values), int(zero_point.values), np.iinfo(zero_point.dtype)
    remedy = "Let the smallest code stand for its lower bound and the largest for no more than its upper one."
    if clip.op == "Relu" and zero != codes.min:
        yield f"The Relu behind it stays: the zero point of its QuantizeLinear is {zero}, not {codes.min}.", remedy
    if clip.op == "Clip":
        low, high = (codes.min - zero) * step, (codes.max - zero) * step
        bottom, top = (end if bound is None else bound for bound, end in zip(clip_bounds(clip), (-np.inf, np.inf), strict=True))
        if low < bottom or top < high:
            ends = f"[{bottom:g}, {top:g}]"
            yield f"The Clip to {ends} behind it stays: its QuantizeLinear reaches from {low:g} to {high:g}.", remedy


def dequantized_weight(node: Node, results: Results) -> Iterator[tuple[str, str]]:
    """What becomes MatMulNBits: a float activation by a stored matrix, in blocks of inputs, whose codes nobody else reads."""
    if node.op not in ("Gemm", "MatMul") or not maker(node.inputs[1]) or maker(node.inputs[0]) == "DequantizeLinear":
        return
    weight = node.inputs[1].inputs[0]
    is_turned = weight.op == "Transpose" or node.attrs.get("transB")
    if weight.op == "Transpose" and maker(weight.inputs[0]):
        weight = weight.inputs[0].inputs[0]
    if weight.op != "DequantizeLinear" or not is_stored(weight):
        return
    start, block = "Its weight is dequantized at every run: ", weight.attrs.get("block_size", 0)
    if is_turned:
        yield f"{start}it is transposed.", "Store it as inputs by outputs."
    if len(weight.outputs[0].outputs) > 1 or any(len(t.outputs) > 1 for t in weight.inputs):
        yield f"{start}its codes or scales have another reader.", "Give every product its own."
    if block and (block < 16 or block & (block - 1)):
        yield f"{start}it has blocks of {block}.", "Use blocks of 16, 32, 64 or 128."
    if any(reader.op == "QuantizeLinear" for reader in node.outputs[0].outputs):
        yield f"{start}the result is quantized.", "Leave the result in float."
    readers = [reader.op for reader in node.outputs[0].outputs]
    if readers in (["Relu"], ["Clip"]) and tail(node).outputs:
        yield f"{start}a {readers[0]} reads the result.", f"Put a Sum of one in front of the {readers[0]}."


def _where_meant(rule: Rule) -> Rule:
    """The rule for any node of any model: it is asked of products that read codes of an activation, and of what joins codes
    into codes.
    """

    @functools.wraps(rule)
    def ask(node: Node, results: Results) -> Iterator[tuple[str, str]]:
        read = [t.inputs[0] for t in node.inputs if maker(t) == "DequantizeLinear"]
        joins = node.op in STORED and any(reader.op == "QuantizeLinear" for reader in tail(node).outputs)
        if (node.op in LAYER_OPS or joins) and not all(is_stored(dequantize) for dequantize in read):
            yield from rule(node, results)

    return ask


_RULES = (float_operand, float_addend, float_result, unabsorbed_clip)
"""In the order in which they are asked."""
OF_INTEGERS = frozenset(rule.__name__.replace("_", "-") for rule in _RULES)
"""Rules that a node breaks only if it was meant to compute on integers."""
RULES = (*(_where_meant(rule) for rule in _RULES), dequantized_weight)
