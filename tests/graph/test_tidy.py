"""Tidying: the bias of a method becomes part of the layer's own, and the model computes the same."""

from __future__ import annotations

import re

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from equality import ops, parse, run, stored
from onnx import ModelProto, checker

from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Tape, apply
from onnxcomp.graph.sites import Site, find_sites
from onnxcomp.graph.tidy import Fold, fold_bias, is_load_time

F = np.float32
W = np.arange(12, dtype=F).reshape(4, 3) / 4
B = np.array([1, -2, 4], F)
SHIFT = np.array([0.5, 0.25, -8], F)
U, V = np.array([[1, 1], [-2, 1]], F), np.array([[1, 2, 3], [0.5, 0.25, -8]], F)
"""A table U V of two tokens; the last column of U is one."""


def shifted(model: ModelProto, table: bool = False) -> tuple[gs.Graph, Site, str]:
    """The graph with SHIFT, or the table, added behind its first site as a method does."""
    graph = to_graph(model)
    site, tape = find_sites(graph)[0], Tape("site/bias")
    if table:
        extra = tape("MatMul", tape.constant("u", U), tape.constant("v", V))
    else:
        extra = tape.constant("b", SHIFT if site.channel_axis == -1 else SHIFT.reshape(-1, *[1] * (site.rank - 2)))
    new = tape("Add", site.y, extra)
    apply(graph, "bias", tape, {site.y: new})
    return graph, site, tape.nodes[-1].name


def fold(model: ModelProto, table: bool = False) -> tuple[Fold | None, ModelProto]:
    """What was folded, and the model, checked and equal to the unfolded one; all numbers are exact in float32."""
    graph, site, add = shifted(model, table)
    before = to_model(graph, model)

    done = fold_bias(graph, site, add, "bias")

    after = to_model(graph, model)
    checker.check_model(after, full_check=True)
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).integers(-8, 9, size=shape).astype(F)
    for name, expected in run(before, {"x": x}).items():
        np.testing.assert_array_equal(run(after, {"x": x})[name], expected)
    return done, after


def matmul(body: str, shape: str = "N,4", y: str = "N,3") -> ModelProto:
    constants = {"w": W, "b": B}
    used = {key: value for key, value in constants.items() if re.search(rf"\b{key}\b", body)}
    return parse(f"g (float[{shape}] x) => (float[{y}] y) {{ {body} }}", used, opset=21)


def conv(body: str) -> ModelProto:
    weights = {"k": np.ones((3, 4, 1, 1), F)} | ({"b": B} if " b)" in body else {})
    return parse(f"g (float[N,4,2,2] x) => (float[N,3,2,2] y) {{ {body} }}", weights, opset=21)


@pytest.mark.parametrize("operands", ["h, b", "b, h"])
def test_a_bias_is_folded_into_the_add_behind_a_matmul(operands: str):
    done, model = fold(matmul(f"[fc] h = MatMul(x, w) [add] y = Add({operands})"))

    assert done is not None
    assert ops(model) == ["MatMul", "Add"]
    assert stored(model)["b"].tolist() == (B + SHIFT).tolist()


def test_what_was_folded_is_handed_back():
    done, _ = fold(matmul("[fc] h = MatMul(x, w) [add] y = Add(b, h)"))

    assert done is not None
    assert (done.node, done.index, done.method, done.name) == ("add", 0, "bias", "b")
    assert done.before is not None
    assert done.before.tolist() == B.tolist()
    assert done.added.tolist() == SHIFT.tolist()


@pytest.mark.parametrize(("body", "total"), [("Gemm(x, w, b)", ("b", B + SHIFT)), ("Gemm(x, w)", ("site/bias.b", SHIFT))])
def test_a_bias_is_folded_into_a_gemm(body: str, total: tuple[str, np.ndarray]):
    done, model = fold(matmul(f"[fc] y = {body}"))

    assert done is not None
    assert ops(model) == ["Gemm"]
    name, values = total
    assert stored(model)[name].tolist() == values.tolist()


@pytest.mark.parametrize(("body", "total"), [("Conv(x, k, b)", ("b", B + SHIFT)), ("Conv(x, k)", ("site/bias.b", SHIFT))])
def test_a_bias_is_folded_into_a_conv_without_its_trailing_axes(body: str, total: tuple[str, np.ndarray]):
    done, model = fold(conv(f"[c] y = {body}"))

    assert done is not None
    assert ops(model) == ["Conv"]
    name, values = total
    assert stored(model)[name].tolist() == values.tolist()


