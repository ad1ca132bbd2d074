"""Where live tensors lie: what stays in memory, what goes to files, and that neither changes a byte or stays behind."""

from __future__ import annotations

import ctypes
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from onnxcomp.calibrate import room
from onnxcomp.calibrate.room import FREE, SMALL, Room, free_memory
from onnxcomp.calibrate.samples import Store
from onnxcomp.calibrate.work import Work
from onnxcomp.errors import ResourceError
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import NAMED, Bits

TENSOR = np.arange(2 * SMALL, dtype=np.float32).reshape(2, -1)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * resource.getpagesize()


def test_what_exceeds_the_budget_lies_in_files_and_is_mapped(scratch: Path):
    with Room(TENSOR.nbytes) as here:
        kept = here.take({"a": TENSOR, "b": TENSOR + 1, "small": TENSOR[:, :8]})

        assert here.held == TENSOR.nbytes + 64
        assert len([*scratch.rglob("*.npy")]) == 1
        assert isinstance(kept["b"].base, np.memmap)
        assert np.array_equal(kept["a"], TENSOR)
        assert np.array_equal(kept["b"], TENSOR + 1)


@pytest.mark.parametrize("array", [TENSOR.T, TENSOR.astype(np.int8), TENSOR > 5, TENSOR.reshape(2, 1, -1, 4)])
def test_a_tensor_comes_back_as_it_was(array: np.ndarray, scratch: Path):
    with Room(0) as here:
        (found,) = here.take({"a": array}).values()

        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert not found.flags.writeable


def test_what_is_no_longer_needed_or_replaced_leaves_memory_and_disk(scratch: Path):
    with Room(TENSOR.nbytes) as here:
        kept = here.take({"a": TENSOR, "b": TENSOR})
        kept = here.take({"b": TENSOR + 1, "unneeded": TENSOR}, kept, ["b"])

        assert list(kept) == ["b"]
        assert here.held == TENSOR.nbytes
        assert [*scratch.rglob("*.npy")] == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_folder_goes_with_the_room_whatever_happens(scratch: Path, error: type[BaseException]):
    def fail() -> None:
        with Room(0) as here:
            here.take({"a": TENSOR})
            raise error

    with pytest.raises(error):
        fail()

    assert [*scratch.iterdir()] == []


def test_nothing_is_made_on_disk_where_memory_suffices(scratch: Path):
    with Room() as here:
        Store([{"x": TENSOR}], batchable=False, work=Work(here))

        assert [*scratch.iterdir()] == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(scratch: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "SMALL", 0)
    subject = tiny.models()["transformer"]

    with largest_file(100), pytest.raises(ResourceError) as caught:
        quantize(subject.model, subject.samples, memory=0)

    (folder, _, rest) = str(caught.value).partition(" ")
    assert Path(folder) == scratch
    assert rest == f"cannot hold the samples' activations: file too large. {FREE}"
    assert FREE == "Make room there, set TMPDIR to another folder, or raise --memory."
    assert [*scratch.iterdir()] == []


def test_a_folder_that_cannot_be_made_is_the_same_error(scratch: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(scratch / "gone"))

    with (
        pytest.raises(ResourceError, match=r"/gone cannot hold the samples' activations: no such file or directory\."),
        Room(0) as here,
    ):
        here.take({"a": TENSOR})


@pytest.mark.parametrize("recipe", ["auto", "best"])
@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_the_budget_changes_no_byte_of_the_result(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch, scratch: Path):
    monkeypatch.setattr(room, "SMALL", 0)
    subject, chosen = tiny.models()[name], replace(NAMED[recipe], bits=Bits(4, 8))

    found = [quantize(subject.model, subject.samples, chosen, memory=memory).model for memory in (0, 5000, 10**9)]

    assert found[0].SerializeToString(deterministic=True) == found[1].SerializeToString(deterministic=True)
    assert found[0].SerializeToString(deterministic=True) == found[2].SerializeToString(deterministic=True)


def test_free_memory_is_what_the_system_says():
    assert 1 << 20 < free_memory() < 1 << 50


def test_where_the_system_does_not_say_it_is_a_small_machine(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)

    assert free_memory() == 4 << 30


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps what was freed as it likes")
def test_what_was_freed_between_live_tensors_goes_back_to_the_system():
    tensors = [np.ones(1 << 14, np.uint8) for _ in range(4096)]  # 64 MB in pieces too small to be mapped each
    live = tensors[::16]
    del tensors
    before = resident()

    room.give_back()

    assert before - resident() > 32 << 20
    assert all(tensor.all() for tensor in live)
