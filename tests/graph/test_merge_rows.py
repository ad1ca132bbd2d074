"""Factors and norms behind matrix products, merged into them: powers of two and whole numbers, which are exact."""

from __future__ import annotations

import re

import numpy as np
import pytest
from equality import ops, parse, prepare_and_compare, stored
from onnx import ModelProto

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.integers(-4, 5, (4, 8)).astype(np.float32), "bias": RNG.integers(-4, 5, 8).astype(np.float32),
    "gain": np.float32([1, 2, 0.5, 4, -1, -2, 0.25, 1]), "half": np.float32(0.5), "one": np.float32([[2]]),
    "gamma": np.float32([1, 2, 0.5, -1, 4, 1, 2, 1]), "beta": np.float32([0, 1, -1, 2, 3, 0, 0, 1]),
    "mean": np.float32([1, 0, -3, 2, 0, 4, 0, 0]), "var": np.float32([1, 4, 0.25, 1, 16, 1, 1, 4]),
    "whole": np.array([2, 3, 8]), "heads": np.array([2, 3, 2, 4]), "rows": np.array([6, 8]), "pairs": np.array([2, 12, 2]),
    "three": np.float32([[1], [2], [4]]), "pair": np.float32([2, 4]), "table": RNG.integers(-4, 5, (3, 8)).astype(np.float32),
}  # fmt: skip
NORM = "BatchNormalization<epsilon = 0.0>"
FEED = {"x": RNG.integers(-4, 5, (2, 3, 4)).astype(np.float32), "r": RNG.integers(-4, 5, (6, 4)).astype(np.float32)}
MERGED = [
    ("m = MatMul(x, w) b = Add(m, bias) y = Mul(b, gain)", 3, ["MatMul", "Add"]),
    ("m = MatMul(x, w) b = Add(bias, m) y = Mul(gain, b)", 3, ["MatMul", "Add"]),
    ("m = MatMul(x, w) b = Add(m, bias) y = Div(b, gain)", 3, ["MatMul", "Add"]),
    ("m = MatMul(x, w) b = Add(m, table) y = Mul(b, one)", 3, ["MatMul", "Add"]),
    ("m = MatMul(x, w) y = Mul(m, gain)", 3, ["MatMul"]),
    (f"m = MatMul(x, w) f = Flatten<axis = 2>(m) n = {NORM}(f, gamma, beta, mean, var) y = Reshape(n, whole)", 3,
     ["MatMul", "Add", "Flatten", "Reshape"]),
    (f"m = MatMul(x, w) b = Add(m, bias) f = Reshape(b, rows) n = {NORM}(f, gamma, beta, mean, var) y = Reshape(n, whole)", 3,
     ["MatMul", "Add", "Reshape", "Reshape"]),
    ("m = MatMul(x, w) b = Add(m, bias) h = Reshape(b, heads) t = Transpose<perm = [0, 2, 1, 3]>(h) y = Mul(t, half)", 4,
     ["MatMul", "Add", "Reshape", "Transpose"]),
    ("g = Gemm(r, w, bias) h = Reshape(g, whole) y = Mul(h, gain)", 3, ["Gemm", "Reshape"]),
    (f"g = Gemm(r, w) h = Reshape(g, rows) y = {NORM}(h, gamma, beta, mean, var)", 2, ["Gemm", "Reshape"]),
]  # fmt: skip
LEFT = [
    ("m = MatMul(x, w) z = Relu(m) y = Mul(m, gain)", (3, 3)),
    ("m = MatMul(x, w) z = Relu(m) y = Mul(z, gain)", (3, 3)),
    ("m = MatMul(x, w) y = Mul(m, three)", (3,)),
    ("m = MatMul(x, w) y = Mul(m, table)", (3,)),
    ("m = MatMul(x, w) h = Reshape(m, pairs) y = Mul(h, pair)", (3,)),
    ("m = MatMul(x, w) t = Transpose<perm = [1, 0, 2]>(m) y = Mul(t, gain)", (3,)),
    ("m = MatMul(x, w) y = Div(gain, m)", (3,)),
    ("a = Relu(x) y = Mul(a, half)", (3,)),
]


def model_of(text: str, *ranks: int) -> ModelProto:
    """A model of the text, whose outputs y and z have these ranks."""
    words = set(re.findall(r"\w+", text))
    outputs = ", ".join(f"float[{','.join('ABCD'[:rank])}] {name}" for name, rank in zip("yz", ranks, strict=False))
    given = "float[6,4] r" if "r" in words else "float[2,3,4] x"
    return parse(f"g ({given}) => ({outputs}) {{ {text} }}", {k: v for k, v in WEIGHTS.items() if k in words}, opset=21)


def feed_of(model: ModelProto) -> dict[str, np.ndarray]:
    return {port.name: FEED[port.name] for port in model.graph.input}


@pytest.mark.parametrize(("text", "rank", "wanted"), MERGED)
def test_what_scales_and_shifts_columns_becomes_part_of_the_product(text: str, rank: int, wanted: list[str]):
    model = model_of(text, rank)

    prepared = prepare_and_compare(model, feed_of(model))

    assert ops(prepared.model) == wanted
    assert "Arithmetic with constants merged into the matrix products before it: 1." in prepared.notes


def test_a_shape_that_is_asked_of_what_is_scaled_is_still_given():
    text = """g (float[2,3,4] x) => (float[2,2,3,4] y, int64[4] s) {
        m = MatMul(x, w) h = Reshape(m, heads) t = Transpose<perm = [0, 2, 1, 3]>(h) s = Shape(t) y = Mul(t, half) }"""

    prepared = prepare_and_compare(parse(text, {k: WEIGHTS[k] for k in ("w", "heads", "half")}), {"x": FEED["x"]})

    assert sorted(ops(prepared.model)) == ["MatMul", "Reshape", "Shape", "Transpose"]


def test_a_weight_that_another_product_reads_too_is_copied():
    text = "g (float[2,3,4] x) => (float[2,3,8] y, float[2,3,8] z) { m = MatMul(x, w) y = Mul(m, gain) z = MatMul(x, w) }"

    prepared = prepare_and_compare(parse(text, {k: WEIGHTS[k] for k in ("w", "gain")}), {"x": FEED["x"]})

    assert ops(prepared.model) == ["MatMul", "MatMul"]
    np.testing.assert_array_equal(stored(prepared.model)["w"], WEIGHTS["w"])


@pytest.mark.parametrize(("text", "ranks"), LEFT)
def test_what_is_more_than_a_factor_of_the_columns_stays(text: str, ranks: tuple[int, ...]):
    model = model_of(text, *ranks)

    assert ops(prepare_and_compare(model, feed_of(model)).model) == [node.op_type for node in model.graph.node]
