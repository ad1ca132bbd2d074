"""The errors a user can meet, one kind per documented exit code.

The command line prints `Kind: text` on one line and leaves with the kind's exit code. The text says what is wrong, where,
and what to do. A bug of ours is an AssertionError, never one of these.
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, get_type_hints


class OnnxcompError(Exception):
    """Base of every error that is about the user's input, not about our code."""

    exit_code: ClassVar[int] = 1


class UsageError(OnnxcompError):
    """An option or argument cannot be understood or contradicts another."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a value of the wrong kind, or a pattern that matches nothing."""


class ModelError(OnnxcompError):
    """The model cannot be read, prepared or written."""

    exit_code = 3


class UnsupportedSite(ModelError):  # noqa: N818 (its name is what users read)
    """One site cannot be quantized as asked."""


class DataError(OnnxcompError):
    """Calibration or evaluation data do not fit the model."""

    exit_code = 4


class VerificationError(OnnxcompError):
    """The finished file failed its proof and was not written."""

    exit_code = 5


class BoundError(OnnxcompError):
    """The result is slower or less accurate than the bound that was asked for."""

    exit_code = 6


class ResourceError(OnnxcompError):
    """The machine has no room left for what a run must keep, or a cluster is lost."""

    exit_code = 7


def check_types(settings: Any, where: str = "") -> None:
    """Raise RecipeError where a field of the frozen dataclass `settings` is not of its type."""
    for key in _types(type(settings)):
        convert(type(settings), key, getattr(settings, key), where)


def convert(owner: type, key: str, value: Any, where: str = "") -> Any:
    """The value of a field of the dataclass `owner`, a list being a tuple. Raises RecipeError where it is not of its type."""
    from pydantic import ValidationError  # not for --help

    try:
        return _types(owner)[key].validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        reasons = " or: ".join(dict.fromkeys(one["msg"].replace("tuple", "list") for one in error.errors()))
        raise RecipeError(f"{where}{key} = {value!r} is not understood. {reasons}.") from None


@cache
def _types(owner: Any) -> dict[str, Any]:
    """What checks each field."""
    from pydantic import TypeAdapter

    hints = get_type_hints(owner, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(owner)}


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error about an unknown name: the known name that is closest, else all of them, called `otherwise`."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" {otherwise}: {', '.join(known)}." if otherwise and known else ""
