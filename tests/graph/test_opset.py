"""Raising old models to opset 21: an operator whose form has changed gives the same numbers or is refused."""

from __future__ import annotations

import numpy as np
import pytest
from equality import Feeds, ops, parse, prepare_and_compare

from onnxcomp import runtime
from onnxcomp.errors import ModelError
from onnxcomp.graph.prepare import prepare

IMAGE = "(float[2,3,4,4] x) => (float[n,c,h,w] y)"
MATRIX = "(float[2,6] x) => (float[a,b] y)"
PAIR = "(float[2,6] x) => (float[a,b] y, float[c,d] z)"
CUBE = "(float[2,3,4] x) => (float[a,b] y)"
TOP = "(float[2,3,4,4] x) => (float[a,b,c,d] y, int64[e,f,g,h] i)"
ENLARGE = {"s": np.float32([1, 1, 1.5, 2])}
SHRINK = {"s": np.float32([1, 1, 0.6, 0.75])}
BATCHNORM = {k: np.float32(v) for k, v in {"g": [1, 2, 3], "b": [0, 1, 2], "m": [1, 0, 1], "v": [1, 2, 4]}.items()}
PICK = {"i": np.array([[0, 1, 1, 0, 1, 0]]), "u": np.float32([[1, 2, 3, 4, 5, 6]])}

CASES: list[tuple[int, str, str, Feeds]] = [
    (7, IMAGE, "y = Softmax(x)", {}),
    (11, IMAGE, "y = Softmax<axis = 2>(x)", {}),
    (11, IMAGE, "y = LogSoftmax<axis = 1>(x)", {}),
    (12, IMAGE, "y = Hardmax<axis = -1>(x)", {}),
    (7, IMAGE, 'y = Upsample<mode = "nearest", scales = [1.0, 1.0, 1.5, 2.0]>(x)', {}),
    (7, IMAGE, 'y = Upsample<mode = "linear", scales = [1.0, 1.0, 1.5, 2.0]>(x)', {}),
    (9, IMAGE, 'y = Upsample<mode = "nearest">(x, s)', ENLARGE),
    (9, IMAGE, 'y = Upsample<mode = "linear">(x, s)', ENLARGE),
    (9, IMAGE, 'e = Abs(s) y = Upsample<mode = "nearest">(x, e)', ENLARGE),
    (10, IMAGE, 'y = Resize<mode = "nearest">(x, s)', ENLARGE),
    (10, IMAGE, 'y = Resize<mode = "nearest">(x, s)', SHRINK),
    (10, IMAGE, 'y = Resize<mode = "linear">(x, s)', ENLARGE),
    (10, IMAGE, 'y = Resize<mode = "linear">(x, s)', SHRINK),
    (11, IMAGE, 'y = Resize<mode = "linear">(x, r, s)', {"r": np.zeros(0, np.float32), **ENLARGE}),
    (7, IMAGE, "y = Dropout<ratio = 0.5>(x)", {}),
    (10, IMAGE, "y, mask = Dropout(x)", {}),
    (7, IMAGE, "y = BatchNormalization<epsilon = 0.001>(x, g, b, m, v)", BATCHNORM),
    (8, IMAGE, "y = BatchNormalization<spatial = 1>(x, g, b, m, v)", BATCHNORM),
    (13, IMAGE, "y = BatchNormalization(x, g, b, m, v)", BATCHNORM),
    (7, IMAGE, "y = Slice<axes = [1, 2], starts = [1, 0], ends = [3, 9223372036854775807]>(x)", {}),
    (9, IMAGE, "y = Slice<starts = [1, 0], ends = [3, 9]>(x)", {}),
    (7, IMAGE, "y = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], value = 2.0>(x)", {}),
    (10, IMAGE, 'y = Pad<mode = "reflect", pads = [0, 0, 1, 1, 0, 0, 1, 1]>(x)', {}),
    (7, IMAGE, "y = Clip<min = 0.0, max = 6.0>(x)", {}),
    (10, IMAGE, "y = Clip<min = 0.0>(x)", {}),
    (7, TOP, "y, i = TopK<axis = 2, k = 2>(x)", {}),
    (10, TOP, "y, i = TopK<axis = 2>(x, k)", {"k": np.array([2])}),
    (7, "(float[1,2,1,3] x) => (float[a,b] y)", "y = Squeeze<axes = [0, 2]>(x)", {}),
    (11, "(float[1,2,1,3] x) => (float[a,b] y)", "y = Squeeze(x)", {}),
    (11, "(float[2,3] x) => (float[a,b,c] y)", "y = Unsqueeze<axes = [-1]>(x)", {}),
    (7, PAIR, "y, z = Split<axis = 1, split = [2, 4]>(x)", {}),
    (11, PAIR, "y, z = Split<axis = 1>(x)", {}),
    (13, PAIR, "y, z = Split<axis = 1>(x)", {}),
    (7, CUBE, "y = ReduceSum<axes = [1], keepdims = 0>(x)", {}),
    (11, "(float[2,3,4] x) => (float y)", "y = ReduceSum<keepdims = 0>(x)", {}),
    (13, CUBE, "y = ReduceMean<axes = [-1], keepdims = 0>(x)", {}),
    (17, CUBE, "y = ReduceMax<axes = [1], keepdims = 0>(x)", {}),
    (17, CUBE, "y = ReduceL2<axes = [1], keepdims = 0>(x)", {}),
    (7, MATRIX, "y = Gemm<alpha = 0.5, beta = 2.0>(x, w, c)", {"w": np.ones((6, 1), np.float32), "c": np.float32([3])}),
    (9, MATRIX, "y = Scatter<axis = 0>(x, i, u)", PICK),
    (7, IMAGE, "y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], auto_pad = \"SAME_UPPER\">(x)", {}),
    (7, IMAGE, 'y = Conv<auto_pad = "SAME_LOWER">(x, w)', {"w": np.ones((5, 3, 3, 3), np.float32)}),
    (7, IMAGE, "y = InstanceNormalization(x, g, b)", {k: BATCHNORM[k] for k in "gb"}),
    (7, IMAGE, "y = PRelu(x, s)", {"s": np.float32([[[0.1]], [[0.2]], [[0.3]]])}),
    (7, IMAGE, "y = LRN<size = 3>(x)", {}),
    (7, MATRIX, "q = Cast<to = 7>(x) y = Cast<to = 1>(q)", {}),
    (13, MATRIX, "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", {"s": np.float32(0.1), "z": np.uint8(3)}),
    (17, MATRIX, "y = LayerNormalization(x, g)", {"g": np.ones(6, np.float32)}),
    (22, MATRIX, "y = Softmax(x)", {}),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "signature", "body", "weights"), CASES, ids=[f"{c[0]}-{c[2][:40]}" for c in CASES])
