"""Other tools in environments of their own: installed once, then asked for one file at a time (tools/peer_worker.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("peer_worker.py")
INSTALL_SECONDS, QUANTIZE_SECONDS = 1200, 900
CPU_TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Tool:
    """What to install, and what the versions of a row are read from."""

    packages: tuple[str, ...]
    shown: str
    python: str = ""
    """The version of Python that it needs, where this interpreter's is too new for it."""


TOOLS = {
    "ort": Tool(("onnxruntime", "onnx", "sympy"), "onnxruntime"),
    "nncf": Tool(("nncf", "onnx", "onnxruntime"), "nncf"),
    "onnxsim": Tool(("onnxsim", "onnx", "onnxruntime"), "onnxsim"),
    "inc": Tool(("onnx-neural-compressor", "onnx", "onnxruntime", "prettytable", "scipy"), "onnx-neural-compressor"),
    "modelopt": Tool((CPU_TORCH, "nvidia-modelopt[onnx]", "onnxruntime"), "nvidia-modelopt"),
    "aimet": Tool((CPU_TORCH, "aimet-onnx"), "aimet-onnx"),
    "quark": Tool((CPU_TORCH, "amd-quark", "onnxruntime", "onnx"), "amd-quark"),
}


class RefusedError(Exception):
    """A tool could not be installed, or did not make the file; the text is the reason in one sentence."""


def environment(name: str, folder: Path) -> Path:
    """The Python of a tool's environment, which is made where there is none. Raises RefusedError where it cannot be."""
    tool, home = TOOLS[name], folder / name
    python, log = home / "bin" / "python", folder / f"{name}.log"
    if not (home / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        base = shutil.which(f"python{tool.python}") if tool.python else sys.executable
        if base is None:
            raise RefusedError(f"it needs Python {tool.python}, which is not here.")
        for command in ([base, "-m", "venv", str(home)], [str(python), "-m", "pip", "install", "-q", *tool.packages]):
            _run(command, log, INSTALL_SECONDS)
        (home / "installed").touch()
    return python


def version(name: str, folder: Path) -> str:
    """The version of the tool that the environment holds."""
    code = f"import importlib.metadata as m; print(m.version({TOOLS[name].shown!r}))"
    return subprocess.run([str(folder / name / "bin" / "python"), "-c", code], capture_output=True, text=True).stdout.strip()


def save_feeds(feeds: Sequence[dict[str, np.ndarray]], path: Path) -> None:
    """The samples as the worker reads them."""
    np.savez(path, **{f"{i:05d}/{name}": array for i, feed in enumerate(feeds) for name, array in feed.items()})  # type: ignore[arg-type]


def ask(python: Path, name: str, setting: str, model: Path, feeds: Path, output: Path) -> None:
    """Let a tool make `output`. Raises RefusedError with its own last words."""
    partial = output.with_name(f"partial.{output.name}")
    command = [str(python), str(WORKER), name, setting, str(model.resolve()), str(feeds.resolve()), str(partial.resolve())]
    _run(command, output.with_suffix(".log"), QUANTIZE_SECONDS)
    if not partial.exists():
        raise RefusedError("it ended without an error and without a file.")
    partial.rename(output)


def _run(command: list[str], log: Path, seconds: int) -> None:
    """Run a command in a scratch folder's place, its output in `log`; raise RefusedError where it fails."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, cwd=log.parent, env=clean, check=False
            )
        except subprocess.TimeoutExpired:
            raise RefusedError(f"it was not done after {seconds} s.") from None
    if process.returncode:
        raise RefusedError(_reason(log.read_text(encoding="utf-8", errors="replace"), process.returncode))


def _reason(text: str, code: int) -> str:
    """The last error of a log in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Failure|Fail|InvalidArgument|InvalidGraph)\b", line)
    ]
    errors += [] if errors else [line for line in lines if line.lower().startswith("error")][:1]
    said = (errors or lines or [f"it ended with exit code {code}"])[-1]
    return re.sub(r"\s+", " ", said).replace("|", "/")[:200].rstrip(". ") + "."
