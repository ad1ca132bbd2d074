"""The prices in onnxcomp/targets/timing.py, measured on this machine: layers in float and on codes, per position of a Conv's
result and per row of a MatMul.

    python tools/layer_prices.py [--rounds 5] [--sizes 56,112]

Every layer stands alone in a model, on one thread. Of a Conv the kernel's own time in ONNX Runtime's profile counts, so that
neither quantizers nor changes of layout are part of it, and what memory adds in the middle of a model was added by hand; of a
MatMul the times of all operators, for its quantizer is its own. Each is the lower quartile of rounds of ten. Both lines of a
kind are fitted to relative errors, by least squares without negative terms. Printed are the terms, in nanoseconds, and the
median error.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
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
MATMULS = ((4, 4), (8, 8), (16, 16), (16, 64), (64, 16), (32, 32), (64, 64), (32, 128), (64, 256), (256, 64), (192, 192))
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


@dataclass(frozen=True)
class Product:
    """A MatMul with its bias."""

    positions: int
    inputs: int
    outputs: int


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
    return model(nodes, stored, [1, inputs, conv.size, conv.size])


def build_product(layer: Product, *, quantized: bool) -> ModelProto:
    """The MatMul and its bias, behind a quantizer if asked."""
    w = np.random.default_rng(0).normal(size=(layer.inputs, layer.outputs)).astype(np.float32)
    stored: dict[str, Any] = {"b": np.zeros(layer.outputs, np.float32), "w": w}
    nodes, x = list[Any](), "x"
    if quantized:
        stored |= {"codes": np.clip(np.rint(40 * w), -127, 127).astype(np.int8), "zeros": np.zeros(layer.outputs, np.int8)}
        stored |= {"steps": np.full(layer.outputs, 0.025, np.float32), "s": np.float32(0.02), "z": np.uint8(128)}
        del stored["w"]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["codes", "steps", "zeros"], ["w"], axis=1),
        ]
        x = "xd"
    nodes += [helper.make_node("MatMul", [x, "w"], ["h"]), helper.make_node("Sum" if quantized else "Add", ["h", "b"], ["y"])]
    return model(nodes, stored, [1, layer.positions, layer.inputs])


def model(nodes: list[Any], stored: dict[str, Any], shape: list[int]) -> ModelProto:
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None)))
    graph = helper.make_graph(nodes, "layer", [next(ends)], [next(ends)])
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in stored.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def nanoseconds(layer: Conv | Product, *, quantized: bool, rounds: int) -> float:
    """Of a Conv's kernel, or of a MatMul and its quantizer."""
    is_conv = isinstance(layer, Conv)
    made = build(layer, quantized=quantized) if is_conv else build_product(layer, quantized=quantized)
    shape = [d.dim_value for d in made.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    found = [sum(ms for op, ms in profile(made, feed) if "Conv" in op or not is_conv) for _ in range(rounds)]
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


CONVS: dict[str, tuple[bool, tuple[str, ...], Callable[[Conv], tuple[float, ...]]]] = {
    "float": (False, ("m", "C", "1"), lambda c: (c.products, c.outputs, 1)),
    "int8": (True, ("m", "C", "k [k > 1]", "1"), lambda c: (c.products, c.outputs, c.kernel**2 * (c.kernel > 1), 1)),
    "float, depthwise": (False, ("m", "C"), lambda c: (c.products, c.outputs)),
    "int8, depthwise": (True, ("m", "C", "k", "1"), lambda c: (c.products, c.outputs, c.kernel**2, 1)),
}


def fitted(title: str, names: Sequence[str], terms: Sequence[tuple[float, ...]], times: Sequence[float]) -> None:
    """Print the line of one kind."""
    prices, error = fit(np.array(terms, float), np.array(times))
    line = " + ".join(f"{price:.4f} {name}" for price, name in zip(prices, names, strict=True))
    print(f"{title}: {line} ns; median error {100 * error:.0f} % of {len(times)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="56,112")
    arguments = parser.parse_args()
    sizes, rounds = [int(size) for size in arguments.sizes.split(",")], arguments.rounds
    for title, (quantized, names, of) in CONVS.items():
        some = [conv for conv in convs(sizes) if (conv.groups > 1) == title.endswith("depthwise")]
        terms = [tuple(conv.positions * term for term in of(conv)) for conv in some]
        fitted(title, names, terms, [nanoseconds(conv, quantized=quantized, rounds=rounds) for conv in some])
    products = [Product(size**2, *widths) for size in sizes for widths in MATMULS]
    for quantized in (False, True):
        terms = [
            (p.positions * p.inputs * p.outputs, p.positions * p.inputs, p.positions * p.outputs, p.positions) for p in products
        ]
        times = [nanoseconds(p, quantized=quantized, rounds=rounds) for p in products]
        fitted(f"{'int8' if quantized else 'float'}, MatMul", ("K N", "K", "N", "1"), terms, times)


if __name__ == "__main__":
    main()
