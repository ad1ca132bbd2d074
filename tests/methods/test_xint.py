"""FP=xINT: the digits of a series, how many there are, the graph they become, and its parts as models of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny
from abstract import dequantize, measured, static
from equality import parse, run

from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.errors import RecipeError
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Graph, Tape, apply
from onnxcomp.graph.sites import Site
from onnxcomp.methods import weights
from onnxcomp.methods.base import Fit
from onnxcomp.methods.xint import Digits, Terms, XInt, allocate, expand, first_term, split
from onnxcomp.numerics.affine import QParams, Scheme
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.targets import find

TARGET = find("ort-x86")
Array = np.ndarray
FLOAT = ""
FC = Site("fc", "MatMul", "layer", ("x",), "h", "y", -1, weight="w", weight_axis=1, bias="b", bias_node="fc_bias")
GEMM = Site("fc", "Gemm", "layer", ("x",), "y", "y", -1, weight="w", weight_axis=1, bias="b")
CONV = Site("fc", "Conv", "layer", ("x",), "y", "y", 1, rank=4, weight="w", weight_axis=0, bias="b")
BODY = {
    "MatMul": "[fc] h = MatMul({}, w) [fc_bias] y = Add(h, b)",
    "Gemm": "[fc] y = Gemm({}, w, b)",
    "Conv": "[fc] y = Conv({}, w, b)",
}


@dataclass
class Layer:
    """One layer with its weight in one term, abstractly quantized, and the float function it stands for."""

    site: Site
    graph: Graph
    place: Terms
    x: Array
    bias: Array

    def expanded(self, method: XInt, fit: Fit) -> Graph:
        """The graph with the series in place of the one term."""
        graph, tape = self.graph.copy(), Tape(f"{self.site.name}/xint")
        new = method.build(tape, self.place, fit)
        apply(graph, "xint", tape, new, None if self.site.raw in new else (self.site.name,))
        return graph

    def wanted(self) -> Array:
        w = self.place.weight.astype(np.float64)
        if self.site.op == "Conv":
            return np.einsum("nchw,oc->nohw", self.x, w[:, :, 0, 0]) + self.bias[:, None, None]
        return self.x.astype(np.float64) @ w + self.bias

    def sqnr(self, graph: Graph) -> float:
        want = self.wanted()
        return float(10 * np.log10(np.square(want).sum() / np.square(output(graph, self.x) - want).sum()))


def layer(quantizer: str, op: str = "MatMul", bits: int = 4, **constants: object) -> Layer:
    """A layer of 16 inputs and 12 outputs on normal numbers."""
    rng = np.random.default_rng(0)
    site = {"MatMul": FC, "Gemm": GEMM, "Conv": CONV}[op]
    shape, inner = ((12, 16, 1, 1), (16, 3, 3)) if op == "Conv" else ((16, 12), (16,))
    w = rng.normal(size=shape).astype(np.float32)
    first, axis = first_term(w, site.weight_axis, bits), site.weight_axis
    known = {**first._asdict(), "b": rng.normal(size=12).astype(np.float32), **constants}
    body = quantizer + dequantize("codes", "scale", "w", bits, axis) + BODY[op].format("d" if quantizer else "x")
    free = "N,12,3,3" if op == "Conv" else "N,12"
    sizes = ",".join(map(str, inner))
    text = f"g (float[N,{sizes}] x) => (float[{free}] y) {{ {body} }}"
    graph = to_graph(parse(text, {k: np.asarray(v) for k, v in known.items()}, opset=21, domains=', "onnxcomp" : 1'))
    x = rng.normal(size=(32, *inner)).astype(np.float32)
    return Layer(site, graph, Terms.read(graph, site, w), x, known["b"])


def output(graph: Graph, x: Array) -> Array:
    like = parse("g (float[N] x) => (float[N] y) { y = Neg(x) }", opset=21)
    return run(to_model(TARGET.lower(graph.copy()), like), {"x": x}, optimize=True)["y"]


def cut(x: Array, batch: int = 1) -> Cut:
    """Samples of `xh`, `batch` rows each."""
    parts = [LiveBatch((i,), {"h": x[i * batch : (i + 1) * batch]}) for i in range(len(x) // batch)]
    return Cut(parts, {"xh": "h"})


def fitted(method: XInt, place: Terms, samples: Cut | None = None) -> Fit:
    outcome = method.fit(place, samples)
    assert outcome.fit is not None, outcome.reason
    return outcome.fit


TOKEN, DYNAMIC = measured("x", "d", "token", 4), measured("x", "d", "dynamic", 4)
STATIC, RANGE = static("x", "d", 4), {"s": np.float32(0.375), "z": np.uint8(8)}  # clips beyond -3 and 2.625


# --- digits of a weight ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_digit_needs_more_than_the_symmetric_range_and_every_term_converges(rng: np.random.Generator, bits: int):
    w, top = rng.normal(size=(64, 8)), 2 ** (bits - 1) - 1
    terms, left = expand(w, 1, bits, 4)

    rest = w
    for codes, scale in terms:
        assert np.abs(codes).max() <= top
        rest = rest - codes * scale.astype(np.float64)
        assert np.all(np.abs(rest) <= scale * (0.5 + 1e-6 * top))  # half a step, and the rounding of the scale
    assert left == sorted(left, reverse=True)
    assert left[-1] == pytest.approx(np.square(rest).sum() / np.square(w).sum())


def test_the_first_term_clips_nothing_and_every_channel_has_its_own_scale():
    w = np.array([[7.0, -0.7], [3.4, 0.0], [0.0, 0.0]], np.float32).T

    term = first_term(w, 1, 4)

    np.testing.assert_allclose(term.scale[:2], [1, 3.4 / 7], rtol=2.0**-23)
    assert term.codes.T.tolist() == [[7, -1], [7, 0], [0, 0]]
    assert term.scale[2] > 0


def test_behind_a_term_that_clips_the_step_is_measured_anew(rng: np.random.Generator):
    w = rng.standard_t(3, size=(256, 4)).astype(np.float32)
    clipped = Digits(**weights.fit(replace(FC, weight_axis=1), w, 4))

    terms, left = expand(w, 1, 4, 4, clipped)

    rest = w - clipped.values(1)
    np.testing.assert_array_equal(terms[1].scale, (np.abs(rest).max(axis=0) / 7).astype(np.float32))
    # From the second term on nothing is clipped: what is left is below half a step, and steps are 14 times finer.
    assert left[3] < left[1] / 14**4 * 4


# --- how many terms --------------------------------------------------------------------------------------------------


def test_an_exact_weight_gets_no_further_term():
    found = layer(FLOAT)
    exact = replace(found.place, weight=found.place.first.codes * found.place.first.scale)

    assert XInt(keep="always").fit(exact, None).reason == "one term is enough, or all that fits"


@pytest.mark.parametrize(("tolerance", "terms"), [(30.0, 2), (60.0, 3), (200.0, 4)])
def test_a_tolerance_takes_the_fewest_terms_that_reach_it(tolerance: float, terms: int):
    place = layer(FLOAT).place
    _, left = expand(place.weight, 1, 4, 4)

    assert fitted(XInt(weight_terms=4, tolerance=tolerance), place)["terms"].tolist() == [terms, 1]

    assert -10 * np.log10(left[terms - 2]) < tolerance
    assert terms == 4 or -10 * np.log10(left[terms - 1]) >= tolerance


def test_without_samples_an_input_is_taken_to_converge_as_digits_do():
    place = layer(TOKEN).place

    (_, t) = fitted(XInt(activation_terms=4, tolerance=40.0), place)["terms"]

    assert t == 2  # 22.9 dB per term


def test_with_samples_the_terms_of_an_input_are_counted_on_held_out_ones(rng: np.random.Generator):
    found = layer(DYNAMIC)
    x = np.round(found.x)  # exact in one term where the largest is 7, as in the held-out samples
    x[:, 0] = 7
    x[[i for i in range(32) if i % 4 != 3], 1] = 0.1

    outcome = XInt(activation_terms=3).fit(found.place, cut(x))

    assert outcome.reason == "2 weight and 1 activation terms"


def test_the_gain_is_that_of_both_relative_errors_together():
    found = layer(DYNAMIC)
    _, left = expand(found.place.weight, 1, 4, 2)
    kept, errors = found.x[3::4], []
    for step in (np.abs(kept).max(axis=1, keepdims=True) / 7, np.abs(kept).max(axis=1, keepdims=True) / 98):
        errors.append((errors[-1] if errors else kept) - np.rint((errors[-1] if errors else kept) / step) * step)

    outcome = XInt(activation_terms=2).fit(found.place, cut(found.x))

    x1, x2 = (np.square(e).sum() / np.square(kept).sum() for e in errors)
    # Digits of float64 here and of float32 values there fall apart at few thresholds.
    assert outcome.gain_db == pytest.approx(10 * np.log10((left[0] + x1) / (left[1] + x2)), abs=0.01)


def test_what_does_not_help_is_declined_unless_it_is_always_kept():
    found = layer(STATIC, **RANGE)
    x = np.full((8, 16), 0.376, np.float32)  # 0.001 from a code, where it is judged: less than half a second step
    x[0] = 0.5
    method = XInt(weight_terms=1, activation_terms=2)

    assert method.fit(found.place, cut(x)).reason == "held-out inputs do not improve"
    assert replace(method, keep="always").fit(found.place, cut(x)).fit is not None
    assert replace(method, granularity="model").fit(found.place, cut(x)).fit is not None


def test_a_budget_goes_where_residual_times_size_is_largest():
    left = {"small": [0.9, 0.5, 0.1], "large": [0.1, 0.05, 0.01], "exact": [0.0, 0.0, 0.0]}
    sizes = {"small": 10, "large": 100, "exact": 50}

    assert allocate(left, sizes, 1.0) == {"small": 1, "large": 1, "exact": 1}
    assert allocate(left, sizes, 1.1) == {"small": 2, "large": 1, "exact": 1}  # room for 16 numbers
    assert allocate(left, sizes, 2.0) == {"small": 3, "large": 2, "exact": 1}  # 160: 100 first, since 10 > 9
    assert allocate(left, sizes, 9.0) == {"small": 3, "large": 3, "exact": 1}


def test_layers_get_no_more_terms_than_a_budget_leaves_them():
    mlp = tiny.mlp()
    recipe = Recipe(bits=Bits(4, 4), activations="token", compensate=(XInt(weight_terms=4, budget=1.5),))

    graph = quantize(mlp.model, None, recipe).model.graph

    stored = [i.name for i in graph.initializer]
    terms = {name: 1 + sum(key.startswith(f"{name}/xint.codes-") for key in stored) for name in ("fc1", "fc2")}
    assert terms == {"fc1": 1, "fc2": 2}  # there is room for 384 numbers more


# --- the graph -------------------------------------------------------------------------------------------------------


PLACES = [(TOKEN, "MatMul"), (TOKEN, "Gemm"), (DYNAMIC, "MatMul"), (FLOAT, "MatMul"), (FLOAT, "Gemm"), (FLOAT, "Conv")]


@pytest.mark.parametrize("granularity", ["layer", "tensor", "model"])
@pytest.mark.parametrize(("quantizer", "op"), PLACES)
def test_every_further_term_gains_twenty_decibels(quantizer: str, op: str, granularity: str):
    found, gains = layer(quantizer, op), []

    for n in range(2, 5):
        method = XInt(weight_terms=n, activation_terms=n, granularity=granularity)
        gains.append(found.sqnr(found.expanded(method, fitted(method, found.place))))

    assert np.all(np.diff([found.sqnr(found.graph), *gains]) >= 20)


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_static_terms_converge_although_the_first_clips(granularity: str):
    found, gains = layer(STATIC, **RANGE), []
    assert np.abs(found.x).max() > 3

    for n in range(2, 5):
        method = XInt(weight_terms=n, activation_terms=n, granularity=granularity)
        gains.append(found.sqnr(found.expanded(method, fitted(method, found.place, cut(found.x)))))

    # The range of what is left is 16 codes wide, and a quarter wider than what a clipped first term leaves unclipped.
    assert np.all(np.diff(gains) >= 20)
    assert gains[0] > found.sqnr(found.graph)


def test_a_later_static_range_spans_what_is_left():
    found = layer(STATIC, **RANGE)

    fit = fitted(XInt(activation_terms=2), found.place, cut(found.x))

    rest = found.x - QParams(Scheme(4), np.asarray(RANGE["s"]), np.asarray(RANGE["z"])).fake(found.x)
    assert fit["scale-x2"] == np.float32((float(rest.max()) - float(rest.min())) / 15)


def test_a_ratio_that_clips_widens_the_second_step():
    place = layer(measured("x", "d", "token", 4, 0.5)).place

    assert place.finer(2) == 1.0  # 7 steps cover half of the range, and 7 more what is left of it
    assert place.finer(3) == replace(place, ratio=1.0).finer(2) == 1 / 14


def test_branches_share_the_codes_of_an_input_and_end_in_one_sum():
    found = layer(TOKEN)
    method = XInt(weight_terms=2, activation_terms=2)

    graph = found.expanded(method, fitted(method, found.place))

    (series,) = (n for n in graph.nodes if n.op == "Sum")
    assert [t.inputs[0].op for t in series.inputs] == ["MatMul"] * 4
    assert series.outputs[0].name == "h"
    assert [n.attrs["granularity"] for n in graph.nodes if n.op == "FakeQuantize"] == ["token", "residual"]
    assert len({id(t.inputs[0].inputs[0]) for t in series.inputs}) == 2
    added = [n.name for n in graph.nodes if n.name not in {m.name for m in found.graph.nodes}]
    assert all(name.startswith("fc/xint/") for name in added)


def test_all_terms_in_one_tensor_are_one_int8_weight_and_one_quantizer():
    found = layer(TOKEN)
    method = XInt(weight_terms=2, activation_terms=2, granularity="tensor")
    layered = XInt(weight_terms=2, activation_terms=2)

    graph = found.expanded(method, fitted(method, found.place))

    node = next(n for n in graph.nodes if n.name == "fc")
    assert [t.inputs[0].op for t in node.inputs] == ["FakeQuantize", "Dequantize"]
    assert node.inputs[1].inputs[0].attrs["bits"] == 8
    (codes, scale) = (t.values for t in node.inputs[1].inputs[0].inputs)
    fit = fitted(layered, found.place)
    np.testing.assert_array_equal(codes, 14 * found.place.first.codes.astype(int) + fit["codes-2"])
    np.testing.assert_array_equal(scale, fit["scale-2"])
    # Both are the same series, but for ties that are rounded twice or once.
    one, many = output(graph, found.x), output(found.expanded(layered, fit), found.x)
    assert np.square(one - many).sum() < np.square(many - found.wanted()).sum()


def test_the_terms_of_a_conv_of_an_integer_region_are_one_int8_weight():
    found = layer(STATIC, "Conv", **RANGE)

    fit = fitted(XInt(weight_terms=3, activation_terms=2), found.place, cut(found.x))
    graph = found.expanded(XInt(weight_terms=3, activation_terms=2), fit)

    assert fit["terms"].tolist() == [2, 1]  # a third one would need codes up to 1372
    node = next(n for n in graph.nodes if n.name == "fc")
    assert [t.inputs[0].op for t in node.inputs[:2]] == ["FakeQuantize", "Dequantize"]
    assert XInt().fit(layer(STATIC, "Conv", 5, **RANGE).place, cut(found.x)).fit is None


def test_saturated_channels_lose_nothing_beyond_the_range():
    found = layer(STATIC, **RANGE)
    x = found.x
    x[:, 5] *= 20
    x[:, 2] *= 10
    method = XInt(weight_terms=3, activation_terms=2, saturation=2)

    fit = fitted(method, found.place, cut(x))

    assert fit["channels"].tolist() == [2, 5]
    np.testing.assert_array_equal(fit["rows"], found.place.weight[[2, 5]])
    without = fitted(replace(method, saturation=0), found.place, cut(x))
    gain = found.sqnr(found.expanded(method, fit)) - found.sqnr(found.expanded(method, without))
    assert gain > 20 * np.log10(10)  # the second range is that of the other channels, which reach a tenth as far


def test_channels_that_stay_inside_their_range_are_not_saturated():
    found = layer(STATIC, s=np.float32(2), z=np.uint8(8))

    assert "channels" not in fitted(XInt(saturation=4), found.place, cut(found.x))


# --- every term as a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantizer", "op"), [(TOKEN, "MatMul"), (DYNAMIC, "Gemm"), (FLOAT, "Conv"), (FLOAT, "MatMul")])
def test_the_models_of_all_terms_add_up_to_the_layer(quantizer: str, op: str):
    found = layer(quantizer, op)
    method = XInt(weight_terms=3, activation_terms=2, granularity="model")
    graph = found.expanded(method, fitted(method, found.place))

    parts = split(graph, [found.site], 3)

    whole = output(graph, found.x)
    # Float32 sums of 18 terms, taken in another order.
    np.testing.assert_allclose(sum(output(p, found.x) for p in parts), whole, atol=18 * 2.0**-24 * np.abs(whole).max())
    for part in parts:
        assert [n.op for n in part.nodes if n.name == "fc"] == [op] or op == "Gemm"
        assert sum(n.op == "Dequantize" for n in part.nodes) == 1


def test_the_model_of_the_first_term_is_the_quantized_layer_itself():
    found = layer(TOKEN)
    method = XInt(weight_terms=2, granularity="model")

    first, _ = split(found.expanded(method, fitted(method, found.place)), [found.site], 2)

    np.testing.assert_array_equal(output(first, found.x), output(found.graph, found.x))


# --- options ---------------------------------------------------------------------------------------------------------

NEGATIVE = "is not understood. Input should be greater than or equal to 0."
ONE_RULE = "tolerance, budget and granularity = 'model' each decide the number of terms. Give one of them."
NO_BRANCH = "saturation is a branch of its own, and granularity = 'tensor' has none. Use 'layer'."


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"granularity": "all"}, "granularity = 'all' is not understood. Input should be 'tensor', 'layer' or 'model'."),
        ({"weight_terms": 0}, "weight_terms = 0 is not understood. Input should be greater than or equal to 1."),
        ({"activation_terms": 9}, "activation_terms = 9 is not understood. Input should be less than or equal to 8."),
        ({"budget": 0.5}, "budget must be 0 or at least 1."),
        ({"budget": -1.0}, f"budget = -1.0 {NEGATIVE}"),
        ({"saturation": -1}, f"saturation = -1 {NEGATIVE}"),
        ({"tolerance": -1.0}, f"tolerance = -1.0 {NEGATIVE}"),
        ({"granularity": "model", "budget": 2.0}, ONE_RULE),
        ({"tolerance": 20.0, "budget": 2.0}, ONE_RULE),
        ({"granularity": "tensor", "saturation": 1}, NO_BRANCH),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], text: str):
    with pytest.raises(RecipeError) as caught:
        XInt(**options)  # pyright: ignore[reportArgumentType]

    assert str(caught.value) == text
