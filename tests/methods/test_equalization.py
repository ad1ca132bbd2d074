"""Equalization: the equal model stays equal, uneven channels become even, and what does not gain is left alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
from equality import parse

from onnxcomp import quantize
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph, extract
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.methods import equalization
from onnxcomp.methods.equalization import equalize
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.recipe import Bits, Recipe, SiteRule
from onnxcomp.runtime import Session, infer_types

RNG = np.random.default_rng(0)
SPREAD = np.geomspace(0.02, 2.0, 8)
"""How much larger some channels are than others."""
FEEDS = [{"x": RNG.normal(size=(8, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
WEIGHTS = {
    "w": RNG.normal(size=(8, 3, 3, 3)) * SPREAD[:, None, None, None], "d": RNG.normal(size=(8, 1, 3, 3)),
    "p": RNG.normal(size=(8, 8, 1, 1)), "q": RNG.normal(size=(5, 8, 1, 1)) / SPREAD[:, None, None], "lo": np.float32(0),
    "hi": np.float32(6),
}  # fmt: skip
DEPTHWISE = "a = Conv(x, w) r = Clip(a, lo, hi) e = Conv<group = 8>(r, d) k = Relu(e) y = Neg(k)"
LINEAR = "a = Conv(x, w) c = Conv(a, p) s = Add(a, c) e = Conv(s, q) k = Relu(e) y = Neg(k)"


def model(body: str):
    used = {k: np.asarray(v, np.float32) for k, v in WEIGHTS.items() if f" {k}," in body or f" {k})" in body}
    return parse(f"g (float[N,3,8,8] x) => (float[N,C,H,W] y) {{ {body} }}", used)


def prepared(body: str) -> Prepared:
    return prepare(model(body), infer_types)


def at(p: Prepared, weights: int, activations: int) -> dict[str, tuple[int, int]]:
    return {site.name: (weights, activations) for site in find_sites(p.graph)}


def run_to(name: str, graph: Graph, like: Prepared) -> np.ndarray:
    return Session(to_model(extract(graph, ["x"], [name]), like.model).SerializeToString()).run(FEEDS[0])[name]


def run(graph: Graph, like: Prepared) -> np.ndarray:
    return Session(to_model(graph, like.model).SerializeToString()).run(FEEDS[0])["y"]


@pytest.mark.parametrize("body", [DEPTHWISE, LINEAR])
def test_the_equalized_model_equals_the_float_one(body: str):
    p = prepared(body)

    equal, notes = equalize(p.graph, p.model, at(p, 4, 4), FEEDS, bounds=True)

    assert sqnr_db(*energies(run(p.graph, p), run(equal, p))) > equalization.EQUAL_DB
    assert len(notes) == 1
    assert notes[0].startswith("Groups of channels equalized: 1 of 1; equal to ")


def test_channels_in_front_of_a_depthwise_layer_get_one_range():
    p = prepared(DEPTHWISE)

    equal, _ = equalize(p.graph, p.model, at(p, 8, 4), FEEDS, bounds=True)

    ends = [run_to("r", graph, p).max(axis=(0, 2, 3)) for graph in (p.graph, equal)]
    assert ends[0].max() / ends[0].min() > 20
    # what is left is how far each channel's largest value lies beyond the end of its range
    assert ends[1].max() / ends[1].min() < 2


def test_groups_whose_positions_would_take_too_much_memory_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch):
    p, looked, see = prepared(DEPTHWISE.replace("Neg(k)", "Conv(k, p)")), [], equalization._see

    def spy(graph: Graph, like: object, groups: list[object], feeds: object) -> object:
        looked.append(len(groups))
        return see(graph, like, groups, feeds)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(equalization, "_see", spy)
    together, notes = equalize(p.graph, p.model, at(p, 4, 4), FEEDS, bounds=True)
    monkeypatch.setattr(equalization, "SEEN", 1)
    alone, said = equalize(p.graph, p.model, at(p, 4, 4), FEEDS, bounds=True)

    assert looked == [2, 1, 1]
    assert said == notes
    np.testing.assert_allclose(run(alone, p), run(together, p), rtol=1e-5)


def test_a_clip_stays_where_the_target_takes_no_bound_per_channel():
    p = prepared(DEPTHWISE)

    equal, notes = equalize(p.graph, p.model, at(p, 4, 4), FEEDS, bounds=False)

    assert equal is p.graph
    assert not notes


def test_what_has_one_range_already_is_left_alone():
    p = prepared("a = Conv(x, d) y = Relu(a)".replace("x, d", "x, w"))

    equal, notes = equalize(p.graph, p.model, at(p, 4, 4), FEEDS, bounds=True)

    assert equal is p.graph
    assert not notes


def error(body: str, bits: str, **options: object) -> float:
    feeds = [{"x": x[None]} for feed in FEEDS for x in feed["x"]]
    recipe = Recipe(bits=Bits.parse(bits), sensitive="asked", site=(SiteRule("a", bits=Bits(8, 8)),), **options)  # type: ignore[arg-type]
    found, want = (Session(m.SerializeToString()) for m in (quantize(model(body), feeds, recipe).model, model(body)))
    pairs = [energies(want.run(feed)["y"], found.run(feed)["y"]) for feed in FEEDS]
    return float(sum(noise for _, noise in pairs) / sum(signal for signal, _ in pairs))


@pytest.mark.parametrize("body", [DEPTHWISE, LINEAR])
def test_narrow_activations_lose_less(body: str):
    # at 8 bits for weights nearly all that is lost is the activations'; 1.2 dB are 0.76 of it
    assert error(body, "w8a4") < 0.76 * error(body, "w8a4", equalization="none")


def test_a_scale_that_clips_what_it_was_not_fitted_on_is_refused():
    # two channels come from one input, which is quiet but in half of the samples, and large weights read them
    p = prepared(DEPTHWISE)
    first, behind = (node.inputs[1] for node in p.graph.nodes if node.op == "Conv")
    one = (np.arange(8)[:, None] % 3 == np.arange(3)) / SPREAD[:, None]
    first.values = (first.values * one[..., None, None]).astype(np.float32)
    behind.values = (behind.values * np.where(np.arange(8) % 3 == 2, 50, 1)[:, None, None, None]).astype(np.float32)
    quiet, loud = (np.array([1, 1, size], np.float32).reshape(3, 1, 1) for size in (0.02, 1))
    halves = [{"x": FEEDS[0]["x"] * quiet}, {"x": FEEDS[1]["x"] * loud}]

    notes = [equalize(p.graph, p.model, at(p, 8, 4), feeds, bounds=True)[1] for feeds in (halves, halves[:1])]

    assert [note.startswith("Groups of channels equalized: 1") for (note,) in notes] == [False, True]


def test_a_bound_per_channel_is_no_operator_of_the_quantized_file():
    feeds = [{"x": x[None]} for feed in FEEDS for x in feed["x"]]

    found = quantize(model(DEPTHWISE), feeds, Recipe(bits=Bits(4, 4), sensitive="asked"))

    assert any(note.startswith("Groups of channels equalized: 1 of 1") for note in found.report.notes)
    assert not {node.op_type for node in found.model.graph.node} & {"Min", "Relu"}


def test_at_8_bits_nothing_is_equalized():
    feeds = [{"x": x[None]} for feed in FEEDS for x in feed["x"]]

    found = quantize(model(DEPTHWISE), feeds, Recipe())

    assert not any("equalized" in note for note in found.report.notes)


TOKENS = [{"x": (RNG.normal(size=(4, 5, 8)) * SPREAD + 1).astype(np.float32)} for _ in range(4)]
NORMED = {
    "g": SPREAD * 4, "s": np.linspace(-3, 3, 8), "v": RNG.normal(size=(8, 6)), "u": RNG.normal(size=(8, 3)),
    "b": RNG.normal(size=3),
}  # fmt: skip
TWO_READERS = "n = LayerNormalization(x, g, s) y = MatMul(n, v) m = MatMul(n, u) z = Add(m, b)"
NO_SHIFT = "n = LayerNormalization(x, g) y = MatMul(n, v) z = MatMul(n, u)"
SCALED = "n = Mul(x, g) y = MatMul(n, v) z = MatMul(n, u)"


def normed(body: str, **weights: np.ndarray) -> Prepared:
    arrays = {k: np.asarray(v, np.float32) for k, v in (NORMED | weights).items()}
    used = {k: a for k, a in arrays.items() if re.search(rf"\b{k}\b", body.replace("s =", ""))}
    return prepare(parse(f"g (float[N,5,8] x) => (float[N,5,6] y, float[N,5,3] z) {{ {body} }}", used), infer_types)


def smoothed(p: Prepared) -> tuple[Graph, np.ndarray]:
    """The equalized graph, and what stands behind its norm."""
    equal, notes = equalize(p.graph, p.model, at(p, 8, 4), TOKENS, bounds=True)
    assert notes
    part = extract(equal, ["x"], ["n"])
    found = Session(to_model(part, p.model).SerializeToString())
    return equal, np.concatenate([found.run(feed)["n"].reshape(-1, 8) for feed in TOKENS])


@pytest.mark.parametrize("body", [TWO_READERS, NO_SHIFT, SCALED, SCALED.replace("Mul(x, g)", "Mul(g, x)")])
def test_the_smoothed_model_equals_the_float_one(body: str):
    p = normed(body)

    equal, _ = smoothed(p)

    want, found = (Session(to_model(graph, p.model).SerializeToString()).run(TOKENS[0]) for graph in (p.graph, equal))
    for name, array in want.items():
        assert sqnr_db(*energies(array, found[name])) > equalization.EQUAL_DB


def test_behind_a_norm_channels_get_one_range_around_zero():
    before = Session(to_model(extract(normed(TWO_READERS).graph, ["x"], ["n"]), normed(TWO_READERS).model).SerializeToString())
    plain = np.concatenate([before.run(feed)["n"].reshape(-1, 8) for feed in TOKENS])

    _, x = smoothed(normed(TWO_READERS))

    off = [np.abs(a.mean(axis=0) / a.std(axis=0)).max() for a in (plain, x)]
    spread = [a.std(axis=0).max() / a.std(axis=0).min() for a in (plain, x)]
    assert off[0] > 5 > 0.5 > off[1]
    assert spread[0] > 20 > 8 > spread[1]


def test_where_a_rotation_has_mixed_the_channels_they_are_shifted_alone():
    p = normed(TWO_READERS, g=np.ones(8))

    equal, x = smoothed(p)

    norm = next(node for node in equal.nodes if node.op == "LayerNormalization")
    assert (norm.inputs[1].values == 1).all()
    assert np.abs(x.mean(axis=0)).max() < 0.5 < 2.9 < np.abs(NORMED["s"]).max()


@pytest.mark.parametrize(
    "body",
    [
        "n = LayerNormalization(x, g, s) y = MatMul(n, v) r = Add(n, x) z = MatMul(r, u)",
        "n = LayerNormalization(x, g, s) y = MatMul(n, v) r = Relu(n) z = MatMul(r, u)",
        "n = LayerNormalization(x, t, s) y = MatMul(n, v) z = MatMul(n, u)",
        "n = LayerNormalization(x, g, t) y = MatMul(n, v) z = MatMul(n, u)",
    ],
    ids=["residual", "activation", "computed scale", "computed shift"],
)
def test_a_norm_that_others_than_layers_read_or_whose_factors_are_computed_is_left_alone(body: str):
    computed = "axes = Constant<value_ints = [0, 1]>() t = ReduceMean<keepdims = 0>(x, axes) "
    p = normed(computed * (" t" in body) + body)

    equal, notes = equalize(p.graph, p.model, at(p, 8, 4), TOKENS, bounds=True)

    assert equal is p.graph
    assert not notes


def test_a_single_position_is_both_fitted_on_and_judged_by(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder):
    monkeypatch.setattr(equalization, "ROWS", 1)
    p = normed(TWO_READERS)

    _, notes = equalize(p.graph, p.model, at(p, 8, 4), TOKENS[:1], bounds=True)

    assert notes
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
