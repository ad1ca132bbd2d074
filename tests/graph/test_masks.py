"""Masks of attention are bounded where Softmaxes alone see them, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from equality import parse

from onnxcomp import Recipe, quantize
from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.edit import tensors_of
from onnxcomp.graph.masks import bound_masks
from onnxcomp.graph.prepare import prepare
from onnxcomp.lint import lint
from onnxcomp.recipe import Bits
from onnxcomp.runtime import Session, infer_types

RNG = np.random.default_rng(0)
LOWEST = float(np.finfo(np.float32).min)
ADDED = "s = Add(logits, mask) y = Softmax(s)"
CHOSEN = "s = Where(keep, logits, low) t = Add(s, near) y = Softmax(t)"
KEEP = np.tril(np.ones((4, 4), bool))
FEED = {"logits": RNG.normal(size=(2, 4, 4)).astype(np.float32)}


def mask(value: float) -> np.ndarray:
    return np.where(KEEP, 0.0, value).astype(np.float32)


def graph(body: str, value: float):
    constants = {"mask": mask(value), "keep": KEEP, "low": np.float32(value), "near": np.full((4, 4), -5, np.float32)}
    used = {name: array for name, array in constants.items() if f"{name})" in body or f"({name}," in body}
    model = parse(f"g (float[N,4,4] logits) => (float[N,4,4] y) {{ {body} }}", used, opset=21)
    return model, prepare(model, infer_types)


@pytest.mark.parametrize("value", [-np.inf, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("body", [ADDED, CHOSEN])
def test_a_bounded_mask_still_masks(body: str, value: float):
    model, prepared = graph(body, value)
    bounded = prepared.graph.copy()

    count = bound_masks(bounded)

    assert count == 1
    constants = {name: t.values for name, t in tensors_of(bounded).items() if name in ("mask", "low", "near")}
    assert min(values.min() for values in constants.values()) == -100
    assert constants.get("near", np.float32(-5)).min() == -5
    want = Session(model.SerializeToString()).run(FEED)["y"]
    found = np.exp(FEED["logits"] + np.where(KEEP, 0.0, -100.0))
    np.testing.assert_allclose(found / found.sum(-1, keepdims=True), want, atol=1e-6)


@pytest.mark.parametrize(
    "body", [ADDED.replace("Softmax", "Relu"), f"{ADDED} z = Relu(s)", ADDED.replace("y = Softmax(s)", "y = Tanh(s)")]
)
def test_what_others_read_stays_as_it_is(body: str):
    model = parse(f"g (float[N,4,4] logits) => (float[N,4,4] y) {{ {body} }}", {"mask": mask(-1e9)}, opset=21)

    assert bound_masks(to_graph(model)) == 0


@pytest.mark.parametrize("bits", ["w8a8", "w8a16"])
@pytest.mark.parametrize("value", [-np.inf, LOWEST])
def test_masked_attention_keeps_its_accuracy_where_every_tensor_is_quantized(bits: str, value: float):
    body = """q = MatMul(x, w) k = MatMul(x, u) t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) m = Add(s, mask)
              p = Softmax(m) v = MatMul(x, z) o = MatMul(p, v) y = MatMul(o, e)"""
    weights = {name: (RNG.normal(size=(16, 16)) / 4).astype(np.float32) for name in "wuze"}
    model = parse(f"g (float[N,4,16] x) => (float[N,4,16] y) {{ {body} }}", weights | {"mask": mask(value)}, opset=21)
    data = {"x": RNG.normal(size=(32, 4, 16)).astype(np.float32)}

    made = quantize(model, data, Recipe(target="qnn", bits=Bits.parse(bits)))

    report = made.report
    assert lint(made.model, "qnn").violations == ()  # a bias of a product that has none would stand between codes
    assert report.verification.sqnr_db > (20 if bits == "w8a8" else 30)
    assert {d.adopted for d in report.decisions if d.method == "bias"} == {False}
    assert any(note.startswith("Masks of attention set to -100: 1, equal to ") for note in report.notes)
    assert {site.bits for site in report.sites if site.kind == "join"} == {bits[2:]}


def test_a_row_that_is_masked_whole_keeps_its_mask():
    body = (
        "q = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(q) s = MatMul(q, t) m = Add(s, mask) p = Softmax(m) y = MatMul(p, q)"
    )
    low = np.full((4, 4), LOWEST, np.float32)
    model = parse(
        f"g (float[N,4,16] x) => (float[N,4,16] y) {{ {body} }}", {"w": np.eye(16, dtype=np.float32), "mask": low}, opset=21
    )

    report = quantize(model, {"x": RNG.normal(size=(32, 4, 16)).astype(np.float32)}, Recipe(target="qnn")).report

    assert any(note.startswith("Masks of attention not set to -100: 1, equal to ") for note in report.notes)
