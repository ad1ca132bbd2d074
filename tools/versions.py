"""Files run by other versions of ONNX Runtime: which fail, which agree with the installed one, which lose integer kernels.

    python tools/versions.py FILE... --float MODEL [--feeds samples.npz] [--versions 1.22,1.24,newest] [--cache FOLDER]

Every version has an environment in the cache folder, made with pip when it is first asked for; delete it to renew `newest`.
Feeds are the arrays of the .npz named like the inputs (their first eight rows), else made up. Float operators differ by a
rounding from version to version, and a value at a threshold then falls the other way; so a version agrees where

    |y - y_installed|^2 <= max(|y_installed - y_float|^2, 1e-4 |y_float|^2)

the law of the proof. Integer kernels are counted in the model as each version executes it. Exit code 1 if any file fails,
differs or loses kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.graph import files
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.targets.audit import INTEGER_KERNELS
from onnxcomp.verify import FLOOR, made_up_feed

VERSIONS = ("1.22", "1.24", "newest")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxcomp"
CHILD = Path(__file__).with_name("run_once.py")
ROWS = 8
Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Found:
    """What one version makes of one file; `error` is empty where it runs, and then the rest is known."""

    version: str
    file: Path
    error: str = ""
    sqnr: float = 0.0
    agrees: bool = False
    kernels: int = 0
    installed: int = 0

    def __str__(self) -> str:
        if self.error:
            return f"{self.version:8} {self.file.name:32} fails: {self.error}"
        lost = f", of {self.installed} of the installed version" if self.kernels != self.installed else ""
        agreement = f"{'agrees' if self.agrees else 'DIFFERS'}, {self.sqnr:.1f} dB"
        return f"{self.version:8} {self.file.name:32} {agreement}, {self.kernels} integer kernels{lost}"


def interpreter(version: str, cache: Path) -> Path:
    """The Python of the environment that holds this version, made if need be. Raises CalledProcessError if pip fails."""
    folder = cache / f"ort-{version}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "done"
    if not done.exists():
        wanted = "onnxruntime" if version == "newest" else f"onnxruntime=={version}{'.*' if version.count('.') == 1 else ''}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted, "numpy"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        done.touch()
    return python


def compare(paths: Sequence[Path], model: Path, feed: Feed, versions: Sequence[str], cache: Path = CACHE) -> Iterator[Found]:
    """Every file, made from the float `model`, in every version, against the installed one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.savez(folder / "feed.npz", **feed)
        jobs = [[str(path.resolve()), str(folder / "feed.npz"), str(i)] for i, path in enumerate(paths)]
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        exact = runtime.Session(model, threads=1).run(feed)
        want = [runtime.Session(path, threads=1).run(feed) for path in paths]
        kernels = [_integer(runtime.optimized(path)) for path in paths]
        for version in versions:
            out = folder / version
            out.mkdir()
            command = [str(interpreter(version, cache)), str(CHILD), str(folder / "jobs.json"), str(out)]
            environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            for index, path in enumerate(paths):
                yield _found(done.stdout.split()[-1], path, out / str(index), (want[index], exact), kernels[index])


def _found(version: str, path: Path, stem: Path, wanted: tuple[Feed, Feed], installed: int) -> Found:
    """What is left at `stem`; `wanted` is what the installed version made of the file, and of the float model."""
    want, exact = wanted
    error = stem.with_suffix(".txt")
    if error.exists():
        return Found(version, path, error.read_text(encoding="utf-8"))
    with np.load(stem.with_suffix(".npz")) as archive:
        pairs = {name: energies(want[name], archive[name]) for name in want}
    errors = {name: energies(exact[name], want[name]) for name in want}
    agrees = all(pairs[name][1] <= max(errors[name][1], FLOOR * errors[name][0]) for name in want)
    kernels = _integer(files.read_nodes(stem.with_suffix(".onnx")))
    return Found(version, path, "", min(sqnr_db(*pair) for pair in pairs.values()), bool(agrees), kernels, installed)


def _integer(nodes: Sequence[files.NodeProto]) -> int:
    return sum(node.op_type in INTEGER_KERNELS for node in nodes)


def feed_of(path: Path, samples: Path | None) -> Feed:
    """The first rows of the arrays that are named like the inputs; made-up values without samples."""
    session = runtime.Session(path)
    if samples is None:
        return made_up_feed(session)
    with np.load(samples) as archive:
        return {name: archive[name][:ROWS].astype(kind.dtype) for name, kind in session.inputs}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--float", dest="model", type=Path, required=True)
    parser.add_argument("--feeds", type=Path)
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    feed, good = feed_of(options.model, options.feeds), True
    for found in compare(options.files, options.model, feed, options.versions.split(","), options.cache):
        print(found, flush=True)
        good = good and found.agrees and found.kernels >= found.installed
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
