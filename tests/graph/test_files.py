"""Reading and writing model files: every error's text, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from equality import parse, run, stored
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import files, mapped

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


def entries_of(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_saved_model_loads_equal(model: ModelProto, tmp_path: Path):
    files.save(model, tmp_path / "m.onnx")

    assert files.load(tmp_path / "m.onnx") == model
    assert files.load(str(tmp_path / "m.onnx")) == model
    assert files.load((tmp_path / "m.onnx").read_bytes()) == model
    assert files.load(model) is model
    assert entries_of(tmp_path) == ["m.onnx"]


def test_weights_beside_the_model_load_into_it(model: ModelProto, external: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "INLINE_LIMIT", 10**9)
    loaded = files.load(external)

    assert {k: v.tolist() for k, v in stored(loaded).items()} == {k: v.tolist() for k, v in stored(model).items()}
    assert not any(tensor.external_data for tensor in loaded.graph.initializer)
    np.testing.assert_array_equal(run(loaded, X)["y"], run(model, X)["y"])


def test_a_large_model_keeps_its_weights_beside_it_where_the_runtime_finds_them(model: ModelProto, external: Path):
    before = model.SerializeToString(deterministic=True)
    session = onnx.load(external)

    assert entries_of(external.parent) == ["m.onnx", "m.onnx.data"]
    assert external.stat().st_size < 1000
    assert files.files_of(external) == (external, external.parent / "m.onnx.data")
    np.testing.assert_array_equal(run(session, X)["y"], run(model, X)["y"])
    assert files.check(external) == f"onnx {onnx.__version__}"
    assert model.SerializeToString(deterministic=True) == before


def test_weights_of_every_storage_survive_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    rng = np.random.default_rng(0)
    model = parse("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [400], rng.normal(size=400))
    codes = rng.integers(-8, 8, 3001).astype(np.int8)
    packed = helper.make_tensor("packed", TensorProto.INT4, [3001], codes)
    model.graph.initializer.extend([typed, packed, helper.make_tensor("text", TensorProto.STRING, [1], [b"a" * 2000])])

    files.save(model, tmp_path / "m.onnx")

    loaded = stored(mapped.embed(files.load(tmp_path / "m.onnx")))
    np.testing.assert_array_equal(loaded["typed"], numpy_helper.to_array(typed))
    np.testing.assert_array_equal(loaded["packed"].astype(np.int8), codes)
    assert loaded["text"][0] == "a" * 2000


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"^.*/none\.onnx does not exist\.$"):
        files.load(tmp_path / "none.onnx")


def test_a_folder_is_no_model(tmp_path: Path):
    with pytest.raises(ModelError, match=r" is a folder\. Give the path of the \.onnx file in it\.$"):
        files.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x08\x08"])
def test_other_bytes_are_no_model(tmp_path: Path, data: bytes):
    (tmp_path / "m.onnx").write_bytes(data)

    with pytest.raises(ModelError, match=r"m\.onnx: not an ONNX model, or one that is cut short\.$"):
        files.load(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"^The bytes given: not an ONNX model, or one that is cut short\.$"):
        files.load(data)


def test_a_truncated_model_is_refused_wherever_it_is_cut(model: ModelProto, tmp_path: Path):
    data = model.SerializeToString()

    for length in range(1, len(data) - 1, 97):
        with pytest.raises(ModelError, match="cut short"):
            files.load(data[:length])


def test_an_unreadable_file_says_why(model: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.save(model, tmp_path / "m.onnx")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"m\.onnx cannot be read: permission denied\.$"):
        files.load(tmp_path / "m.onnx")


def test_a_model_in_memory_cannot_point_to_files(external: Path):
    text = r"^The weight 'w' lies in a file beside the model\. Give the model's path\.$"
    with pytest.raises(ModelError, match=text):
        files.load(external.read_bytes())
    with pytest.raises(ModelError, match=text):
        files.load(onnx.load(external, load_external_data=False))


def test_an_existing_output_is_replaced_only_by_force(model: ModelProto, tmp_path: Path):
    (tmp_path / "m.onnx").write_text("mine")

    with pytest.raises(UsageError, match=r"m\.onnx exists\. Pass --force to overwrite it\.$"):
        files.save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    files.save(model, tmp_path / "m.onnx", force=True)
    assert files.load(tmp_path / "m.onnx") == model


def test_an_existing_weight_file_is_replaced_only_by_force(model: ModelProto, external: Path):
    external.unlink()

    with pytest.raises(UsageError, match=r"m\.onnx\.data exists\. Pass --force"):
        files.save(model, external)
    assert entries_of(external.parent) == ["m.onnx.data"]


def test_the_input_is_never_written_over(model: ModelProto, external: Path):
    (external.parent / "link.onnx").symlink_to(external)

    for output in (external, external.parent / "link.onnx", external.parent / "m.onnx.data"):
        with pytest.raises(UsageError, match=r" is the input itself, which is never changed\. Choose another output\.$"):
            files.save(model, output, force=True, source=external)
        with pytest.raises(UsageError, match="is the input itself"):
            files.check_output(output, external, force=True)


def test_a_weight_file_of_the_input_is_never_written_over(model: ModelProto, external: Path):
    (external.parent / "m.onnx.data").rename(external.parent / "out.onnx.data")
    for name in ("w", "b"):
        loaded = onnx.load(external, load_external_data=False)
        weight = next(tensor for tensor in loaded.graph.initializer if tensor.name == name)
        weight.external_data[0].value = "out.onnx.data"
        external.write_bytes(loaded.SerializeToString())

    with pytest.raises(UsageError, match=r"out\.onnx\.data is the input itself"):
        files.save(model, external.parent / "out.onnx", force=True, source=external)


def test_an_output_needs_its_folder(model: ModelProto, tmp_path: Path):
    text = r"^The folder .*none does not exist\. Create it first, or choose another output\.$"
    with pytest.raises(UsageError, match=text):
        files.save(model, tmp_path / "none" / "m.onnx")
    with pytest.raises(UsageError, match=text):
        files.check_output(tmp_path / "none" / "m.onnx")


def test_an_output_is_no_folder(model: ModelProto, tmp_path: Path):
    with pytest.raises(UsageError, match=r" is a folder\. Give the name of the file to write\.$"):
        files.save(model, tmp_path, force=True)


def test_no_output_needs_no_check():
    files.check_output(None, b"model")


@pytest.mark.parametrize("limit", [1000, 10**9])
def test_a_full_disk_leaves_nothing_behind(model: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(files, "INLINE_LIMIT", limit)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(ModelError, match=r"m\.onnx cannot be written: file too large\.$"):
            files.save(model, tmp_path / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert entries_of(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_says_why(model: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "TemporaryDirectory", refuse)
    with pytest.raises(ModelError, match=r"m\.onnx cannot be written: permission denied\.$"):
        files.save(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_move_leaves_the_old_model_and_its_weights(
    model: ModelProto, external: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
):
    """The weight file moves first; it is moved back when the model cannot follow."""
    if not existing:
        external.unlink()
        (external.parent / "m.onnx.data").unlink()
    before = {path.name: path.read_bytes() for path in external.parent.iterdir()}
    other = parse("g (float[N,3] x) => (float[N,900] y) { y = MatMul(x, w) }", {"w": np.ones((3, 900), np.float32)})
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if target == external:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ModelError, match=r"m\.onnx cannot be written: no space left on device\.$"):
        files.save(other, external, force=True)

    assert {path.name: path.read_bytes() for path in external.parent.iterdir()} == before


def test_an_interrupted_write_leaves_nothing_behind(model: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.save(model, tmp_path / "m.onnx")

    assert entries_of(tmp_path) == []


def test_a_pending_file_runs_before_it_is_moved_and_vanishes_without(external: Path, model: ModelProto):
    output = external.parent / "out.onnx"

    with files.PendingFile(model, output) as pending:
        assert not output.exists()
        np.testing.assert_array_equal(run(onnx.load(pending.path), X)["y"], run(model, X)["y"])
        files.check(pending.path)
    assert entries_of(external.parent) == ["m.onnx", "m.onnx.data"]

    with files.PendingFile(model, output) as pending:
        pending.commit()
    assert entries_of(external.parent) == ["m.onnx", "m.onnx.data", "out.onnx", "out.onnx.data"]


def test_an_output_that_appeared_meanwhile_is_not_replaced(model: ModelProto, tmp_path: Path):
    with files.PendingFile(model, tmp_path / "m.onnx") as pending:
        (tmp_path / "m.onnx").write_text("mine")
        with pytest.raises(UsageError, match="exists"):
            pending.commit()

    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_abstract_nodes_never_reach_a_file(tmp_path: Path):
    model = parse("g (float[N,3] x) => (float[N,3] y) { y = onnxcomp.FakeQuantize(x) }", domains=', "onnxcomp" : 1')

    with pytest.raises(AssertionError, match="abstract nodes were not lowered"):
        files.save(model, tmp_path / "m.onnx")


def test_the_checkers_complaint_is_a_model_error(model: ModelProto, tmp_path: Path):
    model.graph.node[0].op_type = "Wrong"
    files.save(model, tmp_path / "m.onnx")

    with pytest.raises(ModelError, match=r"^The ONNX checker refuses the model: No Op registered for Wrong"):
        files.check(tmp_path / "m.onnx")


def test_metadata_is_merged_and_sorted(model: ModelProto):
    files.set_metadata(model, {"b": "2", "c": "3"})
    files.set_metadata(model, {"a": "1", "c": "4"})

    assert files.metadata(model) == {"a": "1", "b": "2", "c": "4"}
    assert [p.key for p in model.metadata_props] == ["a", "b", "c"]


def test_the_digest_covers_the_weights_beside_the_model(external: Path):
    data = external.parent / "m.onnx.data"
    whole = hashlib.sha256(external.read_bytes() + data.read_bytes()).hexdigest()

    assert files.sha256(external) == whole
    assert files.size(external) == external.stat().st_size + data.stat().st_size
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    assert files.sha256(external) != whole


def test_the_digest_of_a_file_is_that_of_its_bytes(model: ModelProto, tmp_path: Path):
    files.save(model, tmp_path / "m.onnx")

    assert files.sha256(tmp_path / "m.onnx") == files.sha256((tmp_path / "m.onnx").read_bytes())
    assert (tmp_path / "m.onnx").read_bytes() == files.to_bytes(model)


def test_more_than_two_gigabytes_do_not_fit_into_bytes():
    """protobuf's own refusal, without two gigabytes to show it."""

    def refuse(deterministic: bool) -> bytes:
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    large = SimpleNamespace(SerializeToString=refuse)
    with pytest.raises(ModelError, match=r"^The model exceeds 2 GiB, the most that ONNX can hold in one piece\.$"):
        files.to_bytes(large)  # pyright: ignore[reportArgumentType]
