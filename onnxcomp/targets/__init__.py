"""Targets: one file of settings per runtime, `ort-x86.toml` and so on, found by its name; the machinery is in the modules."""

import platform
from pathlib import Path
from typing import Any

from onnxcomp.errors import RecipeError, did_you_mean
from onnxcomp.targets import rules
from onnxcomp.targets.base import Encoding
from onnxcomp.targets.fallback import RULES
from onnxcomp.targets.target import Target
from onnxcomp.toml import tomllib

FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The names of every target."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def find(name: str) -> Target:
    """The target called `name`; `auto` is this machine's ONNX Runtime.

    Raises RecipeError with the nearest name for an unknown one.
    """
    if name == "auto":
        name = "ort-arm" if platform.machine().lower() in ("aarch64", "arm64") else f"ort-x86{_without_vnni()}"
    if name not in names():
        raise RecipeError(f"Unknown target '{name}'.{did_you_mean(name, ('auto', *names()), 'The targets are')}")
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    encoding, table = Encoding(**_frozen(table.pop("encoding", {}))), _frozen(table)
    judged = [getattr(rules, rule.replace("-", "_")) for rule in table.pop("rules")]
    return Target(name, encoding=encoding, rules=(*(RULES if table.get("kernels") == "onnxruntime" else ()), *judged), **table)


def _without_vnni() -> str:
    """`-avx2` where Linux lists what the CPU can do, and VNNI is not there."""
    known = Path("/proc/cpuinfo")
    flags = known.read_text(encoding="utf-8") if known.is_file() else "vnni"
    return "" if "vnni" in flags or "avx2" not in flags else "-avx2"


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
