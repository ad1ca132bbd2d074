"""The promises on real models: accuracy on the test half, kernels, size, repeatability. Skipped where the data are absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from scripts import load_tool

from onnxcomp import runtime
from onnxcomp.comparison import compare
from onnxcomp.data import InputSpec
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import Bits, Recipe, find

pytestmark = pytest.mark.real
bench = load_tool("bench")

SAMPLES = 64
DROPS = {"vit": 1.5, "mobilenet": 0.5, "resnet20": 0.5, "kwt1": 0.5, "mnist": 0.5, "stories260k": 1.0}
"""Largest fall at W8A8: points of accuracy, and for the language model per cent of perplexity."""


def make(name: str, folder: Path, output: Path, bits: str, recipe: Recipe) -> Result:
    subject = bench.SUBJECTS[name]
    path, source = folder / subject.file, folder / subject.calibration
    changed = dataclasses.replace(recipe, bits=Bits.parse(bits), samples=SAMPLES, preprocess=subject.preprocess)
    return quantize(path, bench.stories(source) if subject.language else source, changed, output=output)


def scores(name: str, folder: Path, *files: Path) -> list[float]:
    """Accuracy in per cent, or perplexity, on the test half."""
    subject = bench.SUBJECTS[name]
    sessions = [runtime.Session(file) for file in files]
    specs = [InputSpec(n, kind.dtype, kind.shape) for n, kind in sessions[0].inputs]
    test = bench.load(subject, folder, "test", specs, None)
    if subject.language:
        feeds = [test[i] for i in range(len(test))]
        return [bench.perplexity(session, feeds) for session in sessions]
    batches = bench.stacked(test, sessions[0])
    return [bench.accuracy(session, batches) for session in sessions]


@pytest.mark.parametrize("name", DROPS)
def test_w8a8_keeps_the_accuracy_on_integer_kernels(name: str, data_dir: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"

    result = make(name, data_dir, output, "w8a8", find("auto"))

    sites = result.report.sites
    assert sum(site.falls_back for site in sites) <= 0.02 * len(sites)
    before, after = scores(name, data_dir, data_dir / bench.SUBJECTS[name].file, output)
    drop = 100 * (after / before - 1) if bench.SUBJECTS[name].language else before - after
    assert drop <= DROPS[name]


def test_a_transformer_with_massive_activations_keeps_its_accuracy_where_all_is_stored(data_dir: Path, tmp_path: Path):
    output = tmp_path / "out.onnx"

    report = make("vit", data_dir, output, "w8a8", dataclasses.replace(find("auto"), target="qnn")).report

    assert {site.bits for site in report.sites if site.kind == "layer"} == {"w8a8", "w8a16"}
    assert report.verification.sqnr_db > 14
    subject = bench.SUBJECTS["vit"]
    found = compare(data_dir / subject.file, output, data_dir / subject.test, preprocess=subject.preprocess, limit=256)
    assert found.accuracy is not None
    assert found.accuracy.drop_points <= DROPS["vit"]


TARGETS = ("ort-x86", "ort-arm", "openvino")
"""Those whose runtime is here to tell which kernels it executes."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DROPS)
def test_the_rules_foretell_the_kernel_of_every_site(name: str, target: str, data_dir: Path, tmp_path: Path):
    subject, output = bench.SUBJECTS[name], tmp_path / "out.onnx"
    source = data_dir / subject.calibration
    recipe = dataclasses.replace(find("base"), samples=8, preprocess=subject.preprocess, target=target)

    report = quantize(
        data_dir / subject.file, bench.stories(source) if subject.language else source, recipe, output=output
    ).report

    assert not [note for note in report.notes if "foretold" in note]
    assert all(site.integer for site in report.sites)
    assert report.kernels_by.split()[0] == ("openvino" if target == "openvino" else "onnxruntime")


def test_bias_compensation_adds_eight_points_to_a_w4a4_vision_transformer(data_dir: Path, tmp_path: Path):
    base, compensated = tmp_path / "base.onnx", tmp_path / "bias.onnx"

    make("vit", data_dir, base, "w4a4", find("base"))
    make(
        "vit",
        data_dir,
        compensated,
        "w4a4",
        dataclasses.replace(find("auto"), activations="static", compensate=(BiasCompensation(),)),
    )

    without, with_bias = scores("vit", data_dir, base, compensated)
    assert with_bias >= without + 8
    assert compensated.stat().st_size <= 0.18 * (data_dir / bench.SUBJECTS["vit"].file).stat().st_size


def test_a_second_run_leaves_the_same_bytes(data_dir: Path, tmp_path: Path):
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"

    make("kwt1", data_dir, first, "w4a8", find("auto"))
    make("kwt1", data_dir, second, "w4a8", find("auto"))

    assert first.read_bytes() == second.read_bytes()


def test_reconstruction_brings_the_outputs_of_a_cnn_of_four_bits_nearer(data_dir: Path, tmp_path: Path):
    """The divergence of its classes from the float model's: 0.048 without and 0.035 with it, with 128 samples."""
    pytest.importorskip("torch")
    subject, files = bench.SUBJECTS["resnet20"], [tmp_path / name for name in ("plain.onnx", "refined.onnx")]

    for file, reconstruct in zip(files, (False, True), strict=True):
        make("resnet20", data_dir, file, "w4a4", dataclasses.replace(find("auto"), reconstruct=reconstruct))

    exact, plain, refined = (runtime.Session(file) for file in (data_dir / subject.file, *files))
    specs = [InputSpec(n, kind.dtype, kind.shape) for n, kind in exact.inputs]
    feeds = [feed for feed, _ in bench.stacked(bench.load(subject, data_dir, "test", specs, None), exact)]
    assert divergence(exact, refined, feeds) < 0.9 * divergence(exact, plain, feeds)


def divergence(exact: runtime.Session, other: runtime.Session, feeds: Sequence[Mapping[str, np.ndarray]]) -> float:
    """The mean over samples of sum p log(p / q), p and q the classes' probabilities by the two models."""
    pairs = [[next(iter(session.run(feed).values())).astype(np.float64) for session in (exact, other)] for feed in feeds]
    p, q = (np.concatenate(outputs) for outputs in zip(*pairs, strict=True))
    p, q = (y - y.max(-1, keepdims=True) - np.log(np.exp(y - y.max(-1, keepdims=True)).sum(-1, keepdims=True)) for y in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())
