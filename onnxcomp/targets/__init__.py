"""Targets: one module per runtime, found by its name (`ort-x86` is `ort_x86.py`)."""

import importlib
import pkgutil

from onnxcomp.errors import RecipeError, did_you_mean
from onnxcomp.targets.target import Target

SHARED = ("audit", "base", "fallback", "lowering", "regions", "rules", "settle", "target")
"""Modules that targets share; they are no targets themselves."""


def names() -> tuple[str, ...]:
    """The names of every target."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(name.replace("_", "-") for name in found if name not in SHARED)


def find(name: str) -> Target:
    """The target called `name`; `auto` is this machine's ONNX Runtime.

    Raises RecipeError with the nearest name for an unknown one.
    """
    if name == "auto":
        name = "ort-x86"
    if name not in names():
        raise RecipeError(f"Unknown target '{name}'.{did_you_mean(name, ('auto', *names()), 'The targets are')}")
    return importlib.import_module(f"onnxcomp.targets.{name.replace('-', '_')}").TARGET
