"""Affine layers in their one form. A tolerance is a count of roundings to float32 of numbers below a power of two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from equality import Feeds, ops, parse, prepare_and_compare, stored

from onnxcomp.graph.prepare import prepare
from onnxcomp.runtime import infer_types

Arithmetic = Callable[[np.ndarray], np.ndarray]
EPS = float(np.finfo(np.float32).eps)
W = np.float32([[1, -2, 3, 0.5], [4, 5, -6, 1], [7, 8, 10, -1]])
B = np.float32([0.5, -1, 2, 4])
X = {"x": np.float32([[1, -2, 3], [-4, 5, 0.5]])}
IMAGE = {"x": np.random.default_rng(0).integers(-8, 8, (2, 4, 5, 5)).astype(np.float32)}
KERNEL = np.random.default_rng(1).integers(-4, 4, (6, 2, 3, 3)).astype(np.float32)
NORM: Feeds = {
    "gamma": np.float32([1, -2, 0.5, 3, 0.1, 1]), "beta": np.float32([0, 1, -1, 2, 0.5, 0]),
    "mean": np.float32([1, 0, -3, 2, 0.3, 10]), "var": np.float32([1, 4, 0.25, 2, 1e-3, 9]),
}  # fmt: skip
NORMALIZE = "y = BatchNormalization(h, gamma, beta, mean, var)"
LAYERS = [
    ("h = Conv<group = 2>(x, w)", (6, 2, 3, 3)),
    ("h = Conv<group = 2, pads = [1, 1, 1, 1]>(x, w, bias)", (6, 2, 3, 3)),
    ("h = Conv(x, w, )", (6, 4, 3, 3)),
    ("h = ConvTranspose<group = 2, strides = [2, 2]>(x, w, bias)", (4, 3, 3, 3)),
    ("h = ConvTranspose(x, w)", (4, 6, 3, 3)),
]


def integers(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(2).integers(-4, 4, shape).astype(np.float32)


def conv_bound(norm_gain: float) -> float:
    """Sums of 36 products below 32 and their scaled form differ by some 40 roundings of numbers below 2048 · gain."""
    return 40 * 2048 * norm_gain * EPS / 2


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_batchnorm_is_merged_into_the_convolution_before_it(layer: str, shape: tuple[int, ...]):
    weights = {"w": integers(shape), "bias": np.float32([1, 2, 3, -1, -2, -3]), **NORM}
    text = f"g (float[N,4,5,5] x) => (float[N,6,H,V] y) {{ [conv] {layer} {NORMALIZE} }}"
    gain = float(np.max(np.abs(NORM["gamma"]) / np.sqrt(NORM["var"] + 1e-5)))

    prepared = prepare_and_compare(parse(text, weights), IMAGE, tolerance=conv_bound(gain))

    (node,) = prepared.graph.nodes
    assert (node.name, [t.name for t in node.outputs]) == ("conv", ["y"])
    assert {t.name for t in node.inputs} == {"x", "w", "bias" if "bias" in layer else "beta"}
    scale = NORM["gamma"].astype(np.float64) / np.sqrt(NORM["var"].astype(np.float64) + 1e-5)
    offset = weights["bias"].astype(np.float64) if "bias" in layer else 0.0
    bias = ((offset - NORM["mean"]) * scale + NORM["beta"]).astype(np.float32)
    np.testing.assert_array_equal(node.inputs[2].values, bias)
    assert "BatchNormalization and arithmetic with constants merged into the layers before them: 1." in prepared.notes


def test_batchnorm_after_a_depthwise_1d_convolution_is_merged():
    weights = {"w": integers((6, 1, 3)), **NORM}
    text = f"g (float[N,6,9] x) => (float[N,6,7] y) {{ h = Conv<group = 6>(x, w) {NORMALIZE} }}"
    x = np.random.default_rng(0).integers(-8, 8, (2, 6, 9)).astype(np.float32)

    prepared = prepare_and_compare(parse(text, weights), {"x": x}, tolerance=conv_bound(4.0))

    assert ops(prepared.model) == ["Conv"]


def test_batchnorm_is_merged_into_the_gemm_before_it():
    weights = {"w": W.T.copy(), **{k: v[:4] for k, v in NORM.items()}}
    text = f"g (float[N,3] x) => (float[N,4] y) {{ h = Gemm<transB = 1>(x, w) {NORMALIZE} }}"

    prepared = prepare_and_compare(parse(text, weights), X, tolerance=conv_bound(0.25))

    assert ops(prepared.model) == ["Gemm"]


@pytest.mark.parametrize("text", [
    "h = Conv(x, w) y = BatchNormalization(h, gamma, beta, mean, var) z = Relu(h)",
    "z = Conv(x, w) y = BatchNormalization(z, gamma, beta, mean, var)",
    "v = Abs(w) h = Conv(x, v) y = BatchNormalization(h, gamma, beta, mean, var) z = Relu(y)",
    "h = Relu(x) y = BatchNormalization(h, gamma, beta, mean, var) z = Relu(y)",
    "u = Abs(beta) h = Conv(x, w) y = BatchNormalization(h, gamma, u, mean, var) z = Relu(y)",
])  # fmt: skip
def test_a_batchnorm_that_cannot_be_merged_stays(text: str):
    """The convolution's output is read elsewhere, is an output itself, or something is not constant."""
    weights = {"w": integers((6, 6, 1, 1)), **NORM}
    model = parse(f"g (float[N,6,4,4] x) => (float[N,6,4,4] y, float[N,6,4,4] z) {{ {text} }}", weights)

    prepared = prepare_and_compare(model, {"x": integers((2, 6, 4, 4))})

    assert "BatchNormalization" in ops(prepared.model)


