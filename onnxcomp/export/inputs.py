"""The inputs as the user describes them, and random values for them.

pixel_values=1x3x224x224   input_ids=1x16:int64         sizes, and a type other than float32
batch                      input_ids:1=sequence         axes that vary: the first of every input, or a certain one
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.errors import UsageError

TYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
_INPUT = re.compile(r"(?P<name>[^=:,\s]+)=(?P<shape>[1-9]\d*(x[1-9]\d*)*)(:(?P<dtype>\w+))?")
_AXIS = re.compile(r"(?P<input>[^=:,\s]+):(?P<axis>\d+)=(?P<dimension>[^\W\d]\w*)")

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Input:
    """One input, its shape an example where axes vary."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Mapping[int, str]
    """The name of each axis that varies."""

    def traced(self) -> Input:
        """The input to trace with: torch takes a size of 1 for a fixed one, so an axis that varies has at least 2."""
        return replace(self, shape=tuple(max(s, 2) if axis in self.axes else s for axis, s in enumerate(self.shape)))


def read_inputs(inputs: Sequence[str], dynamic: Sequence[str]) -> tuple[Input, ...]:
    """The inputs with their varying axes. Raises UsageError for a text that cannot be understood."""
    found: dict[str, Input] = {}
    for text in inputs:
        described = _read_input(text)
        if described.name in found:
            raise UsageError(f"Input '{described.name}' is given twice.")
        found[described.name] = described
    for item in (item for text in dynamic for item in text.split(",")):
        for name, axis, dimension in _read_axes(item, found):
            found[name] = replace(found[name], axes={**found[name].axes, axis: dimension})
    return tuple(found.values())


def draw(inputs: Sequence[Input], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Standard normal floats; integers and truth values 0 or 1, which fits ids, types and masks alike."""
    return {
        i.name: (rng.standard_normal(i.shape) if i.dtype.kind == "f" else rng.integers(0, 2, i.shape)).astype(i.dtype)
        for i in inputs
    }


def suggest(name: str, known: Sequence[str]) -> str:
    """A hint at the name that may have been meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(known)}." if known else ""


def _read_input(text: str) -> Input:
    match = _INPUT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"Input '{text}' cannot be understood. Write NAME=SIZExSIZE or NAME=SIZExSIZE:TYPE, for example "
            "pixel_values=1x3x224x224 or input_ids=1x16:int64."
        )
    dtype = match["dtype"] or "float32"
    if dtype not in TYPES:
        raise UsageError(f"Input '{text}': unknown type '{dtype}'. Types are {', '.join(TYPES)}.")
    return Input(match["name"], tuple(map(int, match["shape"].split("x"))), np.dtype(dtype), {})


def _read_axes(item: str, inputs: Mapping[str, Input]) -> list[tuple[str, int, str]]:
    """Input, axis and name of the dimension, for each axis that `item` speaks of."""
    if item.isidentifier():
        return [(name, 0, item) for name in inputs]
    match = _AXIS.fullmatch(item)
    if match is None:
        raise UsageError(
            f"Dynamic axis '{item}' cannot be understood. Write a name for the first axis of every input, such as "
            "batch, or INPUT:AXIS=NAME, such as input_ids:1=sequence."
        )
    name, axis = match["input"], int(match["axis"])
    if name not in inputs:
        raise UsageError(f"Dynamic axis '{item}': there is no input '{name}'.{suggest(name, list(inputs))}")
    if axis >= len(inputs[name].shape):
        raise UsageError(f"Dynamic axis '{item}': the axes of '{name}' end at {len(inputs[name].shape) - 1}.")
    return [(name, axis, match["dimension"])]
