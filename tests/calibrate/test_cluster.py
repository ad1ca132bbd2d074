"""Samples on the workers of a Dask cluster: the same bytes as here, also where workers die, and what travels."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner

from onnxcomp import cli, runtime
from onnxcomp.calibrate import cluster
from onnxcomp.calibrate.cluster import connect
from onnxcomp.errors import ResourceError, UsageError
from onnxcomp.methods import reconstruction
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import NAMED, Bits, Recipe

distributed = pytest.importorskip("distributed")
ROOT = Path(__file__).resolve().parents[2]
W4 = replace(NAMED["best"], bits=Bits(4, 4))
SUBJECTS = {name: tiny.models()[name] for name in ("transformer", "residual")}
SAMPLES = 5
"""Times the samples of a tiny model: 60 samples, 8 batches."""
Progress = Callable[[str, int, int], None]


def made(name: str, recipe: Recipe, where: str | None, work: Path | None = None, progress: Progress = runtime.ignore) -> bytes:
    subject = SUBJECTS[name]
    found = quantize(subject.model, subject.samples * SAMPLES, recipe, cluster=where, work=work, progress=progress)
    return found.model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module", params=[1, 2, 4])
def workers(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The address of a cluster of so many workers."""
    with distributed.LocalCluster(request.param, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as found:
        yield found


@pytest.fixture
def two() -> Iterator[Any]:
    """A cluster that may be broken."""
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as found:
        yield found


@pytest.mark.parametrize("recipe", [W4, NAMED["auto"]], ids=["best", "auto"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_bytes_are_those_of_a_run_without_a_cluster(name: str, recipe: Recipe, workers: Any):
    assert made(name, recipe, workers.scheduler_address) == made(name, recipe, None)


def test_reconstruction_gives_the_bytes_of_a_run_without_a_cluster(two: Any, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(reconstruction, "STEPS", 60)
    monkeypatch.setattr(reconstruction, "THREADS", 1)
    recipe = replace(NAMED["auto"], bits=Bits(4, 4), samples=64, reconstruct=True)
    files = ROOT / "models" / "cnn_digits.onnx", ROOT / "models" / "digits_calib.npz"

    here, there = (quantize(*files, recipe, cluster=where) for where in (None, two.scheduler_address))

    assert any(d.method == "reconstruction" and d.adopted for d in here.report.decisions)
    assert there.model.SerializeToString(deterministic=True) == here.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("done", [2, 6])
def test_a_worker_that_is_killed_changes_nothing(two: Any, done: int):
    killed = []

    def kill(stage: str, at: int, _: int) -> None:
        if stage.startswith("quantizing") and at == done:
            with distributed.Client(two) as client:
                killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[-1], signal.SIGKILL)

    assert made("transformer", W4, two.scheduler_address, progress=kill) == made("transformer", W4, None)
    assert len(killed) == 1


def test_where_the_cluster_is_lost_what_is_finished_is_kept_and_goes_on_without_one(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cluster, "SECONDS", 5)

    def lose(stage: str, at: int, _: int) -> None:
        if stage.startswith("quantizing") and at == 5:
            two.close()

    with pytest.raises(ResourceError) as caught:
        made("transformer", W4, two.scheduler_address, tmp_path, lose)

    start, end = f"The cluster {two.scheduler_address} cannot go on: ", ". With --work, what is finished is kept."
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(end)
    assert len([*tmp_path.rglob("*.step")]) == 5
    assert made("transformer", W4, None, tmp_path) == made("transformer", W4, None)


def test_a_run_that_was_stopped_here_goes_on_in_a_cluster(tmp_path: Path, two: Any):
    class StopError(Exception):
        pass

    def stop(stage: str, at: int, _: int) -> None:
        if stage.startswith("quantizing") and at == 5:
            raise StopError

    with pytest.raises(StopError):
        made("transformer", W4, None, tmp_path, stop)

    assert made("transformer", W4, two.scheduler_address, tmp_path) == made("transformer", W4, None)


def test_what_travels_is_counted(two: Any):
    found = quantize(SUBJECTS["transformer"].model, SUBJECTS["transformer"].samples, W4, cluster=two.scheduler_address)

    names = [name for name, _, _ in found.traffic if name]
    assert names == [name for name in names if name in {site.name for site in found.report.sites}]
    samples = sum(array.nbytes for feed in SUBJECTS["transformer"].samples for array in feed.values())
    assert found.traffic[0][1] > samples
    assert all(sent > 0 for name, sent, _ in found.traffic if name)
    assert sum(moved for _, _, moved in found.traffic) > 0


# --- on the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_says_what_has_travelled(tmp_path: Path):
    model, data = ROOT / "models" / "vit_digits.onnx", ROOT / "models" / "digits_calib.npz"
    code = "from onnxcomp.cli import main; main(prog_name='onnxcomp')"
    options = ("--data", data, "--samples", "24", "--cluster", "local:2", "--threads", "1", "-o", tmp_path / "out.onnx")
    command = [sys.executable, "-c", code, "quantize", model, *options]

    brief, every = (
        subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, check=True)
        for more in ([], ["--all", "--force"])
    )

    total = r"Cluster: [\d.]+ [kM]B sent from here, [\d.]+ [kM]B by workers to one another and home\.\n"
    assert re.fullmatch(total, brief.stderr)
    head, *rows = every.stderr.splitlines()
    assert head.split() == ["Step", "Sent", "By", "workers"]
    assert any(row.startswith("/blocks/0/") or "MatMul" in row for row in rows)
    assert re.fullmatch(total, rows[-1] + "\n")


@pytest.mark.parametrize("where", ["here", "local:0", "local:two", "tcp://", "127.0.0.1:8786"])
def test_an_address_that_is_not_understood_is_one_line(where: str):
    model, data = ROOT / "models" / "vit_digits.onnx", ROOT / "models" / "digits_calib.npz"

    found = CliRunner().invoke(
        cli.main, ["quantize", str(model), "--data", str(data), "--cluster", where, "-o", "/tmp/gone.onnx"]
    )

    text = f"UsageError: Cluster '{where}' is not understood. Write tcp://HOST:PORT, or local:N for N processes here.\n"
    assert (found.exit_code, found.stderr) == (2, text)


def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "SECONDS", 0.5)

    with pytest.raises(ResourceError, match=r"^The cluster tcp://127\.0\.0\.1:1 cannot go on: .+ what is finished is kept\.$"):
        made("transformer", W4, "tcp://127.0.0.1:1")


def test_other_versions_on_a_worker_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "__version__", "0.0.0")

    with pytest.raises(UsageError) as caught, connect("local:1"):
        pass

    text = (
        rf"Worker tcp://\S+ has onnxcomp \S+ and onnxruntime {runtime.version()}, and here is onnxcomp 0\.0\.0 and onnxruntime "
    )
    assert re.fullmatch(text + rf"{runtime.version()}\. Install the same everywhere\.", str(caught.value))


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(UsageError) as caught, connect("local:1"):
        pass

    assert str(caught.value) == "--cluster needs Dask. Install it with pip install 'onnxcomp[cluster]'."
