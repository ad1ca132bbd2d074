from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from click.testing import CliRunner, Result

from onnxcomp import pipeline, recipe, runtime, targets
from onnxcomp.analysis import MASK, analyze, blend, hadamard
from onnxcomp.cli import main
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import extract
from onnxcomp.graph.files import to_bytes
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.report.model import Analysis

MODELS = Path(__file__).resolve().parents[1] / "models"
CALIBRATION = MODELS / "digits_calib.npz"
LOW = Recipe(bits=Bits(4, 4), samples=32)


class Mixed:
    """A model behind its walk, with every part switched on or off at will."""

    def __init__(self, model: object, data: object, how: Recipe) -> None:
        self.made = pipeline.compress(model, data, how, runtime.ignore)  # pyright: ignore[reportArgumentType]
        self.walk = self.made.walk
        graph, self.parts = blend(self.walk)
        self.output = self.walk.reference.outputs[0].name
        part = extract(graph, [t.name for t in graph.inputs], [self.output])
        self.session = runtime.Session(to_bytes(to_model(part, self.walk.like)))
        assert self.made.samples is not None
        self.feeds = [self.made.samples[i] for i in range(len(self.made.samples))]

    def run(self, on: object) -> np.ndarray:
        """The output of every sample with some parts quantized: all or none, or one number for each."""
        m = np.broadcast_to(np.asarray(on, np.float32), (len(self.parts),)).copy()
        return np.concatenate([self.session.run(feed | {MASK: m})[self.output].ravel() for feed in self.feeds])

    def damage(self, site: str) -> float:
        """The squared error with one site quantized, over the energy of the output."""
        error = self.run([site in part.sites for part in self.parts]) - self.run(0)
        return float(np.square(error).sum() / np.square(self.run(0)).sum())


@pytest.fixture(scope="module")
def digits() -> Analysis:
    return analyze(MODELS / "vit_digits.onnx", CALIBRATION, LOW)


def spearman(a: list[float], b: list[float]) -> float:
    one, other = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(one, other)[0, 1])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="onnxcomp")


@pytest.mark.parametrize("name", ["shared", "transformer", "residual"])
@pytest.mark.parametrize("activations", ["auto", "token"])
def test_nothing_mixed_in_is_the_float_model_and_everything_the_compressed_one(name: str, activations: str) -> None:
    net = tiny.models()[name]

    mixed = Mixed(net.model, net.samples, dataclasses.replace(LOW, activations=activations))

    before = np.concatenate([mixed.made.reference.run(feed)[mixed.output].ravel() for feed in mixed.feeds])
    np.testing.assert_allclose(mixed.run(0), before, rtol=1e-4, atol=1e-5)
    after = np.concatenate([batch[mixed.output].ravel() for batch in mixed.walk.expected(100)])
    error = np.linalg.norm(mixed.run(1) - after)
    assert error < 0.3 * np.linalg.norm(after - before)  # a code here and there falls the other way


