"""Models in float16: computed in float32, their ends as they were, and weights that stay float stored in float16."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from equality import Feeds, ops, parse, prepare_and_compare, run, stored
from onnx import ModelProto, TensorProto, checker

from onnxcomp import runtime
from onnxcomp.graph import mapped
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.half import narrow, widen
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe

RNG = np.random.default_rng(0)
W = RNG.normal(size=(64, 64)).astype(np.float16)
X = {"x": RNG.normal(size=(3, 64)).astype(np.float16)}
HALF = np.dtype(np.float16)
# Sums of 64 products of standard normal numbers are below 64; two roundings of the output to float16.
TOLERANCE = 2 * 64 * 2.0**-11


def widened(model: ModelProto, feeds: Feeds) -> Prepared:
    """The prepared model, which must compute what `model` does in float32, and with its own ends once it is narrowed."""
    prepared = prepare(model, runtime.infer_types)
    want = run(model, feeds)
    wide = run(prepared.model, {k: v.astype(np.float32) if v.dtype == HALF else v for k, v in feeds.items()})
    graph = prepared.graph.copy()
    narrow(graph, prepared.half_ends)
    again = to_model(graph, prepared.model)
    checker.check_model(again, full_check=True)
    assert [*again.graph.input, *again.graph.output] == [*model.graph.input, *model.graph.output]
    for found, dtype in ((wide, np.float32), (run(again, feeds), HALF)):
        assert found.keys() == want.keys()
        for name, array in want.items():
            assert found[name].dtype == (dtype if array.dtype == HALF else array.dtype)
            assert np.max(np.abs(found[name].astype(np.float64) - array)) <= TOLERANCE
    return prepared


def test_a_float16_model_is_computed_in_float32_and_prepared_like_any_other():
    weights = {"w": W, "g": np.ones(64, HALF), "b": np.zeros(64, HALF), "v": np.full(64, 2, HALF)}
    text = """g (float16[N,64] x) => (float16[N,64] y) {
        h = Gemm<transB = 1, alpha = 0.5>(x, w)
        y = BatchNormalization(h, g, b, b, v)
    }"""

    prepared = widened(parse(text, weights), X)

    assert ops(prepared.model) == ["Gemm"]
    assert {t.dtype for t in prepared.graph.tensors().values()} == {np.dtype(np.float32)}
    assert (prepared.is_half, prepared.half_ends) == (True, ("x", "y"))
    assert "Computed in float32: 4 constants were float16." in prepared.notes


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Cast<to = 1>(x) b = Softmax(a) c = Cast<to = 10>(b) y = MatMul(c, w)", ["Softmax", "MatMul"]),
        ("s = Shape(x) z = ConstantOfShape<value = float16[1] {2}>(s) h = Mul(x, z) y = MatMul(h, w)", None),
        ("y = MatMul(x, w)  z = Identity(x) unused = MatMul(z, w)", None),
        ("h = MatMul(x, w) i = Cast<to = 7>(h) y = Cast<to = 10>(i)", ["MatMul", "Cast", "Cast"]),
    ],
)
def test_what_names_float16_names_float32(body: str, left: list[str] | None):
    prepared = widened(parse(f"g (float16[N,64] x) => (float16[N,64] y) {{ {body} }}", {"w": W}), X)

    assert left is None or ops(prepared.model) == left


def test_weights_that_only_are_stored_in_float16_are_found():
    model = parse("g (float[N,64] x) => (float[N,64] y) { c = Cast<to = 1>(w) y = MatMul(x, c) }", {"w": W})

    prepared = prepare_and_compare(model, {"x": X["x"].astype(np.float32)})

    assert ops(prepared.model) == ["MatMul"]
    np.testing.assert_array_equal(stored(prepared.model)["w"], W.astype(np.float32), strict=True)


def test_bodies_are_widened_too():
    text = """g (float16[N,64] x, bool c) => (float16[N,64] y) {
        h = MatMul(x, w)
        y = If<
            then_branch = t () => (float16[N,64] p) { p = Add(h, v) },
            else_branch = e () => (float16[N,64] q) { k = Cast<to = 10>(h) q = Sub(k, v) }
        >(c)
    }"""
    for choice in (True, False):
        widened(parse(text, {"w": W, "v": np.ones(64, HALF)}), {**X, "c": np.array(choice)})


@pytest.mark.parametrize(("half", "dtype"), [("auto", HALF), (True, HALF), (False, np.dtype(np.float32))])
def test_a_float16_model_stays_float16_for_tensorrt(half: bool, dtype: np.dtype):
    text = "g (float16[N,64] x) => (float16[N,64] y) { h = MatMul(x, w) m = Mul(h, x) y = Tanh(m) }"

    result = quantize(parse(text, {"w": W}), [X], Recipe(target="tensorrt", half=half))

    assert {a.dtype for a in stored(result.model).values() if a.dtype.kind == "f"} == {dtype}


def test_what_a_body_reads_too_is_stored_in_float16():
    text = """g (float[N,64] x, bool c) => (float[N,64] y) {
        h = If<
            then_branch = t () => (float[N,64] p) { p = MatMul(x, w) },
            else_branch = e () => (float[N,64] q) { q = Neg(x) }
        >(c)
        y = MatMul(h, w)
    }"""
    model = parse(text, {"w": W.astype(np.float32)}, opset=21)
    graph = to_graph(model)

    narrow(graph, ("x", "y"))

    found, feeds = to_model(graph, model), {"x": X["x"], "c": np.array(True)}
    assert stored(found)["w"].dtype == HALF
    y = run(found, feeds)["y"]
    np.testing.assert_array_equal(y, run(model, {**feeds, "x": X["x"].astype(np.float32)})["y"].astype(HALF), strict=True)


def test_a_float32_model_is_left_alone():
    graph = to_graph(parse("g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": W.astype(np.float32)}))

    assert widen(graph) == (0, ())


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (W.astype(np.float32), np.float16),
        (W.astype(np.float32) * np.float32(1.001), np.float16),
        (np.full((64, 64), 1e6, np.float32), np.float32),
    ],
)
def test_what_float16_holds_is_stored_in_it(weight: np.ndarray, dtype: type):
    model = parse("g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, w) y = MatMul(h, w) }", {"w": weight}, opset=21)
    graph = to_graph(model)

    narrow(graph, ())

    found = to_model(graph, model)
    assert ops(found) == [*["Cast"][: dtype is np.float16], "MatMul", "MatMul"]
    assert stored(found)["w"].dtype == dtype
    x = {"x": X["x"].astype(np.float32)}
    is_exact = dtype is np.float32 or (weight == weight.astype(np.float16)).all()
    # Else each of 2 x 64 products below 4 x 64 may be off by half a unit of 11 bits.
    np.testing.assert_allclose(run(found, x)["y"], run(model, x)["y"], atol=0 if is_exact else 2 * 64 * 256 * 2.0**-12)


@pytest.mark.parametrize("target", ["ort-x86", "openvino", "tensorrt", "qnn", "portable"])
@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(4, None)])
def test_a_float16_model_is_quantized_for_every_target(target: str, bits: Bits):
    text = """g (int64[N,5] ids, float16[N,5,64] x) => (float16[N,5,64] y) {
        rows = Gather(table, ids) h = Add(rows, x) m = MatMul(h, w) r = Relu(m) y = MatMul(r, w2)
    }"""
    weights = {"table": RNG.normal(size=(300, 64)).astype(HALF), "w": W, "w2": W.T.copy()}
    model = parse(text, weights)
    feeds = [{"ids": RNG.integers(300, size=(1, 5)), "x": RNG.normal(size=(1, 5, 64)).astype(HALF)} for _ in range(8)]

    result = quantize(model, feeds, Recipe(bits=bits, target=target))

    ends = [v.type.tensor_type.elem_type for v in (*result.model.graph.input, *result.model.graph.output)]
    assert ends == [TensorProto.INT64, TensorProto.FLOAT16, TensorProto.FLOAT16]
    assert [site.kind for site in result.report.sites if site.op == "MatMul"] == ["layer"] * 2
    assert result.report.verification.sqnr_db > (20 if bits.activations else 12)
    is_coded = target == "qnn" and bits.activations is not None  # as what is picked from it is
    assert stored(result.model)["rows/table.codes" if is_coded else "table"].dtype == (np.uint8 if is_coded else HALF)


def test_only_what_is_a_weight_is_stored_in_float16():
    graph = gs.Graph(opset=21)
    x, y = gs.Variable("x", np.float32, ["N", 8192]), gs.Variable("y", np.float32, ["N", 8192])
    graph.inputs, graph.outputs = [x], [y]
    graph.nodes = [gs.Node("Add", "add", inputs=[x, gs.Constant("b", np.ones(8192, np.float32))], outputs=[y])]

    narrow(graph, ())

    assert [node.op for node in graph.nodes] == ["Add"]


def test_weights_too_large_for_one_message_are_mapped(monkeypatch: pytest.MonkeyPatch):
    model = parse("g (float16[N,64] x) => (float16[N,64] y) { h = MatMul(x, w) y = MatMul(h, v) }", {"w": W, "v": W.T.copy()})
    plain = quantize(model, [X], Recipe())
    for name in ("half.INLINE_LIMIT", "mapped.SPILL_BYTES"):
        monkeypatch.setattr(f"onnxcomp.graph.{name}", 1000)

    prepared = prepare(model, runtime.infer_types)

    assert mapped.outside(prepared.model) == 2 * 64 * 64 * 4
    assert quantize(model, [X], Recipe()).model.graph == plain.model.graph
