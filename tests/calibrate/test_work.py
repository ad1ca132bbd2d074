"""A run that is stopped, by whatever, goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from onnxcomp import account, targets
from onnxcomp.calibrate.room import AGAIN, Room
from onnxcomp.calibrate.work import Work
from onnxcomp.errors import ResourceError, UsageError
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import NAMED, Bits, Recipe

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = tiny.models()["transformer"]
W4 = replace(NAMED["best"], bits=Bits(4, 4))
KILLS = 10
CODE = "from onnxcomp.cli import main; main(prog_name='onnxcomp')"


def made(recipe: Recipe = W4, work: Path | None = None, progress: Callable[[str, int, int], None] = lambda *_: None) -> bytes:
    found = quantize(SUBJECT.model, SUBJECT.samples, recipe, work=work, progress=progress)
    return found.model.SerializeToString(deterministic=True)


def steps(work: Path) -> list[Path]:
    return sorted(work.rglob("*.step"))


def command(*arguments: object) -> list[str]:
    model, data = ROOT / "models" / "vit_digits.onnx", ROOT / "models" / "digits_calib.npz"
    options = ("--data", data, "--recipe", "best", "--bits", "w4a4", "--samples", "32", *arguments)
    return [sys.executable, "-c", CODE, "quantize", str(model), *map(str, options)]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen[str], work: Path, count: int) -> None:
    """Until so many steps are finished, or the process is."""
    while process.poll() is None and len(steps(work)) < count:
        time.sleep(0.005)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path):
    whole, output, work, rng = tmp_path / "whole.onnx", tmp_path / "out.onnx", tmp_path / "work", np.random.default_rng()
    subprocess.run(command("-o", whole), cwd=ROOT, check=True, capture_output=True)
    reached = []

    for _ in range(KILLS):
        process = start("--work", work, "-o", output)
        wait_for_steps(process, work, len(steps(work)) + int(rng.integers(3)))
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        reached.append(len(steps(work)))
    subprocess.run(command("--work", work, "-o", output), cwd=ROOT, check=True, capture_output=True)

    assert reached == sorted(reached)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interrupt_leaves_with_130_says_how_to_go_on_and_leaves_nothing_half_written(tmp_path: Path):
    output, work = tmp_path / "out.onnx", tmp_path / "work"
    process = start("--work", work, "-o", output)
    wait_for_steps(process, work, 4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130
    assert errors == f"Interrupted. Start it again, with --work {work}, and it goes on.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert not [*work.rglob("*.new")]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interrupt_of_a_run_that_keeps_nothing_says_so_and_leaves_no_temporary_file(tmp_path: Path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    options = ("--memory", "0MB", "-o", tmp_path / "out.onnx")
    process = subprocess.Popen(command(*options), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not [*tmp_path.glob("onnxcomp-*/*.npy")]:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors.splitlines()[-1]) == (130, "Interrupted. Nothing is kept; --work DIR would.")
    assert [*tmp_path.glob("onnxcomp-*")] == []


# --- stopped by an error ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(ResourceError) as caught:
            made(work=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    before = {path: path.stat().st_mtime_ns for path in steps(tmp_path)}

    assert str(caught.value) == f"{next(tmp_path.iterdir())} cannot hold the samples' activations: file too large. {AGAIN}"
    assert AGAIN == "Make room there and start again: what is finished is kept."
    assert len(before) > 3
    assert made(work=tmp_path) == made()
    assert before.items() <= {path: path.stat().st_mtime_ns for path in steps(tmp_path)}.items()


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()

    with pytest.raises(ResourceError, match=r"/file/\w{16} cannot hold the samples' activations: not a directory\."):
        made(work=tmp_path / "file")


def test_two_runs_do_not_share_a_folder(tmp_path: Path):
    with Room(folder=tmp_path), pytest.raises(UsageError) as caught:
        Room(folder=tmp_path)

    assert str(caught.value) == f"{tmp_path} is in use by another run. Wait for it, or give another folder."


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [W4, replace(NAMED["best"], bits=Bits(4, 8)), NAMED["auto"]])
def test_what_is_finished_is_not_done_again(recipe: Recipe, tmp_path: Path):
    first = made(recipe, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}

    assert made(recipe, tmp_path) == first == made(recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_only_the_tensors_of_the_last_cut_stay(tmp_path: Path):
    class StopError(Exception):
        pass

    def stop(stage: str, done: int, _: int) -> None:
        if stage.startswith("quantizing") and done == 4:
            raise StopError

    with pytest.raises(StopError):
        made(work=tmp_path, progress=stop)
    (folder,) = tmp_path.iterdir()
    (folder / "9999.npy").touch()  # as a run leaves that is killed while it writes
    with Room(folder=folder) as room:
        live = Work(room).live or []

    assert len(steps(tmp_path)) == 4
    assert {path.name for path in folder.glob("*.npy")} == {
        p.name for _, files in live for p in files.values() if isinstance(p, Path)
    }


def test_another_recipe_model_or_data_starts_anew():
    target = targets.find("auto")

    def key(recipe: Recipe = W4) -> str:
        return account.fingerprint(SUBJECT.model, SUBJECT.model, None, recipe, target)

    assert len({key(), key(recipe=NAMED["auto"]), key(recipe=replace(W4, samples=7))}) == 3
    assert key() == key()
