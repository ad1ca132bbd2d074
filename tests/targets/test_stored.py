"""Weights of operators without an integer kernel: which are stored as codes, for whom, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from equality import parse
from onnx import numpy_helper

from onnxcomp.account import frozen
from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.sites import find_holders
from onnxcomp.pipeline import foresee, quantize
from onnxcomp.recipe import Bits, Recipe, SiteRule

TINY = tiny.recurrent()
LARGE = {"k": (16, 32, 2), "w": (1, 64, 16), "r": (1, 64, 16), "b": (1, 128), "m": (2, 16, 32), "i": (64, 16)}


def found(body: str, result: str = "float y", **weights: Any) -> list[tuple[str, tuple[str, ...], int]]:
    used = {key: np.ones(shape, np.float32) for key, shape in LARGE.items() if f", {key}" in body or f"({key}," in body}
    graph = to_graph(parse(f"g (float[N,16,16] x) => ({result}) {{ {body} }}", used | weights, opset=21))
    return [(s.op, (s.weight or "", *s.others), s.weight_axis) for s in find_holders(graph) if s.kind == "stored"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = ConvTranspose(x, k)", [("ConvTranspose", ("k",), 1)]),
        ("s, h, y = LSTM<hidden_size = 16>(x, w, r, b)", [("LSTM", ("w", "r"), 1)]),
        (", h, y = LSTM<hidden_size = 16>(x, w, r)", [("LSTM", ("w", "r"), 1)]),
        ("a = ReduceMean<keepdims = 0>(x) y = MatMul(a, m)", [("MatMul", ("m",), 2)]),
        ("y = MatMul(i, x)", [("MatMul", ("i",), 1)]),
        ('y = Einsum<equation = "bij, ki -> bkj">(x, i)', [("Einsum", ("i",), 1)]),
        ("y = MatMul(x, wide)", []),
        ("y = MatMul(x, x)", []),
        ("z = MatMul(i, wide) y = Add(x, z)", []),
    ],
)
def test_whatever_has_large_weights_and_is_no_layer_is_found(body: str, expected: list[Any]):
    assert found(body, wide=np.ones((16, 16), np.float32)) == expected


def test_a_small_weight_is_left_alone():
    assert found("y = ConvTranspose(x, small)", small=np.ones((16, 31, 2), np.float32)) == []
    assert found("y = ConvTranspose(x, half)", result="float16 y", half=np.ones((16, 32, 2), np.float16)) == []


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({}, {"lstm": "w8", "up": "w8"}),
        ({"bits": Bits(4, 8)}, {"lstm": "w8", "up": "w8"}),
        ({"bits": Bits(4, None), "block": 32}, {"lstm": "w8", "up": "w8"}),
        ({"site": (SiteRule("up", bits=Bits(4, None)),)}, {"lstm": "w8", "up": "w4"}),
        ({"exclude": ("op:LSTM",)}, {"up": "w8"}),
        ({"target": "ort-arm"}, {"lstm": "w8", "up": "w8"}),
        ({"target": "openvino"}, {"up": "w8"}),
        ({"target": "portable"}, {"up": "w8"}),
        ({"target": "tensorrt"}, {}),
        ({"target": "qnn"}, {}),
        ({"target": "nnapi"}, {}),
    ],
)
def test_they_have_eight_bits_where_the_target_makes_floats_of_them(options: dict[str, Any], stored: dict[str, str]):
    report = quantize(TINY.model, TINY.samples, replace(Recipe(target="ort-x86"), **options)).report

    assert {s.name: s.bits for s in report.sites if s.kind == "stored"} == stored
    assert {s.activations for s in report.sites if s.kind == "stored"} <= {"float"}
    asked = {"lstm", "up"} - stored.keys() if options.get("target") != "qnn" else {"lstm"}
    assert {s.name for s in report.skipped} == asked


def test_only_the_weights_are_rounded_each_channel_by_itself():
    recipe = Recipe(target="ort-x86", exclude=("op:Conv",), compensate=())

    model = quantize(TINY.model, TINY.samples, recipe).model

    before = {t.name: numpy_helper.to_array(t) for t in TINY.model.graph.initializer}
    for name in ("w", "state", "k"):
        w = before[name]
        step = np.abs(w).max(axis=tuple({0, 1, 2} - {1}), keepdims=True) / 127
        before[name] = (np.rint(w / step) * step).astype(np.float32)
    expected = type(TINY.model)()
    expected.CopyFrom(TINY.model)
    for tensor in expected.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(before[tensor.name], tensor.name))
    want, got = (ort.InferenceSession(m.SerializeToString()).run(None, TINY.samples[0])[0] for m in (expected, model))
    error = np.sum((want - got) ** 2) / np.sum(want**2)
    assert error < 1e-4  # ranges of least squared error, not of the largest value
    types = {t.name.split("/")[0]: t.data_type for t in model.graph.initializer if t.name.endswith("codes")}
    assert types == dict.fromkeys(("w", "state", "k"), 3)


def test_a_weight_that_two_of_them_share_is_stored_once():
    text = """g (float[3,N,16] x) => (float[3,N,16] y) {
        [one] a = LSTM<hidden_size = 16>(x, w, r) b = Squeeze(a, axis)
        [two] c = LSTM<hidden_size = 16>(b, w, other) y = Squeeze(c, axis) }"""
    rng = np.random.default_rng(0)
    weights = {key: tiny.weight(rng, 1, 64, 16, fan_in=16) for key in ("w", "r", "other")} | {"axis": np.array([1])}
    samples = [{"x": rng.standard_normal((3, 1, 16)).astype(np.float32)} for _ in range(4)]

    result = quantize(parse(text, weights, opset=21), samples, Recipe(target="ort-x86"))

    codes = [t.name for t in result.model.graph.initializer if t.data_type == 3]
    assert (len(codes), len(result.report.sites)) == (3, 2)
    assert result.report.verification.sqnr_db > 35


def vocoder() -> tiny.Tiny:
    rng = np.random.default_rng(3)
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,8,T] x) => (float[N,1,L] y) {
        [pre] a = Conv<pads = [1, 1]>(x, wa, ba) b = LeakyRelu<alpha = 0.1>(a)
        [up] c = ConvTranspose<strides = [2], pads = [1, 1]>(b, k, bk) d = LeakyRelu<alpha = 0.1>(c)
        [mid] e = Conv<pads = [1, 1]>(d, wm, bm) f = Add(e, c) [post] y = Conv(f, wp, bp) }"""
    up = {"k": tiny.weight(rng, 32, 32, 4, fan_in=64), "bk": tiny.bias(rng, 32)}
    layers = tiny.conv(rng, "a", 32, 8, 3) | tiny.conv(rng, "m", 32, 32, 3) | tiny.conv(rng, "p", 1, 32, 1)
    return tiny.build("vocoder", text, up | layers, tiny.feeds(rng, 8, 20))


