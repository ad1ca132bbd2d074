"""The choice: which sites a recipe quantizes, with which settings, and why others stay float."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from equality import parse
from onnx import ModelProto

from onnxcomp.choose import Choice, choose
from onnxcomp.errors import RecipeError, UnsupportedSite
from onnxcomp.graph.prepare import prepare
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, SiteRule
from onnxcomp.report.model import Skipped
from onnxcomp.runtime import infer_types
from onnxcomp.targets import find
from onnxcomp.targets.base import Settings

STATIC = Recipe(activations="static")
PRODUCT = "a product of two activations: quantized with --products"


def pick(model: ModelProto, recipe: Recipe = STATIC, *, with_data: bool = True) -> Choice:
    return choose(prepare(model, infer_types).graph, recipe, find(recipe.target), with_data=with_data)


def names(choice: Choice) -> list[str]:
    return [site.name for site in choice.sites]


TRANSFORMER = tiny.transformer().model
LAYERS = ["q", "k", "v", "proj", "fc1", "fc2", "head"]


# --- which -----------------------------------------------------------------------------------------------------------


def test_every_layer_is_chosen_and_products_are_left():
    choice = pick(TRANSFORMER)

    assert names(choice) == LAYERS
    assert choice.skipped == (Skipped("scores", "MatMul", PRODUCT), Skipped("values", "MatMul", PRODUCT))
    assert choice.notes == ()


def test_products_are_chosen_when_switched_on():
    choice = pick(TRANSFORMER, Recipe(products=True))

    assert names(choice) == ["q", "k", "v", "scores", "values", "proj", "fc1", "fc2", "head"]
    assert choice.skipped == ()


def test_a_product_is_chosen_when_included_by_name():
    assert names(pick(TRANSFORMER, Recipe(include=("scores", "fc1")))) == ["scores", "fc1"]


def test_including_everything_does_not_switch_products_on():
    assert names(pick(TRANSFORMER, Recipe(include=("*",)))) == LAYERS


def test_what_the_recipe_leaves_out_is_skipped_with_a_reason():
    choice = pick(tiny.mlp().model, Recipe(exclude=("fc2",)))

    assert names(choice) == ["fc1"]
    assert choice.skipped == (Skipped("fc2", "MatMul", "not included by the recipe"),)


def test_a_weight_that_cannot_be_quantized_is_skipped_with_its_type():
    """A float64 weight, a vector, and a weight that is computed."""
    text = """g (double[N,4] x, float[N,4] z, float[1,1,2,2] k, float[1,1,4,4] i)
        => (double[N,4] y, float[N] v, float c, float[N,4] p) {
        [wide] y = MatMul(x, w64) [vector] v = MatMul(z, w1) [computed] c = Conv(i, k)
        [plain] p = MatMul(z, w)
    }"""
    weights = {"w64": np.eye(4), "w1": np.ones(4, np.float32), "w": np.eye(4, dtype=np.float32)}
    model = parse(text, weights, opset=21)

    assert pick(model).skipped == (
        Skipped("wide", "MatMul", "weight 'w64' has type float64 and rank 2"),
        Skipped("vector", "MatMul", "weight 'w1' has type float32 and rank 1"),
        Skipped("computed", "Conv", "weight 'k' is not a constant of type float32"),
    )


def test_weights_in_operators_that_are_no_layers_are_named():
    """Of a recurrent layer, and of an operator that fuses several."""
    text = """g (float[2,1,4] x) => (float[2,1,4] y, float[2,1,4] z) {
        [fc] h = MatMul(x, w) [rnn] r = GRU<hidden_size = 4>(h, wr, rr) y = Squeeze(r, one)
        [fused] z = com.microsoft.Attention<num_heads = 2>(h, wa, ba)
    }"""
    shapes = {"w": (4, 4), "wr": (1, 12, 4), "rr": (1, 12, 4), "wa": (4, 12), "ba": (12,)}
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | {"one": np.array([1])}

    choice = pick(parse(text, weights, opset=21, domains=', "com.microsoft" : 1'))

    inside = "weights inside an operator of com.microsoft: give the model as it was exported, without it"
    wanted = (Skipped("rnn", "GRU", "weights of GRU stay as they are"), Skipped("fused", "Attention", inside))
    assert (names(choice), choice.skipped) == (["fc"], wanted)


def test_a_layer_of_constants_is_computed_when_the_file_is_loaded():
    """As of relative positions, whose Sin is not computed beforehand."""
    text = """g (float[N,4] x) => (float[N,4] y) {
        s = Sin(table) [position] p = MatMul(s, w) pb = Add(p, b) [fc] h = MatMul(x, v) y = Add(h, pb)
    }"""
    weights = {name: np.eye(4, dtype=np.float32) for name in ("table", "w", "v")} | {"b": np.ones(4, np.float32)}
    model = parse(text, weights, opset=21)

    choice = pick(model)

    reason = "it reads constants alone, so it is computed when the file is loaded"
    assert (names(choice), choice.skipped) == (["fc"], (Skipped("position", "MatMul", reason),))
    feeds = [{"x": np.ones((1, 4), np.float32) * i} for i in range(12)]
    assert quantize(model, feeds, Recipe(bits=Bits(4, 4))).report.verification.sqnr_db > 10


def test_a_product_whose_activations_stay_float_is_not_chosen():
    recipe = Recipe(products=True, site=(SiteRule("scores", activations="float"),))

    assert "scores" not in names(pick(TRANSFORMER, recipe))


# --- with which settings ---------------------------------------------------------------------------------------------


def test_a_site_gets_the_settings_of_the_recipe():
    recipe = Recipe(bits=Bits(4, 6), ranges="percentile", percentile=99.0, activations="token", symmetric=True)

    assert pick(tiny.mlp().model, recipe).settings["fc1"] == Settings(4, 6, "token", "percentile", 99.0, True, "gptq")


def test_a_rule_overrides_what_it_says_and_the_last_one_wins():
    rules = (
        SiteRule("fc*", bits=Bits(4, 4), ranges="minmax"),
        SiteRule("op:MatMul", symmetric=True),
        SiteRule("fc2", bits=Bits(3, 8), activations="dynamic"),
    )

    settings = pick(tiny.mlp().model, Recipe(activations="static", site=rules)).settings

    assert settings == {
        "fc1": Settings(4, 4, "static", "minmax", 99.99, True, "gptq"),
        "fc2": Settings(3, 8, "dynamic", "minmax", 99.99, True, "gptq"),
    }


def activations(model: ModelProto, recipe: Recipe, *, with_data: bool = True) -> dict[str, str]:
    choice = pick(model, recipe, with_data=with_data)
    return {site.name: choice.settings[site.name].activations for site in choice.sites}


@pytest.mark.parametrize("asked", ["dynamic", "token", "auto", "static"])
def test_the_range_of_a_conv_is_static_whatever_is_asked(asked: str):
    assert activations(tiny.silu().model, Recipe(activations=asked))["conv1"] == "static"


@pytest.mark.parametrize(
    ("asked", "target", "last"),
    [("auto", "ort-x86", "float"), ("static", "ort-x86", "static"), ("auto", "tensorrt", "static"), ("auto", "qnn", "static")],
)
def test_a_conv_whose_result_is_the_models_stays_float_where_it_would_be_codes(asked: str, target: str, last: str):
    assert activations(tiny.silu().model, Recipe(activations=asked, target=target)) == {"conv1": "static", "conv2": last}


def test_the_activations_of_a_conv_may_stay_float():
    assert activations(tiny.silu().model, Recipe(activations="float")) == {"conv1": "float", "conv2": "float"}


@pytest.mark.parametrize(("asked", "product"), [("token", "static"), ("auto", "static"), ("dynamic", "dynamic")])
def test_a_product_has_no_range_per_token(asked: str, product: str):
    found = activations(TRANSFORMER, Recipe(activations=asked, products=True))

    assert (found["scores"], found["fc1"]) == (product, asked)


# --- without data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["static", "auto"])
def test_without_data_layers_measure_their_range_at_run_time(asked: str):
    choice = pick(tiny.mlp().model, Recipe(activations=asked), with_data=False)

    assert {s.activations for s in choice.settings.values()} == {"dynamic"}
    assert choice.notes == (
        "No data were given, so activations are quantized at run time and nothing is calibrated or compensated. "
        "Pass --data for static ranges.",
    )


def test_without_data_convs_keep_float_activations_and_products_stay_float():
    choice = pick(tiny.conv_bn().model, with_data=False)

    assert {site.name: choice.settings[site.name].activations for site in choice.sites} == {
        "conv1": "float", "conv2": "float", "fc": "dynamic",
    }  # fmt: skip
    assert choice.notes == (
        "No data were given, so activations are quantized at run time and nothing is calibrated or compensated; "
        "Conv activations stay float. Pass --data for static ranges.",
    )
    assert names(pick(TRANSFORMER, Recipe(products=True), with_data=False)) == LAYERS


def test_a_range_per_token_needs_no_data():
    assert set(activations(tiny.mlp().model, Recipe(activations="token"), with_data=False).values()) == {"token"}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(include=("fc9",)),
        Recipe(exclude=("fc9",)),
        Recipe(site=(SiteRule("fc9"),)),
        Recipe(compensate=(BiasCompensation(where="fc9"),)),
    ],
    ids=["include", "exclude", "rule", "method"],
)
def test_a_pattern_that_matches_nothing_is_refused_wherever_it_stands(recipe: Recipe):
    with pytest.raises(RecipeError) as caught:
        pick(tiny.mlp().model, recipe)

    assert str(caught.value) == "Pattern 'fc9' matches no site. Did you mean 'fc2'?"


def test_an_operator_that_is_no_site_cannot_be_included():
    with pytest.raises(UnsupportedSite) as caught:
        pick(TRANSFORMER, Recipe(include=("norm1",)))

    assert str(caught.value) == (
        "norm1: it is no Conv, Gemm or MatMul with a constant weight, so it cannot be quantized. Leave 'norm1' out of include."
    )


@pytest.mark.parametrize("recipe", [Recipe(exclude=("norm1",)), Recipe(site=(SiteRule("norm1"),))])
def test_naming_an_operator_that_is_no_site_elsewhere_does_no_harm(recipe: Recipe):
    assert names(pick(TRANSFORMER, recipe)) == LAYERS
