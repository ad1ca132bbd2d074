"""GELU and LayerNormalization: each spelling found, and nothing taken for one that is none."""

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
    assert prepared.notes[-1] == "GELU and LayerNormalization in primitive operators became single nodes: 1."


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
