"""Sensitive layers: how damage is measured, which layers are widened within what bounds, and that a rule has the last word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from equality import parse
from onnx import ModelProto

from onnxcomp import account
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.methods import sensitivity
from onnxcomp.methods.sensitivity import Rescued, Wide, measure, rescue, store, widen
from onnxcomp.numerics.affine import weight_qparams
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, SiteRule
from onnxcomp.runtime import infer_types

RNG = np.random.default_rng(0)
WIDTH = 64
FEED = {"x": RNG.normal(size=(32, WIDTH)).astype(np.float32)}
CHAIN = "[a] h = MatMul(x, w1) r = Relu(h) [b] g = MatMul(r, w2) t = Relu(g) [c] y = MatMul(t, w3)"
MODELS = Path(__file__).resolve().parents[2] / "models"
DIGITS, DATA = MODELS / "vit_digits.onnx", MODELS / "digits_calib.npz"


def chain(**weights: np.ndarray) -> Prepared:
    """Three layers with the weights given; the others have codes of 4 bits, so that rounding loses nothing of them."""
    codes = RNG.integers(-7, 8, size=(WIDTH, WIDTH)) / 64
    codes[0], codes[1] = -8 / 64, 7 / 64
    w = {name: weights.get(name, codes).astype(np.float32) for name in ("w1", "w2", "w3")}
    text = f"g (float[N,{w['w1'].shape[0]}] x) => (float[N,{w['w3'].shape[1]}] y) {{ {CHAIN} }}"
    return prepare(parse(text, w), infer_types)


def found(graph: Graph, like: Prepared, bits: tuple[int, int | None], feed: dict[str, np.ndarray] = FEED) -> dict[str, Wide]:
    sites = find_sites(graph)
    return widen(graph, like.model, sites, {site.name: bits for site in sites}, feed)


def spread(rows: int, columns: int) -> np.ndarray:
    """Weights that 4 bits cannot hold: a large one in every column."""
    w = RNG.normal(size=(rows, columns))
    w[0] = 20
    return w


def test_the_damage_of_a_part_is_the_error_of_the_output_when_it_alone_is_rounded():
    p = chain(w1=spread(WIDTH, WIDTH), w3=spread(WIDTH, WIDTH))
    sites = {site.name: site for site in find_sites(p.graph)}
    asked = dict.fromkeys(sites, (4, None))

    parts = measure(p.graph, p.model, list(sites.values()), asked, FEED)

    w = {node.name: node.inputs[1].values for node in p.graph.nodes if node.name in sites}
    for part in parts:
        (name,) = part.sites
        rounded = w | {name: weight_qparams(w[name], sites[name].weight_axis, 4).fake(w[name])}
        one, other = (np.maximum(np.maximum(FEED["x"] @ m["a"], 0) @ m["b"], 0) @ m["c"] for m in (w, rounded))
        assert part.damage == pytest.approx(np.square(other - one).sum() / np.square(one).sum(), rel=1e-3, abs=1e-9)
    assert parts[0].damage > 1e-3 > 1e-9 > parts[1].damage


@pytest.mark.parametrize("shortest", [1, 2])
def test_where_the_model_is_cut_changes_no_damage(shortest: int, monkeypatch: pytest.MonkeyPatch):
    net = tiny.models()["transformer"]
    p, feed = prepare(net.model, infer_types), net.samples[0]
    sites = [site for site in find_sites(p.graph) if site.kind == "layer"]
    asked = dict.fromkeys([site.name for site in sites], (3, 4))
    whole = measure(p.graph, p.model, sites, asked, feed)

    monkeypatch.setattr(sensitivity, "SHORTEST", shortest)
    found = measure(p.graph, p.model, sites, asked, feed)

    assert len(sites) > 6
    assert {part[:2]: part.cost for part in found} == {part[:2]: part.cost for part in whole}
    damages = {part[:2]: part.damage for part in whole}
    assert all(part.damage == pytest.approx(damages[part[:2]], rel=1e-3) for part in found)


def test_a_small_layer_that_loses_most_gets_wide_weights_and_says_what_they_take():
    p = chain(w3=spread(WIDTH, 4))

    wide = found(p.graph, p, (4, None))

    assert list(wide) == ["c"]
    assert (wide["c"].widths, wide["c"].added_bytes) == ((8, None), WIDTH * 4 // 2)
    assert wide["c"].outcome.reason == "weights of 8 bits: 100.0% of what weights lose, 3.0% of the weights' bytes"


def test_a_layer_that_costs_more_than_the_bound_keeps_its_weights():
    p = chain(w2=spread(WIDTH, WIDTH))

    assert found(p.graph, p, (4, None)) == {}


def test_fewer_bits_leave_room_for_fewer_wide_weights():
    p = chain(w3=spread(WIDTH, 4))  # 3 % of the weights: 9 % of their bytes at 2 bits

    assert "c" not in found(p.graph, p, (2, None))


def test_the_input_of_a_small_layer_gets_wide_activations():
    """The first layer reads values of which a few are a hundred times the others."""
    p = chain(w1=RNG.normal(size=(4, WIDTH)))
    x = RNG.normal(size=(32, 4)).astype(np.float32)
    x[:, 0] *= 100

    wide = found(p.graph, p, (8, 4), {"x": x})

    assert wide["a"].widths == (8, 8)
    assert wide["a"].added_bytes == 0
    assert wide["a"].outcome.reason.startswith("activations of 8 bits: ")
    assert wide["a"].outcome.reason.endswith("3.0% of the multiplications")


def test_layers_that_read_one_tensor_are_widened_together():
    w = {name: RNG.normal(size=(WIDTH, size)).astype(np.float32) for name, size in (("v", 4), ("u", 2), ("w", WIDTH * 8))}
    body = "[a] p = MatMul(x, v) [b] q = MatMul(x, u) [c] r = MatMul(z, w)"
    text = f"g (float[N,{WIDTH}] x, float[N,{WIDTH}] z) => (float[N,4] p, float[N,2] q, float[N,{WIDTH * 8}] r) {{ {body} }}"
    p = prepare(parse(text, w), infer_types)

    wide = found(p.graph, p, (8, 4), {name: RNG.normal(size=(8, WIDTH)).astype(np.float32) for name in "xz"})

    assert {name: found.widths for name, found in wide.items()} == {"a": (8, 8), "b": (8, 8)}


def test_a_range_per_token_that_is_open_takes_the_damage_away():
    """Rows of very different size: a static range loses the small ones, one per token none."""
    w = {"v": RNG.normal(size=(WIDTH, 1)).astype(np.float32), "w": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)}
    body = "[a] p = MatMul(x, v) [b] q = MatMul(z, w)"
    text = f"g (float[N,{WIDTH}] x, float[N,{WIDTH}] z) => (float[N,1] p, float[N,{WIDTH}] q) {{ {body} }}"
    p = prepare(parse(text, w), infer_types)
    sites = find_sites(p.graph)
    rows = 10.0 ** RNG.uniform(-2, 2, size=(64, 1))
    feed = {name: (RNG.normal(size=(64, WIDTH)) * rows).astype(np.float32) for name in "xz"}

    static, token = (
        measure(p.graph, p.model, sites, dict.fromkeys("ab", (8, 4)), feed, frozenset(names)) for names in ("", "ab")
    )

    assert 0 < token[0].damage < static[0].damage


def test_float_activations_stay_float_and_wide_layers_are_not_looked_at():
    p = chain(w3=spread(WIDTH, 4))

    assert {name: wide.widths for name, wide in found(p.graph, p, (4, None)).items()} == {"c": (8, None)}
    assert found(p.graph, p, (8, 16)) == {}


def test_what_no_float_output_depends_on_does_no_damage():
    w = {name: RNG.normal(size=(WIDTH, 4)).astype(np.float32) for name in "vw"}
    body = "[a] h = MatMul(x, v) k = Cast <to = 7> (h) [b] y = MatMul(x, w)"
    p = prepare(parse(f"g (float[N,{WIDTH}] x) => (int64[N,4] k, float[N,4] y) {{ {body} }}", w), infer_types)

    parts = measure(p.graph, p.model, find_sites(p.graph), dict.fromkeys("ab", (4, None)), FEED)

    assert [part.damage > 0 for part in parts] == [False, True]


def test_a_class_counts_by_the_numbers_that_it_is_picked_from():
    w = {"w": RNG.normal(size=(WIDTH, 4)).astype(np.float32)}
    text = f"g (float[N,{WIDTH}] x) => (int64[N,1] k) {{ [a] h = MatMul(x, w) k = ArgMax <axis = 1> (h) }}"
    p = prepare(parse(text, w), infer_types)

    (part,) = measure(p.graph, p.model, find_sites(p.graph), {"a": (4, None)}, FEED)

    assert part.damage > 0


def test_where_no_output_is_a_number_of_type_float_nothing_can_be_measured():
    w = RNG.normal(size=(WIDTH, 4)).astype(np.float32)
    text = f"g (float[N,{WIDTH}] x) => (int64[N] y) {{ [a] h = MatMul(x, w) y = ArgMax <axis = 1, keepdims = 0> (h) }}"
    p = prepare(parse(text, {"w": w}), infer_types)

    assert found(p.graph, p, (4, 4)) == {}


def lost(graph: Graph, like: Prepared, feed: dict[str, np.ndarray] = FEED) -> dict[str, Rescued]:
    sites = find_sites(graph)
    return rescue(graph, like.model, sites, {site.name: (8, 8) for site in sites}, feed)


def test_layers_of_8_bits_that_lose_little_are_left_alone():
    p = chain()

    assert lost(p.graph, p) == {}


def test_weights_that_8_bits_cannot_hold_are_rounded_by_gptq():
    w = RNG.normal(size=(WIDTH, WIDTH))
    w[0] = 3000
    p = chain(w1=w)
    feed = {"x": FEED["x"].copy()}
    feed["x"][:, 0] = 0

    rescued = lost(p.graph, p, feed)

    assert {name: (layer.is_float, layer.is_gptq) for name, layer in rescued.items()} == {"a": (False, True)}
    assert rescued["a"].outcome.reason.startswith("weights of 8 bits cost the outputs ")


def test_an_input_that_8_bits_cannot_hold_stays_float_where_its_layer_is_cheap():
    """The first layer reads values of which one is ten thousand times the others, and multiplies it by next to nothing."""
    weight = RNG.normal(size=(4, WIDTH))
    weight[0] = 0
    x = RNG.normal(size=(32, 4)).astype(np.float32)
    x[:, 0] *= 10_000

    for width, expected in ((WIDTH, {"a": True}), (4, {})):
        w = {"w1": weight[:, :width].astype(np.float32), "w2": RNG.normal(size=(width, width)).astype(np.float32)}
        text = f"g (float[N,4] x) => (float[N,{width}] y) {{ [a] h = MatMul(x, w1) r = Relu(h) [b] y = MatMul(r, w2) }}"
        p = prepare(parse(text, w), infer_types)
        assert {name: layer.is_float for name, layer in lost(p.graph, p, {"x": x}).items()} == expected


@pytest.mark.parametrize("options", [{"activations": "static"}, {"sensitive": "asked"}, {"target": "qnn"}, {}])
def test_what_the_recipe_or_the_target_leaves_no_choice_of_is_not_rescued(options: dict[str, str]):
    """The first Conv reads what 8 bits cannot hold, and is a hundredth of the model."""
    w1, w2 = RNG.normal(size=(8, 2, 1, 1)).astype(np.float32), RNG.normal(size=(96, 8, 3, 3)).astype(np.float32)
    w1[:, 0] = 0
    body = "[a] c = Conv(x, w1) h = Relu(c) [b] g = Conv(h, w2) y = Tanh(g)"
    model = parse(f"g (float[N,2,8,8] x) => (float[N,96,6,6] y) {{ {body} }}", {"w1": w1, "w2": w2}, opset=21)
    x = RNG.normal(size=(8, 2, 8, 8)).astype(np.float32)
    x[:, 0] *= 100_000

    report = quantize(model, x, Recipe(**options)).report  # type: ignore[arg-type]

    rescued = [d.site for d in report.decisions if d.method == "rescue" and d.adopted]
    assert rescued == ([] if options else ["a"])
    assert report.sites[0].bits == ("w8a16" if "target" in options else "w8a8" if options else "w8")


def test_what_a_conv_stores_counts_where_an_activation_reads_it():
    """One channel is a thousand times as wide as the others, which are lost in 8 bits, and the next layer does not read it."""
    w1 = np.concatenate([np.full((1, 1, 1, 1), 1000), RNG.normal(size=(7, 1, 1, 1))]).astype(np.float32)
    w2 = RNG.normal(size=(64, 8, 3, 3)).astype(np.float32)
    w2[:, 0] = 0
    body = "[a] c = Conv(x, w1) h = HardSwish(c) [b] y = Conv(h, w2)"
    p = prepare(parse(f"g (float[N,1,6,6] x) => (float[N,64,4,4] y) {{ {body} }}", {"w1": w1, "w2": w2}, opset=21), infer_types)
    x = {"x": RNG.normal(size=(4, 1, 6, 6)).astype(np.float32)}
    parts = measure(p.graph, p.model, find_sites(p.graph), dict.fromkeys("ab", (8, 8)), x, least=1e-9)

    found = {part.sites: part.damage for part in parts if not part.is_weight}

    assert found["a",] > 0.5
    assert lost(p.graph, p, x)["a"].is_float


def bits(**options: object) -> dict[str, str]:
    recipe = Recipe(bits=Bits(4, 4), samples=16, rounding="nearest", **options)  # type: ignore[arg-type]
    return {site.name: site.bits for site in quantize(DIGITS, DATA, recipe).report.sites if site.kind == "layer"}


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({}, "w8a8", "w8a8"),
        ({"sensitive": "asked"}, "w4a4", "w4a4"),
        ({"site": (SiteRule("/head/*", bits=Bits(4, 6)),)}, "w8a8", "w4a6"),
    ],
    ids=["auto", "asked", "a rule"],
)
def test_the_file_has_the_widths_that_the_recipe_lets_it_have(options: dict[str, object], first: str, last: str):
    found = bits(**options)

    assert (found["/patch_embed/Conv"], found["/head/Gemm"]) == (first, last)


def test_a_frozen_recipe_keeps_the_widths():
    net = tiny.models()["mlp"]
    report = quantize(net.model, net.samples, Recipe(bits=Bits(4, 4))).report

    again = quantize(net.model, net.samples, account.frozen(report)).report

    assert [site.bits for site in report.sites] == [site.bits for site in again.sites]


# --- tensors that 8 bits do not hold ------------------------------------------------------------------------------------

STREAM = "[a] h = MatMul(x, w1) [j] s = Add(h, x) [b] g = MatMul(s, w2) r = Relu(g) [c] y = MatMul(r, w3)"


def stream(rng: np.random.Generator, layers: int = 0) -> tuple[ModelProto, np.ndarray]:
    """A residual stream of 16 channels, one of which no layer reads and is a thousand times as wide as the others, and so many
    more layers behind it.
    """
    w = {f"w{i + 1}": rng.normal(size=(16, 16)).astype(np.float32) / 4 for i in range(3 + layers)}
    w["w1"][0] = w["w2"][0] = 0
    x = rng.normal(size=(16, 16)).astype(np.float32)
    x[:, 0] *= 1000
    body = STREAM.replace("y =", "z0 =") + "".join(f" z{i + 1} = MatMul(z{i}, w{i + 4})" for i in range(layers))
    return parse(f"g (float[N,16] x) => (float[N,16] y) {{ {body.replace(f'z{layers} =', 'y =')} }}", w, opset=21), x


def test_the_tensors_that_lose_most_are_stored_in_16_bits(rng: np.random.Generator):
    model, x = stream(rng)
    p = prepare(model, infer_types)

    loose = store(p.graph, p.model, (), ["x", "h", "s", "g", "r", "y"], {"x": x})

    assert list(loose) == ["x", "s"]
    assert loose["s"].outcome.reason.startswith("stored in 8 bits it costs the outputs ")


def test_layers_of_most_multiplications_read_8_bits_of_what_others_read_in_16(rng: np.random.Generator):
    """Two of three equal layers read x and s, and the first channel too; what is added needs 16 bits as well."""
    model, x = stream(rng)
    p = prepare(model, infer_types)

    found = store(p.graph, p.model, find_sites(p.graph), ["x", "h", "s", "g", "r", "y"], {"x": x})

    assert {name: tensor.layers for name, tensor in found.items()} == {"x": ()}


def test_a_layer_with_few_multiplications_reads_16_bits(rng: np.random.Generator):
    model, x = stream(rng, layers=7)
    p = prepare(model, infer_types)

    found = store(p.graph, p.model, find_sites(p.graph), ["x", "s"], {"x": x})

    assert {name: tensor.layers for name, tensor in found.items()} == {"x": ("a",), "s": ("b",)}


def test_where_8_bits_are_enough_nothing_is_stored_in_16(rng: np.random.Generator):
    p = prepare(stream(rng)[0], infer_types)

    assert (
        store(p.graph, p.model, (), ["x", "h", "s", "g", "r", "y"], {"x": rng.normal(size=(16, 16)).astype(np.float32)}) == {}
    )


@pytest.mark.parametrize("stretches", [1, 3, 100])
def test_where_the_model_is_cut_changes_nothing_of_what_is_stored(
    rng: np.random.Generator, stretches: int, monkeypatch: pytest.MonkeyPatch
):
    model, x = stream(rng)
    p = prepare(model, infer_types)
    whole = store(p.graph, p.model, (), ["x", "s", "y"], {"x": x})

    monkeypatch.setattr(sensitivity, "STRETCHES", stretches)
    found = store(p.graph, p.model, (), ["x", "s", "y"], {"x": x})

    assert found.keys() == whole.keys()
    assert [f.outcome.gain_db for f in found.values()] == pytest.approx([f.outcome.gain_db for f in whole.values()], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "wide"),
    [
        ({}, ["x", "s"]),
        ({"sensitive": "asked"}, []),
        ({"site": (SiteRule("a", Bits(8, 8)),)}, ["s"]),
        ({"target": "portable"}, []),
    ],
)
def test_a_stream_that_8_bits_do_not_hold_has_16_where_all_is_stored(
    rng: np.random.Generator, options: dict[str, object], wide: list[str]
):
    """Seven more layers, so that those that read the stream have less than a quarter of the multiplications."""
    model, x = stream(rng, layers=7)

    result = quantize(model, x, Recipe(**{"target": "qnn", "rotation": "none"} | options))  # type: ignore[arg-type]

    found = [d.site for d in result.report.decisions if d.method == "16 bits" and d.adopted]
    types = {i.name: i.data_type for i in result.model.graph.initializer}
    codes = {types[n.input[2]] for n in result.model.graph.node if n.op_type == "QuantizeLinear"}
    assert sorted(found) == sorted(wide)
    assert (onnx.TensorProto.UINT16 in codes) is bool(wide)
    if "target" not in options:
        assert (result.report.verification.sqnr_db > 15) is (len(wide) == 2)
        assert result.report.verification.expected_db is not None
        assert result.report.verification.expected_db > 60
