"""Android's NNAPI through ONNX Runtime's provider: uint8 activations, int8 weights per channel, fixed shapes.

Limits: rules from the provider's documents; the integer kernels are those of the CPU provider, which runs what NNAPI does not
take.
"""

import numpy as np

from onnxcomp.graph.edit import Node
from onnxcomp.targets.base import Encoding, Facts
from onnxcomp.targets.fallback import RULES
from onnxcomp.targets.rules import Broken, codes_type, measured_range, varying_axis, wide_codes
from onnxcomp.targets.target import Target


def signed_activation(node: Node, facts: Facts) -> Broken:
    """NNAPI's Conv takes uint8 activations."""
    if node.op == "QuantizeLinear" and codes_type(node) == np.int8:
        yield "Its activation codes are int8; NNAPI takes uint8.", "Use unsigned activations."


TARGET = Target(
    name="nnapi",
    summary="Android through ONNX Runtime's NNAPI provider",
    encoding=Encoding(packed="int8", run_time=(), tables=False),
    needs=("ONNX Runtime 1.18 or newer with its NNAPI provider, Android 10 or newer.",),
    rules=(varying_axis, signed_activation, measured_range, *RULES, wide_codes),
    kernels="onnxruntime",
    fixed=True,
)
