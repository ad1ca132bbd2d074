"""What operators cost on one x86 core, so that a price is the same wherever and whenever it is asked for.

Nanoseconds with ONNX Runtime 1.31.1 on one thread of an AMD EPYC (Zen 4). `tools/prices.py` measures those of operators; a
node costs about twice as much in the middle of a model, where caches are cold, and that is what stands here. A block's rest
is what makes the times of ViT-Ti, KWT-1 and ResNet-20 come out, to some 15 %.
Limits: other machines are faster or slower, which moves the ratio of two prices less; other fusions are not seen.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """Nanoseconds on one core: of a node, whatever it does; per multiply-accumulate; and per element."""

    node: float = 700.0
    float_mac: float = 0.0175
    int8_mac: float = 0.0057
    elementwise: float = 0.09
    """Two operands of one shape, or an operand and a number."""
    channelwise: float = 0.21
    """An operand and one number per channel."""
    log: float = 1.7
    exp: float = 0.18
    quantize: float = 0.12
    stream: float = 20.0
    """The rest of a transformer's block: normalizations, attention, GELU, quantizers, additions; per element of its stream."""
    feature: float = 4.0
    """The rest of a CNN's block, per element of its output."""
    nodes: int = 60
    """Operators of a transformer's block."""
    detour: float = 1.5
    """What it takes to leave the 8 bits of a CNN's features and to come back, per element of them."""

    def block_ns(self, macs: int, elements: float, *, spatial: bool) -> float:
        """The time of a quantized block: its layers' multiply-accumulates and `elements`, the size of its output."""
        rest = elements * self.feature if spatial else elements * self.stream + self.nodes * self.node
        return macs * self.int8_mac + rest

    def branch_ns(self, parts: Collection[str], inputs: float, outputs: float, macs: float, *, spatial: bool) -> float:
        """The time of a branch beside a block: elements in and out, and multiply-accumulates. `parts` are the arrays that it
        has. Of products there is one per `weight`, `codes`, `left` and `right`; `input_scale`: with a quantizer in front;
        `factor`: per input channel; `log`: a bipolar logarithm of the input; `unit`: a clipped bipolar exponential behind;
        `spatial`: in a CNN, where the bias is a Conv's own.
        """
        products = len({"weight", "codes", "left", "right"}.intersection(parts))
        integer, scaled, log, exp = (name in parts for name in ("input_scale", "factor", "log", "unit"))
        nodes = 1 + products + (4 if spatial else 1) + integer + scaled + 6 * log + 7 * exp
        total = nodes * self.node + macs * (self.int8_mac if integer else self.float_mac)
        total += inputs * (integer * self.quantize + scaled * self.channelwise + log * (5 * self.elementwise + self.log))
        total += outputs * (self.elementwise + (self.detour if spatial else self.channelwise))
        return total + exp * outputs * (4 * self.elementwise + 2 * self.channelwise + self.exp)


X86 = Prices()
