"""Reconstruction: that torch computes what ONNX Runtime does, what is refined, what is kept, and every sentence about it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from equality import parse

from onnxcomp import recipe, runtime
from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.cli import main
from onnxcomp.errors import UsageError
from onnxcomp.graph import files
from onnxcomp.graph.blocks import find_blocks, find_rest
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Graph, Tape, apply, extract
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.methods import reconstruction
from onnxcomp.methods.activations import build_static
from onnxcomp.methods.base import find as find_method
from onnxcomp.numerics.affine import Scheme, from_range
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.pipeline import Compressed, compress, quantize
from onnxcomp.recipe import Bits, Recipe

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch: pip install 'onnxcomp[torch]'")

Array = np.ndarray
W4A4 = Recipe("w4a4", bits=Bits(4, 4), moments="none", samples=64)
RECONSTRUCTED = replace(W4A4, reconstruct=True)
TRANSLATED = (
    "linear",
    "linear_3d",
    "mlp",
    "transformer",
    "relu_mlp",
    "conv_bn",
    "residual",
    "depthwise",
    "gemm",
    "silu",
    "concat",
)


@pytest.fixture(autouse=True)
def few_steps_and_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "STEPS", 60)
    monkeypatch.setattr(reconstruction, "RATES", {"code": 0.01, "scale": 0.005, "bias": 0.002})


def many(subject: tiny.Tiny, rng: np.random.Generator, count: int = 64) -> list[dict[str, Array]]:
    """More samples of normal numbers than a tiny model has."""
    return [{k: rng.normal(size=v.shape).astype(np.float32) for k, v in subject.samples[0].items()} for _ in range(count)]


def walked(subject: tiny.Tiny, settings: Recipe) -> Compressed:
    return compress(subject.model, subject.samples, settings, runtime.ignore)


def cut(x: Array, wanted: Array | None = None, given: Array | None = None, first: int = 0, count: int | None = None) -> Cut:
    """Samples [N, C] one by one, what the stretch shall give for them and what it gives; the numbers start at `first`."""
    reads = {"x": x, "f_xh": x if wanted is None else wanted, "g_xh": x if given is None else given}
    live = {name: array.astype(np.float32) for name, array in reads.items()}
    batches = [LiveBatch((first + i,), {k: v[i : i + 1] for k, v in live.items()}) for i in range(count or len(x))]
    return Cut(batches, {name: name for name in live})


def biased(b: float = 0.0) -> Graph:
    """The stretch y = x + b."""
    return to_graph(parse("g (float[N,8] x) => (float[N,8] y) { y = Add(x, b) }", {"b": np.full(8, b, np.float32)}, opset=21))


def by_torch(graph: Graph, feed: dict[str, Array]) -> Array:
    import torch

    with torch.no_grad():
        return reconstruction.Twin(graph, {}, ()).run(feed).numpy()


@needs_torch
@pytest.mark.parametrize("name", TRANSLATED)
def test_torch_computes_the_float_model_as_the_runtime_does(name: str):
    subject = tiny.models()[name]
    walk = walked(subject, W4A4).walk
    part = extract(walk.reference, [t.name for t in walk.reference.inputs], [walk.reference.outputs[0].name])
    session = runtime.Session(to_model(part, walk.like).SerializeToString())

    found = by_torch(part, subject.samples[0])

    expected = session.run(subject.samples[0])[part.outputs[0].name]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()  # sums of some 100 terms in another order


@needs_torch
@pytest.mark.parametrize(("bits", "least"), [("w4a4", 24.0), ("w4a8", 40.0)])
@pytest.mark.parametrize("name", TRANSLATED)
def test_torch_computes_the_quantized_model_as_the_runtime_does(name: str, bits: str, least: float):
    """Up to single values on the other side of a step, which a Conv's bias in whole steps of its products puts there: the
    range over a step is 24 dB at 4 bits and 48 at 8.
    """
    subject = tiny.models()[name]
    walk = walked(subject, replace(W4A4, bits=Bits.parse(bits), compensate=())).walk
    part = extract(walk.compressed, [t.name for t in walk.compressed.inputs], [walk.compressed.outputs[0].name])
    session = runtime.Session(to_model(walk.target.lower(part.copy()), walk.like).SerializeToString())

    pairs = [(session.run(feed)[part.outputs[0].name], by_torch(part, feed)) for feed in subject.samples]

    assert sqnr_db(*np.sum([energies(*pair) for pair in pairs], axis=0)) > least


@needs_torch
@pytest.mark.parametrize("methods", [("xint",), ("nbc",)])
def test_torch_computes_compensations_as_the_runtime_does(methods: tuple[str, ...]):
    """Residual terms and branches beside a block, with one range per token; every term takes up what single steps leave."""
    subject = tiny.models()["transformer"]
    made = tuple(find_method(method)(keep="always") for method in methods)
    walk = walked(subject, replace(W4A4, activations="token", compensate=made)).walk
    part = extract(walk.compressed, [t.name for t in walk.compressed.inputs], [walk.compressed.outputs[0].name])
    session = runtime.Session(to_model(walk.target.lower(part.copy()), walk.like).SerializeToString())

    found = by_torch(part, subject.samples[0])

    assert sqnr_db(*energies(session.run(subject.samples[0])[part.outputs[0].name], found)) > 24.0


@needs_torch
@pytest.mark.parametrize("name", ["transformer", "conv_bn"])
def test_a_stretch_is_kept_where_it_gains_on_held_out_samples(name: str, rng: np.random.Generator):
    subject = tiny.models()[name]

    found = [
        d for d in quantize(subject.model, many(subject, rng), RECONSTRUCTED).report.decisions if d.method == "reconstruction"
    ]

    assert any(d.adopted for d in found)
    assert all(d.adopted == ((d.gain_db or 0) > 0) for d in found)
    assert all(re.fullmatch(r"\d+ tensors refined", d.reason) for d in found if d.adopted)


@needs_torch
def test_what_a_bias_can_repair_is_repaired_on_samples_that_were_not_seen(rng: np.random.Generator):
    x = rng.normal(size=(64, 8))

    found = reconstruction.fit("s", biased(0.1), {"x": "x"}, cut(x, x + 0.103, x + 0.1), {}, (), 0)

    assert found.fit is not None
    assert np.abs(found.fit["b"] - 0.103).max() < 1e-3  # 60 steps of at most 0.002 of what it was


@needs_torch
def test_the_kernels_and_the_size_stay_and_the_file_does_what_the_walk_did(rng: np.random.Generator):
    subject = tiny.models()["residual"]
    samples = many(subject, rng)

    plain, refined = (quantize(subject.model, samples, settings).report for settings in (W4A4, RECONSTRUCTED))

    assert [site.integer for site in refined.sites] == [site.integer for site in plain.sites]
    assert refined.verification.expected_db == plain.verification.expected_db
    assert abs(refined.output_bytes - plain.output_bytes) < 4096  # what the report says of it


@needs_torch
def test_the_same_call_gives_the_same_bytes(rng: np.random.Generator):
    subject = tiny.models()["transformer"]
    samples = many(subject, rng)

    first, second = (quantize(subject.model, samples, RECONSTRUCTED).model.SerializeToString() for _ in range(2))

    assert first == second


@needs_torch
def test_a_run_that_is_started_again_ends_with_the_same_bytes(rng: np.random.Generator, tmp_path: Path):
    subject = tiny.models()["transformer"]
    samples, work = many(subject, rng), tmp_path / "work"
    whole = quantize(subject.model, samples, RECONSTRUCTED, work=work).model
    for path in sorted(work.rglob("*.step"))[9:]:
        path.unlink()

    again = quantize(subject.model, samples, RECONSTRUCTED, work=work).model

    assert again.SerializeToString() == whole.SerializeToString()


@needs_torch
def test_an_operator_without_a_counterpart_leaves_its_stretch_as_it_is():
    model = parse("g (float[N,8] x) => (float[N,8] y) { s = Sin(x) y = Softplus(s) }", opset=21)

    found = reconstruction.fit("s", to_graph(model), {"x": "x"}, cut(np.zeros((8, 8))), {}, (), 0)

    assert (found.fit, found.reason) == (None, "Sin, Softplus cannot be computed by torch here")


@needs_torch
def test_a_stretch_with_nothing_of_few_bits_and_no_bias_stays():
    model = parse("g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }", opset=21)

    found = reconstruction.fit("s", to_graph(model), {"x": "x"}, cut(np.zeros((8, 8))), {}, (), 0)

    assert (found.fit, found.reason) == (None, "nothing in it may change")


@needs_torch
def test_too_few_samples_and_constants_that_others_read_are_refused():
    graph = biased()

    few = reconstruction.fit("s", graph, {"x": "x"}, cut(np.zeros((8, 8)), first=3, count=1), {}, (), 0)
    shared = reconstruction.fit("s", graph, {"x": "x"}, cut(np.zeros((8, 8))), {}, ("b",), 0)

    assert (few.fit, few.reason) == (None, "there are too few samples")
    assert (shared.fit, shared.reason) == (None, "nothing in it may change")


@needs_torch
def test_what_does_not_improve_held_out_samples_is_not_kept(rng: np.random.Generator):
    """Held-out samples want nothing changed, and the others something."""
    x = rng.normal(size=(16, 8))
    wanted = x + 1.0 * (np.arange(16)[:, None] % 4 != 3)

    found = reconstruction.fit("s", biased(), {"x": "x"}, cut(x, wanted), {}, (), 0)

    assert (found.fit, found.reason) == (None, "on held-out samples it does not improve, or the model does not")
    assert found.gain_db == 0.0


@needs_torch
def test_what_makes_the_model_worse_is_not_kept_although_the_stretch_gains(rng: np.random.Generator):
    """The output of the model is the best as it is, and moves away with what the stretch gives."""
    x = rng.normal(size=(64, 8)).astype(np.float32)
    samples = cut(x, x + 0.103, x + 0.1)
    samples = replace(samples, reads={**samples.reads, "result/out": "g_xh"})

    found = reconstruction.fit(
        "s", biased(0.1), {"x": "x"}, samples, {}, (), 0, y="y", tail=lambda live: {"out": live["y"]}, beside=["result/out"]
    )

    assert (found.fit, found.reason, found.gain_db) == (
        None,
        "on held-out samples it does not improve, or the model does not",
        0.0,
    )


@needs_torch
def test_samples_of_many_lengths_are_run_together_where_they_have_the_same(rng: np.random.Generator):
    pairs = [rng.normal(size=(2, 2 + i % 3, 8)).astype(np.float32) for i in range(32)]
    live = [{"x": x, "f_xh": x + np.float32(0.103), "g_xh": x + np.float32(0.1)} for x in pairs]
    batches = [LiveBatch((2 * i, 2 * i + 1), reads) for i, reads in enumerate(live)]
    samples = Cut(batches, {name: name for name in live[0]})
    graph = to_graph(parse("g (float[N,T,8] x) => (float[N,T,8] y) { y = Add(x, b) }", {"b": np.full(8, 0.1, np.float32)}))

    found = reconstruction.fit("s", graph, {"x": "x"}, samples, {}, (), 0, tokens=True)

    assert found.fit is not None
    assert np.abs(found.fit["b"] - 0.103).max() < 2e-3


@needs_torch
def test_what_has_eight_bits_is_left_at_once(rng: np.random.Generator):
    subject = tiny.models()["residual"]

    report = quantize(subject.model, many(subject, rng), replace(RECONSTRUCTED, bits=Bits(8, 8))).report

    found = [(d.adopted, d.reason) for d in report.decisions if d.method == "reconstruction"]
    assert set(found) == {(False, "it has no codes of fewer than 8 bits")}


@needs_torch
@pytest.mark.parametrize("body", ["y = Clip(x, low, high)", "y = Min(x, high)"])
def test_a_range_does_not_outgrow_the_clip_in_front_of_it(body: str, rng: np.random.Generator):
    """A kernel that ends in a Clip has it for nothing only while its range ends there too."""
    part = to_graph(
        parse(
            f"g (float[N,8] x) => (float[N,8] y) {{ {body} }}",
            {"low": np.array(0, np.float32), "high": np.array(1, np.float32)},
            opset=21,
        )
    )
    tape = Tape("y/quantized")
    q = from_range(0.0, 1.0, Scheme(4))
    apply(part, "quantize", tape, {"y": build_static(tape, "y", q)})
    x = rng.uniform(size=(64, 8))

    larger, smaller = (reconstruction.fit("s", part, {"x": "x"}, cut(x, f * x, q.fake(x)), {}, (), 0) for f in (2.0, 0.8))

    assert larger.fit is None
    assert smaller.fit is not None
    assert smaller.fit["y/quantized.scale"] < q.scale


@needs_torch
@pytest.mark.parametrize("body", ["y = Add(x, b)", "r = Reshape(x, wrong) y = Add(r, b)"])
def test_a_stretch_that_torch_computes_otherwise_stays(body: str, rng: np.random.Generator):
    weights = {"b": np.zeros(8, np.float32), "wrong": np.array([3, -1])}
    used = {name: value for name, value in weights.items() if name in body}
    part = to_graph(parse(f"g (float[N,8] x) => (float[N,8] y) {{ {body} }}", used, opset=21))
    x = rng.normal(size=(16, 8))

    found = reconstruction.fit("s", part, {"x": "x"}, cut(x, 2.0 * x, 1.5 * x), {}, (), 0)

    assert (found.fit, found.reason) == (None, "torch computes it otherwise than ONNX Runtime")


def test_without_torch_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    subject = tiny.models()["mlp"]
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(UsageError) as error:
        quantize(subject.model, subject.samples, RECONSTRUCTED)

    assert str(error.value) == "Reconstruction needs the package torch. Run: pip install 'onnxcomp[torch]'"


def test_without_data_one_sentence_says_what_is_missing():
    with pytest.raises(UsageError) as error:
        quantize(tiny.models()["mlp"].model, None, RECONSTRUCTED)

    assert str(error.value) == "Reconstruction is fitted to samples. Pass --data, or leave --reconstruct out."


@needs_torch
def test_the_command_line_asks_for_it_and_the_recipe_keeps_it(net: Path, data: Path):
    found = CliRunner().invoke(main, ["quantize", str(net), "--data", str(data), "--bits", "w4a4", "--reconstruct", "--all"])

    assert found.exit_code == 0, found.stderr
    assert "reconstruction" in found.stdout
    stored = files.metadata(files.load(net.with_name("mlp.w4a4.onnx")))["onnxcomp.recipe"]
    assert recipe.loads(stored).reconstruct


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("conv_bn", [("conv1", "y")]),
        ("residual", [("stem", "rs")]),
        ("transformer", [("head", "y")]),
        ("mlp", [("fc1", "y")]),
        ("silu", [("conv1", "c1"), ("conv2", "y")]),
    ],
)
def test_layers_outside_all_blocks_are_stretches_of_their_own(name: str, ends: list[tuple[str, str]]):
    graph = prepare(tiny.models()[name].model, runtime.infer_types).graph
    layers = [site for site in find_sites(graph) if site.kind == "layer"]

    rest = find_rest(graph, layers, find_blocks(graph, layers))

    assert [(block.name, block.y) for block in rest] == ends
    assert {block.kind for block in rest} == {"rest"}


def test_a_stretch_has_six_layers_at_most():
    body = "".join(f" [l{i}] t{i + 1} = MatMul(t{i}, w)" for i in range(7))
    model = parse(
        f"g (float[N,8] t0) => (float[N,8] y) {{ {body} y = Relu(t7) }}", {"w": np.eye(8, dtype=np.float32)}, opset=21
    )
    graph = prepare(model, runtime.infer_types).graph

    rest = find_rest(graph, find_sites(graph), ())

    assert [(block.name, block.y) for block in rest] == [("l0", "t6"), ("l6", "y")]