VOCODER = vocoder()


@pytest.mark.parametrize(
    ("options", "op"),
    [
        *(({"target": name}, "Conv") for name in ("ort-x86", "ort-x86-avx2", "ort-arm", "openvino", "openvino-avx2")),
        *(({"target": name}, "ConvTranspose") for name in ("portable", "tensorrt", "nnapi", "xnnpack", "qnn")),
        ({"bits": Bits(4, 4)}, "Conv"),
        ({"bits": Bits(8, None)}, "ConvTranspose"),
        ({"samples": 0}, "ConvTranspose"),
        ({"activations": "static"}, "Conv"),
        ({"activations": "float"}, "ConvTranspose"),
        ({"exclude": ("up",)}, "ConvTranspose"),
        ({"site": (SiteRule("u*", activations="float"),)}, "ConvTranspose"),
        ({"site": (SiteRule("u*", bits=Bits(4, 8)),)}, "Conv"),
    ],
)
def test_a_transposed_conv_of_fixed_ranges_becomes_a_conv_where_that_has_an_integer_kernel(options: dict[str, Any], op: str):
    result = quantize(VOCODER.model, VOCODER.samples, replace(Recipe(target="ort-x86"), **options))

    (node,) = (node for node in result.model.graph.node if node.name == "up")
    assert node.op_type == op
    if op == "Conv":
        (site,) = (s for s in result.report.sites if s.name == "up")
        assert (site.integer, site.activations) == (True, "static")
        assert result.report.verification.sqnr_db > (3 if "bits" in options else 15)
        assert any(note.startswith("ConvTransposes written as Convs and moves: 1, equal to") for note in result.report.notes)


def test_a_frozen_recipe_writes_the_same_convs():
    report = quantize(VOCODER.model, VOCODER.samples, Recipe(target="ort-x86"))

    again = quantize(VOCODER.model, VOCODER.samples, frozen(report.report))

    assert again.model.graph == report.model.graph


def test_a_model_of_recurrent_layers_alone_is_foretold(tmp_path: Path):
    text = "g (float[3,N,16] x) => (float y) { [one] y = LSTM<hidden_size = 16>(x, w, r) }"
    rng = np.random.default_rng(0)
    model = parse(text, {key: tiny.weight(rng, 1, 64, 16, fan_in=16) for key in ("w", "r")}, opset=21)
    model.graph.output[0].type.tensor_type.elem_type = 1
    onnx.save(model, tmp_path / "lstm.onnx")
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((4, 3, 1, 16)).astype(np.float32))

    plan = foresee(tmp_path / "lstm.onnx", tmp_path / "x.npz", Recipe(target="ort-x86"))

    assert plan.forecast is not None
