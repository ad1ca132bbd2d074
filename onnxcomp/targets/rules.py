"""Rules that targets share. Each looks at one node of any model and says what is wrong with it, and what to do.

To the rules the inputs of a model are nodes of type `Input`. Reasons are measured or read in the runtimes' own documents, as
each docstring says; a probe in the tests breaks each one.
"""

from collections.abc import Iterator

import numpy as np

from onnxcomp.graph.edit import Constant, Node, Tensor
from onnxcomp.targets.base import Facts

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
Broken = Iterator[tuple[str, str]]
FIX = "Quantize the float model again for this target."


def maker(tensor: Tensor) -> str:
    """The type of the operator that makes the tensor; empty where none does."""
    return tensor.inputs[0].op if tensor.inputs else ""


def codes_type(node: Node) -> np.dtype | None:
    """The type of the codes that a QuantizeLinear makes or a DequantizeLinear reads; None where it is not known."""
    zero_point = node.inputs[2:3] if node.op == "QuantizeLinear" else node.inputs[:1]
    dtype = zero_point[0].dtype if zero_point else np.uint8
    return None if dtype is None or isinstance(dtype, int) else np.dtype(dtype)


def is_stored(node: Node) -> bool:
    """Whether a DequantizeLinear reads a constant, at once or behind what is computed when the model is loaded."""
    tensor = node.inputs[0]
    while isinstance(tensor, Tensor) and tensor.inputs and tensor.inputs[0].op in ("Cast", "Clip", "QuantizeLinear"):
        tensor = tensor.inputs[0].inputs[0]
    return isinstance(tensor, Constant)


def varying_axis(node: Node, facts: Facts) -> Broken:
    """Runtimes that compile the whole model for a device want every axis fixed (QNN, NNAPI and XNNPACK providers)."""
    shape = node.outputs[0].shape if node.op == "Input" else ()
    if any(not isinstance(n, int) for n in shape or ()):
        yield f"Its shape {list(shape or ())} has axes that vary, so nothing of it is compiled.", "Fix every axis."


def foreign_operator(node: Node, facts: Facts) -> Broken:
    """Only operators of the standard domain run everywhere."""
    if node.domain not in (None, "", "ai.onnx"):
        yield f"It is {node.op} of the domain '{node.domain}', which no other runtime has.", FIX


def integer_operator(node: Node, facts: Facts) -> Broken:
    """Runtimes that take Q/DQ take no operators that compute with codes themselves."""
    if node.op in ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger") or node.op.startswith("QLinear"):
        yield f"{node.op} is not taken; products of codes are written with QuantizeLinear and DequantizeLinear.", FIX


def measured_range(node: Node, facts: Facts) -> Broken:
    """Scales and zero points are constants."""
    if node.op in QUANTIZERS and any(not isinstance(t, Constant) for t in node.inputs[1:]):
        yield "Its scale or zero point is no constant.", "Fix the ranges at calibration."


def wide_codes(node: Node, facts: Facts) -> Broken:
    """No kernel of ONNX Runtime's CPU, NNAPI and XNNPACK providers computes with codes of 16 bits."""
    if node.op in QUANTIZERS and codes_type(node) in (np.int16, np.uint16):
        yield "Codes of 16 bits have no integer kernel.", "Use activations of 8 bits."


def half_quantized(node: Node, facts: Facts) -> Broken:
    """A product runs on integers only if both of its factors are codes."""
    makers = [maker(t) for t in node.inputs[:2]] if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") else []
    for tensor, made in zip(node.inputs, makers, strict=False):
        if "DequantizeLinear" in makers and made != "DequantizeLinear":
            yield f"Its input '{tensor.name}' is not quantized, so it is computed in float.", "Quantize both of its factors."
