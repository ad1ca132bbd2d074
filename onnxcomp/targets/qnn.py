"""Qualcomm's QNN, ONNX Runtime's provider for the Hexagon processor: every operator reads and makes codes.

    activation   uint8, or uint16 where asked, per tensor, on every float tensor
    weight       int8 or int4 per output channel; the bias of a Conv is int32
    shapes       fixed: axes that vary become 1

Limits: rules from the provider's documents; nothing of it runs here.
"""

import numpy as np

from onnxcomp.graph.edit import Node
from onnxcomp.targets.base import Encoding, Facts
from onnxcomp.targets.rules import QUANTIZERS, Broken, integer_operator, maker, measured_range, varying_axis
from onnxcomp.targets.target import Target


def open_unit(node: Node, facts: Facts) -> Broken:
    """An operator between DequantizeLinear and QuantizeLinear is a unit that runs on codes; any other is float."""
    if node.op in (*QUANTIZERS, "Input", "Cast", "Shape", "Constant"):
        return
    reads = [t for t in node.inputs if t.dtype == np.float32 and maker(t) != "DequantizeLinear"]
    makes = [t for t in node.outputs if t.dtype == np.float32 and [r.op for r in t.outputs] != ["QuantizeLinear"]]
    follower = [r.op for t in node.outputs for r in t.outputs]
    if reads and maker(reads[0]) not in ("Conv", "Gemm", "MatMul", "Add"):
        yield f"Its input '{reads[0].name}' is float, so it does not run on codes.", "Quantize what it reads."
    if makes and follower not in (["Relu"], ["Clip"]):
        yield f"Its output '{makes[0].name}' is not quantized once, so it does not run on codes.", "Quantize what it makes."


TARGET = Target(
    name="qnn",
    summary="Qualcomm Hexagon through ONNX Runtime's QNN provider (rules; nothing is run here)",
    encoding=Encoding(where="units", packed="native", clip="values", run_time=(), fused=False, tables=False, wide=True),
    needs=("ONNX Runtime 1.20 or newer with its QNN provider, backend HTP.",),
    rules=(varying_axis, integer_operator, measured_range, open_unit),
    fixed=True,
)
