"""quantize(): what it takes, what it gives, and that a failure leaves nothing behind."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from equality import parse
from onnx import ModelProto

from onnxcomp import targets
from onnxcomp.calibrate import samples
from onnxcomp.errors import (
    DataError,
    ModelError,
    OnnxcompError,
    RecipeError,
    UnsupportedSite,
    UsageError,
    VerificationError,
)
from onnxcomp.graph import files
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import NAMED, Bits, Recipe, dumps

TINY = tiny.linear()
DATA = np.concatenate([feed["x"] for feed in TINY.samples])
BASE = NAMED["base"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in it and, apart, an empty one for temporary files."""
    scratch, here = tmp_path / "scratch", tmp_path / "here"
    scratch.mkdir()
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    onnx.save(TINY.model, here / "net.onnx")
    return here


def left_behind(folder: Path) -> list[str]:
    """Every file but the model."""
    found = [*folder.rglob("*"), *(folder.parent / "scratch").rglob("*")]
    return sorted(path.name for path in found if path != folder / "net.onnx")


def vanishing() -> tuple[ModelProto, np.ndarray]:
    """y = 1 / (x w): finite in float, infinite once a small x has the code of zero."""
    model = parse(
        "g (float[N,4] x) => (float[N,4] y) { [fc] h = MatMul(x, w) y = Reciprocal(h) }", {"w": np.eye(4, dtype=np.float32)}
    )
    return model, np.array([[1, 1, 1, 1], [200, 200, 200, 200], [-50, 1e-3, 7, 9], [3, 5, -2, 4]], np.float32)


def test_the_proof_has_as_many_samples_whatever_their_batches(monkeypatch: pytest.MonkeyPatch):
    subject = tiny.residual()
    recipe = Recipe(target="ort-x86")
    before = quantize(subject.model, subject.samples, recipe)
    monkeypatch.setattr(samples, "BATCH_BYTES", 1)

    found = quantize(subject.model, subject.samples, recipe)

    assert found.report.verification.samples == before.report.verification.samples == samples.BATCH
    assert found.report.verification.expected_db == 200


def test_what_is_left_in_float_on_purpose_is_no_objection(rng: np.random.Generator):
    """The Add joins codes and floats into what a Conv reads as codes and another Add as floats: it is no integer one."""
    pads, weights = "<pads = [1,1,1,1]>", {f"w{i}": rng.normal(size=(8, 8, 3, 3)).astype(np.float32) for i in range(3)}
    text = f"a = Conv{pads}(x, w0) b = Conv{pads}(a, w1) c = Erf(b) [join] d = Add(a, c) e = Conv{pads}(d, w2) f = Erf(e)"
    model = parse(f"g (float[N,8,8,8] x) => (float[N,8,8,8] y) {{ {text} y = Add(d, f) }}", weights)

    report = quantize(model, rng.normal(size=(16, 8, 8, 8)).astype(np.float32), replace(BASE, target="ort-x86")).report

    assert [site.op for site in report.sites] == ["Conv"] * 3
    assert not any("object" in note for note in report.notes)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_tensor_without_a_range_is_named(bits: str, rng: np.random.Generator):
    weights = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("w", "v")}
    text = "a = MatMul(x, w) r = Relu(a) logs = Log(r) y = MatMul(logs, v)"
    model = parse(f"g (float[N,8] x) => (float[N,8] y) {{ {text} }}", weights)

    with pytest.raises(DataError, match=r"^logs: The values to quantize hold NaN or infinity, so they have no range\. "):
        quantize(model, rng.normal(size=(16, 8)).astype(np.float32), replace(Recipe(), bits=Bits.parse(bits)))


# --- the result ------------------------------------------------------------------------------------------------------


def test_the_file_written_is_the_model_returned(folder: Path):
    output = folder / "out.onnx"

    result = quantize(folder / "net.onnx", DATA, BASE, output=output)

    assert output.read_bytes() == files.to_bytes(result.model)
    assert result.report.output_bytes == output.stat().st_size
    assert left_behind(folder) == ["out.onnx"]


