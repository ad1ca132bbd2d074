"""Weights of large models stay in their files, from the file that is read to the one that is written.

What is large is made small here: from a few bytes on a model counts as one of more than 2 GiB.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import ModelProto, TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcomp import automatic, runtime
from onnxcomp.analysis import analyze
from onnxcomp.calibrate.samples import Run
from onnxcomp.comparison import compare
from onnxcomp.errors import ModelError, ResourceError
from onnxcomp.graph import files, mapped
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Constant, tensors_of
from onnxcomp.graph.prepare import prepare
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Recipe
from onnxcomp.strip import strip

TINY = tiny.models()
MODELS = Path(__file__).resolve().parents[2] / "models"
X = {"x": np.ones((2, 3), np.float32)}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def all_is_large(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every weight of 16 bytes or more is mapped, and so is what is made of it; the folder of temporary files."""
    monkeypatch.setattr(files, "INLINE_LIMIT", 16)
    monkeypatch.setattr(mapped, "WEIGHT_BYTES", 16)
    monkeypatch.setattr(mapped, "SPILL_BYTES", 16)
    return scratch


def save(model: ModelProto, path: Path) -> Path:
    """The model with all its weights beside it."""
    copy = ModelProto.FromString(model.SerializeToString())
    onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def weights_of(model: ModelProto) -> set[str]:
    """The weights that lie in files."""
    return {tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("name", ["linear", "gemm", "transformer", "conv_bn", "embedding", "shared", "outputs"])
def test_a_large_model_becomes_what_it_would_as_a_small_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(TINY[name].model, tmp_path / "m.onnx")
    large = quantize(path, TINY[name].samples, Recipe(bits="w4a8", sensitive="asked"))  # pyright: ignore[reportArgumentType]
    monkeypatch.undo()
    small = quantize(path, TINY[name].samples, Recipe(bits="w4a8", sensitive="asked"))  # pyright: ignore[reportArgumentType]

    assert not weights_of(large.model)
    assert large.model.graph == small.model.graph  # how far a rotated float model agrees is measured in another order of sums
    assert large.report.model_bytes == small.report.model_bytes


@pytest.mark.usefixtures("all_is_large")
def test_the_file_made_of_a_large_model_has_its_weights_beside_it_and_computes_the_same(tmp_path: Path):
    model, output = onnx.load(MODELS / "cnn_digits.onnx"), tmp_path / "out.onnx"
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(1, 1, 16, 16)).astype(np.float32)} for _ in range(4)]

    made = quantize(save(model, tmp_path / "m.onnx"), samples, "base", output=output)

    assert files.files_of(output) == (output, tmp_path / "out.onnx.data")
    found, want = (runtime.Session(m).run(samples[0]) for m in (output, made.model))
    assert all(np.array_equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["gemm", "transformer", "conv_bn"])
def test_a_prepared_large_model_holds_no_weight_and_computes_the_same(name: str, all_is_large: Path, tmp_path: Path):
    model = files.load(save(TINY[name].model, tmp_path / "m.onnx"))

    prepared = prepare(model, runtime.infer_types)

    assert len(weights_of(prepared.model)) > 0
    inline = [t for t in prepared.model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert all(tensor.data_type == TensorProto.INT64 or len(tensor.raw_data) < 16 for tensor in inline)
    feed = TINY[name].samples[0]
    found, want = (runtime.Session(m, optimize=False).run(feed) for m in (prepared.model, TINY[name].model))
    for key, value in want.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)
    del prepared
    gc.collect()
    assert list(all_is_large.iterdir()) == []


def test_a_rewritten_weight_lies_in_a_temporary_file_as_long_as_it_is_used(all_is_large: Path, tmp_path: Path):
    loaded = files.load(save(TINY["linear"].model, tmp_path / "m.onnx"))
    old = next(mapped.array_of(t) for t in loaded.graph.initializer if len(t.dims) == 2)

    new = mapped.keep(2 * old.T, old)

    np.testing.assert_array_equal(new, 2 * old.T)
    stored = mapped.stored("new", new)
    assert isinstance(stored, LazyValues)
    assert len(list(all_is_large.iterdir())) == 1
    transposed = new.T.copy()
    np.testing.assert_array_equal(mapped.array_of(stored.tensor), new)
    assert mapped.stored("new", transposed) is transposed
    assert mapped.keep(new[:1, :1], old).tobytes() == new[:1, :1].tobytes()
    del new
    gc.collect()
    assert list(all_is_large.iterdir()) == []


