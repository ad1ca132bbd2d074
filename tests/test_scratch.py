"""Temporary folders: what a killed process has left is removed by the next one, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from onnxcomp import scratch

MAKE = """
import os
from onnxcomp import scratch
with scratch.folder() as folder:
    (folder / "weight").write_bytes(bytes(9))
    print(folder, flush=True)
    """
"""A program whose next line runs while it has a folder."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all temporary files, of this process and of others."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_block(place: Path):
    with scratch.folder() as folder:
        assert folder.parent == place
        assert [path.name for path in folder.iterdir()] == [scratch.LOCK]

    assert [*place.iterdir()] == []


def test_what_a_killed_process_has_left_goes_with_the_next_one(place: Path):
    killed = subprocess.run([sys.executable, "-c", f"{MAKE}os.kill(os.getpid(), 9)"], stdout=subprocess.PIPE, check=False)
    left = sorted(path.name for path in Path(killed.stdout.decode().strip()).iterdir())

    with scratch.folder() as folder:
        found = [*place.iterdir()]

    assert killed.returncode == -9
    assert left == [scratch.LOCK, "weight"]
    assert found == [folder]


def test_what_a_live_process_works_on_stays(place: Path):
    with subprocess.Popen([sys.executable, "-c", f"{MAKE}input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as live:
        assert live.stdout is not None
        kept = Path(live.stdout.readline().decode().strip())
        with scratch.folder():
            found = sorted(path.name for path in kept.iterdir())
        live.communicate(b"\n")

    assert found == [scratch.LOCK, "weight"]
    assert [*place.iterdir()] == []


def test_what_has_no_lock_is_not_ours_to_remove(place: Path):
    (place / f"{scratch.NAME}other").mkdir()
    (place / "lock").touch()

    with scratch.folder():
        pass

    assert sorted(path.name for path in place.iterdir()) == ["lock", f"{scratch.NAME}other"]