def test_an_old_operator_gives_the_same_numbers(
    rng: np.random.Generator, opset: int, signature: str, body: str, weights: Feeds
):
    model = parse(f"g {signature} {{ {body} }}", weights, opset)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]

    prepared = prepare_and_compare(model, {"x": rng.normal(size=shape).astype(np.float32)})

    assert prepared.graph.opset == max(opset, 21)
    assert prepared.model.ir_version == 10
    assert any(note == f"Opset raised from {opset} to 21." for note in prepared.notes) == (opset < 21)


@pytest.mark.parametrize("choice", [True, False])
def test_bodies_are_raised_with_the_graph(choice: bool):
    text = """g (float[2,3] x, bool c) => (float[a,b] y) {
        y = If<
            then_branch = t () => (float[a,b] p) { p = Softmax<axis = 0>(x) },
            else_branch = e () => (float[a,b] q) {
                n = Clip<min = 0.0>(x)
                s, r = Split<axis = 1, split = [1, 2]>(n)
                q = Mul(n, s)
            }
        >(c)
    }"""
    feeds = {"x": np.float32([[1, -2, 3], [4, 5, -6]]), "c": np.array(choice)}

    prepared = prepare_and_compare(parse(text, opset=10), feeds)

    assert "Bodies of If, Loop and Scan left as they are: 2." in prepared.notes


def test_a_resize_in_a_body_keeps_its_grid():
    text = """g (float[1,1,2,3] x, bool c) => (float[a,b,d,e] y) {
        y = If<
            then_branch = t () => (float[a,b,d,e] p) { p = Resize<mode = "linear">(x, s) },
            else_branch = e () => (float[a,b,d,e] q) { q = Resize<mode = "nearest">(x, s) }
        >(c)
    }"""
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)

    for choice in (True, False):
        prepare_and_compare(parse(text, ENLARGE, opset=10), {"x": x, "c": np.array(choice)})


