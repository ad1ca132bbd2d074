"""What is only taken away: Identity, Dropout and Casts that change nothing, with every name that leaves the graph kept."""

from __future__ import annotations

import numpy as np
import pytest
from equality import ops, parse, prepare_and_compare, stored

from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.fold import is_load_time, names_of_shapes

X = {"x": np.float32([[1, -2, 3], [-4, 5, 0.5]])}
W = np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 10]])


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("h = Identity(x) y = Relu(h)", [("Relu", ["x"], ["y"])]),
        ("h = Relu(x) y = Identity(h)", [("Relu", ["x"], ["y"])]),
        ("a = Relu(x) b = Identity(a) c = Identity(b) y = Neg(c)", [("Relu", ["x"], ["a"]), ("Neg", ["a"], ["y"])]),
        ("y = Identity(x)", [("Identity", ["x"], ["y"])]),
        ("h = Dropout(x, ratio) y = Neg(h)", [("Neg", ["x"], ["y"])]),
        ("h, m = Dropout(x, ratio, off) y = Neg(h)", [("Neg", ["x"], ["y"])]),
        ("v = Identity(w) y = MatMul(x, v)", [("MatMul", ["x", "w"], ["y"])]),
        ("a = Relu(x) y = Identity(a) b = Neg(a) z = Abs(b)", [("Relu", ["x"], ["y"])]),
    ],
)
def test_identity_and_dropout_are_removed(body: str, left: list[tuple[str, list[str], list[str]]]):
    weights = {"ratio": np.float32(0.5), "off": np.array(False), "w": W}
    model = parse(f"g (float[N,3] x) => (float[N,3] y) {{ {body} }}", weights)

    nodes = prepare_and_compare(model, X).model.graph.node

    assert [(node.op_type, [*node.input], [*node.output]) for node in nodes] == left


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Relu(x) b = Cast<to = 1>(a) y = Neg(b)", ["Relu", "Neg"]),
        ("a = Cast<to = 1>(x) y = Neg(a)", ["Neg"]),
        ("a = Neg(x) y = Cast<to = 1>(a)", ["Neg"]),
        ("a = Cast<to = 11>(x) b = Neg(a) y = Cast<to = 1>(b)", ["Cast", "Neg", "Cast"]),
        ("a = Cast<to = 7>(x) b = Cast<to = 7>(a) y = Cast<to = 1>(b)", ["Cast", "Cast"]),
    ],
)
def test_casts_to_the_type_that_is_there_are_removed(body: str, left: list[str]):
    prepared = prepare_and_compare(parse(f"g (float[N,3] x) => (float[N,3] y) {{ {body} }}"), X)

    assert ops(prepared.model) == left


def test_a_norm_with_casts_around_it_is_a_single_node():
    """Exporters write the types of a half-precision network down, where they change nothing too."""
    text = """g (float[N,3] x) => (float[N,3] y) {
        a = Relu(x) c = Cast<to = 1>(a) m = ReduceMean<axes = [-1]>(c) d = Sub(c, m) q = Pow(d, two)
        v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(d, s) f = Cast<to = 1>(n) g = Mul(f, w) y = Add(g, b)
    }"""
    weights = {"two": np.float32(2), "eps": np.float32(1e-5), "w": np.float32([1, 2, 3]), "b": np.float32([3, 2, 1])}

    prepared = prepare_and_compare(parse(text, weights, opset=17), X, tolerance=1e-6)

    assert ops(prepared.model) == ["Relu", "LayerNormalization"]


def test_two_names_of_one_tensor_both_stay_outputs():
    text = "g (float[N,3] x) => (float[N,3] a, float[N,3] b) { a = Relu(x) b = Identity(a) }"

    assert ops(prepare_and_compare(parse(text), X).model) == ["Relu", "Identity"]


def test_a_dropout_that_trains_or_whose_mask_is_read_stays():
    text = "g (float[N,3] x) => (float[N,3] y) { h, m = Dropout(x, ratio) k = Cast<to = 1>(m) y = Mul(h, k) }"

    assert "Dropout" in ops(prepare_and_compare(parse(text, {"ratio": np.float32(0.5)}), X).model)


def test_identity_in_front_of_and_around_bodies_keeps_the_bodies_working():
    text = """g (float[N,3] x, bool c) => (float[N,3] y) {
        h = Identity(x)
        v = Transpose(w)
        u = Identity(v)
        r = If<
            then_branch = t () => (float[N,3] p) { p = MatMul(h, u) },
            else_branch = e () => (float[N,3] q) { k = Identity(h) q = Add(k, k) }
        >(c)
        y = Identity(r)
    }"""
    for choice in (True, False):
        prepared = prepare_and_compare(parse(text, {"w": W}), {**X, "c": np.array(choice)})
        assert ops(prepared.model) == ["If"]
        assert [*stored(prepared.model)] == ["v"]


# --- what fixed axes make constant ------------------------------------------------------------------------------------


def test_what_is_made_of_shapes_and_constants_is_named():
    text = "s = Shape(x) z = Cast<to = 1>(s) r = Resize(c, , z) e = Add(z, r) y = Mul(x, e)"
    graph = to_graph(parse(f"g (float[N,2] x) => (float y) {{ {text} }}", {"c": np.ones((2, 2), np.float32)}))
    tensors = graph.tensors()

    assert names_of_shapes(graph) == {"s", "z", "r", "e"}
    assert [name for name in tensors if is_load_time(tensors[name], fixed=True)] == ["s", "z", "c", "r", "e"]
    assert [name for name in tensors if is_load_time(tensors[name])] == ["c"]
