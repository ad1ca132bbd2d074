"""The contract of a method: what it reads, what it fits, how it is written into the graph, and when it is kept.

A method is a frozen dataclass in a module of its own; its fields are its options (= TOML keys = help text) and its
module's name is its name. It reads samples only through `samples.reduce`, never touches a graph, and returns an edit.
It is fitted to a place: a quantized tensor (`Input`), one operator (`Site`), or a stretch of the model (`Block`).
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np

from onnxcomp.errors import RecipeError, check_types
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.numerics.affine import QParams

Array = np.ndarray
_OTHERS = ("base", "activations", "equalization", "moments", "reconstruction", "rotation", "sensitivity", "twin", "weights")
"""Modules of this package that are no methods of a recipe."""
HOLD_OUT = 4
"""Every fourth sample is held out."""
Fit = Mapping[str, Array]
"""Arrays by name; they become initializers `{site}/{method}.{key}`."""


class Batch(Protocol):
    """What a method sees of a few samples. x, f_x, g_x: the site's input, its float and its compressed output in the
    float model; xh, f_xh, g_xh: the same fed with what the compressed model really computes there.
    """

    indices: tuple[int, ...]
    """The samples' numbers."""

    def read(self, name: str) -> list[Array]:
        """One array per sample (or one for the whole batch where samples cannot be told apart) of a named read."""
        ...


S = TypeVar("S")
"""A statistic, which is whatever `+` adds up or joins: an array of sums, a tuple of things to be kept, a class of its own."""


class Samples(Protocol):
    """The calibration samples of one site. The only way to look at them is to reduce them to a statistic."""

    @property
    def count(self) -> int:
        """How many samples there are."""
        ...

    def reduce(self, fn: Callable[[Batch], S]) -> S:
        """Map every batch with `fn` and add up the results, in sample order."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What fitting gave: the arrays, or None with the reason why the method is declined here."""

    fit: Fit | None
    reason: str
    gain_db: float | None = None
    """Fall of the site's output error on held-out samples, in dB."""
    before_db: float | None = None
    """SQNR of the site's output before the method, in dB."""
    after_db: float | None = None


@dataclass(frozen=True)
class Input:
    """One activation quantizer that layers read, and the layers: where a method may change what is quantized."""

    x: str
    """The tensor in front of the quantizer."""
    q: QParams | None
    """The static quantizer; None where the range is measured at run time."""
    sites: tuple[Site, ...]
    weights: tuple[Array, ...]
    """The float weight of each site."""

    @property
    def name(self) -> str:
        """The name of the first layer."""
        return self.sites[0].name


@dataclass(frozen=True)
class Compensation(ABC):
    """Fitted on what the compressed model computes, adopted when held-out samples agree."""

    where: str = "*"
    """Which sites or blocks: a glob over names, `re:` and a regular expression, or `op:` and an operator type."""
    keep: Literal["if-better", "always"] = "if-better"
    """`if-better`: adopted where held-out samples improve; `always`: adopted everywhere, as a paper does."""

    scope: ClassVar[str] = "layer"
    """Where it is fitted: `input`, `terms` (a site, before its bias), `layer`, `block` or `output` (the whole model)."""

    def __post_init__(self) -> None:
        check_types(self)

    @abstractmethod
    def fit(self, place: Any, samples: Samples) -> Outcome:
        """Fit the method to one place, of the kind that its scope says. Numbers only: no graph."""

    @abstractmethod
    def build(self, op: Tape, place: Any, fit: Fit) -> dict[str, str]:
        """Record the nodes that apply the fit; return {old value: new value}. Graph only: no data."""


class InputMethod(Compensation):
    """A compensation that changes what is quantized, and takes out exactly what it added behind every layer."""

    scope: ClassVar[str] = "input"

    @abstractmethod
    def quantizer(self, fit: Fit, q: QParams) -> QParams:
        """What quantizes the changed input, given what quantized it before."""

    @abstractmethod
    def correction(self, fit: Fit, weight: Array, site: Site) -> Array:
        """What to add to the site's output [C_out], given its rounded weight."""


def least_gain_db(bits: int, at_four: float, enough: float) -> float:
    """By how much a change that costs time must lower the squared error of an input of so many bits: with every bit more than
    four by four times as much, since a quarter of the error is left, up to what is `enough` at any width.
    """
    return min(at_four * 4.0 ** (bits - 4), enough)


def is_held_out(number: Any) -> Any:
    """Whether a sample is held out, for its number or for an array of numbers: every fourth one is."""
    return number % HOLD_OUT == HOLD_OUT - 1


def per_channel(place: Site | Block, values: Array) -> Array:
    """Values [C], in the shape in which they are added to the place's tensors: behind a Conv [C, 1, ..]."""
    return values if place.channel_axis == -1 else values.reshape(-1, *[1] * (place.rank - 2))


def add_bias(op: Tape, place: Site | Block, b: Array) -> dict[str, str]:
    """Record the Add of b [C_out] behind `place`; return {old value: new value}."""
    return {place.y: op("Add", place.y, op.constant("b", per_channel(place, b.astype(np.float32))))}


def names() -> tuple[str, ...]:
    """The names of every method, in alphabetical order: the modules beside this one that define METHOD."""
    package = importlib.import_module("onnxcomp.methods")
    found = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    return tuple(name for name in found if name not in _OTHERS)


def find(name: str) -> type[Compensation]:
    """The method called `name`.

    Raises RecipeError with the methods there are for an unknown one.
    """
    if name not in names():
        raise RecipeError(f"Unknown method '{name}'. The methods are: {', '.join(names())}.")
    return importlib.import_module(f"onnxcomp.methods.{name}").METHOD
