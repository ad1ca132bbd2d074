"""What a run will take, foretold: against what it took, and on the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

from onnxcomp import cli
from onnxcomp.pipeline import foresee, quantize
from onnxcomp.recipe import NAMED
from onnxcomp.report import text
from onnxcomp.report.model import Forecast

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 1.5
"""How far the projected peak may be off, either way."""
LINE = r"Foretold: \d+ s, [\d.]+ [MG]B of memory; [\d.]+ [kM]?B of activations, [\d.]+ [kM]?B of files\.\n"
MODEL, DATA = ROOT / "models" / "cnn_digits.onnx", ROOT / "models" / "digits_calib.npz"
MEASURE = """
import json, sys
from dataclasses import asdict, replace
from onnxcomp.calibrate.room import peak_memory
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, find
model, data, bits, samples, memory = sys.argv[1:]
found = []
recipe = replace(find("auto"), bits=Bits.parse(bits), samples=int(samples))
quantize(model, data, recipe, memory=int(memory), announce=found.append)
print(json.dumps(asdict(found[0]) | {"peak": peak_memory()}))  # ru_maxrss begins with that of whoever started the process
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], prog_name="onnxcomp")


def test_the_live_tensors_are_those_of_the_widest_cut():
    """Twelve samples of four numbers go in, eight hidden ones lie between the layers, both in float32."""
    subject = tiny.mlp()
    inputs = sum(array.nbytes for feed in subject.samples[:8] for array in feed.values())

    found = foresee(subject.model, subject.samples).forecast

    assert found is not None
    hidden = 4 * 8 * next(t.dims[-1] for t in subject.model.graph.initializer if len(t.dims) == 2)
    assert found.live_bytes == 2 * max(inputs, hidden)  # two batches, the second counted as if it were whole


@pytest.mark.parametrize("memory", [0, 10**9])
def test_what_exceeds_the_budget_is_foretold_to_lie_in_files(memory: int):
    found = foresee(tiny.mlp().model, tiny.mlp().samples, memory=memory).forecast

    assert found is not None
    assert found.disk_bytes == (0 if memory else found.live_bytes)


def test_in_a_folder_that_stays_two_cuts_lie_at_a_time(tmp_path: Path):
    found = foresee(tiny.mlp().model, tiny.mlp().samples, work=tmp_path).forecast

    assert found is not None
    assert found.disk_bytes == 2 * found.live_bytes
    assert not [*tmp_path.iterdir()]


def test_without_data_only_the_sites_are_shown():
    found = foresee(tiny.mlp().model)

    assert found.forecast is None
    assert [site.name for site in found.sites] == ["fc1", "fc2"]


@pytest.mark.parametrize(("bits", "samples"), [("w8a8", 16), ("w8a8", 128), ("w4a8", 64)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory a process holds")
def test_the_peak_of_memory_is_within_half_of_what_was_foretold(bits: str, samples: int):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", MEASURE, MODEL, DATA, bits, samples, 4 * 10**6]

    done = subprocess.run([*map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)

    found = json.loads(done.stdout)
    assert found["peak"] / MEMORY < found["memory_bytes"] < found["peak"] * MEMORY
    assert found["disk_bytes"] == max(found["live_bytes"] - 4 * 10**6, 0)


# --- on the command line ---------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path):
    output = tmp_path / "out.onnx"

    found = run("quantize", MODEL, "--data", DATA, "--dry-run", "--work", tmp_path / "work", "-o", output)

    assert (found.exit_code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["Site", "Bits", "Activations", "Kernel"]
    assert lines[1].split() == ["/stem/conv/Conv", "w8a8", "static", "QLinearConv"]
    assert re.fullmatch(LINE, lines[-1] + "\n")
    assert [*tmp_path.iterdir()] == []


def test_the_sites_of_a_dry_run_are_those_of_the_run():
    recipe = replace(NAMED["auto"], samples=16)

    plan, made = foresee(MODEL, DATA, recipe).sites, quantize(MODEL, DATA, recipe).report.sites

    assert [(s.name, s.bits, s.activations, s.kernel) for s in plan] == [
        (s.name, s.bits, s.activations, s.kernel) for s in made
    ]


def test_a_dry_run_as_json():
    found = json.loads(run("quantize", MODEL, "--data", DATA, "--samples", "16", "--dry-run", "--json").stdout)

    assert set(found["forecast"]) == {"live_bytes", "memory_bytes", "disk_bytes", "seconds"}
    assert found["sites"][0]["name"] == "/stem/conv/Conv"


def test_a_run_that_exceeds_its_memory_says_so_in_front(tmp_path: Path):
    told = run("quantize", MODEL, "--data", DATA, "--samples", "16", "--memory", "10kB", "-o", tmp_path / "a.onnx")
    quiet = run(
        "quantize", MODEL, "--data", DATA, "--samples", "16", "--memory", "1GB", "--threads", "1", "-o", tmp_path / "b.onnx"
    )

    assert re.fullmatch(LINE, told.stderr)
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_long_times_are_in_minutes():
    assert text.forecast(Forecast(10**9, 2 * 10**9, 0, 119)).startswith(
        "Foretold: 119 s, 2.00 GB of memory; 1.00 GB of activations, "
    )
    assert text.forecast(Forecast(0, 0, 0, 900)).startswith("Foretold: 15 minutes, ")


def test_steps_of_progress_name_their_site():
    calls = list[tuple[str, int, int]]()

    quantize(tiny.mlp().model, tiny.mlp().samples, progress=lambda *call: calls.append(call))

    assert [stage for stage, _, _ in calls if stage.startswith("quantizing /") or stage.endswith(("fc1", "fc2"))] == [
        "quantizing fc1",
        "quantizing fc2",
    ]


def test_the_number_of_threads_changes_no_byte(tmp_path: Path):
    outputs = [tmp_path / f"{count}.onnx" for count in (1, 3)]
    for count, output in zip((1, 3), outputs, strict=True):
        assert (
            run(
                "quantize", MODEL, "--data", DATA, "--samples", "16", "--bits", "w4a8", "--threads", count, "-o", output
            ).exit_code
            == 0
        )

    assert np.array_equal(*(np.frombuffer(output.read_bytes(), np.uint8) for output in outputs))


def test_reconstruction_is_foretold_to_take_twice_the_live_tensors_and_to_hold_some():
    pytest.importorskip("torch")
    subject = tiny.mlp()

    plain, refined = (
        foresee(subject.model, subject.samples, replace(NAMED["auto"], reconstruct=on)).forecast for on in (False, True)
    )

    assert plain is not None
    assert refined is not None
    assert refined.live_bytes == 2 * plain.live_bytes
    assert refined.memory_bytes > plain.memory_bytes
