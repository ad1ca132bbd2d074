"""Graph preparation: what users have, in the one form that the rest assumes, equal in float and with its names kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from equality import Feeds, ops, parse, prepare_and_compare, run, stored
from onnx import ModelProto, TensorProto, checker, helper

from onnxcomp import runtime
from onnxcomp.graph import files
from onnxcomp.graph.prepare import Prepared, correct_ranks, prepare

X = {"x": np.float32([[1, -2, 3], [-4, 5, 0.5]])}
W = np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 10]])


def variables(prepared: Prepared) -> dict[str, gs.Variable]:
    return {name: t for name, t in prepared.graph.tensors().items() if isinstance(t, gs.Variable)}


def test_a_plain_model_stays_as_it_is():
    model = parse("g (float[N,3] x) => (float[N,3] y) { [fc] h = MatMul(x, w) [act] y = Relu(h) }", {"w": W}, 21)

    prepared = prepare_and_compare(model, X)

    assert prepared.notes == ()
    assert [(node.op_type, node.name, [*node.input], [*node.output]) for node in prepared.model.graph.node] == [
        ("MatMul", "fc", ["x", "w"], ["h"]),
        ("Relu", "act", ["h"], ["y"]),
    ]


def test_the_graph_and_the_model_are_the_same():
    prepared = prepare_and_compare(parse("g (float[N,3] x) => (float[N,3] y) { h = Relu(x) y = Neg(h) }"), X)

    assert [(n.op, n.name) for n in prepared.graph.nodes] == [(n.op_type, n.name) for n in prepared.model.graph.node]
    assert prepared.graph.opset == 21


def test_initializers_listed_as_inputs_become_constants():
    """Before IR version 4 every initializer had to be listed."""
    model = parse("g (float[N,3] x, float[3,3] w) => (float[N,3] y) { y = MatMul(x, w) }", {"w": W}, 8)
    model.ir_version = 3

    prepared = prepare_and_compare(model, X)

    assert [value.name for value in prepared.model.graph.input] == ["x"]
    assert "Inputs with a stored value made constants: 1." in prepared.notes


def test_large_initializers_listed_as_inputs_become_constants():
    weight = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    model = parse("g (float[N,3] x, float[3,200] w) => (float[N,200] y) { y = MatMul(x, w) }", {"w": weight}, 11)

    prepared = prepare_and_compare(model, X)

    assert [value.name for value in prepared.model.graph.input] == ["x"]
    np.testing.assert_array_equal(stored(prepared.model)["w"], weight)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("value = float[3] {1.0, 2.0, 3.0}", np.float32([1, 2, 3])),
        ("value_float = 2.5", np.float32(2.5)),
        ("value_floats = [1.0, 2.0, 3.0]", np.float32([1, 2, 3])),
        ("value_int = 2", np.int64(2)),
        ("value_ints = [1, 2, 3]", np.int64([1, 2, 3])),
    ],
)
def test_constant_nodes_become_initializers(attribute: str, value: np.ndarray):
    cast = "s = Cast<to = 1>(c)" if value.dtype == np.int64 else "s = Abs(c)"
    model = parse(f"g (float[N,3] x) => (float[N,3] y) {{ c = Constant<{attribute}>() n = Neg(x) {cast} y = Add(n, s) }}")

    prepared = prepare_and_compare(model, X)

    assert "Constant" not in ops(prepared.model)
    constants = stored(prepared.model)
    found = constants["s"] if value.dtype == np.int64 else constants["c"]
    np.testing.assert_array_equal(found, value)
    assert found.shape == value.shape


def test_an_empty_list_and_a_string_are_constants_too():
    text = """g (float[1,1] x) => (float[1,1] y) {
        [c] s = Constant<value_strings = ["a", "b"]>()
        k = StringNormalizer(s)
        n = Shape(k)
        f = Cast<to = 1>(n)
        r = Reshape(x, e)
        y1 = Add(r, f)
        y = Reshape(y1, ones)
    }"""
    model = parse(text, {"ones": np.array([1, 1])})
    empty = helper.make_node("Constant", [], ["e"])
    empty.attribute.append(onnx.AttributeProto(name="value_ints", type=onnx.AttributeProto.INTS))
    model.graph.node.insert(0, empty)

    prepared = prepare_and_compare(model, {"x": np.float32([[3]])})

    assert stored(prepared.model)["e"].shape == (0,)
    assert [*stored(prepared.model)["s"]] == ["a", "b"]


def test_a_constant_that_is_an_output_stays_a_node():
    model = parse("g (float[N,3] x) => (float[N,3] y, float[2] c) { c = Constant<value_floats = [1.0, 2.0]>() y = Neg(x) }")

    assert ops(prepare_and_compare(model, X).model) == ["Constant", "Neg"]


@pytest.mark.parametrize(
    ("body", "weights", "value"),
    [
        ("c = Transpose<perm = [1, 0]>(w) y = MatMul(x, c)", {"w": W}, W.T),
        ("c = Reshape(flat, shape) y = MatMul(x, c)", {"flat": W.ravel(), "shape": np.array([3, -1])}, W),
        ("c = Cast<to = 1>(codes) y = MatMul(x, c)", {"codes": W.astype(np.int8)}, W),
        ("c = Unsqueeze(row, zero) y = Add(x, c)", {"row": W[0], "zero": np.array([0])}, W[:1]),
        ("u = Transpose(w) c = Mul(u, two) y = MatMul(x, c)", {"w": W, "two": np.float32(2)}, 2 * W.T),
        (
            "s = Shape(w) g = Gather(s, one) c = Cast<to = 1>(g) y = Add(x, c)",
            {"w": W, "one": np.array(1)},
            np.float32(3),
        ),
        ("c = Expand(row, shape) y = MatMul(x, c)", {"row": W[:1], "shape": np.array([3, 3])}, W[[0, 0, 0]]),
        ("c = MatMul(w, v) y = MatMul(x, c)", {"w": W, "v": W.T.copy()}, W @ W.T),
    ],
)
def test_constants_are_computed_beforehand(body: str, weights: Feeds, value: np.ndarray):
    prepared = prepare_and_compare(parse(f"g (float[N,3] x) => (float[N,3] y) {{ {body} }}", weights), X)

    assert len(prepared.model.graph.node) == 1
    np.testing.assert_array_equal(stored(prepared.model)["c"], value)


def test_a_constant_is_not_computed_where_it_would_grow():
    """Twice the bytes of its inputs is the most, and 1024 bytes are always allowed."""
    weights = {"row": np.float32([[1, 2, 3]]), "s": np.array([200, 1, 3])}
    model = parse("g (float[N,3] x) => (float[A,N,3] y) { c = Expand(row, s) y = Add(c, x) }", weights)

    assert ops(prepare_and_compare(model, {"x": X["x"][:1]}).model) == ["Expand", "Add"]


def test_a_computed_constant_that_is_an_output_stays_computed():
    model = parse("g (float[N,3] x) => (float[N,3] y, float[3,3] c) { c = Transpose(w) y = MatMul(x, c) }", {"w": W})

    assert ops(prepare_and_compare(model, X).model) == ["Transpose", "MatMul"]


def test_stored_codes_stay_codes():
    """What is quantized already stays so, whatever its width."""
    weights = {"q": np.int8([[1, -2, 3]] * 3), "s": np.float32(0.5), "b": np.int32([1, 2, 3])}
    text = """g (float[N,3] x) => (float[N,3] y) {
        w = DequantizeLinear(q, s)
        h = MatMul(x, w)
        c = DequantizeLinear(b, s)
        y = Add(h, c)
    }"""

    assert ops(prepare_and_compare(parse(text, weights), X).model) == [
        "DequantizeLinear", "MatMul", "DequantizeLinear", "Add",
    ]  # fmt: skip


def test_packed_int4_weights_survive():
    codes = np.array([[1, -8, 7], [0, 3, -1], [2, -2, 5]])
    text = "g (float[N,3] x) => (float[N,3] y) { c = Cast<to = 3>(q) w = DequantizeLinear(c, s) y = MatMul(x, w) }"
    model = parse(text, {"s": np.float32(0.5)}, 21)
    model.graph.initializer.append(helper.make_tensor("q", TensorProto.INT4, [3, 3], codes.ravel()))

    prepared = prepare_and_compare(model, X)

    assert prepared.model.graph.initializer[0].data_type == TensorProto.INT4
    np.testing.assert_array_equal(stored(prepared.model)["q"].astype(np.int8), codes)


def test_a_shared_initializer_stays_shared():
    model = parse("g (float[N,3] x) => (float[N,3] y) { v = Identity(w) h = MatMul(x, v) y = MatMul(h, w) }", {"w": W})

    prepared = prepare_and_compare(model, X)

    assert [*stored(prepared.model)] == ["w"]
    assert [node.inputs[1].name for node in prepared.graph.nodes] == ["w", "w"]


def test_every_tensor_has_the_type_that_the_runtime_gives_it():
    """Nothing is declared between input and output, and one dimension is known at run time only."""
    text = """g (float[N,T,4] x) => (float[A,B,C] y) {
        s = Shape<start = 0, end = 2>(x)
        t = Concat<axis = 0>(s, tail)
        r = Reshape(x, t)
        n = NonZero(r)
        f = Cast<to = 1>(n)
        m = ReduceSum<keepdims = 1>(f, last)
        k = Reshape(m, ones)
        y = Add(r, k)
    }"""
    weights = {"tail": np.array([2, 2]), "last": np.array([-1, 0]), "ones": np.array([1])}
    model = parse(text.replace("float[A,B,C]", "float[A,B,C,D]"), weights)

    found = variables(prepare_and_compare(model, {"x": np.ones((2, 3, 4), np.float32)}))

    assert all(tensor.dtype is not None and tensor.shape is not None for tensor in found.values())
    assert (found["s"].dtype, found["f"].dtype) == (np.int64, np.float32)
    assert (found["s"].shape, found["m"].shape) == ([2], [1, 1])
    assert found["n"].shape[0] == 4
    assert found["x"].shape == ["N", "T", 4]


def test_an_output_without_a_declared_shape_gets_one():
    model = parse("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    model.graph.output[0].type.tensor_type.ClearField("shape")

    prepared = prepare(model, runtime.infer_types)

    assert variables(prepared)["y"].shape == ["N", 3]


def test_nodes_get_names_of_their_own():
    """ONNX Runtime itself loads no model in which two nodes have one name."""
    text = "g (float[N,3] x) => (float[N,3] y) { a = Relu(x) [a] b = Neg(a) [twin] c = Abs(b) [twin] y = Ceil(c) }"

    prepared = prepare(parse(text), runtime.infer_types)

    assert [node.name for node in prepared.graph.nodes] == ["a_2", "a", "twin", "y"]
    np.testing.assert_array_equal(run(prepared.model, X)["y"], np.ceil(np.maximum(X["x"], 0)))


def test_an_unused_initializer_and_a_dead_node_are_left_out():
    model = parse("g (float[N,3] x) => (float[N,3] y) { d = Neg(x) y = Relu(x) }", {"unused": W})

    prepared = prepare_and_compare(model, X)

    assert ops(prepared.model) == ["Relu"]
    assert not stored(prepared.model)


def test_a_loop_keeps_its_body():
    text = """g (float[2,3] x, int64 n, bool go) => (float[2,3] y) {
        y = Loop<body = b (int64 i, bool c, float[2,3] s) => (bool d, float[2,3] r) { d = Identity(c) r = Add(s, x) }>
            (n, go, x)
    }"""
    feeds = {**X, "n": np.array(3), "go": np.array(True)}

    prepared = prepare_and_compare(parse(text, opset=16), feeds)

    assert prepared.notes[-1] == "Bodies of If, Loop and Scan left as they are: 1."


def feeds_of(model: ModelProto, scale: float) -> dict[str, np.ndarray]:
    """Normal numbers, or ids, of the model's shape with batch 1 and 7 tokens."""
    rng = np.random.default_rng(0)
    known = {tensor.name for tensor in model.graph.initializer}
    value = next(value for value in model.graph.input if value.name not in known)
    shape = [{"N": 1, "T": 7}.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
    if value.type.tensor_type.elem_type == TensorProto.INT64:
        return {value.name: rng.integers(0, 500, shape)}
    return {value.name: (scale * rng.normal(size=shape)).astype(np.float32)}


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vit_tiny_patch16_224", {"Gelu": 12, "LayerNormalization": 25, "Erf": 0, "MatMul": 72, "Gemm": 1}),
        ("mobilenet_v2_1.0_224", {"Conv": 52, "Clip": 35, "Gemm": 1, "Constant": 0}),
        ("cifar10_resnet20", {"Conv": 19, "BatchNormalization": 0, "Gemm": 1}),
        ("kwt1", {"Gelu": 12, "Tanh": 0, "LayerNormalization": 24, "MatMul": 97}),
        ("mnist", {"Conv": 2, "Add": 1, "Reshape": 1, "MatMul": 1}),
        ("stories260k", {"MatMul": 46, "Softmax": 5}),
    ],
)
def test_a_real_model_is_prepared_without_loss(data_dir: Path, name: str, counts: dict[str, int]):
    """110 dB is a relative error of 3e-6: 26 roundings to float32, the noise of reordered sums in so deep networks."""
    model = files.load(data_dir / f"{name}.onnx")
    before = model.SerializeToString(deterministic=True)
    feeds = feeds_of(model, scale=255.0 if name == "mnist" else 1.0)

    prepared = prepare(model, runtime.infer_types)

    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(prepared.model, full_check=True)
    found = Counter(ops(prepared.model))
    assert {op: found[op] for op in counts} == counts
    assert all(t.dtype is not None and t.shape is not None for t in variables(prepared).values())
    (want,), (got,) = run(model, feeds).values(), run(prepared.model, feeds).values()
    noise = np.sum(np.square(np.subtract(got, want, dtype=np.float64)))
    signal = np.sum(np.square(want, dtype=np.float64))
    assert noise <= signal * 10 ** (-110 / 10)


