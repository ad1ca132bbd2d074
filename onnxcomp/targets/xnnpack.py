"""Mobile CPUs through ONNX Runtime's XNNPACK provider: int8 activations, int8 weights per channel, fixed shapes.

Limits: rules from the provider's documents; the integer kernels are those of the CPU provider, which runs what XNNPACK does
not take.
"""

import numpy as np

from onnxcomp.graph.edit import Node
from onnxcomp.targets.base import Encoding, Facts
from onnxcomp.targets.fallback import RULES
from onnxcomp.targets.rules import Broken, codes_type, measured_range, varying_axis, wide_codes
from onnxcomp.targets.target import Target


def unsigned_activation(node: Node, facts: Facts) -> Broken:
    """XNNPACK takes weights with a scale per channel beside int8 activations only."""
    if node.op == "QuantizeLinear" and codes_type(node) == np.uint8:
        yield "Its activation codes are uint8; with scales per channel XNNPACK takes int8.", "Use signed activations."


TARGET = Target(
    name="xnnpack",
    summary="mobile CPUs through ONNX Runtime's XNNPACK provider",
    encoding=Encoding(signed=True, packed="int8", run_time=(), tables=False),
    needs=("ONNX Runtime 1.18 or newer with its XNNPACK provider.",),
    rules=(varying_axis, unsigned_activation, measured_range, *RULES, wide_codes),
    kernels="onnxruntime",
    fixed=True,
)
