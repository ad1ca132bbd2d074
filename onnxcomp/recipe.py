"""Recipes: what to quantize and how, as frozen data that round-trips through TOML.

Keys are strict: an unknown one is an error with the nearest known key. The named recipes are the files in `recipes/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from onnxcomp.data import Preprocess
from onnxcomp.errors import RecipeError, UsageError, check_types, convert, did_you_mean
from onnxcomp.methods import base as methods
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.toml import tomllib

Ranges = Literal["mse", "percentile", "minmax"]
Activations = Literal["auto", "static", "dynamic", "token", "float"]
"""Activation ranges: static or per token, whichever suits the site; fixed at calibration; per tensor at run time; per token
at run time; or not quantized."""
Block = Literal["auto", 0, 16, 32, 64, 128]
"""How many inputs of an output channel share a scale; 0: all; auto: 32, or the fewest from there on that the target takes, of
weights of 4 bits or fewer."""
Rounding = Literal["auto", "nearest", "gptq"]


@dataclass(frozen=True)
class Bits:
    """Widths of weights, 2 to 8 bits, and of activations, 2 to 8 or 16, written `w4a8`; `w4` leaves activations float."""

    weights: int = 8
    activations: int | None = 8

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read `w4a8` or `w4`.

        Raises RecipeError for anything else, or another width.
        """
        found = re.fullmatch(r"w([2-8])(?:a([2-8]|16))?", text.strip().lower())
        if found is None:
            raise RecipeError(f"bits = '{text}' is not understood. Write wXaY, X and Y from 2 to 8 (or Y 16), such as w4a8.")
        return cls(int(found[1]), int(found[2]) if found[2] else None)

    def __str__(self) -> str:
        return f"w{self.weights}" if self.activations is None else f"w{self.weights}a{self.activations}"


@dataclass(frozen=True)
class SiteRule:
    """Settings for the sites that `where` matches; what is None is inherited. The last matching rule wins."""

    where: str
    bits: Bits | None = None
    ranges: Ranges | None = None
    activations: Activations | None = None
    symmetric: bool | None = None
    block: Block | None = None
    zero_points: bool | None = None
    rounding: Rounding | None = None
    mixed: bool | None = None
    """Whether the channels of its input are mixed, where `rotation` is auto."""
    methods: tuple[str, ...] | None = None
    """The methods on layers that are kept here, of those that the recipe lists; others are not fitted."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.methods or ():
            methods.find(name)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the model and the data."""

    name: str = "auto"
    description: str = ""
    bits: Bits = Bits()
    ranges: Ranges = "mse"
    """How static activation ranges are chosen."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    activations: Activations = "auto"
    symmetric: bool = False
    """Symmetric activations (zero point in the middle) instead of asymmetric ones."""
    rounding: Rounding = "auto"
    """How weights are rounded; auto: gptq below 8 bits where there are data."""
    rotation: Literal["auto", "folded", "none"] = "auto"
    """Mix channels by orthogonal matrices first; folded: only what costs nothing at run time."""
    block: Block = "auto"
    """Weights of MatMul and Gemm with a scale per so many inputs, beside float activations; 0: one per output channel."""
    zero_points: bool = False
    """Asymmetric weights: a zero point per block too."""
    embeddings: Literal["auto"] | bool = "auto"
    """Quantize the tables that Gather reads rows of too; auto: the larger ones, to 8 bits, where the target takes them."""
    sensitive: Literal["auto", "asked"] = "auto"
    """The bits of the few layers that the outputs lose most by: 8, and of tensors 16 where those are taken; or as asked."""
    equalization: Literal["auto", "none"] = "auto"
    """Scale and mix the channels between layers first, where that costs nothing at run time."""
    moments: Literal["auto", "none"] = "auto"
    """Give every channel of a CNN whose activations have fewer than 8 bits back its mean and its spread."""
    reconstruct: bool = False
    """Refine codes, ranges and biases of every stretch of the model on its float output; needs torch, and minutes."""
    products: bool = False
    """Quantize MatMuls of two activations too."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: NonNegativeInt = 128
    """Calibration samples at most; 0 calibrates nothing, even where data are given."""
    seed: NonNegativeInt = 0
    target: str = "auto"
    half: Literal["auto"] | bool = "auto"
    """Everything but codes in float16, on targets that take it; auto: where the model given is."""
    preprocess: Preprocess | None = None
    site: tuple[SiteRule, ...] = ()
    compensate: tuple[Compensation, ...] = (BiasCompensation(),)

    def __post_init__(self) -> None:
        # In a notebook `Recipe(bits="w4a8", exclude="/head/*")` is what one types first.
        if isinstance(self.bits, str):
            object.__setattr__(self, "bits", Bits.parse(self.bits))
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        check_types(self)