def test_two_convolutions_of_one_weight_are_merged_each_with_its_own_batchnorm():
    weights = {"w": integers((6, 6, 1, 1)), **NORM, "gamma2": np.float32([2, 1, 1, 1, 1, 2])}
    text = """g (float[N,6,4,4] x) => (float[N,6,4,4] y) {
        a = Conv(x, w)
        p = BatchNormalization(a, gamma, beta, mean, var)
        b = Conv(p, w)
        y = BatchNormalization(b, gamma2, beta, mean, var)
    }"""

    prepared = prepare_and_compare(parse(text, weights), {"x": integers((2, 6, 4, 4))}, tolerance=conv_bound(64.0))

    assert ops(prepared.model) == ["Conv", "Conv"]
    assert len(stored(prepared.model)) == 4


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), (), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias", ["", ", bias"])
@pytest.mark.parametrize("flipped", [True, False])
def test_an_add_per_channel_becomes_the_bias(shape: tuple[int, ...], bias: str, flipped: bool):
    """Integers, so that the order of the sums does not show."""
    weights = {"w": KERNEL, "c": integers(shape), "bias": integers((6,))}
    add = "Add(c, h)" if flipped else "Add(h, c)"
    text = f"g (float[N,4,5,5] x) => (float[N,6,3,3] y) {{ [conv] h = Conv<group = 2>(x, w{bias}) y = {add} }}"

    (node,) = prepare_and_compare(parse(text, weights), IMAGE).graph.nodes

    assert node.name == "conv"
    expected = np.broadcast_to(weights["c"].ravel() + (weights["bias"] if bias else 0), (6,))
    np.testing.assert_array_equal(node.inputs[2].values, expected)


