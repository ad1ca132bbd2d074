"""Stripping: what a method put into a file is gone, and what is left is the model as it was before, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from equality import parse
from onnx import ModelProto, checker
from tiny import models

from onnxcomp import cli, runtime, targets
from onnxcomp.choose import choose
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import files
from onnxcomp.graph.prepare import prepare
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.nbc import NonlinearBipolarCompensation
from onnxcomp.methods.noisyquant import NoisyQuant
from onnxcomp.methods.xint import XInt
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, method_name
from onnxcomp.report.json import from_json
from onnxcomp.strip import strip

MODELS = Path(__file__).resolve().parents[1] / "models"
TINY = models()
PLAIN = Recipe(
    "plain", bits=Bits(4, 4), activations="static", rounding="nearest", sensitive="asked", equalization="none", moments="none",
    compensate=(),
)  # fmt: skip
METHODS: dict[str, Compensation] = {
    "bias": BiasCompensation(keep="always"),
    "channels": BiasCompensation(keep="always", tokens=False),
    "block-bias": BiasCompensation(keep="always", level="block"),
    "output-bias": BiasCompensation(keep="always", level="output"),
    "nbc": NonlinearBipolarCompensation(keep="always"),
    "linear": NonlinearBipolarCompensation(keep="always", alpha=float("inf"), weight="int8"),
    "offset": NoisyQuant(keep="always"),
    "uniform": NoisyQuant(mode="uniform", keep="always"),
}


def graph_bytes(model: ModelProto) -> bytes:
    return model.graph.SerializeToString(deterministic=True)


def last_place(model: ModelProto, method: Compensation) -> str | None:
    """The name of the last place that the method could be fitted to."""
    choice = choose(
        prepare(model, runtime.infer_types).graph, replace(PLAIN, compensate=(method,)), targets.find("auto"), with_data=True
    )
    sites = [site.name for site in choice.sites if site.kind == "layer"]
    blocks = [block.name for block in choice.blocks]
    places = blocks if method.scope in ("block", "output") else sites
    return places[-1] if places else None


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("how", METHODS)
def test_a_method_at_the_last_place_is_taken_out_to_the_bit(name: str, how: str):
    """No other place is fitted behind the last one, so without the method the model is the one that never had it, but
    for the range of what the place computes.
    """
    tiny, method = TINY[name], METHODS[how]
    place = last_place(tiny.model, method)
    if place is None:
        pytest.skip(f"{name} has no place for {how}")
    recipe = replace(PLAIN, compensate=(replace(method, where=place),))
    compensated = quantize(tiny.model, tiny.samples, recipe)
    if not any(d.adopted for d in compensated.report.decisions):
        pytest.skip(f"{how} is declined: {[d.reason for d in compensated.report.decisions]}")

    stripped = strip(compensated.model, [method_name(method)])

    assert stripped.places == (place,)
    plain = quantize(tiny.model, tiny.samples, PLAIN).model
    for ours, theirs in zip(stripped.model.graph.initializer, plain.graph.initializer, strict=True):
        if ours.name.endswith(("/quantized.scale", "/quantized.zero_point")):  # of the place's output
            theirs.ClearField("raw_data"), ours.ClearField("raw_data")
    assert graph_bytes(stripped.model) == graph_bytes(plain)
    assert graph_bytes(stripped.model) != graph_bytes(compensated.model)


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "transformer", "gemm", "shared"])
def test_what_is_left_of_a_series_is_its_first_term(name: str):
    tiny = TINY[name]
    series = replace(PLAIN, activations="token", compensate=(XInt(weight_terms=2, activation_terms=2, keep="always"),))
    one = replace(series, compensate=(XInt(weight_terms=1, activation_terms=1, keep="always"),))
    compensated = quantize(tiny.model, None, replace(series, samples=0))

    stripped = strip(compensated.model, ["xint"])

    assert graph_bytes(stripped.model) == graph_bytes(quantize(tiny.model, None, replace(one, samples=0)).model)
    assert graph_bytes(stripped.model) != graph_bytes(compensated.model)


@pytest.mark.parametrize(
    ("name", "place", "method"),
    [
        ("conv_bn", "conv1", XInt(keep="always")),
        ("mlp", "fc1", XInt(keep="always", granularity="tensor")),
        ("mlp", "fc1", XInt(keep="always", granularity="tensor", weight_terms=1, activation_terms=2)),
    ],
)
def test_terms_that_were_merged_into_one_tensor_are_refused(name: str, place: str, method: XInt, tmp_path: Path):
    tiny = TINY[name]
    activations = "static" if name == "conv_bn" else "token"
    recipe = replace(PLAIN, target="ort-x86", activations=activations, compensate=(method,))
    compensated = quantize(tiny.model, tiny.samples, recipe)
    before = compensated.model.SerializeToString(deterministic=True)

    with pytest.raises(ModelError) as error:
        strip(compensated.model, ["xint"], output=tmp_path / "stripped.onnx")

    assert str(error.value) == (
        f"{place}: xint merged what it adds into one tensor with what was there, so it cannot be taken out. "
        "Quantize the float model again without xint."
    )
    assert compensated.model.SerializeToString(deterministic=True) == before
    assert not list(tmp_path.iterdir())


def test_one_method_of_two_leaves_what_the_other_folded_into_the_same_bias():
    tiny = TINY["mlp"]
    both = (BiasCompensation(keep="always", where="fc1"), BiasCompensation(keep="always", level="output"))
    compensated = quantize(tiny.model, tiny.samples, replace(PLAIN, compensate=both)).model

    stripped = strip(compensated, ["bias"]).model

    assert graph_bytes(stripped) != graph_bytes(compensated)
    checker.check_model(stripped, full_check=True)


BOTH = (METHODS["offset"], METHODS["bias"])


@pytest.mark.parametrize("name", ["linear", "mlp", "transformer", "shared", "gemm", "depthwise"])
def test_methods_are_taken_out_one_by_one_as_well_as_at_once(name: str, capfd: pytest.CaptureFixture[str]):
    tiny = TINY[name]
    compensated = quantize(tiny.model, tiny.samples, replace(PLAIN, compensate=BOTH)).model

    first, second = (strip(strip(compensated, [a]).model, [b]).model for a, b in permutations(["bias", "noisyquant"]))

    assert graph_bytes(first) == graph_bytes(second) == graph_bytes(strip(compensated, ["bias", "noisyquant"]).model)
    assert capfd.readouterr() == ("", "")


def test_a_method_is_taken_out_from_under_a_table_that_another_put_beside_the_same_bias():
    model = onnx.load(MODELS / "vit_digits.onnx")
    samples = np.load(MODELS / "digits_calib.npz")["x"][:32].astype(np.float32)
    recipe = replace(PLAIN, include=("*/fc1/MatMul",), compensate=(METHODS["offset"], BiasCompensation(table_gain=0.0)))
    compensated = quantize(model, samples, recipe).model
    assert any(tensor.name.endswith("/bias.v") for tensor in compensated.graph.initializer)

    one_by_one = strip(strip(compensated, ["noisyquant"]).model, ["bias"]).model

    assert graph_bytes(one_by_one) == graph_bytes(strip(compensated, ["noisyquant", "bias"]).model)


def test_the_stored_report_says_what_was_stripped(tmp_path: Path):
    tiny, path = TINY["mlp"], tmp_path / "q.onnx"
    quantize(tiny.model, tiny.samples, replace(PLAIN, compensate=(METHODS["channels"],)), output=path)

    strip(path, ["bias"], output=tmp_path / "s.onnx")

    stored = files.metadata(onnx.load(tmp_path / "s.onnx"))
    decisions = from_json(stored["onnxcomp.report"]).decisions
    assert {(d.method, d.adopted, d.reason, d.added_bytes) for d in decisions if d.method == "bias"} == {
        ("bias", False, "stripped", 0)
    }
    with pytest.raises(ModelError, match=r"No compensation of bias is in the file\. `onnxcomp inspect` lists what is\."):
        strip(tmp_path / "s.onnx", ["bias"])


def test_a_stripped_model_computes_what_the_uncompensated_layer_computes():
    tiny = TINY["linear"]
    recipe = replace(PLAIN, compensate=(METHODS["channels"],))

    stripped = strip(quantize(tiny.model, tiny.samples, recipe).model, ["bias"]).model

    plain = quantize(tiny.model, tiny.samples, PLAIN).model
    left, right = (runtime.Session(m.SerializeToString()).run(tiny.samples[0]) for m in (stripped, plain))
    for name, expected in right.items():
        np.testing.assert_array_equal(left[name], expected)


def test_an_unknown_method_and_a_file_without_a_record_are_refused():
    with pytest.raises(UsageError, match=r"^Unknown method 'bais'\. The methods are: bias"):
        strip(TINY["mlp"].model, ["bais"])
    text = r"The file holds no record of compensations\. Give a file that this version of onnxcomp wrote\."
    with pytest.raises(ModelError, match=text):
        strip(TINY["mlp"].model, ["bias"])


def test_a_model_that_no_made_up_inputs_fit_is_stripped_too():
    """Its free length must be 11."""
    text = "g (float[3,M] x) => (float[11,4] y) { r = Reshape(x, rows) [fc] m = MatMul(r, w) y = Add(m, b) }"
    rng = np.random.default_rng(0)
    weights = {"rows": np.array([11, 3]), "w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
    samples = [{"x": (rng.normal(size=(3, 11)) + 2).astype(np.float32)} for _ in range(16)]
    found = quantize(parse(text, weights), samples, replace(PLAIN, bits=Bits(3, 3), compensate=(METHODS["channels"],)))

    assert strip(found.model, ["bias"]).places == ("fc",)


def test_the_command_names_the_places_and_writes_the_file(tmp_path: Path):
    tiny, path = TINY["mlp"], tmp_path / "q.onnx"
    quantize(tiny.model, tiny.samples, replace(PLAIN, compensate=(METHODS["channels"],)), output=path)

    found = CliRunner().invoke(cli.main, ["strip", str(path), "--method", "bias", "--json"])

    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == {"path": str(tmp_path / "q.stripped.onnx"), "stripped": ["fc1", "fc2"]}
    assert graph_bytes(onnx.load(tmp_path / "q.stripped.onnx")) == graph_bytes(strip(path, ["bias"]).model)
