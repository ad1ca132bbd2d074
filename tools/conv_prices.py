"""The prices in onnxcomp/targets/timing.py, measured on this machine: a Conv in float and on codes, per position of its result.

    python tools/conv_prices.py [--rounds 5] [--sizes 56,112]

Every Conv stands alone in a model, on one thread; the kernel's own time in ONNX Runtime's profile counts, the lower quartile of
rounds of ten, so that neither quantizers nor changes of layout are part of it. Both lines of a kind are fitted to relative
errors, by least squares without negative terms; what memory adds in the middle of a model was added by hand. Printed are the
terms, in nanoseconds, and the median error.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxcomp.runtime import profile

POINTWISE = (
    (8, 8),
    (8, 16),
    (16, 8),
    (16, 16),
    (16, 32),
    (16, 96),
    (24, 144),
    (32, 16),
    (32, 32),
    (32, 64),
    (96, 24),
    (144, 32),
)
DENSE = ((8, 8), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))
DEPTHWISE = (16, 32, 48, 64, 96, 144)
STEMS = ((16, 3, 2), (32, 3, 2), (64, 3, 2), (64, 7, 2), (96, 4, 4), (32, 3, 1))
"""Outputs, kernel and stride of Convs on pictures of three channels."""


@dataclass(frozen=True)
class Conv:
    """A square Conv on a square image."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    groups: int = 1

    @property
    def positions(self) -> int:
        return (-(-self.size // self.stride)) ** 2

    @property
    def products(self) -> int:
        return self.outputs * self.inputs // self.groups * self.kernel**2


def convs(sizes: list[int]) -> Iterator[Conv]:
    for size in sizes:
        yield from (Conv(a, b, 1, 1, size) for a, b in POINTWISE)
        yield from (Conv(a, b, 3, stride, size) for a, b in DENSE for stride in (1, 2))
        yield from (Conv(c, c, k, s, size, c) for c, k, s in itertools.product(DEPTHWISE, (3, 5), (1, 2)))
    yield from (Conv(3, outputs, kernel, stride, 2 * max(sizes)) for outputs, kernel, stride in STEMS)


def build(conv: Conv, *, quantized: bool) -> ModelProto:
    """The Conv alone, or between quantizers; three channels are filled up to four then."""
    inputs, rng = conv.inputs + (quantized and conv.inputs == 3), np.random.default_rng(0)
    w = rng.normal(size=(conv.outputs, inputs // conv.groups, conv.kernel, conv.kernel)).astype(np.float32)
    stored: dict[str, Any] = {"b": np.zeros(conv.outputs, np.float32), "w": w}
    nodes, x, y = [], "x", "y"
    if quantized:
        stored = {"codes": np.clip(np.rint(40 * w), -127, 127).astype(np.int8), "zeros": np.zeros(conv.outputs, np.int8)}
        stored |= {"steps": np.full(conv.outputs, 0.025, np.float32), "i32": np.zeros(conv.outputs, np.int32)}
        stored |= {"fine": np.full(conv.outputs, 5e-4, np.float32), "s": np.float32(0.02), "z": np.uint8(128)}
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["codes", "steps", "zeros"], ["w"], axis=0),
            helper.make_node("DequantizeLinear", ["i32", "fine"], ["b"], axis=0),
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"]),
        ]
        x, y = "xd", "c"
    how: dict[str, Any] = {
        "kernel_shape": [conv.kernel] * 2,
        "strides": [conv.stride] * 2,
        "pads": [(conv.kernel - 1) // 2] * 4,
    }
    nodes.insert(4 if quantized else 0, helper.make_node("Conv", [x, "w", "b"], [y], "conv", group=conv.groups, **how))
    shape = [1, inputs, conv.size, conv.size]
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None)))
    graph = helper.make_graph(nodes, "conv", [next(ends)], [next(ends)])
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in stored.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def kernel_ns(model: ModelProto, rounds: int) -> float:
    """Nanoseconds of the Conv's kernel."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    found = [sum(ms for op, ms in profile(model, feed) if "Conv" in op) for _ in range(rounds)]
    return 1e6 * float(np.quantile(found, 0.25))


def fit(terms: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, float]:
    """The terms' prices, none below zero, and the median relative error."""
    kept = np.ones(terms.shape[1], bool)
    while True:
        prices = np.zeros(len(kept))
        prices[kept] = np.linalg.lstsq(terms[:, kept] / times[:, None], np.ones(len(times)))[0]
        if (prices >= 0).all():
            return prices, float(np.median(np.abs(np.log(terms @ prices / times))))
        kept &= prices > 0


KINDS: dict[str, tuple[bool, tuple[str, ...], Callable[[Conv], tuple[float, ...]]]] = {
    "float": (False, ("m", "C", "1"), lambda c: (c.products, c.outputs, 1)),
    "int8": (True, ("m", "C", "k [k > 1]", "1"), lambda c: (c.products, c.outputs, c.kernel**2 * (c.kernel > 1), 1)),
    "float, depthwise": (False, ("m", "C"), lambda c: (c.products, c.outputs)),
    "int8, depthwise": (True, ("m", "C", "k", "1"), lambda c: (c.products, c.outputs, c.kernel**2, 1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="56,112")
    arguments = parser.parse_args()
    found = list(convs([int(size) for size in arguments.sizes.split(",")]))
    for title, (quantized, names, terms) in KINDS.items():
        some = [conv for conv in found if (conv.groups > 1) == title.endswith("depthwise")]
        times = np.array([kernel_ns(build(conv, quantized=quantized), arguments.rounds) for conv in some])
        columns = np.array([np.array(terms(conv), float) * conv.positions for conv in some])
        prices, error = fit(columns, times)
        line = " + ".join(f"{price:.4f} {name}" for price, name in zip(prices, names, strict=True))
        print(f"{title}: {line} ns per position; median error {100 * error:.0f} % of {len(some)} Convs", flush=True)


if __name__ == "__main__":
    main()