def test_adds_and_batchnorm_in_a_row_are_merged_into_one_convolution():
    weights = {"w": KERNEL, "c": integers((6, 1, 1)), "d": integers((1, 6, 1, 1)), **NORM}
    text = """g (float[N,4,5,5] x) => (float[N,6,3,3] y) {
        a = Conv<group = 2>(x, w)
        b = Add(a, c)
        p = BatchNormalization(b, gamma, beta, mean, var)
        y = Add(d, p)
    }"""
    gain = float(np.max(np.abs(NORM["gamma"]) / np.sqrt(NORM["var"] + 1e-5)))

    prepared = prepare_and_compare(parse(text, weights), IMAGE, tolerance=conv_bound(gain))

    assert ops(prepared.model) == ["Conv"]


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), ()])
@pytest.mark.parametrize("bias", ["", ", bias"])
@pytest.mark.parametrize(
    ("op", "scale", "shift"),
    [
        ("Mul(h, c)", lambda c: c, lambda c: 0 * c), ("Mul(c, h)", lambda c: c, lambda c: 0 * c),
        ("Div(h, c)", lambda c: 1 / c, lambda c: 0 * c), ("Sub(h, c)", lambda c: 0 * c + 1, lambda c: -c),
        ("Sub(c, h)", lambda c: 0 * c - 1, lambda c: c),
    ],
    ids=["Mul", "Mul, flipped", "Div", "Sub", "Sub, flipped"],
)  # fmt: skip
@pytest.mark.parametrize(("layer", "kernel"), [LAYERS[1], LAYERS[3]], ids=["Conv", "ConvTranspose"])
def test_arithmetic_with_a_constant_becomes_part_of_the_layer_before_it(
    shape: tuple[int, ...], bias: str, op: str, scale: Arithmetic, shift: Arithmetic, layer: str, kernel: tuple[int, ...]
):
    """Powers of two, so that the order of the products does not show."""
    c = np.float32([1, 2, -4, 0.5, -0.25, 8])[: int(np.prod(shape))].reshape(shape)
    weights = {"w": integers(kernel), "c": c, "bias": integers((6,))}
    layer = layer if bias else layer.replace(", bias", "")
    text = f"g (float[N,4,5,5] x) => (float[N,6,H,V] y) {{ [conv] {layer} y = {op} }}"

    prepared = prepare_and_compare(parse(text, weights), IMAGE)

    (node,) = prepared.graph.nodes
    offset = np.broadcast_to(shift(c).ravel(), 6) + (weights["bias"] * np.broadcast_to(scale(c).ravel(), 6) if bias else 0)
    found = node.inputs[2].values if len(node.inputs) > 2 else np.zeros(6)
    np.testing.assert_array_equal(found, offset)
    assert "BatchNormalization and arithmetic with constants merged into the layers before them: 1." in prepared.notes