def test_the_layer_then_makes_the_tensor_of_the_sites_name():
    _, model = fold(conv("[c] h = Conv(x, k, b) y = Neg(h)"))

    assert [list(n.output) for n in model.graph.node] == [["h"], ["y"]]


def test_a_bias_that_others_read_is_copied():
    done, model = fold(matmul("[fc] h = MatMul(x, w) [add] t = Add(h, b) y = Mul(t, b)"))

    assert done is not None
    assert stored(model)["b"].tolist() == B.tolist()
    assert stored(model)["site/bias.b"].tolist() == (B + SHIFT).tolist()


def test_a_matmul_without_a_bias_keeps_the_add():
    done, model = fold(matmul("[fc] y = MatMul(x, w)"))

    assert done is None
    assert ops(model) == ["MatMul", "Add"]


def test_what_something_else_reads_before_the_shift_is_not_folded():
    graph, site, add = shifted(matmul("[fc] h = MatMul(x, w) [add] y = Add(h, b)"))
    before = graph.tensors()["y/before-bias"]
    graph.nodes.append(gs.Node("Tanh", "reader", inputs=[before], outputs=[gs.Variable("t", np.float32)]))

    assert fold_bias(graph, site, add, "bias") is None
    assert [n.op for n in graph.nodes] == ["MatMul", "Add", "Add", "Tanh"]


def test_a_bias_that_is_computed_is_not_folded_into():
    model = parse(
        "g (float[N,4,2,2] x, float[3] b) => (float[N,3,2,2] y) { [c] y = Conv(x, k, b) }", {"k": np.ones((3, 4, 1, 1), F)}
    )
    graph, site, add = shifted(model)

    assert fold_bias(graph, site, add, "bias") is None
    assert [n.op for n in graph.nodes] == ["Conv", "Add"]


def test_sums_are_taken_in_float64_and_rounded_once():
    one, tiny = np.full(3, 1, F), np.full(3, 2.0**-24 + 2.0**-26, F)
    model = matmul("[fc] h = MatMul(x, w) [add] y = Add(h, b)")
    graph = to_graph(model)
    graph.tensors()["b"].values = one
    (site,), tape = find_sites(graph), Tape("site/bias")
    new = tape("Add", "y", tape.constant("b", tiny))
    apply(graph, "bias", tape, {"y": new})

    fold_bias(graph, site, tape.nodes[-1].name, "bias")

    # 1 + 2^-24 + 2^-26 lies above the middle between 1 and its neighbour 1 + 2^-23.
    assert stored(to_model(graph, model))["b"].tolist() == [1 + 2.0**-23] * 3


# --- tables per token ------------------------------------------------------------------------------------------------

TOKENS = {"shape": "N,2,4", "y": "N,2,3"}


def test_a_table_and_the_bias_are_added_when_the_file_is_loaded():
    done, model = fold(matmul("[fc] h = MatMul(x, w) [add] y = Add(h, b)", **TOKENS), table=True)

    assert done is None
    assert ops(model) == ["MatMul", "MatMul", "Add", "Add"]
    bracket, total = model.graph.node[2:]
    assert bracket.input[0] == "b"
    assert total.input[1] == bracket.output[0]


def test_a_table_stands_behind_a_matmul_without_bias():
    done, model = fold(matmul("[fc] y = MatMul(x, w)", **TOKENS), table=True)

    assert done is None
    assert ops(model) == ["MatMul", "MatMul", "Add"]


def test_a_table_is_computed_in_front_of_the_add_that_reads_it():
    graph, site, add = shifted(matmul("[fc] h = MatMul(x, w) [add] t = Add(h, b) y = Neg(t)", **TOKENS), table=True)

    fold_bias(graph, site, add, "bias")

    assert [n.name for n in graph.nodes] == ["fc", "site/bias/matmul", add, "add", graph.nodes[-1].name]


def test_what_is_computed_from_constants_is_told_apart_in_a_graph_of_any_depth():
    chain = " ".join(f"h{i + 1} = Neg(h{i})" for i in range(3000))
    text = f"g (float[N] h0) => (float[N] y) {{ {chain} a = Neg(c) b = Abs(a) y = Add(h3000, b) }}"
    tensors = to_graph(parse(text, {"c": np.float32(1)})).tensors()

    assert [is_load_time(tensors[name]) for name in ("c", "b", "h0", "h3000", "y")] == [True, True, False, False, False]
