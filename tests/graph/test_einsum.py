"""Einsum as the matrix product that it is, on small whole numbers, which are exact in any order."""

from __future__ import annotations

import numpy as np
import pytest
from equality import ops, parse, prepare_and_compare, stored

from onnxcomp.pipeline import quantize

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "h": 7}
LAYERS = [
    ("ab,bc->ac", ["MatMul"]),
    ("ab,bc", ["MatMul"]),
    ("ab,cb->ac", ["MatMul"]),
    ("ab,bc->ca", ["MatMul", "Transpose"]),
    ("abc,cd->abd", ["MatMul"]),
    ("abc,bd->acd", ["Transpose", "MatMul"]),
    ("abc,cde->abde", ["MatMul", "Reshape"]),
    ("abcd,cde->abe", ["Reshape", "MatMul"]),
    ("abcd,cdeh->abeh", ["Reshape", "MatMul", "Reshape"]),
    ("abcd,dce->abe", ["Transpose", "Reshape", "MatMul"]),
    ("abc,cde->adbe", ["MatMul", "Reshape", "Transpose"]),
    ("...c,cd->...d", ["MatMul"]),
]
PRODUCTS = [
    ("ab,bc->ac", ["MatMul"]),
    ("abcd,aecd->aceb", ["Transpose", "Transpose", "MatMul"]),
    ("abcd,aecd->acbe", ["Transpose", "Transpose", "MatMul"]),
    ("acbe,aecd->abcd", ["Transpose", "MatMul", "Transpose"]),
    ("...ab,...bc->...ac", ["MatMul"]),
    ("abhc,hdc->abhd", ["Transpose", "Transpose", "MatMul", "Transpose"]),
    ("hdc,abhc->abhd", ["Transpose", "Transpose", "MatMul", "Transpose"]),
]
LEFT = [
    ("aab,bc->ac", (2, 2, 3), (3, 4)),
    ("ab,bc->a", (2, 3), (3, 4)),
    ("abc,cde->abd", (2, 3, 4), (4, 5, 6)),
    ("ab,cd->abcd", (2, 3), (4, 5)),
    ("abc,acd->abd", (2, 3, 4), (2, 4, 5)),
    ("ab,b->a", (2, 3), (3,)),
    ("...ab,bc->a...c", (2, 4, 3), (3, 5)),
    ("...c,cde->...de", (2, 4), (4, 5, 6)),
]


def sizes_of(term: str) -> tuple[int, ...]:
    return tuple(SIZES[c] for c in term.replace("...", "eh"))


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(-4, 5, shape).astype(np.float32)


def declared(name: str, shape: tuple[int, ...]) -> str:
    return f"float[{','.join(map(str, shape))}] {name}"


def terms(equation: str) -> tuple[str, str]:
    left, right = equation.partition("->")[0].split(",")
    return left, right


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize(("equation", "wanted"), LAYERS)
def test_a_constant_becomes_the_weight_of_a_matmul(equation: str, wanted: list[str], constant: int):
    left, right = terms(equation)
    x, w = integers(*sizes_of(left)), integers(*sizes_of(right))
    if constant == 0 and "->" in equation:  # the same with the weight first
        equation = f"{right},{left}->{equation.partition('->')[2]}"
    order = "w, x" if constant == 0 and "->" in equation else "x, w"
    made = np.einsum(equation, *((w, x) if order == "w, x" else (x, w)))
    text = (
        f'g ({declared("x", x.shape)}) => ({declared("y", made.shape)}) {{ [e] y = Einsum<equation = "{equation}">({order}) }}'
    )

    prepared = prepare_and_compare(parse(text, {"w": w}), {"x": x})

    assert ops(prepared.model) == wanted
    assert [node.name for node in prepared.model.graph.node if node.op_type == "MatMul"] == ["e"]
    assert [a.ndim for name, a in stored(prepared.model).items() if a.dtype == np.float32] == [2]
    assert "Einsum nodes written as matrix products: 1." in prepared.notes


@pytest.mark.parametrize(("equation", "wanted"), PRODUCTS)
def test_two_activations_are_multiplied_between_transposes(equation: str, wanted: list[str]):
    feeds = {name: integers(*sizes_of(term)) for name, term in zip("xz", terms(equation), strict=True)}
    made = np.einsum(equation, *feeds.values())
    ports = ", ".join(declared(name, a.shape) for name, a in feeds.items())
    text = f'g ({ports}) => ({declared("y", made.shape)}) {{ y = Einsum<equation = "{equation}">(x, z) }}'

    assert ops(prepare_and_compare(parse(text), feeds).model) == wanted