@pytest.mark.parametrize("zero_points", [False, True])
def test_weights_in_blocks_and_tables_are_mixed_in_as_well(zero_points: bool) -> None:
    net = tiny.models()["embedding"]
    how = Recipe(bits=Bits(3, None), block=16, zero_points=zero_points, embeddings=True, rounding="nearest", compensate=())

    mixed = Mixed(net.model, net.samples, how)

    assert [part.sites for part in mixed.parts] == [(site.name,) for site in mixed.walk.plan.sites]
    before = np.concatenate([mixed.made.reference.run(feed)[mixed.output].ravel() for feed in mixed.feeds])
    np.testing.assert_allclose(mixed.run(0), before, rtol=1e-4, atol=1e-5)
    after = np.concatenate([batch[mixed.output].ravel() for batch in mixed.walk.expected(100)])
    np.testing.assert_allclose(mixed.run(1), after, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(after - before) > 0.01 * np.linalg.norm(before)


def test_layers_of_float_activations_are_suggested_with_such() -> None:
    net = tiny.mlp()

    found = analyze(net.model, net.samples, Recipe(bits=Bits(4, None), samples=32))

    assert {str(rule.bits) for rule in recipe.loads(found.suggestion).site} == {"w8"}


@pytest.mark.parametrize(("model", "least"), [("vit_digits", 0.85), ("cnn_digits", 0.6)])
def test_the_order_is_that_of_true_runs_with_one_site_quantized_at_a_time(model: str, least: float, digits: Analysis) -> None:
    path = MODELS / f"{model}.onnx"

    found = digits if model == "vit_digits" else analyze(path, CALIBRATION, LOW)

    mixed, layers = Mixed(path, CALIBRATION, LOW), [row for row in found.sites if row.kind == "layer"]
    assert spearman([row.isolated for row in layers], [mixed.damage(row.name) for row in layers]) > least


def test_shares_add_up_to_what_the_compressed_model_loses(digits: Analysis) -> None:
    assert sum(row.cumulative for row in digits.sites) == pytest.approx(digits.total, rel=0.25)


def test_the_passes_do_not_grow_with_the_number_of_sites(digits: Analysis) -> None:
    assert (len(digits.sites), digits.passes) == (18, 258)


def test_columns_of_signs_are_orthogonal() -> None:
    found = hadamard(8)

    assert set(found.ravel()) == {-1.0, 1.0}
    np.testing.assert_array_equal(found.T @ found, 8 * np.eye(8))


def test_a_quantizer_that_several_sites_read_is_shared_among_them() -> None:
    net = tiny.models()["transformer"]

    parts = Mixed(net.model, net.samples, LOW).parts

    assert {part.is_weight for part in parts} == {True, False}
    assert max(len(part.sites) for part in parts if not part.is_weight) > 1
    assert {len(part.sites) for part in parts if part.is_weight} == {1}


@pytest.mark.parametrize(
    ("bits", "better"),
    [
        ("w4a4", lambda r, name: next(s for s in r.site if s.where == name).bits == Bits(8, 8)),
        ("w8a8", lambda r, name: next(s for s in r.site if s.where == name).activations == "float"),
        ("w3", lambda r, name: next(s for s in r.site if s.where == name).bits == Bits(8, None)),
        ("w8", lambda r, name: name in r.exclude),
    ],
)
def test_what_is_suggested_quantizes_the_worst_layers_less(bits: str, better: Callable[[Recipe, str], bool]) -> None:
    net = tiny.mlp()

    found = analyze(net.model, net.samples, Recipe(bits=Bits.parse(bits)))

    assert better(recipe.loads(found.suggestion), found.sites[0].name)


def test_damage_needs_samples() -> None:
    with pytest.raises(UsageError, match=r"^Damage is measured on samples\. Pass --data, and a recipe with samples above 0\.$"):
        analyze(MODELS / "cnn_digits.onnx", None)


def test_damage_needs_an_output_of_floats() -> None:
    body = "[fc] h = MatMul(x, w) y = Cast<to = 7>(h)"
    text = f'<ir_version: 10, opset_import: ["" : 21]> n (float[N,16] x) => (int64[N,16] y) {{ {body} }}'
    net = tiny.build("most", text, {"w": np.eye(16, dtype=np.float32)}, tiny.feeds(np.random.default_rng(0), 16))
    expected = r"^The model has no output of type float32, so damage cannot be measured there\.$"

    with pytest.raises(ModelError, match=expected):
        analyze(net.model, net.samples)


def test_the_command_shows_the_worst_first_and_a_piece_of_a_recipe(tmp_path: Path) -> None:
    net = tiny.mlp()
    path, data = tmp_path / "mlp.onnx", tmp_path / "calib.npz"
    onnx.save(net.model, path)
    np.savez(data, x=np.concatenate([feed["x"] for feed in net.samples]))

    shown, plain = run("analyze", path, "--data", data), json.loads(run("analyze", path, "--data", data, "--json").stdout)

    lines = shown.stdout.splitlines()
    assert lines[0].startswith(f"mlp.onnx -> w4a4 for {targets.here()}: the output's SQNR is ")
    assert lines[0].endswith(" dB, 12 samples, 18 passes")
    assert lines[2].split() == ["Site", "Bits", "Alone", "weights", "activations", "In", "all", "weights", "activations"]
    assert [line.split()[0] for line in lines[3:5]] == [site["name"] for site in plain["sites"]]
    assert lines[6] == "For a recipe, so that the first layers lose less:"
    rules = recipe.loads(plain["suggestion"]).site
    assert [(rule.where, str(rule.bits)) for rule in rules] == [(site["name"], "w8a8") for site in plain["sites"]]
    assert shown.stdout.rstrip().endswith(plain["suggestion"].rstrip())