def test_without_an_output_nothing_is_written(folder: Path):
    quantize(folder / "net.onnx", DATA, BASE)

    assert left_behind(folder) == []


def test_the_input_file_is_untouched(folder: Path):
    net = folder / "net.onnx"
    before, stamp = net.read_bytes(), net.stat().st_mtime_ns

    quantize(net, DATA, BASE, output=folder / "out.onnx")

    assert (net.read_bytes(), net.stat().st_mtime_ns) == (before, stamp)


def test_a_path_its_bytes_and_the_model_itself_give_the_same_graph(folder: Path):
    net = folder / "net.onnx"

    graphs = [quantize(source, DATA, BASE).model.graph for source in (net, str(net), net.read_bytes(), onnx.load(net))]

    assert all(graph == graphs[0] for graph in graphs)


def test_a_recipe_its_name_and_its_file_are_the_same(folder: Path):
    path = folder / "base.toml"
    path.write_text(dumps(BASE), encoding="utf-8")

    reports = [quantize(TINY.model, DATA, source).report.recipe for source in (BASE, "base", path)]

    assert reports == [reports[0]] * 3


def test_the_recipe_limits_the_samples(folder: Path):
    assert quantize(TINY.model, DATA, Recipe(samples=5, compensate=())).report.samples == 5


def test_the_account_names_the_model_the_data_and_the_target(folder: Path):
    net = folder / "net.onnx"

    report = quantize(net, DATA, BASE).report

    assert (report.model_name, report.model_sha256, report.model_bytes) == ("net.onnx", files.sha256(net), net.stat().st_size)
    assert (report.target, report.samples) == (targets.here(), 12)
    assert report.verification.samples == 8


def test_progress_begins_with_preparing_and_ends_with_verifying():
    calls: list[tuple[str, int, int]] = []

    quantize(TINY.model, DATA, BASE, progress=lambda *call: calls.append(call))

    assert calls[0] == ("preparing", 0, 1)
    assert calls[-2:] == [("verifying", 0, 1), ("verifying", 1, 1)]
    quantizing = [(done, total) for stage, done, total in calls if stage.startswith("quantizing")]
    assert quantizing == [(0, 2), (1, 2), (2, 2)]  # what comes before the layer, and the layer


def test_a_model_without_sites_is_refused():
    model = parse("g (float[N,4] x) => (float[N,4] y) { h = Tanh(x) y = Neg(h) }")

    with pytest.raises(UnsupportedSite) as caught:
        quantize(model, None, BASE)

    assert str(caught.value) == ("No Conv, Gemm or MatMul with a constant float32 weight is left to quantize. It has none.")


def test_a_refusal_says_where_the_layers_are(rng: np.random.Generator):
    w = rng.normal(size=(4, 4)).astype(np.float32)
    branches = "then_branch = g () => (float[N,4] p) { p = MatMul(x, w) }, else_branch = h () => (float[N,4] q) { q = Neg(x) }"
    inside = parse(f"g (float[N,4] x, bool b) => (float[N,4] y) {{ y = If (b) <{branches}> }}", {"w": w})
    computed = parse("g (float[N,4] x, float[4,4] v) => (float[N,4] y) { u = Neg(v) [fc] y = Gemm(x, u) }")
    plain = parse("g (float[N,4] x) => (float[N,4] y) { [fc] y = MatMul(x, w) }", {"w": w})
    left = "No Conv, Gemm or MatMul with a constant float32 weight is left to quantize."
    merged = "which are left as they are: quantize the models that were merged into this one"

    for model, recipe, why in (
        (inside, BASE, f"There are 1 inside bodies of If, Loop and Scan, {merged}."),
        (computed, BASE, "The first of 1, fc: weight 'u' is not a constant of type float32."),
        (plain, replace(BASE, exclude=("fc",)), "The first of 1, fc: not included by the recipe."),
    ):
        with pytest.raises(UnsupportedSite) as caught:
            quantize(model, None, recipe)
        assert str(caught.value) == f"{left} {why}"


