"""The contract of a target: what may be quantized on it, where quantizers stand, and how they are written down.

A target plans *points* (activation quantizers on named tensors) around the chosen sites, and in the end lowers the
abstract quantizers of the compressed graph to the operators its runtime runs fastest.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from onnxcomp.graph.edit import Graph
from onnxcomp.graph.sites import Site
from onnxcomp.numerics.affine import Scheme


@dataclass(frozen=True)
class Settings:
    """What the recipe asks of one site."""

    weight_bits: int
    activation_bits: int
    activations: str
    """`auto`, `static`, `dynamic`, `token` or `float`."""
    ranges: str
    percentile: float
    symmetric: bool
    rounding: str = "nearest"
    """How weights are rounded: `nearest` or `gptq`."""


@dataclass(frozen=True)
class Point:
    """One activation quantizer: on `tensor`, for the named consumers, or for everyone where `consumers` is None."""

    tensor: str
    scheme: Scheme
    granularity: str
    """`static`, `dynamic` (per tensor at run time), `token` (last axis, at run time), or `auto`: static or token."""
    ranges: str
    percentile: float
    consumers: tuple[str, ...] | None = None
    highest: float = float("inf")
    """The upper bound of the Clip in front, which the codes must not exceed if they are to replace it."""
    same_as: str | None = None
    """A tensor quantized earlier whose scale and zero point this one shares, because its values are the same."""


@dataclass(frozen=True)
class Plan:
    """What will be quantized: the sites in graph order, joins included, and the points each tensor gets."""

    sites: tuple[Site, ...]
    settings: Mapping[str, Settings]
    """By site name; layers and products only."""
    points: tuple[Point, ...]
    """In the order in which they are to be fitted on a tensor."""
    heads: Mapping[str, Site | None] = field(default_factory=dict)
    """The nodes in front of which the walk stops: every site, and the first reader of every stored tensor."""


class Target(ABC):
    """One runtime's rules."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, graph: Graph, sites: Sequence[Site], settings: Mapping[str, Settings]) -> Plan:
        """Place the quantizers around `sites` in the float `graph`, which is only read."""

    @abstractmethod
    def requirements(self, plan: Plan) -> tuple[str, ...]:
        """What the file needs where it runs, one sentence each."""

    @abstractmethod
    def lower(self, graph: Graph) -> Graph:
        """Write the abstract quantizers of `graph` as standard operators. Changes `graph` and returns it."""

    @abstractmethod
    def settle(self, graph: Graph) -> None:
        """Bring what stands around the products of a lowered `graph` into the form that keeps them integer kernels.
        Doing it twice changes nothing: it is done again where operators were taken out.
        """
