"""The prices in onnxcomp/numerics/prices.py, measured on this machine: nanoseconds per node, element and multiply-accumulate.

    python tools/prices.py [--rounds 15]

Chains of eight equal steps are timed in turn, on one thread, and the fastest tenth of the rounds counts. What an operator
takes on a handful of elements is the price of a node; the rest is shared out over the elements. What a block takes besides
its products is no operator's price: it is there to make the times of whole models come out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

import numpy as np
import onnx.parser
from onnx import numpy_helper

from onnxcomp import runtime
from onnxcomp.numerics.prices import X86

LENGTH, TOKENS, CHANNELS = 8, 197, 192
OPERATORS = {
    "elementwise": "Y = Add(X, one)",
    "channelwise": "Y = Mul(X, a)",
    "log": "Y0 = Log(X) Y = Exp(Y0)",
    "exp": "Y0 = Exp(X) Y = Sub(one, Y0)",
    "quantize": "Y0 = QuantizeLinear(X, s, z) Y1 = DequantizeLinear(Y0, s, z) Y = Neg(Y1)",
    "float_mac": "Y0 = MatMul(X, W) Y = Sum(Y0, one)",
    "int8_mac": "Y0 = QuantizeLinear(X, s, z) Y1 = DequantizeLinear(Y0, s, z) Y2 = DequantizeLinear<axis = 1>(C, S, Z) "
    "Y3 = MatMul(Y1, Y2) Y = Sum(Y3, one)",
}
"""One step of a chain each: the operator, and what keeps the values in their place or the fusion as it is in a branch."""
LESS = {
    "elementwise": (),
    "channelwise": (),
    "exp": ("elementwise",),
    "log": ("exp",),
    "quantize": ("elementwise", "quantize"),
    "float_mac": ("elementwise",),
    "int8_mac": ("quantize", "elementwise"),
}
"""What else a step holds; a quantizer there and back counts as two."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of interleaved timing")
    rounds = parser.parse_args().rounds
    elements = TOKENS * CHANNELS
    node = _chains({"node": OPERATORS["elementwise"]}, 1, 16, rounds)["node"]
    steps = _chains(OPERATORS, TOKENS, CHANNELS, rounds)
    prices: dict[str, float] = {}
    for name, also in LESS.items():
        rest = steps[name] - node - sum(node + elements * prices.get(other, 0.0) for other in also)
        prices[name] = rest / elements / (CHANNELS if name.endswith("mac") else 1 + also.count(name))
    print("ns per            here   in use")
    for name, ns in {"node": node, **prices}.items():
        print(f"{name:12s} {ns:9.4f} {getattr(X86, name):8.4f}")


def _chains(operators: Mapping[str, str], tokens: int, channels: int, rounds: int) -> dict[str, float]:
    """Nanoseconds of one operator of each kind, on [1, tokens, channels]."""
    rng = np.random.default_rng(0)
    weights = {
        "one": np.float32(1),
        "a": np.ones(channels, np.float32),
        "s": np.float32(0.05),
        "z": np.uint8(0),
        "W": np.eye(channels, dtype=np.float32),
        "C": np.eye(channels, dtype=np.int8),
        "S": np.ones(channels, np.float32),
        "Z": np.zeros(channels, np.int8),
    }
    x = {"x": rng.uniform(2, 4, (1, tokens, channels)).astype(np.float32)}
    bodies = {"empty": "y = Neg(x)"} | {name: _chain(text) for name, text in operators.items()}
    models = [_model(body, weights, tokens, channels) for body in bodies.values()]
    empty, *found = runtime.measure(models, [x], threads=1, rounds=rounds)
    return {name: 1e6 * (latency.low_ms - empty.low_ms) / LENGTH for name, latency in zip(operators, found, strict=True)}


def _chain(operator: str) -> str:
    """Eight of them in a row."""
    steps = []
    for i in range(LENGTH):
        text = re.sub(r"\bY(\d)", rf"y{i}_\1", operator)
        steps.append(re.sub(r"\bY\b", f"x{i + 1}", re.sub(r"\bX\b", f"x{i}" if i else "x", text)))
    return " ".join([*steps, f"y = Neg(x{LENGTH})"])


def _model(body: str, weights: Mapping[str, np.ndarray | np.generic], tokens: int, channels: int) -> bytes:
    shape = f"float[N,{tokens},{channels}]"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g ({shape} x) => ({shape} y) {{ {body} }}')
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), k) for k, w in weights.items() if k in used)
    return model.SerializeToString()


if __name__ == "__main__":
    main()