def test_a_quantized_model_is_refused(rng: np.random.Generator):
    model = parse("g (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", {"w": np.ones((4, 3), np.float32)})
    quantized = quantize(model, None, BASE).model

    with pytest.raises(ModelError) as caught:
        quantize(quantized, None, BASE)

    assert str(caught.value) == "The model is quantized already. Give the float model that it was made from."


# --- without data ----------------------------------------------------------------------------------------------------


def test_without_data_a_note_says_what_was_not_done():
    notes = quantize(TINY.model).report.notes

    assert notes[0] == (
        "No data were given, so activations are quantized at run time and nothing is calibrated or compensated. "
        "Pass --data for static ranges."
    )


def test_without_data_a_note_says_that_convs_keep_float_activations():
    notes = quantize(tiny.depthwise().model).report.notes

    assert notes[0] == (
        "No data were given, so activations are quantized at run time and nothing is calibrated or compensated; "
        "Conv activations stay float. Pass --data for static ranges."
    )


def test_with_data_there_is_no_such_note():
    assert not any("No data" in note for note in quantize(TINY.model, DATA, BASE).report.notes)


def test_without_data_the_proof_is_one_made_up_feed():
    verification = quantize(TINY.model).report.verification

    assert verification.samples == 1
    assert verification.expected_db is None


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_unless_forced(folder: Path):
    output = folder / "out.onnx"
    output.write_bytes(b"mine")

    with pytest.raises(UsageError) as caught:
        quantize(folder / "net.onnx", DATA, BASE, output=output)

    assert str(caught.value) == f"{output} exists. Pass --force to overwrite it."
    assert output.read_bytes() == b"mine"
    assert left_behind(folder) == ["out.onnx"]


def test_an_existing_output_is_replaced_when_forced(folder: Path):
    output = folder / "out.onnx"
    output.write_bytes(b"mine")

    result = quantize(folder / "net.onnx", DATA, BASE, output=output, force=True)

    assert output.read_bytes() == files.to_bytes(result.model)
    assert left_behind(folder) == ["out.onnx"]


def test_the_input_is_never_the_output_even_when_forced(folder: Path):
    net = folder / "net.onnx"
    before = net.read_bytes()

    with pytest.raises(UsageError) as caught:
        quantize(net, DATA, BASE, output=net, force=True)

    assert str(caught.value) == f"{net} is the input itself, which is never changed. Choose another output."
    assert net.read_bytes() == before


def test_an_output_that_cannot_be_written_is_refused_before_any_work(folder: Path):
    calls: list[str] = []

    with pytest.raises(
        UsageError, match=r"The folder .*/nowhere does not exist\. Create it first, or choose another output\.$"
    ):
        quantize(
            folder / "net.onnx",
            DATA,
            BASE,
            output=folder / "nowhere" / "out.onnx",
            progress=lambda *call: calls.append(call[0]),
        )

    assert calls == []


FAILURES: list[tuple[type[OnnxcompError], dict[str, object], str]] = [
    (ModelError, {"model": b"no model"}, "The bytes given: not an ONNX model, or one that is cut short."),
    (RecipeError, {"recipe": "autoo"}, "Unknown recipe 'autoo'. Did you mean 'auto'? A file's name ends in .toml."),
    (RecipeError, {"recipe": Recipe(target="ort-x68")}, "Unknown target 'ort-x68'. Did you mean 'ort-x86'?"),
    (
        RecipeError,
        {"recipe": Recipe(target="cloud")},
        f"Unknown target 'cloud'. The targets are: auto, {', '.join(targets.names())}.",
    ),
    (
        RecipeError,
        {"recipe": Recipe(exclude=("nothing-here",))},
        "Pattern 'nothing-here' matches no site. `onnxcomp inspect MODEL` lists the sites.",
    ),
    (DataError, {"data": 5}, "data: expected a path, arrays, or an iterable of feeds, found int."),
]


