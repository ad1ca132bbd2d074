"""What is exported, and its inputs, found by the user's descriptions.

pixel_values=1x3x224x224   input_ids=1x16:int64         sizes, and a type other than float32
batch                      input_ids:1=sequence         axes that vary: the first of every input, or a certain one
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from onnxcomp.errors import ModelError, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

TYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
_INPUT = re.compile(r"(?P<name>[^=:,\s]+)=(?P<shape>[1-9]\d*(x[1-9]\d*)*)(:(?P<dtype>\w+))?")
_AXIS = re.compile(r"(?P<input>[^=:,\s]+):(?P<axis>\d+)=(?P<dimension>[^\W\d]\w*)")
_UNFIT = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""What torch raises for a file or for inputs that it cannot use."""


@dataclass(frozen=True)
class Input:
    """One input, its shape an example where axes vary."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: dict[int, str] = field(default_factory=dict)
    """The name of each axis that varies."""


@dataclass(frozen=True)
class Network:
    """A module or program, and how it is called."""

    title: str
    source: torch.nn.Module | torch.export.ExportedProgram
    module: torch.nn.Module
    """Runs in torch; the source itself, unless that is a program."""
    inputs: tuple[Input, ...]
    """In the order of the call."""
    keywords: tuple[str, ...]
    """The torch names of those inputs, the last ones, that are passed by keyword."""

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Values by input name, as positional and keyword arguments."""
        ordered = tuple(values.values())
        split = len(ordered) - len(self.keywords)
        return ordered[:split], dict(zip(self.keywords, ordered[split:], strict=True))

    def run(self, feed: Mapping[str, torch.Tensor]) -> Any:
        """What torch returns. Raises ModelError where the module does not take the feed."""
        positional, keyword = self.arguments(feed)
        try:
            return self.module(*positional, **keyword)
        except _UNFIT as error:
            given = ", ".join(f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for name, x in feed.items())
            raise ModelError(f"{self.title} does not run in torch on {given}: {sentence(error)}") from error


def read_inputs(inputs: Sequence[str], dynamic: Sequence[str]) -> tuple[Input, ...]:
    """The inputs with their varying axes. Raises UsageError for a text that cannot be understood."""
    found: dict[str, Input] = {}
    for text in inputs:
        match = _INPUT.fullmatch(text)
        if match is None:
            raise UsageError(
                f"Input '{text}' cannot be understood. Write NAME=SIZExSIZE or NAME=SIZExSIZE:TYPE, for example "
                "pixel_values=1x3x224x224 or input_ids=1x16:int64."
            )
        name, dtype = match["name"], match["dtype"] or "float32"
        if dtype not in TYPES:
            raise UsageError(f"Input '{text}': unknown type '{dtype}'. Types are {', '.join(TYPES)}.")
        if name in found:
            raise UsageError(f"Input '{name}' is given twice.")
        found[name] = Input(name, tuple(map(int, match["shape"].split("x"))), np.dtype(dtype))
    for item in ",".join(dynamic).split(",") if dynamic else ():
        if item.isidentifier():
            for described in found.values():
                described.axes[0] = item
            continue
        match = _AXIS.fullmatch(item)
        if match is None:
            raise UsageError(
                f"Dynamic axis '{item}' cannot be understood. Write a name for the first axis of every input, such as "
                "batch, or INPUT:AXIS=NAME, such as input_ids:1=sequence."
            )
        name, axis = match["input"], int(match["axis"])
        if name not in found:
            raise UsageError(f"Dynamic axis '{item}': there is no input '{name}'.{did_you_mean(name, found, 'There are')}")
        if axis >= len(found[name].shape):
            raise UsageError(f"Dynamic axis '{item}': the axes of '{name}' end at {len(found[name].shape) - 1}.")
        found[name].axes[axis] = match["dimension"]
    return tuple(found.values())


