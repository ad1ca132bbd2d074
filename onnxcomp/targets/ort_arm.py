"""ONNX Runtime on ARM: signed activations and signed weights, whose products its kernels compute without a detour.

The graph is that of ort-x86 with signed codes, which stand for the same values; the same rules decide what stays integer.
"""

from onnxcomp.targets.base import Encoding
from onnxcomp.targets.fallback import RULES
from onnxcomp.targets.rules import wide_codes
from onnxcomp.targets.target import Target

TARGET = Target(
    name="ort-arm",
    summary="ONNX Runtime on 64-bit ARM CPUs",
    encoding=Encoding(signed=True),
    needs=("ONNX Runtime 1.18 or newer, with graph optimizations enabled (the default).",),
    packed_needs=("ONNX Runtime 1.23 or newer, with graph optimizations enabled (the default).",),
    rules=(*RULES, wide_codes),
    kernels="onnxruntime",
)
