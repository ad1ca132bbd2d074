"""Recipes: what to quantize and how, as frozen data that round-trips through TOML.

Keys are strict: an unknown one is an error with the nearest known key. Named recipes are the constants at the end.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxcomp.data import Preprocess
from onnxcomp.errors import RecipeError, UsageError
from onnxcomp.methods import base as methods
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.nbc import NonlinearBipolarCompensation
from onnxcomp.methods.noisyquant import NoisyQuant
from onnxcomp.methods.xint import XInt
from onnxcomp.numerics.ranges import METHODS as RANGES

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ACTIVATIONS = ("auto", "static", "dynamic", "token", "float")
"""Activation ranges: static or per token, whichever suits the site; fixed at calibration; per tensor at run time; per token
at run time; or not quantized."""


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations, written `w4a8`."""

    weights: int = 8
    activations: int = 8

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read `w4a8`.

        Raises RecipeError for anything else, or a width outside 2..8.
        """
        found = re.fullmatch(r"w([2-8])a([2-8])", text.strip().lower())
        if found is None:
            raise RecipeError(f"bits = '{text}' is not understood. Write wXaY with X and Y from 2 to 8, such as w4a8.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


@dataclass(frozen=True)
class SiteRule:
    """Settings for the sites that `where` matches; what is None is inherited. The last matching rule wins."""

    where: str
    bits: Bits | None = None
    ranges: str | None = None
    activations: str | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        _check_choices(self.ranges, self.activations)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the model and the data."""

    name: str = "auto"
    description: str = ""
    bits: Bits = Bits()
    ranges: str = "mse"
    """How static activation ranges are chosen: minmax, percentile or mse."""
    percentile: float = 99.99
    activations: str = "auto"
    symmetric: bool = False
    """Symmetric activations (zero point in the middle) instead of asymmetric ones."""
    rounding: str = "auto"
    """How weights are rounded: nearest, gptq, or auto: gptq below 8 bits where there are data."""
    products: bool = False
    """Quantize MatMuls of two activations too."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 128
    """Calibration samples at most; 0 calibrates nothing, even where data are given."""
    seed: int = 0
    target: str = "auto"
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
        _check_choices(self.ranges, self.activations)
        if self.rounding not in ("auto", "nearest", "gptq"):
            raise RecipeError(f"rounding = '{self.rounding}' is unknown. Use one of: auto, nearest, gptq.")
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"percentile = {self.percentile} is outside (50, 100].")
        for name in ("samples", "seed"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} = {getattr(self, name)} is negative.")


def find(name_or_path: str | Path) -> Recipe:
    """A named recipe, or one read from a TOML file.

    Raises RecipeError for an unknown name or a file that cannot be read.
    """
    text = str(name_or_path)
    if text in NAMED:
        return NAMED[text]
    path = Path(text)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(text, NAMED, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"The named ones are: {', '.join(NAMED)}."
        raise RecipeError(f"Unknown recipe '{text}'. {hint} A file's name ends in .toml.")
    try:
        return loads(path.read_text(encoding="utf-8"), where=text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{text}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def loads(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from TOML. `where`, the file's path, stands at the head of error texts; a recipe without a name is
    called by its stem.

    Raises RecipeError for bad TOML, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}.") from None
    table = dict(table)
    compensate = table.pop("compensate", None)
    rules = table.pop("site", [])
    preprocess = table.pop("preprocess", None)
    values = _fields(Recipe, table, where)
    if compensate is not None:
        tables = _tables(compensate, where, "compensate")
        values["compensate"] = tuple(_method(t, f"{where} in [[compensate]] #{i}") for i, t in enumerate(tables, 1))
    rule_tables = _tables(rules, where, "site")
    values["site"] = tuple(_rule(t, f"{where} in [[site]] #{i}") for i, t in enumerate(rule_tables, 1))
    if preprocess is not None and not isinstance(preprocess, dict):
        raise RecipeError(f"{where}: 'preprocess' must be a table, written [preprocess].")
    values.setdefault("name", Path(where).stem)
    with _located(where):
        if preprocess is not None:
            values["preprocess"] = Preprocess.from_table(preprocess)
        return Recipe(**values)  # pyright: ignore[reportArgumentType]


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out; `loads` gives back an equal recipe."""
    lines = [f"{f.name} = {_toml(getattr(recipe, f.name))}" for f in _plain_fields(Recipe)]
    if not recipe.compensate:
        lines.append("compensate = []")
    if recipe.preprocess is not None:
        lines += ["", "[preprocess]"]
        lines += [f"{k} = {_toml(v)}" for k, v in recipe.preprocess.to_table().items()]
    for method in recipe.compensate:
        lines += ["", "[[compensate]]", f'method = "{method_name(method)}"']
        lines += [f"{f.name} = {_toml(getattr(method, f.name))}" for f in dataclasses.fields(method)]
    for rule in recipe.site:
        values = [(f.name, getattr(rule, f.name)) for f in dataclasses.fields(rule)]
        lines += ["", "[[site]]"] + [f"{key} = {_toml(value)}" for key, value in values if value is not None]
    return "\n".join(lines) + "\n"