def draw(inputs: Sequence[Input], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Standard normal floats; integers and truth values 0 or 1, which fits ids, types and masks alike."""
    import torch

    drawn = [rng.standard_normal(i.shape) if i.dtype.kind == "f" else rng.integers(0, 2, i.shape) for i in inputs]
    return {i.name: torch.from_numpy(values.astype(i.dtype)) for i, values in zip(inputs, drawn, strict=True)}


def load(spec: str | Path | torch.nn.Module, inputs: tuple[Input, ...]) -> Network:
    """What `spec` means. Inputs are passed by keyword if all bear names of the module's parameters, else in order."""
    import torch

    if isinstance(spec, torch.nn.Module):
        title, module = type(spec).__name__, spec
    elif str(spec).endswith(".pt2"):
        return _load_program(Path(spec), inputs)
    else:
        title, module = str(spec), _make(str(spec))
    signature = inspect.signature(module.forward)
    names = tuple(i.name for i in inputs)
    keywords = names if all(name in signature.parameters for name in names) else ()
    try:
        signature.bind(*(() if keywords else names), **dict.fromkeys(keywords))
    except TypeError as error:
        raise UsageError(_misfit(f"{title}: forward", signature.parameters, names)) from error
    return Network(title, module, module, inputs, keywords)


def _load_program(path: Path, inputs: tuple[Input, ...]) -> Network:
    import torch

    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    try:
        program = torch.export.load(path)
    except (BadZipFile, KeyError, *_UNFIT) as error:
        raise ModelError(f"{path} cannot be read as a torch.export program.") from error
    by_name = {i.name: i for i in inputs}
    wanted = [str(name) for name in program.graph_signature.user_inputs]
    if len(inputs) != len(wanted):
        raise UsageError(_misfit(f"{path}: the program", wanted, by_name))
    if any(i.axes for i in inputs):
        text = f"{path}: the dynamic axes of a .pt2 file are those it was saved with."
        raise UsageError(f"{text} Set dynamic_shapes in torch.export.export instead.")
    ordered = tuple(by_name[name] for name in wanted) if set(wanted) == set(by_name) else inputs
    keywords = () if program.example_inputs is None else tuple(program.example_inputs[1])
    return Network(str(path), program, program.module(), ordered, keywords)


def _misfit(what: str, wanted: Iterable[str], names: Iterable[str]) -> str:
    return f"{what} takes ({', '.join(wanted)}), which the inputs ({', '.join(names)}) do not fit."


def _make(spec: str) -> torch.nn.Module:
    """The module that `package.module:factory` is or returns."""
    import torch

    where, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*where.split("."), name)):
        raise UsageError(f"'{spec}' is neither PACKAGE.MODULE:FACTORY, such as nets.vit:tiny, nor a .pt2 file.")
    try:
        package = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if f"{where}.".startswith(f"{error.name}."):
            advice = "Run from the folder that holds it, or install it."
            raise UsageError(f"{spec}: there is no module '{error.name}'. {advice}") from error
        raise UsageError(f"{spec}: '{where}' needs the module '{error.name}', which is not installed.") from error
    if name not in vars(package):
        known = sorted(key for key in vars(package) if not key.startswith("_"))
        raise UsageError(f"{spec}: module '{where}' has no '{name}'.{did_you_mean(name, known, 'There are')}")
    made = getattr(package, name)
    if isinstance(made, torch.nn.Module):
        return made
    if not callable(made):
        raise UsageError(f"{spec}: '{name}' is of type {type(made).__name__}, not a module or a function that makes one.")
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise UsageError(f"{spec}: '{name}' is called without arguments, but is {sentence(error)}") from error
    torch.manual_seed(torch.initial_seed())  # importing the package may have drawn numbers already
    module = made()
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{spec}: '{name}' returned something of type {type(module).__name__}, not a torch.nn.Module.")
    return module


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors that a module returned, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        text = f"The module returns something of type {type(value).__name__}."
        raise ModelError(f"{text} It must return tensors, in tuples, lists or dicts.")
    return [leaf for part in value if part is not None for leaf in leaves(part)]


def sentence(error: BaseException) -> str:
    """The first paragraph of the message as one line."""
    paragraph = str(error).strip().split("\n\n")[0]
    return f"{' '.join(paragraph.split()).rstrip('.')}." if paragraph else f"{type(error).__name__}."