@pytest.mark.parametrize("op", ["Div(h, c)", "Div(c, h)", "Mul(h, h)"])
def test_what_is_no_scale_stays(op: str):
    weights = {"w": KERNEL, "c": np.float32(0)} if "c" in op else {"w": KERNEL}
    text = f"g (float[N,4,5,5] x) => (float[N,6,3,3] y) {{ h = Conv<group = 2>(x, w) k = {op} y = Clip(k) }}"
    model = parse(text, weights)

    assert ops(prepare(model, infer_types).model) == ["Conv", op[:3], "Clip"]


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (1,), ()])
@pytest.mark.parametrize("layer", ["Conv<group = 2>(h, w)", "Conv<group = 2>(h, w, bias)"])
@pytest.mark.parametrize("body", [
    "h = Mul(r, c)", "h = Div(r, c)", "h = Add(c, r)", "h = Sub(r, c)", "k = Mul(r, c) h = Add(k, c)",
    "k = Add(r, c) h = Mul(c, k)", "k = Mul(r, c) l = Sub(k, c) h = Div(l, c)",
])  # fmt: skip
def test_what_stands_in_front_of_a_convolution_without_padding_is_merged_into_it(shape: tuple[int, ...], layer: str, body: str):
    c = np.float32([1, 2, -4, 0.5])[: int(np.prod(shape))].reshape(shape)
    text = f"g (float[N,4,5,5] x) => (float[N,6,3,3] y) {{ r = Relu(x) {body} [conv] y = {layer} }}"

    prepared = prepare_and_compare(parse(text, {"w": KERNEL, "c": c, "bias": integers((6,))}), IMAGE)

    assert ops(prepared.model) == ["Relu", "Conv"]
    assert [t.name for t in prepared.graph.nodes[1].inputs[:1]] == ["r"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("h = Mul(r, c)", []), ("h = Add(r, c)", ["Add"]), ("k = Mul(r, c) h = Add(k, one)", ["Add"]),
        ("k = Add(r, c) h = Mul(k, c)", ["Add"]), ("k = Mul(r, c) l = Mul(k, two) h = Sub(l, one)", ["Sub"]),
        ("k = Mul(r, none) h = Add(k, one)", ["Mul", "Add"]), ("k = Mul(r, c) h = Sub(k, one)", ["Sub"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("padding", ["pads = [1, 1, 1, 1]", 'auto_pad = "SAME_UPPER"'])
def test_in_front_of_a_padded_convolution_a_shift_stays_for_the_padding_is_zero(body: str, left: list[str], padding: str):
    c = np.float32([1, 2, -4, 0.5]).reshape(4, 1, 1)
    weights = {"w": KERNEL, "c": c, "one": np.float32(1), "two": np.float32(2), "none": np.float32(0)}
    used = {name: values for name, values in weights.items() if f", {name})" in f"{body}, w)"}
    text = f"g (float[N,4,5,5] x) => (float[N,6,5,5] y) {{ r = Relu(x) {body} y = Conv<group = 2, {padding}>(h, w) }}"

    prepared = prepare_and_compare(parse(text, used), IMAGE)

    assert ops(prepared.model) == ["Relu", *left, "Conv"]


def test_a_shift_that_moves_in_front_of_a_scale_makes_a_tensor_of_another_name():
    body = "k = Mul(x, two) h = Add(k, one) y = Conv<group = 2, pads = [1, 1, 1, 1]>(h, w)"
    text = f"g (float[N,4,5,5] x) => (float[N,6,5,5] y) {{ {body} }}"

    prepared = prepare_and_compare(parse(text, {"w": KERNEL, "two": np.float32(2), "one": np.float32(1)}), IMAGE)

    add, conv = prepared.graph.nodes
    assert [t.name for t in add.outputs] == ["h/unscaled"]
    assert add.inputs[1].values == np.float32(0.5)
    np.testing.assert_array_equal(conv.inputs[1].values, 2 * KERNEL)


@pytest.mark.parametrize("more", ["z = Neg(h)", "z = Identity(h)"])
def test_what_others_read_too_stays_in_front(more: str):
    text = f"g (float[N,4,5,5] x) => (float[N,6,3,3] y, float[N,4,5,5] z) {{ h = Mul(x, c) y = Conv<group = 2>(h, w) {more} }}"

    prepared = prepare_and_compare(parse(text, {"w": KERNEL, "c": np.float32(2)}), IMAGE)

    assert "Mul" in ops(prepared.model)


@pytest.mark.parametrize("shape", [(6, 3, 1), (3,), (1, 1, 6, 3, 3), (2, 6, 1, 1)])
def test_an_add_that_is_not_per_channel_stays(shape: tuple[int, ...]):
    rank = ",".join("ABCDE"[: max(4, len(shape))])
    text = f"g (float[N,4,5,5] x) => (float[{rank}] y) {{ h = Conv<group = 2>(x, w) y = Add(h, c) }}"

    prepared = prepare_and_compare(parse(text, {"w": KERNEL, "c": integers(shape)}), IMAGE)

    assert ops(prepared.model) == ["Conv", "Add"]
    assert len(prepared.graph.nodes[0].inputs) == 2


def test_a_residual_add_stays():
    text = "g (float[N,4,5,5] x) => (float[N,4,5,5] y) { h = Conv(x, w) y = Add(h, x) }"

    assert ops(prepare_and_compare(parse(text, {"w": integers((4, 4, 1, 1))}), IMAGE).model) == ["Conv", "Add"]


@pytest.mark.parametrize("bias", [None, B, B[None], B[:1], B[0], B[None, :1]], ids=lambda b: str(np.shape(b)))
@pytest.mark.parametrize(("trans_a", "trans_b"), list(product((0, 1), repeat=2)))
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.0)])
def test_every_constant_gemm_gets_the_plain_form(
    bias: np.ndarray | None, trans_a: int, trans_b: int, alpha: float, beta: float
):
    """Powers of two, so that the order of the products does not show."""
    weights = {"w": W.T.copy() if trans_b else W} | ({} if bias is None else {"c": bias})
    flags = f"alpha = {alpha}, beta = {beta}, transA = {trans_a}, transB = {trans_b}"
    shape = "3,N" if trans_a else "N,3"
    text = f"g (float[{shape}] x) => (float[N,4] y) {{ [fc] y = Gemm<{flags}>(x, w{'' if bias is None else ', c'}) }}"

    prepared = prepare_and_compare(parse(text, weights), {"x": X["x"].T.copy() if trans_a else X["x"]})

    assert ops(prepared.model) == ["Transpose"] * trans_a + ["Gemm"]
    node = prepared.graph.nodes[-1]
    assert node.name == "fc"
    numbers = {key: node.attrs.get(key, default) for key, default in (("alpha", 1.0), ("beta", 1.0))}
    assert numbers == {"alpha": 1.0, "beta": 1.0}
    assert not node.attrs.get("transA", 0)
    assert not node.attrs.get("transB", 0)
    np.testing.assert_array_equal(node.inputs[1].values, alpha * W)
    if bias is None or beta == 0.0:
        assert len(node.inputs) == 2
    else:
        np.testing.assert_array_equal(node.inputs[2].values, np.broadcast_to(beta * np.ravel(bias), (4,)))


