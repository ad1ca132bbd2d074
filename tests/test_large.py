"""A generated model of more than 2 GiB, quantized and compared from the command line, and what that takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from scripts import load_tool

from onnxcomp.calibrate.room import free_memory
from onnxcomp.graph import files

pytestmark = pytest.mark.real
large = load_tool("large")

LAYERS, WIDTH = 36, 4096
DISK, MEMORY = 7e9, 8e9
"""Free bytes that the test asks for: the model twice and its codes; the float model in ONNX Runtime, to be compared."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where there is room for the model."""
    disk, memory = shutil.disk_usage(tmp_path).free, free_memory()
    if disk < DISK or memory < MEMORY or not Path("/proc/self/status").exists():
        pytest.skip(f"needs {DISK / 1e9:g} GB of disk and {MEMORY / 1e9:g} GB of memory on Linux")
    return tmp_path


@pytest.mark.parametrize(("bits", "least"), [("w8a8", 20.0)])
def test_a_model_of_more_than_two_gigabytes_is_quantized_in_less_memory_than_it_takes(
    folder: Path, bits: str, least: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(folder))
    path, output = folder / "large.onnx", folder / "out.onnx"
    size = large.build(path, LAYERS, WIDTH)
    data = large.sample(folder / "data.npz", WIDTH, 8)

    made = large.run("quantize", path, "--data", data, "--bits", bits, "--recipe", "base", "-o", output)
    compared = large.run("compare", path, output, "--data", data)

    assert size > 2**31
    assert made.answer["model_bytes"] == files.size(path) > size
    assert made.answer["output_bytes"] == files.size(output) < 0.26 * size
    assert output.stat().st_size < 1e6
    assert [node.op_type for node in onnx.load(output).graph.node].count("MatMulInteger") == LAYERS
    assert compared.answer["outputs"][0]["sqnr_db"] > least
    assert made.anonymous < size / 4
    assert [*folder.glob("onnxcomp-*"), *folder.glob("tmp*"), *folder.glob(".*onnx*")] == []
