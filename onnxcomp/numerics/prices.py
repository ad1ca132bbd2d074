"""What operators cost on one x86 core, so that a price is the same wherever and whenever it is asked for.

Nanoseconds per element, per multiply-accumulate and per node, measured by `tools/prices.py` (ONNX Runtime 1.31.1, one
thread, an AMD EPYC core of the Zen 4 generation). Limits: other machines are faster or slower, which hardly moves the ratio
of two prices; caches and fusions beyond the operator are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """Nanoseconds on one core: of a node, whatever it does; per multiply-accumulate; and per element."""

    node: float = 700.0
    float_mac: float = 0.0165
    int8_mac: float = 0.0053
    elementwise: float = 0.11
    """Two operands of one shape, or an operand and a number."""
    channelwise: float = 0.2
    """An operand and one number per channel."""
    log: float = 1.7
    exp: float = 0.19
    quantize: float = 0.12
    stream: float = 20.0
    """The rest of a transformer's block: normalizations, attention, GELU, quantizers, additions; per element of its stream."""
    feature: float = 2.0
    """The rest of a CNN's block, per element of its output."""
    nodes: int = 60
    """Operators of a transformer's block."""
    detour: float = 0.6
    """What it takes to leave the 8 bits of a CNN's features and to come back, per element of them."""


X86 = Prices()


def block_ns(macs: int, elements: float, *, spatial: bool, prices: Prices = X86) -> float:
    """The time of a quantized block: its layers' multiply-accumulates and `elements`, the size of its output."""
    rest = elements * prices.feature if spatial else elements * prices.stream + prices.nodes * prices.node
    return macs * prices.int8_mac + rest


def branch_ns(
    inputs: float,
    outputs: float,
    macs: float,
    *,
    products: int,
    integer: bool,
    scaled: bool,
    log: bool,
    exp: bool,
    spatial: bool,
    prices: Prices = X86,
) -> float:
    """The time of a branch beside a block: `inputs` and `outputs` elements, `macs` in `products` MatMuls or Convs; `integer`
    with a quantizer in front, `scaled` with a factor per input channel, between a bipolar `log` and a clipped bipolar `exp`;
    `spatial` in a CNN.
    """
    p = prices
    total = (products + 1) * p.node + macs * (p.int8_mac if integer else p.float_mac)
    total += outputs * p.elementwise  # the sum with the block's output
    total += 4 * p.node + outputs * p.detour if spatial else p.node + outputs * p.channelwise  # the bias is a Conv's own
    total += integer * (p.node + inputs * p.quantize)
    total += scaled * (p.node + inputs * p.channelwise)
    total += log * (6 * p.node + inputs * (5 * p.elementwise + p.log))
    total += exp * (7 * p.node + outputs * (4 * p.elementwise + 2 * p.channelwise + p.exp))
    return total
