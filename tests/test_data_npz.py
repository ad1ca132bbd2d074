"""Arrays of a .npz: large ones are mapped, and damage is found all the same."""

from __future__ import annotations

import io
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.data import InputSpec, open_data
from onnxcomp.data.sources import MAPPED_BYTES, read_arrays
from onnxcomp.errors import DataError, ResourceError

BYTES = [InputSpec("x", np.dtype(np.uint8), ("N", 128))]


def error(path: Path) -> str:
    """The text of the DataError that opening the file raises."""
    with pytest.raises(DataError) as raised:
        open_data(path, BYTES)
    return str(raised.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_large_array_of_a_npz_is_mapped(tmp_path: Path, save, order: str):
    block = np.asarray(np.arange(MAPPED_BYTES // 8).reshape(-1, 128).astype(">f8"), order=order)
    save(tmp_path / "d.npz", y=np.arange(len(block)), x=block)

    arrays = read_arrays(tmp_path / "d.npz")

    assert isinstance(arrays["x"].base, np.memmap)
    np.testing.assert_array_equal(arrays["x"], block, strict=True)
    np.testing.assert_array_equal(arrays["y"], np.arange(len(block)), strict=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_of_a_large_npz_one_row_is_in_memory(tmp_path: Path, save):
    save(tmp_path / "d.npz", x=np.zeros((64, MAPPED_BYTES // 64), np.uint8))
    tracemalloc.start()

    try:
        total = sum(len(feed) for feed in open_data(tmp_path / "d.npz", [InputSpec("x", np.dtype(np.uint8), ("N", "M"))]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert total == 64
    assert peak < MAPPED_BYTES // 4  # a row, and the blocks that are unpacked


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("large", [False, True])
def test_a_npz_with_a_wrong_checksum_or_a_password(tmp_path: Path, save, large: bool):
    path = tmp_path / "a.npz"
    save(path, x=np.zeros((MAPPED_BYTES // 12 if large else 10, 3), np.float32))
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")  # of the table of contents: flags are 8 bytes behind, and the checksum 16
    wrong = bytearray(content)
    wrong[start + 16] ^= 1
    locked = bytearray(content)
    locked[start + 8] |= 1

    path.write_bytes(wrong)
    assert error(path) == f"{path}: cannot be read as a .npz file (Bad CRC-32 for file 'x.npy')."
    path.write_bytes(locked)
    assert error(path).startswith(f"{path}: cannot be read as a .npz file (File 'x.npy' is encrypted, password required")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["shape", "object"])
def test_a_large_array_that_is_not_what_its_header_says(tmp_path: Path, save, kind: str):
    header, path = io.BytesIO(), tmp_path / "a.npz"
    said = {"descr": "<f4" if kind == "shape" else "|O", "fortran_order": False, "shape": (MAPPED_BYTES, 3)}
    np.lib.format.write_array_header_1_0(header, said)
    method = zipfile.ZIP_STORED if save is np.savez else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(MAPPED_BYTES))

    assert error(path) == f"{path}: cannot be read as a .npz file (x.npy holds objects, or not what its header says)."


def test_a_large_npz_that_cannot_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((MAPPED_BYTES // 128, 128), np.uint8))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    with pytest.raises(ResourceError) as raised:
        open_data(path, BYTES)

    text = (
        f"{tmp_path}/gone cannot hold {path} unpacked: no such file or directory. Point $TMPDIR to a folder on a larger disk."
    )
    assert str(raised.value) == text
