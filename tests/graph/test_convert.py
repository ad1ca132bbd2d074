"""From model to graph and back: nothing that a model says is lost, and the bytes are always the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from equality import parse, run, stored
from onnx import ModelProto, TensorProto, checker, helper

from onnxcomp.graph.convert import packed_int4, to_graph, to_model
from onnxcomp.graph.prepare import prepare
from onnxcomp.runtime import infer_types

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
LIKE = parse("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }", opset=21)
IF = """g (float[N,3] x, bool c) => (float[N,3] y) {
    a = Add(x, w)
    [if] y = If<
        then_branch = t () => (float[N,3] p) { pw = Mul(x, w) p = Add(pw, only) },
        else_branch = e () => (float[N,3] q) <float[3] own = {7.0, 8.0, 9.0}> { qo = Mul(a, only) q = Add(qo, own) }
    >(c)
}"""
IF_WEIGHTS = {"w": np.float32([1, 2, 3]), "only": np.float32([4, 5, 6])}


def round_trip(model: ModelProto) -> ModelProto:
    return to_model(to_graph(model), model)


@pytest.mark.parametrize(
    ("text", "weights", "domains"),
    [
        ("{ [a] h = Relu(x) [b] y = Add(h, x) }", {}, ""),
        ("{ y = Clip(x, , top) }", {"top": np.float32(2)}, ""),
        ("{ h, i = TopK<axis = 1, largest = 0>(x, k) y = Neg(h) }", {"k": np.array([3])}, ""),
        ("{ y = com.microsoft.Gelu(x) }", {}, ', "com.microsoft" : 1'),
    ],
)
def test_a_model_comes_back_as_it_was(text: str, weights: dict[str, np.ndarray], domains: str):
    model = parse(f"g (float[N,3] x) => (float[N,3] y) {text}", weights, domains=domains)

    assert round_trip(model) == model


def test_the_graph_is_a_copy():
    model = parse("g (float[N,3] x) => (float[N,3] y) { y = Mul(x, w) }", {"w": np.ones(3, np.float32)})
    before = model.SerializeToString(deterministic=True)

    graph = to_graph(model)
    graph.tensors()["w"].name = "renamed"
    changed = to_model(graph, model)

    assert [*stored(changed)] == ["renamed"]
    assert model.SerializeToString(deterministic=True) == before


def test_the_same_graph_gives_the_same_bytes():
    model = parse(IF, IF_WEIGHTS)
    graph = to_graph(model)

    assert len({to_model(g, model).SerializeToString(deterministic=True) for g in (graph, graph, to_graph(model))}) == 1


def test_what_graphsurgeon_drops_is_brought_back():
    model = parse("g (float[N,3] x) => (float[N,3] y) { [a] h = Relu(x) y = Neg(h) }")
    model.producer_name, model.producer_version, model.domain, model.model_version = "maker", "1.2", "org.maker", 7
    model.doc_string, model.graph.doc_string = "a model", "a graph"
    model.metadata_props.add(key="author", value="me")
    for node in model.graph.node:
        node.doc_string = f"makes {node.output[0]}"
        node.metadata_props.add(key="scope", value=node.output[0])

    assert round_trip(model) == model


def test_notes_follow_their_node_and_not_its_neighbours():
    model = parse("g (float[N,3] x) => (float[N,3] y) { [a] h = Relu(x) [b] y = Neg(h) }")
    for node in model.graph.node:
        node.metadata_props.add(key="scope", value=node.name)
    graph = to_graph(model)
    graph.nodes[0].op = "Abs"
    graph.nodes.reverse()

    changed = to_model(graph, model)

    assert [(node.name, [p.value for p in node.metadata_props]) for node in changed.graph.node] == [
        ("b", ["b"]),
        ("a", []),
    ]


def test_attributes_that_graphsurgeon_cannot_hold_survive():
    model = parse("g (float[N,3] x) => (float[N,3] y) { o = OptionalHasElement(e) y = Relu(x) }")
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    model.graph.node.insert(0, helper.make_node("Optional", [], ["e"], type=helper.make_optional_type_proto(kind)))
    transpose = helper.make_node("Transpose", ["s"], ["t"], name="scalar")
    transpose.attribute.append(onnx.AttributeProto(name="perm", type=onnx.AttributeProto.INTS))
    model.graph.node.append(transpose)
    model.graph.initializer.append(helper.make_tensor("s", TensorProto.FLOAT, [], [1.0]))
    graph = to_graph(model)

    back = to_model(graph, model)

    assert list(back.graph.node) == list(model.graph.node)
    assert graph.nodes[-1].attrs == {}


def test_unused_domains_are_left_out_and_new_ones_are_declared():
    model = parse("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }", opset=17, domains=', "unused" : 3, "kept" : 4')
    graph = to_graph(model)
    graph.nodes[0].domain = "kept"
    graph.nodes.append(gs.Node("New", "new", {}, [graph.outputs[0]], [gs.Variable("z")], "brand.new"))
    graph.opset = 21

    changed = to_model(graph, model)

    assert [(o.domain, o.version) for o in changed.opset_import] == [("", 21), ("brand.new", 1), ("kept", 4)]
    assert changed.ir_version == 10


def test_constants_that_bodies_share_are_stored_once():
    model = parse(IF, IF_WEIGHTS)

    back = round_trip(model)

    checker.check_model(back, full_check=True)
    assert sorted(stored(back)) == ["only", "w"]
    bodies = [attribute.g for attribute in back.graph.node[1].attribute]
    assert [[tensor.name for tensor in body.initializer] for body in bodies] == [[], ["own"]]
    for choice in (True, False):
        feeds = {**X, "c": np.array(choice)}
        np.testing.assert_array_equal(run(back, feeds)["y"], run(model, feeds)["y"])


def test_local_functions_stay():
    text = """g (float[N,3] x) => (float[N,3] y) { y = local.F(x) }
    <domain: "local", opset_import: ["" : 17]> F (x) => (y) { h = Relu(x) y = Neg(h) }"""
    model = parse(text, domains=', "local" : 1')

    assert round_trip(model) == model


@pytest.mark.parametrize("shape", [(3, 5), (7,), (3, 3, 3, 3), (1,), (0, 2), (64, 64)])
@pytest.mark.parametrize("axis", [0, -1])
def test_packed_int4_through_cast_is_dequantized_exactly(rng: np.random.Generator, shape: tuple[int, ...], axis: int):
    codes = rng.integers(-8, 8, shape)
    scale = rng.random(shape[axis]).astype(np.float32)
    cast, y = gs.Variable("cast", np.int8), gs.Variable("y", np.float32, list(shape))
    zero = gs.Constant("zero", np.zeros(shape[axis], np.int8))
    nodes = [
        gs.Node("Cast", "cast", {"to": TensorProto.INT8}, [packed_int4("codes", codes)], [cast]),
        gs.Node("DequantizeLinear", "dq", {"axis": axis}, [cast, gs.Constant("scale", scale), zero], [y]),
    ]

    model = to_model(gs.Graph(nodes, [], [y], opset=21), LIKE)

    checker.check_model(model, full_check=True)
    assert len(model.graph.initializer[0].raw_data) == (codes.size + 1) // 2
    np.testing.assert_array_equal(stored(model)["codes"].astype(np.int8), codes)
    expected = codes.astype(np.float32) * np.moveaxis(np.expand_dims(scale, tuple(range(1, len(shape)))), 0, axis)
    for optimize in (False, True):
        np.testing.assert_array_equal(run(model, {}, optimize=optimize)["y"], expected)


def test_codes_beyond_four_bits_are_refused():
    with pytest.raises(AssertionError, match=r"^codes"):
        packed_int4("codes", np.array([8]))


def test_what_is_found_at_run_time_may_be_nothing():
    """As boxes are: with the types that are inferred here ONNX Runtime's optimizer would ask for a Reshape to 0 x -1."""
    text = """g (float[N,4] x) => (float y, float[N] first) {
        first = Gather<axis = 1>(x, zero) above = Greater(first, least) places = NonZero(above)
        rows = Squeeze(places, axis) boxes = Gather(x, rows) shape = Shape(boxes)
        n = Gather(shape, zero) m = Gather(shape, one) n1 = Unsqueeze(n, axis) m1 = Unsqueeze(m, axis)
        left = Slice(boxes, from0, end, axes, steps) right = Slice(boxes, from1, end, axes, steps)
        l = Unsqueeze(left, two) r = Unsqueeze(right, two) pair = Concat<axis = 2>(l, r)
        asked = Concat<axis = 0>(n1, m1) flat = Reshape(pair, asked) y = Unsqueeze(flat, two) }"""
    numbers = {"zero": 0, "one": 1, "axis": [0], "from0": [0], "from1": [1], "end": [2**63 - 1], "axes": [1], "steps": [2]}
    weights = {key: np.array(value) for key, value in numbers.items()} | {"two": np.array([2]), "least": np.float32(9)}
    model = parse(text, weights, opset=21)

    prepared = prepare(model, infer_types).model

    for x, rows in ((np.ones((3, 4), np.float32), 0), (np.full((3, 4), 10, np.float32), 3)):
        assert [a.shape for a in run(prepared, {"x": x}).values()] == [(rows, 4, 1), (3,)]
    assert {value.name for value in prepared.graph.value_info} == {"above"}
