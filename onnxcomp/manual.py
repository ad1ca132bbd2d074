"""The manual pages of the methods: a method's module docstring is its page, its fields are its options.

Limits: fields are documented by the string under them, which only the source has; without the source there is no help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass

from onnxcomp.methods import base


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
    options = tuple(Option(f.name, repr(f.default), helps.get(f.name, "")) for f in dataclasses.fields(kind))
    return Page(name, text.partition("\n")[0], text, options)


def _field_docstrings(kind: type) -> dict[str, str]:
    """The strings that stand under the fields, of the bases too."""
    found: dict[str, str] = {}
    for owner in [one for one in reversed(kind.__mro__) if dataclasses.is_dataclass(one)]:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for pair in itertools.pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