def find(name_or_path: str | Path) -> Recipe:
    """A named recipe, or one read from a TOML file.

    Raises RecipeError for an unknown name or a file that cannot be read.
    """
    text = str(name_or_path)
    if text in NAMED:
        return NAMED[text]
    path = Path(text)
    if path.suffix != ".toml" and not path.is_file():
        hint = did_you_mean(text, NAMED, "The named ones are")
        raise RecipeError(f"Unknown recipe '{text}'.{hint} A file's name ends in .toml.")
    try:
        return loads(path.read_text(encoding="utf-8"), where=text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{text}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def loads(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from TOML. `where`, the file's path, stands at the head of error texts; a recipe without a name is
    called by its stem.

    Raises RecipeError for bad TOML, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    with _located(where):
        return _read(Recipe, {"name": Path(where).stem} | tomllib.loads(text))


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out; `loads` gives back an equal recipe."""
    keys = {key: value for key, value in vars(recipe).items() if key not in ("preprocess", "site", "compensate")}
    tables = [("", keys if recipe.compensate else keys | {"compensate": []})]
    if recipe.preprocess is not None:
        tables.append(("\n[preprocess]\n", recipe.preprocess.to_table()))
    tables += [("\n[[compensate]]\n", {"method": method_name(method)} | vars(method)) for method in recipe.compensate]
    tables += [("\n[[site]]\n", vars(rule)) for rule in recipe.site]
    return "".join(head + "".join(f"{k} = {_toml(v)}\n" for k, v in table.items() if v is not None) for head, table in tables)


def method_name(method: Compensation) -> str:
    """A method's name: its module's."""
    return type(method).__module__.rpartition(".")[2]


def parse_compensate(text: str) -> tuple[Compensation, ...] | None:
    """Read `--compensate`: None for `auto`, () for `none`, else the named methods with default options, in order.

    Raises RecipeError for an unknown method.
    """
    names = [] if text == "none" else text.split(",")
    return None if text == "auto" else tuple(methods.find(name.strip())() for name in names)


def _read(kind: Any, table: Mapping[str, Any]) -> Any:
    """The frozen dataclass whose fields the keys of `table` name; what is no value of a field's type is refused."""
    known = [field.name for field in fields(kind)]
    for key in table:
        if key not in known:
            raise RecipeError(f"unknown key '{key}'.{did_you_mean(key, known, 'The keys are')}")
    return kind(**{key: _value(kind, key, value) for key, value in table.items()})


def _value(kind: Any, key: str, value: Any) -> Any:
    """The value of the key, which must be of the type of that field of `kind`."""
    if key in ("site", "compensate"):
        if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
            raise RecipeError(f"'{key}' must be a list of tables, written [[{key}]].")
        return tuple(_numbered(key, number, table) for number, table in enumerate(value, 1))
    if key == "bits":
        return Bits.parse(str(value))
    if key == "preprocess" and isinstance(value, dict):
        return Preprocess.from_table(value)
    return convert(kind, key, value)


def _numbered(key: str, number: int, table: Mapping[str, Any]) -> SiteRule | Compensation:
    """What one of the tables [[site]] or [[compensate]] says."""
    with _located(f"[[{key}]] #{number}"):
        if key == "site":
            if "where" not in table:
                raise RecipeError("the key 'where' is missing. It names the sites the rule is for.")
            return _read(SiteRule, table)
        if "method" not in table:
            raise RecipeError(f"the key 'method' is missing. The methods are: {', '.join(methods.names())}.")
        return _read(methods.find(table["method"]), {k: v for k, v in table.items() if k != "method"})


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put `where` at the head of the errors of what does not know where it was written."""
    try:
        yield
    except UsageError as error:
        raise RecipeError(f"{where}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}.") from None


def _toml(value: object) -> str:
    """The value as TOML: as JSON has it, but for infinite floats and for DEL, which must be escaped."""
    written = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return written.replace("\x7f", r"\u007f")


NAMED: dict[str, Recipe] = {
    name: loads((Path(__file__).parent / "recipes" / f"{name}.toml").read_text(encoding="utf-8"), where=name)
    for name in ("auto", "base", "bc", "nbc", "noisyquant", "xint", "best")
}
"""The named recipes, in the order in which they are listed."""