@pytest.mark.parametrize("stored_second", [False, True])
@pytest.mark.parametrize(("equation", "left", "right"), LEFT)
def test_what_is_no_matrix_product_stays(equation: str, left: tuple[int, ...], right: tuple[int, ...], stored_second: bool):
    x, w = integers(*left), integers(*right)
    is_product = equation == "abc,acd->abd" and not stored_second  # a batch of products, where nothing is stored
    ports = declared("x", left) + ("" if stored_second else f", {declared('w', right)}")
    made = declared("y", np.einsum(equation, x, w).shape)
    text = f'g ({ports}) => ({made}) {{ y = Einsum<equation = "{equation}">(x, w) }}'

    prepared = prepare_and_compare(
        parse(text, {"w": w} if stored_second else {}), {"x": x} if stored_second else {"x": x, "w": w}
    )

    assert ops(prepared.model) == (["MatMul"] if is_product else ["Einsum"])


@pytest.mark.parametrize("bias", [(5, 6), (1, 1, 5, 6)])
def test_a_constant_added_behind_is_the_bias_of_the_product(bias: tuple[int, ...]):
    x, w, b = integers(2, 3, 4), integers(4, 5, 6), integers(*bias)
    text = 'g (float[2,3,4] x) => (float[2,3,5,6] y) { h = Einsum<equation = "abc,cde->abde">(x, w) [add] y = Add(h, b) }'

    prepared = prepare_and_compare(parse(text, {"w": w, "b": b}), {"x": x})

    assert ops(prepared.model) == ["MatMul", "Add", "Reshape"]
    assert stored(prepared.model)["add.bias"].shape == (30,)


@pytest.mark.parametrize(
    "behind", ["y = Add(h, b) z = Identity(h)", "z = Relu(h) y = Add(h, b)", "y = Add(h, row) z = Relu(y)"]
)
def test_an_add_stays_where_it_is_no_bias(behind: str):
    weights = {"w": integers(4, 5, 6), "b": integers(5, 6), "row": integers(6)}
    ports = "(float[2,3,4] x) => (float[2,3,5,6] y, float[2,3,5,6] z)"
    text = f'g {ports} {{ h = Einsum<equation = "abc,cde->abde">(x, w) {behind} }}'

    found = ops(prepare_and_compare(parse(text, weights), {"x": integers(2, 3, 4)}).model)

    assert found[:2] == ["MatMul", "Reshape"]


def test_attention_of_einsums_is_quantized_like_any_other():
    """Keras's MultiHeadAttention: four layers, two products, and heads that are rotated."""
    rng = np.random.default_rng(0)
    weights = {k: rng.normal(size=(16, 2, 8)).astype(np.float32) / 4 for k in ("q", "k", "v")}
    weights |= {f"{k}b": rng.normal(size=(2, 8)).astype(np.float32) for k in ("q", "k", "v")}
    weights |= {"o": rng.normal(size=(2, 8, 16)).astype(np.float32) / 4, "ob": rng.normal(size=16).astype(np.float32)}
    ways = "".join(f'[{k}] {k}1 = Einsum<equation = "abc,cde->abde">(x, {k}) {k}2 = Add({k}1, {k}b) ' for k in ("q", "k", "v"))
    text = f"""g (float[N,5,16] x) => (float[N,5,16] y) {{ {ways}
        s = Einsum<equation = "aecd,abcd->acbe">(k2, q2) p = Softmax(s)
        m = Einsum<equation = "acbe,aecd->abcd">(p, v2) [o] o1 = Einsum<equation = "abcd,cde->abe">(m, o) y = Add(o1, ob) }}"""
    feeds = [{"x": rng.normal(size=(1, 5, 16)).astype(np.float32)} for _ in range(16)]

    report = quantize(parse(text, weights), feeds).report

    assert [site.name for site in report.sites] == ["q", "k", "v", "o"]
    assert all(site.integer for site in report.sites)
    assert any("attention layers: 1" in note for note in report.notes)
    assert report.verification.sqnr_db > 30
