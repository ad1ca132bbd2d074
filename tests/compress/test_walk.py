"""The walk: where each kind of method is fitted, on what, and what the report says about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import ModelProto

from onnxcomp import runtime
from onnxcomp.errors import UsageError
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.nbc import NonlinearBipolarCompensation
from onnxcomp.methods.noisyquant import NoisyQuant
from onnxcomp.methods.xint import XInt
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import NAMED, Bits, Recipe

PLAIN = Recipe(
    "plain", bits=Bits(4, 4), activations="static", rounding="nearest", sensitive="asked", equalization="none", moments="none",
    compensate=(),
)  # fmt: skip
MODEL = Recipe(
    "model",
    bits=Bits(4, 4),
    activations="token",
    samples=0,
    compensate=(XInt(activation_terms=2, granularity="model", keep="always"),),
)


def outputs(model: ModelProto, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = runtime.Session(model.SerializeToString())
    return np.concatenate([next(iter(session.run(feed).values())).reshape(-1) for feed in feeds]).astype(np.float64)


def error(result: Result, subject: tiny.Tiny) -> float:
    return float(np.square(outputs(result.model, subject.samples) - outputs(subject.model, subject.samples)).sum())


@pytest.mark.parametrize("level", ["block", "output"])
@pytest.mark.parametrize("name", ["transformer", "relu_mlp", "residual"])
def test_the_mean_error_of_a_block_or_an_output_is_taken_out(name: str, level: str):
    """With `always` every sample is fitted, so what is left of the last place's error has no mean."""
    subject = tiny.models()[name]
    found = quantize(subject.model, subject.samples, replace(PLAIN, compensate=(BiasCompensation("*", "always", level=level),)))

    adopted = [d for d in found.report.decisions if d.adopted]
    assert adopted
    assert {d.method for d in adopted} == {"bias"}
    assert all(d.site not in {s.name for s in found.report.sites} for d in adopted)
    if level == "output":
        assert error(found, subject) < error(quantize(subject.model, subject.samples, PLAIN), subject)


def test_methods_are_fitted_in_the_order_of_their_scopes_whatever_the_recipes():
    subject = tiny.models()["transformer"]
    methods = (NoisyQuant(), XInt(keep="always"), BiasCompensation(), NonlinearBipolarCompensation(keep="always"))

    one, other = (
        quantize(subject.model, subject.samples, replace(PLAIN, compensate=order)) for order in (methods, methods[::-1])
    )

    assert one.model.graph.SerializeToString() == other.model.graph.SerializeToString()
    order = list(dict.fromkeys(d.method for d in one.report.decisions))
    assert order == ["rotation", "noisyquant", "xint", "bias", "nbc"]


def test_an_operator_that_is_added_has_a_price_and_what_is_folded_has_none():
    subject = tiny.models()["transformer"]
    methods = (BiasCompensation("*", "always", tokens=False), NonlinearBipolarCompensation(keep="always"))

    decisions = quantize(subject.model, subject.samples, replace(PLAIN, compensate=methods)).report.decisions

    added = {node.name for node in quantize(subject.model, subject.samples, PLAIN).model.graph.node}
    for decision in decisions:
        if decision.method == "nbc" and decision.adopted:
            assert decision.added_ms is not None
            assert decision.added_bytes > 0
        elif f"{decision.site}/bias/add" not in added:
            assert decision.added_ms is None or decision.added_ms >= 0


def test_the_price_is_not_stored_in_the_file():
    subject = tiny.models()["transformer"]
    recipe = replace(PLAIN, compensate=(NonlinearBipolarCompensation(keep="always"),))

    first, second = (quantize(subject.model, subject.samples, recipe).model for _ in range(2))

    assert first.SerializeToString() == second.SerializeToString()


def test_the_xint_recipe_calibrates_nothing_even_with_data():
    subject = tiny.models()["mlp"]

    with_data, without = (quantize(subject.model, data, NAMED["xint"]).model for data in (subject.samples, None))

    assert with_data.SerializeToString() == without.SerializeToString()


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "gemm"])
def test_the_models_of_the_terms_add_up_layer_by_layer(name: str, tmp_path: Path):
    """Of a model with one layer the outputs themselves add up, of any other those of its first layer."""
    subject = tiny.models()[name]

    found = quantize(subject.model, None, MODEL, output=tmp_path / "q.onnx", split=True)

    terms = [onnx.load(tmp_path / f"q.term{n}.onnx") for n in (1, 2)]
    assert [t.graph.SerializeToString() for t in terms] == [t.graph.SerializeToString() for t in found.terms]
    first = found.report.sites[0].name
    layer = next(n for n in subject.model.graph.node if n.name == first).output[0]
    ends = [exposed(model, layer) for model in (found.model, *terms)]
    whole, *parts = (outputs(model, subject.samples[:1]) for model in ends)
    # float32 sums of a few dozen terms of order 1
    np.testing.assert_allclose(sum(parts), whole, rtol=0, atol=1e-5)


def exposed(model: ModelProto, tensor: str) -> ModelProto:
    """The model with `tensor` as its only output."""
    copy = ModelProto.FromString(model.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return copy


def test_terms_are_split_off_a_series_of_granularity_model_only():
    subject = tiny.models()["mlp"]
    text = r'^Terms can be split off a recipe with xint of granularity "model" and no other method\.$'
    with pytest.raises(UsageError, match=text):
        quantize(subject.model, None, NAMED["xint"], split=True)
