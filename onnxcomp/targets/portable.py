"""Plain QuantizeLinear and DequantizeLinear of int8, and of int4 where weights are narrower, for whatever reads ONNX.

    activation   x -> Clip (below 8 bits) -> QuantizeLinear(int8, zero point 0) -> DequantizeLinear
    weight       int8 or int4 -> DequantizeLinear per output channel

No integer operator, no Cast of codes and no range that is measured at run time. Limits: what a runtime makes of it is its own
affair; where there is a target for it, that one is faster.
"""

from onnxcomp.targets.base import Encoding
from onnxcomp.targets.rules import foreign_operator, half_quantized, integer_operator, measured_range, wide_codes
from onnxcomp.targets.target import Target

TARGET = Target(
    name="portable",
    summary="plain Q/DQ in the oldest opset that holds it, for any runtime",
    encoding=Encoding(
        where="inputs", signed=True, symmetric=True, clip="values", packed="native", bias="float", run_time=(), fused=False
    ),
    needs=("A runtime that takes QuantizeLinear and DequantizeLinear per channel.",),
    packed_needs=("A runtime with opset 21, for weights of type int4.",),
    oldest=True,
    rules=(foreign_operator, integer_operator, measured_range, half_quantized, wide_codes),
)
