"""Which outputs are picked, and from what."""

from __future__ import annotations

import numpy as np
import pytest
from equality import parse

from onnxcomp import runtime
from onnxcomp.comparison import compare
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.selection import compared
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Recipe

W = {"w": np.ones((8, 6), np.float32), "v": np.ones((6, 4), np.float32), "k": np.array([3]), "zero": np.float32(0)}
MATMUL = "h = MatMul(x, w)"


def prepared(outputs: str, body: str) -> Prepared:
    text = f"g (float[N,8] x, int64[N] ids) => ({outputs}) {{ {MATMUL} {body} }}"
    return prepare(parse(text, W, opset=21), runtime.infer_types)


@pytest.mark.parametrize(
    ("outputs", "body", "picked", "watched"),
    [
        ("float[N,6] h", "", [], []),
        ("int64[N,1] y", "y = ArgMax<axis = -1>(h)", ["y"], ["h"]),
        ("float[N,3] y, int64[N,3] i", "y, i = TopK(h, k)", ["y", "i"], ["h"]),
        ("float[N,6] h, int64[N,1] y", "y = ArgMax<axis = -1>(h)", ["y"], []),
        ("float[M] y", "s = Sigmoid(h) c = Greater(h, zero) y = Compress(s, c)", ["y"], ["h", "s"]),
        ("int64[2,M] y", "c = Greater(ids, k) y = NonZero(c)", [], []),
        ("int64[2] y", "s = Relu(h) y = Shape(s)", [], []),
        ("int64[2] y", "c = Greater(h, zero) n = NonZero(c) y = Shape(n)", ["y"], ["h"]),
        ("float[N,4] y", "g, i = TopK(h, k) r = Gather<axis = 1>(h, ids) y = MatMul(r, v)", [], []),
        ("float[N,4] y", "g, i = TopK(h, k) c = CastLike(i, h) r = ReduceSum(c) q = Add(h, r) y = MatMul(q, v)", [], []),
        ("float[M,4] y", "c = Greater(h, zero) n = NonZero(c) q = GatherND(h, n) y = Identity(q)", ["y"], ["h"]),
        ("float[N,6] y", "z, i = TopK(h, k) y = ScatterElements<axis = 1>(h, i, z)", [], []),
    ],
)
def test_what_is_picked_and_from_what(outputs: str, body: str, picked: list[str], watched: list[str]):
    found = prepared(outputs, body)

    assert (found.picked, list(found.watched)) == (frozenset(picked), watched)
    judged = {t.name for t in compared(found.graph)}
    assert judged >= set(watched)
    assert not judged & found.picked


DETECTOR = """g (float[1,3,16,16] x) => (float[D,4] boxes, float[D] scores) {
    [stem] a = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w) r = Relu(a) [head] b = Conv(r, v) f = Reshape(b, sizes)
    corners = Slice(f, zero, four, one) classes = Slice(f, four, end, one)
    moved = Transpose<perm = [0,2,1]>(corners) sure = Sigmoid(classes)
    chosen = NonMaxSuppression(moved, sure, most, half, half)
    column = Slice(chosen, two, end, one) places = Squeeze(column, one)
    whole = Squeeze(moved, zero) boxes = Gather(whole, places)
    best = ReduceMax<keepdims = 0>(sure, one) flat = Squeeze(best, zero) scores = Gather(flat, places) }"""


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_a_detector_with_its_nonmaxsuppression_is_judged_in_front_of_it(recipe: str, rng: np.random.Generator):
    weights = {"w": 0.2 * rng.normal(size=(8, 3, 3, 3)), "v": 0.3 * rng.normal(size=(68, 8, 1, 1)), "half": np.array([0.5])}
    numbers = {"sizes": [1, 68, -1], "zero": [0], "one": [1], "two": [2], "four": [4], "end": [99], "most": [20]}
    weights = {k: a.astype(np.float32) for k, a in weights.items()} | {k: np.array(a) for k, a in numbers.items()}
    model, data = parse(DETECTOR, weights, opset=21), rng.normal(size=(24, 3, 16, 16)).astype(np.float32)

    found = quantize(model, data, Recipe(bits=recipe))  # pyright: ignore[reportArgumentType]

    assert [value.name for value in found.model.graph.output] == ["boxes", "scores"]
    assert 10 < found.report.verification.sqnr_db < 60
    outputs = {output.name: output for output in compare(model, found.model, data).outputs}
    assert outputs.keys() == {"boxes", "scores", "moved", "sure", "whole", "flat"}
    assert outputs["boxes"].other_shapes == outputs["scores"].other_shapes > 0
    assert (outputs["boxes"].sqnr_db, outputs["boxes"].answers) == (None, 0)
    assert 10 < (outputs["moved"].sqnr_db or 0) < 60
