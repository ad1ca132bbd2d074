"""What is exported: found by the user's description, and called with its inputs in their places."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.export.inputs import Feed, suggest

if TYPE_CHECKING:
    import torch

_UNFIT = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""What torch raises for a file or for inputs that it cannot use."""


@dataclass(frozen=True)
class Network:
    """A module or program with names for its inputs."""

    title: str
    source: torch.nn.Module | torch.export.ExportedProgram
    module: torch.nn.Module
    """Runs in torch; the source itself, unless that is a program."""
    names: tuple[str, ...]
    """The inputs' names in ONNX, in order."""
    keywords: tuple[str, ...]
    """The torch names of those inputs, the last ones, that are passed by keyword."""

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Values by input name, as positional and keyword arguments."""
        ordered = [values[name] for name in self.names]
        split = len(ordered) - len(self.keywords)
        return tuple(ordered[:split]), dict(zip(self.keywords, ordered[split:], strict=True))

    def run(self, feed: Feed) -> Any:
        """What torch returns for one feed. Raises ModelError where the module does not take it."""
        import torch

        positional, keyword = self.arguments({name: torch.from_numpy(value) for name, value in feed.items()})
        try:
            return self.module(*positional, **keyword)
        except _UNFIT as error:
            given = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feed.items())
            raise ModelError(f"{self.title} does not run in torch on {given}: {sentence(error)}") from error


def load(spec: str | Path | torch.nn.Module, names: tuple[str, ...]) -> Network:
    """The network that `spec` means. Raises UsageError or, for a file that cannot be read, ModelError."""
    import torch

    if isinstance(spec, torch.nn.Module):
        return _named(type(spec).__name__, spec, names)
    text = str(spec)
    if text.endswith(".pt2"):
        return _read_program(Path(spec), names)
    where, separator, factory = text.partition(":")
    if not separator or not factory.isidentifier() or not all(part.isidentifier() for part in where.split(".")):
        raise UsageError(f"'{text}' is neither PACKAGE.MODULE:FACTORY, such as nets.vit:tiny, nor a .pt2 file.")
    return _named(text, _make(text, where, factory), names)


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors that a module returned, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        raise ModelError(
            f"The module returns something of type {type(value).__name__}. It must return tensors, in tuples, lists or dicts."
        )
    return [leaf for part in value if part is not None for leaf in leaves(part)]


def sentence(error: BaseException) -> str:
    """The first paragraph of the message as one line."""
    paragraph = str(error).strip().split("\n\n")[0]
    return f"{' '.join(paragraph.split()).rstrip('.')}." if paragraph else f"{type(error).__name__}."


def _make(title: str, where: str, name: str) -> torch.nn.Module:
    import torch

    try:
        package = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{where}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{title}: there is no module '{error.name}'. Run from the folder that holds it, or install it."
            ) from error
        raise UsageError(f"{title}: '{where}' needs the module '{error.name}', which is not installed.") from error
    known = sorted(key for key in vars(package) if not key.startswith("_"))
    if name not in vars(package):
        raise UsageError(f"{title}: module '{where}' has no '{name}'.{suggest(name, known)}")
    factory = getattr(package, name)
    if isinstance(factory, torch.nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"{title}: '{name}' is of type {type(factory).__name__}, not a module or a function that makes one.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise UsageError(f"{title}: '{name}' is called without arguments, but is {sentence(error)}") from error
    torch.manual_seed(torch.initial_seed())  # importing the package may have drawn numbers already
    module = factory()
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{title}: '{name}' returned something of type {type(module).__name__}, not a torch.nn.Module.")
    return module


def _named(title: str, module: torch.nn.Module, names: tuple[str, ...]) -> Network:
    """Inputs are passed by keyword if all bear names of the module's parameters, else in order."""
    signature = inspect.signature(module.forward)
    keywords = names if all(name in signature.parameters for name in names) else ()
    try:
        signature.bind(*(() if keywords else names), **dict.fromkeys(keywords))
    except TypeError as error:
        raise UsageError(_misfit(title, "forward", tuple(signature.parameters), names)) from error
    return Network(title, module, module, names, keywords)


def _read_program(path: Path, names: tuple[str, ...]) -> Network:
    import torch

    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    try:
        program = torch.export.load(path)
    except (BadZipFile, KeyError, *_UNFIT) as error:
        raise ModelError(f"{path} cannot be read as a torch.export program.") from error
    wanted = tuple(str(name) for name in program.graph_signature.user_inputs)
    if len(names) != len(wanted):
        raise UsageError(_misfit(str(path), "the program", wanted, names))
    keywords = () if program.example_inputs is None else tuple(program.example_inputs[1])
    return Network(str(path), program, program.module(), wanted if set(names) == set(wanted) else names, keywords)


def _misfit(title: str, what: str, wanted: tuple[str, ...], names: tuple[str, ...]) -> str:
    return f"{title}: {what} takes ({', '.join(wanted)}), which the inputs ({', '.join(names)}) do not fit."