@pytest.mark.parametrize(
    ("opset", "signature", "body", "reason"),
    [
        (9, MATRIX, "y = ThresholdedRelu(x)", "its ThresholdedRelu has no equal there"),
        (11, IMAGE, "[hm] y = Hardmax(x)", "Hardmax 'hm' has no equal there"),
        (8, IMAGE, "[bn] y = BatchNormalization<spatial = 0>(x, x, x, x, x)",
         "BatchNormalization 'bn' has no equal there"),
        (18, IMAGE, "[gn] y = GroupNormalization<num_groups = 1>(x, s, s)",
         "GroupNormalization 'gn' has no equal there"),
        (8, IMAGE, "[scan] y = Scan<num_scan_inputs = 1, body = b (float[a] e) => (float[a] o) { o = Neg(e) }>(, x)",
         "Scan 'scan' has no equal there"),
        (10, IMAGE, "[up] y = Resize(x, mixed)", "Resize 'up' shrinks one axis and enlarges another"),
    ],
)  # fmt: skip
def test_what_has_no_equal_in_opset_21_is_refused(opset: int, signature: str, body: str, reason: str):
    weights = {"s": np.ones(1, np.float32), "mixed": np.float32([1, 1, 0.5, 2])}
    model = parse(f"g {signature} {{ {body} }}", weights, opset)

    with pytest.raises(ModelError) as caught:
        prepare(model, runtime.infer_types)

    assert str(caught.value) == (
        f"The model cannot be raised from opset {opset} to 21: {reason}. Export it again with opset 21."
    )


def test_opsets_before_7_are_refused():
    with pytest.raises(ModelError) as caught:
        prepare(parse(f"g {MATRIX} {{ y = Relu(x) }}", opset=6), runtime.infer_types)

    assert str(caught.value) == "The model uses opset 6; 7 is the oldest supported. Export it again."


def test_operators_of_other_domains_pass_through():
    text = f"g {MATRIX} {{ [own] h = com.microsoft.QuickGelu<alpha = 1.5>(x) y = Clip<min = 0.0>(h) }}"
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(2, 6)

    prepared = prepare_and_compare(parse(text, opset=10, domains=', "com.microsoft" : 1'), {"x": x})

    assert ops(prepared.model) == ["QuickGelu", "Clip"]
    assert [(o.domain, o.version) for o in prepared.model.opset_import] == [("", 21), ("com.microsoft", 1)]


def test_local_functions_are_written_out():
    text = f"""g {MATRIX} {{ h = local.F(x) y = local.F(h) }}
    <domain: "local", opset_import: ["" : 11]> F (x) => (y) {{
        h = Clip(x)
        y = ReduceSum<axes = [1], keepdims = 1>(h)
    }}"""
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(2, 6)

    prepared = prepare_and_compare(parse(text, opset=11, domains=', "local" : 1'), {"x": x})

    assert ops(prepared.model) == ["Clip", "ReduceSum"] * 2
    assert not prepared.model.functions
    assert [o.domain for o in prepared.model.opset_import] == [""]


def test_metadata_and_doc_strings_survive():
    model = parse(f"g {MATRIX} {{ [squash] y = Clip<min = 0.0>(x) }}", opset=10)
    model.metadata_props.add(key="author", value="me")
    model.doc_string, model.producer_name, model.graph.doc_string = "a model", "maker", "a graph"
    model.graph.node[0].doc_string = "squashes"
    model.graph.node[0].metadata_props.add(key="scope", value="/squash")

    prepared = prepare_and_compare(model, {"x": np.ones((2, 6), np.float32)}).model

    assert [(p.key, p.value) for p in prepared.metadata_props] == [("author", "me")]
    assert (prepared.doc_string, prepared.producer_name, prepared.graph.doc_string) == ("a model", "maker", "a graph")
    assert prepared.graph.node[0].doc_string == "squashes"
    assert prepared.graph.node[0].metadata_props[0].value == "/squash"


@pytest.mark.parametrize("opset", [14, 17, 21])
@pytest.mark.parametrize("epsilon", ["<epsilon = 0.01>", ""])
def test_what_onnx_runtime_adds_to_the_standard_is_written_in_it(opset: int, epsilon: str):
    weights = {"w": np.float32([1, 2, 3]), "v": np.float32([2, 1, 2])}
    body = f"h = SimplifiedLayerNormalization{epsilon}(x, w) k = Hardmax<axis = -1>(h) y = Mul(h, v) z = Neg(k)"
    text = f"g (float[N,3] x) => (float[N,3] y, float[N,3] z) {{ {body} }}"

    x = {"x": np.float32([[1, -2, 3], [-4, 5, 0.5]])}
    model = prepare_and_compare(parse(text, weights, opset), x, tolerance=1e-5).model

    assert ops(model) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Hardmax", "Mul", "Neg"]
    assert "SimplifiedLayerNormalization" in [n.op_type for n in runtime.optimized(model.SerializeToString())]


def test_an_operator_that_nobody_knows_is_refused_in_one_line():
    with pytest.raises(ModelError, match="cannot load the model"):
        prepare(parse("g (float[N,3] x) => (float[N,3] y) { y = Frobnicate(x) }"), runtime.infer_types)
