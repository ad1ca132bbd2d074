"""Wide ends: which layers they are, what they get by what it costs, and that a rule of the recipe has the last word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from equality import parse

from onnxcomp import account
from onnxcomp.graph import files
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.methods.ends import End, find_ends, widen
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, SiteRule
from onnxcomp.runtime import infer_types

RNG = np.random.default_rng(0)
FEED = {"x": RNG.normal(size=(8, 16)).astype(np.float32)}
CHAIN = "[a] h = MatMul(x, w1) r = Relu(h) [b] g = MatMul(r, w2) t = Relu(g) [c] y = MatMul(t, w3)"
INNER = 128
MODELS = Path(__file__).resolve().parents[2] / "models"
DIGITS, DATA = MODELS / "vit_digits.onnx", MODELS / "digits_calib.npz"


def chain(outputs: int = 4, weight: np.ndarray | None = None) -> Prepared:
    first = RNG.normal(size=(16, INNER)) if weight is None else weight
    w = {"w1": first, "w2": RNG.normal(size=(INNER, INNER)), "w3": RNG.normal(size=(INNER, outputs))}
    text = f"g (float[N,16] x) => (float[N,{outputs}] y) {{ {CHAIN} }}"
    return prepare(parse(text, {k: v.astype(np.float32) for k, v in w.items()}), infer_types)


def found(p: Prepared, bits: tuple[int, int | None]) -> dict[str, End]:
    sites = find_sites(p.graph)
    return widen(p.graph, p.model, sites, {site.name: bits for site in sites}, FEED)


def ends(text: str, **weights: np.ndarray) -> list[str]:
    p = prepare(parse(text, {k: v.astype(np.float32) for k, v in weights.items()}), infer_types)
    return [site.name for site, _ in find_ends(p.graph, find_sites(p.graph))]


def test_a_layer_that_reads_the_input_and_one_that_makes_the_output_are_the_ends():
    p = chain()

    said = [(site.name, place) for site, place in find_ends(p.graph, find_sites(p.graph))]

    assert said == [("a", "it reads the model's input"), ("c", "it makes the model's output")]


def test_what_lies_between_an_end_and_the_layer_does_not_matter():
    w = RNG.normal(size=(16, 16))
    body = "t = Tanh(x) [a] h = MatMul(t, w) [b] k = MatMul(h, v) [c] l = MatMul(k, u) y = Softmax(l)"
    text = f"g (float[N,16] x) => (float[N,16] y) {{ {body} }}"

    assert ends(text, w=w, v=w, u=w) == ["a", "c"]


def test_every_layer_at_an_output_is_an_end():
    w = RNG.normal(size=(16, 16))
    body = "[a] h = MatMul(x, w) [b] k = MatMul(h, v) [c] y = MatMul(k, u) [d] z = MatMul(k, t)"
    text = f"g (float[N,16] x) => (float[N,16] y, float[N,16] z) {{ {body} }}"

    assert ends(text, w=w, v=w, u=w, t=w) == ["a", "c", "d"]


def test_a_layer_behind_a_table_is_no_end():
    p = prepare(tiny.embedding().model, infer_types)

    assert [site.name for site, _ in find_ends(p.graph, find_sites(p.graph))] == ["head"]


def test_the_lengths_of_an_input_are_not_its_values():
    """The digits' class token is expanded to as many as there are images."""
    p = prepare(files.load(DIGITS), infer_types)

    assert [site.name for site, _ in find_ends(p.graph, find_sites(p.graph))] == ["/patch_embed/Conv", "/head/Gemm"]


def test_a_small_end_gets_wide_weights_and_says_what_they_take():
    end = found(chain(), (4, 4))["c"]

    assert end.widths == (8, 8)
    assert end.added_bytes == INNER * 4 // 2
    assert end.outcome.reason == "it makes the model's output: weights and activations of 8 bits"
    assert end.outcome.gain_db is not None
    assert end.outcome.gain_db > 20  # a step 16 times as fine: 24 dB


def test_a_large_end_keeps_its_weights():
    end = found(chain(outputs=64), (4, 4))["c"]

    assert (end.widths, end.added_bytes) == ((4, 8), 0)
    assert end.outcome.reason == "it makes the model's output: activations of 8 bits"


def test_float_activations_stay_float():
    assert {name: end.widths for name, end in found(chain(), (4, None)).items()} == {"c": (8, None)}


def test_wide_layers_are_not_asked():
    assert found(chain(), (8, 16)) == {}


def test_wide_codes_that_gain_nothing_are_not_taken():
    codes = RNG.integers(-8, 8, size=(128, 4))
    codes[0] = -8
    p = chain()
    next(n for n in p.graph.nodes if n.name == "c").inputs[1].values = codes.astype(np.float32)

    end = found(p, (4, None))["c"]

    assert (end.widths, end.added_bytes, end.outcome.fit) == ((4, None), 0, None)
    assert end.outcome.reason == "it makes the model's output, but weights of 8 bits gain nothing"


def bits(**options: object) -> dict[str, str]:
    recipe = Recipe(bits=Bits(4, 4), samples=16, rounding="nearest", **options)  # type: ignore[arg-type]
    return {site.name: site.bits for site in quantize(DIGITS, DATA, recipe).report.sites if site.kind == "layer"}


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({}, "w8a8", "w8a8"),
        ({"ends": "asked"}, "w4a4", "w4a4"),
        ({"site": (SiteRule("/head/*", bits=Bits(4, 6)),)}, "w8a8", "w4a6"),
    ],
    ids=["auto", "asked", "a rule"],
)
def test_the_file_has_the_widths_that_the_recipe_lets_it_have(options: dict[str, object], first: str, last: str):
    found = bits(**options)

    assert (found["/patch_embed/Conv"], found["/head/Gemm"]) == (first, last)
    assert set(found.values()) - {first, last} <= {"w4a4"}


def test_a_frozen_recipe_keeps_the_widths():
    net = tiny.models()["mlp"]
    report = quantize(net.model, net.samples, Recipe(bits=Bits(4, 4))).report

    again = quantize(net.model, net.samples, account.frozen(report)).report

    assert [site.bits for site in report.sites] == [site.bits for site in again.sites] == ["w4a8", "w4a8"]