def test_no_room_for_a_rewritten_weight_says_where(all_is_large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = files.load(save(TINY["linear"].model, tmp_path / "m.onnx"))
    old = next(mapped.array_of(t) for t in loaded.graph.initializer if len(t.dims) == 2)
    monkeypatch.setattr(tempfile, "tempdir", str(all_is_large / "none"))

    text = r"none cannot hold the model's weights: no such file or directory\. Point \$TMPDIR to a folder on a larger disk\.$"
    with pytest.raises(ResourceError, match=text):
        mapped.keep(old + 1, old)


@pytest.mark.usefixtures("all_is_large")
def test_a_mapped_weight_that_nothing_changes_is_written_down_as_a_reference(tmp_path: Path):
    model = files.load(save(TINY["linear"].model, tmp_path / "m.onnx"))
    graph = to_graph(model)
    values = {name: t.values for name, t in tensors_of(graph).items() if isinstance(t, Constant)}

    again = to_model(graph, model)

    assert weights_of(again) == weights_of(model) == set(values)
    assert all(np.array_equal(mapped.array_of(t), values[t.name]) for t in again.graph.initializer)
    assert mapped.embed(again) == to_model(to_graph(TINY["linear"].model), TINY["linear"].model)


def test_a_file_that_was_replaced_is_mapped_anew(external: Path, model: ModelProto):
    before = mapped.embed(files.load(external))
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    files.save(model, external, force=True)

    assert before.graph.initializer[0].raw_data != mapped.embed(files.load(external)).graph.initializer[0].raw_data


def test_a_model_in_memory_may_refer_to_no_file_that_was_not_mapped_here(model: ModelProto, tmp_path: Path):
    path = save(model, tmp_path / "m.onnx")

    with pytest.raises(ModelError, match=r"^The weight '[wb]' lies in a file beside the model\. Give the model's path\.$"):
        files.load(onnx.load(path, load_external_data=False))


@pytest.mark.parametrize("optimize", [True, False])
def test_a_large_model_in_memory_runs_and_is_told_from_others(
    model: ModelProto, monkeypatch: pytest.MonkeyPatch, scratch: Path, optimize: bool
):
    want, size = runtime.Session(model, optimize=optimize).run(X)["y"], files.bytes_of(model)
    digest = files.sha256(model)
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)

    np.testing.assert_array_equal(runtime.Session(model, optimize=optimize).run(X)["y"], want)
    assert digest != files.sha256(model) == files.sha256(model)
    assert 0 <= size - files.bytes_of(model) < 1000
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("all_is_large")
def test_what_travels_to_another_machine_takes_its_weights_along(tmp_path: Path):
    loaded = files.load(save(TINY["linear"].model, tmp_path / "m.onnx"))

    run = Run(loaded, {"x": "x"})

    assert weights_of(loaded)
    assert not weights_of(run.__getstate__()["model"])
    feed = TINY["linear"].samples[0]
    np.testing.assert_allclose(Run(**run.__getstate__()).output(feed), run.output(feed), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("all_is_large")
def test_a_large_file_is_compared_analyzed_and_stripped_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    subject = TINY["gemm"]
    path = save(subject.model, tmp_path / "m.onnx")

    def everything() -> list[object]:
        output = tmp_path / "out.onnx"
        made = quantize(path, subject.samples, "bc", output=output, force=True).model
        bounded = automatic.quantize(path, subject.samples, Recipe(), max_size=1e6)[0].model
        order = [site.name for site in analyze(path, subject.samples).sites]
        compared = compare(path, output, subject.samples).outputs
        return [
            made.graph,
            strip(output, ["bias"]).model.graph,
            bounded.graph,
            order,
            (compared[0].agreement, compared[0].answers),
        ]

    large = everything()
    monkeypatch.undo()

    assert large == everything()