def test_a_tensor_of_unknown_rank_is_not_taken_for_a_scalar(rng: np.random.Generator):
    """ONNX Runtime reports both with an empty shape."""
    body = "g (float[N,4] x, int64[R] s) => (float y) { r = Reshape(x, s) q = Squeeze(r) y = MatMul(q, w) }"
    model = parse(body, {"w": rng.normal(size=(4, 3)).astype(np.float32)}, opset=21)

    prepared = prepare(model, runtime.infer_types)

    feeds = {"x": rng.normal(size=(2, 4)).astype(np.float32), "s": np.array([1, 2, 4])}
    assert prepared.graph.tensors()["r"].shape is None
    np.testing.assert_array_equal(run(prepared.model, feeds)["y"], run(model, feeds)["y"])


def test_the_shape_of_an_output_that_has_another_rank_is_left_open():
    text = "g (float[2,6] x) => (float[2,6] y, float[2,6] z) { y = Reshape(x, shape) z = Neg(x) }"
    prepared = prepare(parse(text, {"shape": np.array([2, 3, 2])}), lambda model: {})

    notes = correct_ranks(prepared, {"y": 3, "z": 2})

    assert notes == ["Output 'y' declares rank 2 and has 3: its shape is left open."]
    assert [t.shape for t in prepared.graph.outputs] == [[None] * 3, [2, 6]]
    assert [len(value.type.tensor_type.shape.dim) for value in prepared.model.graph.output] == [3, 2]
    checker.check_model(prepared.model, full_check=True)
