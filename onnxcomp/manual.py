"""The manual pages of the methods: a method's module docstring is its page, its fields are its options.

Limits: fields are documented by the string under them, which only the source has; without the source there is no help.
"""

import inspect
import re
from dataclasses import dataclass, fields, is_dataclass

from onnxcomp.methods import base

_DOCUMENTED = re.compile(r'^    (\w+): [^\n]*\n    """(.*?)"""', re.DOTALL | re.MULTILINE)
"""A field on a line of its own, and the string under it."""


@dataclass(frozen=True)
class Option:
    """One field of a method, which is also its TOML key."""

    name: str
    default: str
    help: str


@dataclass(frozen=True)
class Page:
    """What there is to know about a method."""

    name: str
    summary: str
    """The first line of the text."""
    text: str
    options: tuple[Option, ...]


def pages() -> tuple[Page, ...]:
    """Every method's page, in alphabetical order."""
    return tuple(page(name) for name in base.names())


def page(name: str) -> Page:
    """The page of the method called `name`.

    Raises RecipeError for an unknown one.
    """
    kind = base.find(name)
    text = inspect.cleandoc(inspect.getdoc(inspect.getmodule(kind)) or "")
    helps = _field_docstrings(kind)
    options = tuple(Option(f.name, repr(f.default), helps.get(f.name, "")) for f in fields(kind))
    return Page(name, text.partition("\n")[0], text, options)


def _field_docstrings(kind: type) -> dict[str, str]:
    """The strings that stand under the fields, of the bases too."""
    found: dict[str, str] = {}
    for owner in [one for one in reversed(kind.__mro__) if is_dataclass(one)]:
        for name, text in _DOCUMENTED.findall(inspect.getsource(owner)):
            found[name] = " ".join(text.split())
    return found
