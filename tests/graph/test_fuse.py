"""GELU, HardSwish and LayerNormalization: each spelling found, and nothing taken for one that is none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from equality import Feeds, ops, parse, prepare_and_compare
from onnx import ModelProto

X = {"x": np.linspace(-6, 6, 40, dtype=np.float32).reshape(2, 5, 4)}
EPS = float(np.finfo(np.float32).eps)
GELU_BOUND = 16 * 8 * EPS / 2
"""16 roundings of numbers below 8."""

ERF = """
    d = Div(x0, root2)
    e = Erf(d)
    a = Add(e, one)"""
TANH = """
    i = Mul(s, root_2_pi)
    t = Tanh(i)
    a = Add(t, one)"""
GELUS = {
    "erf, x first": (f"{ERF} m = Mul(x0, a) g = Mul(m, half)", "none"),
    "erf, half last, swapped": (f"{ERF} m = Mul(a, x0) g = Mul(half, m)", "none"),
    "erf, half x": (f"h = Mul(x0, half) {ERF} g = Mul(h, a)", "none"),
    "erf, half first": (f"{ERF} h = Mul(a, half) g = Mul(x0, h)", "none"),
    "erf, Mul by the root": (
        "d = Mul(x0, half_root) e = Erf(d) a = Add(e, one) h = Mul(a, half) g = Mul(x0, h)", "none",
    ),
    "tanh, Pow": (f"p = Pow(x0, three) q = Mul(p, c) s = Add(x0, q) {TANH} h = Mul(x0, half) g = Mul(h, a)", "tanh"),
    "tanh, x x x": (
        f"p = Mul(x0, x0) k = Mul(x0, p) q = Mul(c, k) s = Add(x0, q) {TANH} m = Mul(x0, a) g = Mul(half, m)", "tanh",
    ),
}  # fmt: skip
GELU_WEIGHTS = {
    "root2": np.float32(np.sqrt(2)), "half_root": np.float32(np.sqrt(0.5)), "root_2_pi": np.float32(np.sqrt(2 / np.pi)),
    "half": np.float32(0.5), "one": np.float32(1), "three": np.float32(3), "c": np.float32(0.044715),
}  # fmt: skip
HARD_SWISHES = {
    "Div last": "a = Add(x0, three) c = Clip(a, zero, six) m = Mul(x0, c) g = Div(m, six)",
    "Div first": "a = Add(three, x0) c = Clip(a, zero, six) m = Div(c, six) g = Mul(m, x0)",
    "Mul by a sixth": "a = Add(x0, three) c = Clip(a, zero, six) m = Mul(sixth, c) g = Mul(x0, m)",
    "HardSigmoid": "s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x0) g = Mul(s, x0)",
}
HARD_SWISH_WEIGHTS = {
    "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "sixth": np.float32(1 / 6),
}  # fmt: skip
LAYERNORM = """
    m = ReduceMean<axes = [{axis}]>(x0)
    c = Sub(x0, m)
    p = Pow(c, two)
    v = ReduceMean<axes = [{axis}]>(p)
    e = Add(v, eps)
    r = Sqrt(e)
    n = Div(c, r)
    k = Mul(n, gain)
    g = Add(k, shift)"""
LAYERNORM_WEIGHTS = {
    "two": np.float32(2), "eps": np.float32(1e-5),
    "gain": np.float32([1, 2, 0.5, 1]), "shift": np.float32([0, 1, 0, -1]),
}  # fmt: skip


def wrapped(body: str, weights: Feeds, opset: int = 17) -> ModelProto:
    """The body, from `x0` to `g`, inside of a model. Its last node is called `last`."""
    before, last = body.rsplit(" g = ", 1)
    inner = f"{before} [last] g = {last}"
    text = f"g (float[N,T,4] x) => (float[N,T,4] y) {{ x0 = Neg(x) x1 = Neg(x0) {inner} z = Abs(x1) y = Add(g, z) }}"
    return parse(text, weights, opset)


@pytest.mark.parametrize("name", GELUS)
@pytest.mark.parametrize("opset", [11, 17, 21])
def test_a_gelu_in_primitive_operators_becomes_one_node(name: str, opset: int):
    body, approximate = GELUS[name]

    prepared = prepare_and_compare(wrapped(body, GELU_WEIGHTS, opset), X, tolerance=GELU_BOUND)

    assert ops(prepared.model) == ["Neg", "Neg", "Gelu", "Abs", "Add"]
    node = prepared.graph.nodes[2]
    assert (node.name, node.domain or "", node.attrs) == ("last", "", {"approximate": approximate})
    assert [t.name for t in (*node.inputs, *node.outputs)] == ["x0", "g"]
    assert prepared.notes[-1] == "GELU, HardSwish and LayerNormalization in primitive operators became single nodes: 1."


@pytest.mark.parametrize("name", HARD_SWISHES)
@pytest.mark.parametrize("opset", [11, 17, 21])
def test_a_hard_swish_in_primitive_operators_becomes_one_node(name: str, opset: int):
    prepared = prepare_and_compare(wrapped(HARD_SWISHES[name], HARD_SWISH_WEIGHTS, opset), X, tolerance=GELU_BOUND)

    assert ops(prepared.model) == ["Neg", "Neg", "HardSwish", "Abs", "Add"]
    node = prepared.graph.nodes[2]
    assert (node.name, [t.name for t in (*node.inputs, *node.outputs)]) == ("last", ["x0", "g"])


def test_what_scales_a_hard_swish_further_is_left_behind_it():
    body = HARD_SWISHES["Div last"].replace(" g = Div(m, six)", " d = Div(m, six) k = Mul(d, three) g = Neg(k)")

    prepared = prepare_and_compare(wrapped(body, HARD_SWISH_WEIGHTS), X, tolerance=4 * GELU_BOUND)

    assert ops(prepared.model) == ["Neg", "Neg", "HardSwish", "Mul", "Neg", "Abs", "Add"]


@pytest.mark.parametrize(
    "body",
    [
        HARD_SWISHES["Div last"].replace("Mul(x0, c)", "Mul(x1, c)"),
        HARD_SWISHES["Div last"].replace("three", "four"),
        HARD_SWISHES["Div last"].replace("Clip(a, zero, six)", "Clip(a, zero, four)"),
        HARD_SWISHES["Div last"].replace("Add(x0, three)", "Add(x0, each)"),
        HARD_SWISHES["Div last"].replace("Div(m, six)", "Div(m, each)"),
        HARD_SWISHES["Div first"].replace("Mul(m, x0)", "Div(m, x0)"),
        HARD_SWISHES["HardSigmoid"].replace("beta = 0.5", "beta = 0.6"),
        HARD_SWISHES["HardSigmoid"].replace("Mul(s, x0)", "Mul(s, s)"),
    ],
)
def test_a_function_that_only_resembles_hard_swish_stays(body: str):
    weights = {**HARD_SWISH_WEIGHTS, "four": np.float32(4), "each": np.float32([3, 3, 3, 3])}
    x = {"x": np.linspace(1, 6, 40, dtype=np.float32).reshape(2, 5, 4)}

    prepared = prepare_and_compare(wrapped(body, {k: v for k, v in weights.items() if f"{k}" in body}), x)

    assert "HardSwish" not in ops(prepared.model)


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("axis", [-1, 2])
def test_a_layernorm_in_primitive_operators_becomes_one_node(opset: int, axis: int):
    body = LAYERNORM.format(axis=axis)
    if opset == 18:
        body = body.replace(f"<axes = [{axis}]>(x0)", "(x0, last_axis)").replace(f"<axes = [{axis}]>(p)", "(p, last_axis)")
    weights = {**LAYERNORM_WEIGHTS, "last_axis": np.array([axis])}

    prepared = prepare_and_compare(wrapped(body, weights, opset), X, tolerance=GELU_BOUND)

    assert ops(prepared.model) == ["Neg", "Neg", "LayerNormalization", "Abs", "Add"]
    node = prepared.graph.nodes[2]
    assert [t.name for t in (*node.inputs, *node.outputs)] == ["x0", "gain", "shift", "g"]
    assert node.attrs == {"axis": -1, "epsilon": float(np.float32(1e-5))}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("erf, x first", {"root2": np.float32(1.4147)}),
        ("tanh, x x x", {"c": np.float32(0.05)}),
        ("tanh, Pow", {"root_2_pi": np.float32(0.79785)}),
    ],
)
def test_a_function_that_only_resembles_gelu_stays(name: str, changed: Feeds):
    """The matcher would take these constants for those of GELU."""
    prepared = prepare_and_compare(wrapped(GELUS[name][0], {**GELU_WEIGHTS, **changed}), X)

    assert "Gelu" not in ops(prepared.model)


def test_a_normalization_over_another_axis_stays():
    """The matcher does not read the axis; with equal widths even the shapes would agree."""
    text = wrapped(LAYERNORM.format(axis=1), LAYERNORM_WEIGHTS)
    x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)

    prepared = prepare_and_compare(text, {"x": x})

    assert "LayerNormalization" not in ops(prepared.model)


@pytest.mark.parametrize("extra", ["q = Neg(a) z = Add(q, q)", "z = Identity(a)"])
def test_a_pattern_whose_inside_is_read_elsewhere_stays(extra: str):
    text = f"g (float[N,T,4] x) => (float[N,T,4] g, float[N,T,4] z) {{ x0 = Neg(x) {GELUS['erf, x first'][0]} {extra} }}"

    prepared = prepare_and_compare(parse(text, GELU_WEIGHTS), X)

    assert "Gelu" not in ops(prepared.model)


def test_a_pattern_whose_inside_a_body_reads_stays():
    text = f"""g (float[N,T,4] x, bool go) => (float[N,T,4] y) {{
        x0 = Neg(x)
        {GELUS["erf, x first"][0]}
        z = If<
            then_branch = t () => (float[N,T,4] u) {{ u = Neg(a) }},
            else_branch = f () => (float[N,T,4] v) {{ v = Abs(x0) }}
        >(go)
        y = Add(g, z)
    }}"""

    prepared = prepare_and_compare(parse(text, GELU_WEIGHTS), {**X, "go": np.array(True)})

    assert "Gelu" not in ops(prepared.model)


def test_the_matcher_leaves_the_import_path_as_it_was():
    """onnxruntime.transformers appends its own folder, in which modules have names such as `models`."""
    code = """