def test_an_alpha_is_rounded_once():
    """One rounding of the weight by alpha, and one of each product and sum: 8 roundings of numbers below 64."""
    text = "g (float[N,3] x) => (float[N,4] y) { y = Gemm<alpha = 0.3>(x, w) }"

    prepared = prepare_and_compare(parse(text, {"w": W}), X, tolerance=8 * 64 * EPS / 2)

    alpha = float(np.float32(0.3))
    np.testing.assert_array_equal(stored(prepared.model)["w"], (alpha * W.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("text", [
    "s = MatMul(x, w) y = Gemm<transA = 1, alpha = 0.5>(eye, s)",
    "r = Relu(rows) y = Gemm<beta = 0.5>(x, w, r)",
    "y = Gemm<beta = 0.5>(x, w, rows)",
    "s = ReduceMax<keepdims = 0>(x) q = Mul(w, s) y = Gemm<alpha = 0.5>(x, q)",
    "s = ReduceMax<keepdims = 0>(x) q = Mul(w, s) y = Gemm(x, q, bias)",
])  # fmt: skip
def test_a_gemm_whose_weight_or_rows_are_not_constant_stays(text: str):
    weights = {"w": W, "rows": np.float32([[1, 2, 3, 4], [5, 6, 7, 8]]), "eye": np.eye(2, dtype=np.float32), "bias": B}
    model = parse(f"g (float[2,3] x) => (float[2,4] y) {{ {text} }}", weights)
    (before,) = [node for node in model.graph.node if node.op_type == "Gemm"]

    (after,) = [node for node in prepare_and_compare(model, X).model.graph.node if node.op_type == "Gemm"]

    assert (after.attribute, after.input) == (before.attribute, before.input)


def test_two_gemms_of_one_weight_share_it_afterwards():
    text = "g (float[N,3] x) => (float[N,3] y) { h = Gemm<transB = 1>(x, w, c) y = Gemm<transB = 1>(h, w, c) }"
    weights = {"w": W[:, :3].copy(), "c": np.float32([[1]])}

    prepared = prepare_and_compare(parse(text, weights), X)

    first, second = prepared.graph.nodes
    assert first.inputs[1] is second.inputs[1]
    assert first.inputs[2] is second.inputs[2]
    assert len(stored(prepared.model)) == 2


def test_a_weight_that_others_read_too_is_left_for_them():
    """A tied embedding: Gather reads the rows that the Gemm reads as columns."""
    text = "g (int64[N] ids) => (float[N,3] y) { e = Gather(w, ids) y = Gemm<transB = 1>(e, w) }"
    weight = W[:, :3].copy()

    prepared = prepare_and_compare(parse(text, {"w": weight}), {"ids": np.array([2, 0])})

    constants = stored(prepared.model)
    np.testing.assert_array_equal(constants["w"], weight)
    np.testing.assert_array_equal(constants["w_2"], weight.T)


@pytest.mark.parametrize("add", ["Add(h, c)", "Add(c, h)"])
def test_matmul_and_its_bias_stay_two_nodes(add: str):
    text = f"g (float[N,T,3] x) => (float[N,T,4] y) {{ h = MatMul(x, w) y = {add} }}"

    prepared = prepare_and_compare(parse(text, {"w": W, "c": B}), {"x": X["x"][None]})

    assert ops(prepared.model) == ["MatMul", "Add"]
