"""ONNX Runtime on x86-64 with VNNI: unsigned activations, signed weights per output channel, int8 kernels at every width.

An integer Clip behind QuantizeLinear keeps the kernels, a float Clip or a 4-bit type in front of the operator loses them; the
Cast of an int4 weight is folded when the session loads. Found by running such files: the Cast from int4 is there from 1.23
on, the rest of opset 21 from 1.18 on.
"""

from onnxcomp.targets.base import Encoding
from onnxcomp.targets.fallback import RULES
from onnxcomp.targets.target import Target

VNNI = (
    "A CPU with VNNI for exact 8-bit products. On older AVX2 CPUs sums of two products may saturate: set the session "
    'option session.x64quantprecision = "1" there.'
)

TARGET = Target(
    name="ort-x86",
    summary="ONNX Runtime on x86-64 CPUs with VNNI",
    encoding=Encoding(),
    needs=("ONNX Runtime 1.18 or newer, with graph optimizations enabled (the default).", VNNI),
    packed_needs=("ONNX Runtime 1.23 or newer, with graph optimizations enabled (the default).", VNNI),
    rules=RULES,
    kernels="onnxruntime",
)