import sys
from onnx import parser
from onnxcomp import runtime
from onnxcomp.graph.prepare import prepare
before = list(sys.path)
text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
prepare(parser.parse_model(text), runtime.infer_types)
assert sys.path == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "shape", "rank", "found"),
    [
        ("y = ReduceMean<keepdims = 1>(x, two)", [2, 5, 3, 4], 4, ["GlobalAveragePool"]),
        ("y = ReduceMean<keepdims = 0>(x, two)", [2, 5, 3, 4], 2, ["GlobalAveragePool", "Flatten"]),
        ("y = ReduceMean<keepdims = 0>(x, minus)", [2, 5, 3, 4], 2, ["GlobalAveragePool", "Flatten"]),
        ("y = ReduceMean(x, two)", [2, 5, 3, 4, 1], 5, ["ReduceMean"]),
        ("y = ReduceMean(x, last)", [2, 5, 3, 4], 4, ["ReduceMean"]),
        ("y = ReduceMean(x, last)", [2, 5, 3], 3, ["ReduceMean"]),
        ("y = ReduceMean(x)", [2, 5, 3, 4], 4, ["ReduceMean"]),
    ],
)
def test_a_mean_over_a_whole_image_is_pooling(text: str, shape: list[int], rank: int, found: list[str]):
    constants = {"two": np.array([2, 3]), "minus": np.array([-1, -2]), "last": np.array([-1])}
    used = {key: value for key, value in constants.items() if f" {key})" in text}
    sizes, result = ",".join(map(str, shape)), ",".join("ABCDE"[:rank])
    model = parse(f"g (float[{sizes}] x) => (float[{result}] y) {{ {text} }}", used, opset=21)
    feed = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}

    assert ops(prepare_and_compare(model, feed, tolerance=1e-5).model) == found