@pytest.mark.parametrize(("kind", "wrong", "text"), FAILURES, ids=[f"{k.__name__}-{t[:20]}" for k, _, t in FAILURES])
def test_a_failure_leaves_nothing_behind(folder: Path, kind: type[OnnxcompError], wrong: dict[str, object], text: str):
    right: dict[str, object] = {"model": folder / "net.onnx", "data": DATA, "recipe": BASE, "output": folder / "out.onnx"}

    with pytest.raises(kind) as caught:
        quantize(**(right | wrong))  # pyright: ignore[reportArgumentType]

    assert str(caught.value) == text
    assert left_behind(folder) == []


def test_a_file_that_fails_its_proof_is_not_written(folder: Path):
    model, data = vanishing()

    with pytest.raises(VerificationError) as caught:
        quantize(model, data, Recipe(ranges="minmax", compensate=()), output=folder / "out.onnx")

    assert str(caught.value) == "Output 'y' of the quantized model is not finite where the float one's is. Nothing was written."
    assert left_behind(folder) == []


def test_a_file_that_fails_its_proof_does_not_replace_one_that_held(folder: Path):
    model, data = vanishing()
    output = folder / "out.onnx"
    output.write_bytes(b"held")

    with pytest.raises(VerificationError):
        quantize(model, data, Recipe(ranges="minmax", compensate=()), output=output, force=True)

    assert output.read_bytes() == b"held"
    assert left_behind(folder) == ["out.onnx"]


def test_an_output_of_another_rank_than_it_declares_is_no_reason_to_refuse(rng: np.random.Generator):
    """The shape is computed, so that nothing contradicts the declaration before constants are folded."""
    weights = {"w": rng.normal(size=(8, 6)).astype(np.float32), "two": np.array([2]), "rest": np.array([-1, 3])}
    text = "g (float[N,8] x) => (float[N,6] y) { [fc] h = MatMul(x, w) s = Concat<axis = 0>(rest, two) y = Reshape(h, s) }"

    found = quantize(parse(text, weights), rng.normal(size=(12, 8)).astype(np.float32), BASE)

    assert "Output 'y' declares rank 2 and has 3: its shape is left open." in found.report.notes


def test_inputs_may_be_numbers_without_axes(rng: np.random.Generator):
    weights = {"w": rng.normal(size=(8, 6)).astype(np.float32)}
    text = "g (float[N,8] x, float factor) => (float[N,6] y) { h = Mul(x, factor) [fc] y = MatMul(h, w) }"
    feeds = [{"x": rng.normal(size=(1, 8)).astype(np.float32), "factor": np.float32(2)} for _ in range(8)]

    assert quantize(parse(text, weights), feeds, "auto").report.samples == 8


def test_steps_of_a_sequence_given_as_rows_are_spoken_of():
    """Of a recurrent layer, whose first axis is time: three steps are three samples, until feeds are stacked."""
    rng = np.random.default_rng(0)
    text = "g (float[T,1,16] x) => (float y) { [one] s = LSTM<hidden_size = 16>(x, w, r) [fc] y = MatMul(s, f) }"
    weights = {key: tiny.weight(rng, 1, 64, 16, fan_in=16) for key in ("w", "r")} | {"f": tiny.weight(rng, 16, 4, fan_in=16)}
    model, x = parse(text, weights, opset=21), rng.standard_normal((5, 3, 1, 16)).astype(np.float32)

    rows, whole = (quantize(model, data).report for data in ([{"x": steps} for steps in x], {"x": x}))

    assert [len([n for n in r.notes if n.startswith("A row of the data is a sample")]) for r in (rows, whole)] == [1, 0]
    assert (rows.samples, whole.samples) == (15, 5)