def method_name(method: Compensation) -> str:
    """A method's name: its module's."""
    return type(method).__module__.rpartition(".")[2]


def parse_compensate(text: str) -> tuple[Compensation, ...] | None:
    """Read `--compensate`: None for `auto`, () for `none`, else the named methods with default options, in order.

    Raises RecipeError for an unknown method.
    """
    if text == "auto":
        return None
    if text == "none":
        return ()
    return tuple(methods.find(name.strip())() for name in text.split(","))


def _plain_fields(kind: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(kind) if f.name not in ("preprocess", "site", "compensate")]


def _fields(kind: type, table: Mapping[str, object], where: str) -> dict[str, object]:
    known = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, object] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"The keys are: {', '.join(known)}."
            raise RecipeError(f"{where}: unknown key '{key}'. {hint}")
        values[key] = _value(known[key], value, where)
    return values


def _value(field: dataclasses.Field, value: object, where: str) -> object:
    kind = str(field.type).removesuffix(" | None")
    if kind == "Bits" and isinstance(value, str):
        with _located(where):
            return Bits.parse(value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    expected = {"str": str, "int": int, "float": float, "bool": bool}.get(kind)
    if expected is None or type(value) is not expected:
        described = {"Bits": 'a string such as "w8a8"', "tuple[str, ...]": "a list of strings"}
        wanted = described.get(kind, f"of type {kind}")
        raise RecipeError(f"{where}: {field.name} = {value!r} must be {wanted}.")
    return value


def _method(table: Mapping[str, object], where: str) -> Compensation:
    table = dict(table)
    name = table.pop("method", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where}: the key 'method' is missing. The methods are: {', '.join(methods.names())}.")
    with _located(where):
        kind = methods.find(name)
    values = _fields(kind, table, where)
    with _located(where):
        return kind(**values)  # pyright: ignore[reportArgumentType]


def _rule(table: Mapping[str, object], where: str) -> SiteRule:
    if not isinstance(table.get("where"), str):
        raise RecipeError(f"{where}: the key 'where' is missing. It names the sites the rule is for.")
    values = _fields(SiteRule, table, where)
    with _located(where):
        return SiteRule(**values)  # pyright: ignore[reportArgumentType]


def _tables(value: object, where: str, key: str) -> list[Mapping[str, object]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise RecipeError(f"{where}: '{key}' must be a list of tables, written [[{key}]].")
    return value


def _check_choices(ranges: str | None, activations: str | None) -> None:
    if ranges is not None and ranges not in RANGES:
        raise RecipeError(f"ranges = '{ranges}' is unknown. Use one of: {', '.join(RANGES)}.")
    if activations is not None and activations not in ACTIVATIONS:
        raise RecipeError(f"activations = '{activations}' is unknown. Use one of: {', '.join(ACTIVATIONS)}.")


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put `where` at the head of the errors of values that do not know where they were written."""
    try:
        yield
    except UsageError as error:
        raise RecipeError(f"{where}: {error}") from None


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in text) + '"'


def _published(name: str, description: str, method: Compensation) -> Recipe:
    """One method alone, as its paper has it, on static MSE ranges and weights rounded to nearest."""
    return Recipe(name, description, activations="static", rounding="nearest", compensate=(method,))


_XINT = XInt(weight_terms=2, activation_terms=2, keep="always")
_ALL = (NoisyQuant(), XInt(budget=1.1), BiasCompensation(), NonlinearBipolarCompensation())
_RECIPES = (
    Recipe("auto", "What fits model and machine: MSE ranges, GPTQ below 8 bits, bias compensation, gated."),
    Recipe("base", "Static MSE ranges alone: nothing is compensated.", activations="static", rounding="nearest", compensate=()),
    _published(
        "bc",
        "Bias Compensation (arXiv:2404.01892), kept everywhere as the paper does.",
        BiasCompensation(keep="always", trim=0.0),
    ),
    _published(
        "nbc",
        "Nonlinear Bipolar Compensation (arXiv:2605.16423) of every block.",
        NonlinearBipolarCompensation(keep="always"),
    ),
    _published(
        "noisyquant",
        "NoisyQuant (arXiv:2211.16056): uniform noise in front of every static quantizer.",
        NoisyQuant(mode="uniform", keep="always"),
    ),
    Recipe(
        "xint",
        "FP=xINT (arXiv:2412.06865): two 4-bit terms of weights and of activations, with no data.",
        bits=Bits(4, 4),
        activations="token",
        samples=0,
        compensate=(_XINT,),
    ),
    Recipe("best", "Everything there is, each where held-out samples gain enough for its price.", compensate=_ALL),
)
NAMED: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
"""The named recipes."""
