"""Targets: one file of settings per runtime, `ort-x86.toml` and so on, found by its name; the machinery is in the modules."""

import platform
from pathlib import Path
from typing import Any

from onnxcomp import runtime
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


def here() -> str:
    """The name of the target that is this machine's ONNX Runtime."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "ort-arm"
    return "ort-x86-avx2" if runtime.saturates() else "ort-x86"


def find(name: str) -> Target:
    """The target called `name`; `auto` is that of `here`.

    Raises RecipeError with the nearest name for an unknown one.
    """
    name = here() if name == "auto" else name
    if name not in names():
        raise RecipeError(f"Unknown target '{name}'.{did_you_mean(name, ('auto', *names()), 'The targets are')}")
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    encoding, table = Encoding(**_frozen(table.pop("encoding", {}))), _frozen(table)
    judged = [getattr(rules, rule.replace("-", "_")) for rule in table.pop("rules")]
    return Target(name, encoding=encoding, rules=(*(RULES if table.get("kernels") == "onnxruntime" else ()), *judged), **table)


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
