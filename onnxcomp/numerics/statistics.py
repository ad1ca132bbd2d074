"""Statistics that are read off the data in one pass and added up with `merge`, whatever the order or the batches.

Each is a value: `of(x)` reads an array, and `a.merge(b)` describes the values of both. Merging is exact for Extremes and
Histogram, bit for bit. A histogram takes its values as float32. NaN and infinity raise DataError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.numerics.affine import NOT_FINITE

BINS = 1 << 15
"""The most bins of a histogram, at least 2, so that values on both sides of zero never share one."""
_FINEST = -126  # 2^126 is the largest power of two whose inverse is a normal float32
_WIDEST_INDEX = 24  # bits of a bin number: bins are not finer than the float32 spacing of the largest value


@dataclass(frozen=True, eq=False)
class Total:
    """Whatever `+` adds up or joins: an array of sums, a tuple of things to be kept."""

    values: Any

    def merge(self, other: Total) -> Total:
        return Total(self.values + other.values)


@dataclass(frozen=True)
class Extremes:
    """The smallest and the largest value; min > max where there was none."""

    min: float = math.inf
    max: float = -math.inf

    @staticmethod
    def of(x: NDArray[np.floating]) -> Extremes:
        if not x.size:
            return Extremes()
        low, high = float(x.min()) + 0.0, float(x.max()) + 0.0  # + 0.0: one sign of zero, whatever the order
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(NOT_FINITE)
        return Extremes(low, high)

    def merge(self, other: Extremes) -> Extremes:
        return Extremes(min(self.min, other.min), max(self.max, other.max))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int64 [bins] over equal bins whose width is a power of two, for data whose range is not known beforehand.

    Bin i covers [(first + i) 2^exponent, (first + i + 1) 2^exponent), so zero is always an edge. The first bin holds
    the smallest value and the last the largest; the exponent is the smallest, from -126 on, for which these are at most
    `BINS` bins and no bin number exceeds 2^24. All of it follows from the extremes alone, and since
    floor(floor(x / 2^k) / 2) = floor(x / 2^(k+1)) the histogram of a union is that of its parts with pairs of bins
    added up, bit for bit.
    """

    counts: NDArray[np.int64]
    first: int
    exponent: int
    extremes: Extremes

    @staticmethod
    def of(x: NDArray[np.floating]) -> Histogram:
        """The histogram of all values of x, without bins where there are none."""
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which Extremes refuses
            flat = np.asarray(x, np.float32).reshape(-1)
        extremes = Extremes.of(flat)
        if not flat.size:
            return Histogram(np.zeros(0, np.int64), 0, _FINEST, extremes)
        exponent, first, bins = _layout(extremes)
        # float32 products are exact up to exponent 0; beyond, a tiny negative value could vanish and leave bin -1
        kind = np.float32 if exponent <= 0 else np.float64
        places = np.floor(flat.astype(kind) * kind(2.0**-exponent)) - first
        return Histogram(np.bincount(places.astype(np.intp), minlength=bins), first, exponent, extremes)

    def merge(self, other: Histogram) -> Histogram:
        if not (self.counts.size and other.counts.size):
            return self if self.counts.size else other
        extremes = self.extremes.merge(other.extremes)
        exponent, first, bins = _layout(extremes)
        counts = np.zeros(bins, np.int64)
        for part in (self, other):
            added, start = part._coarsen(exponent)
            counts[start - first : start - first + added.size] += added
        return Histogram(counts, first, exponent, extremes)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of one bin, 2^exponent."""
        return 2.0**self.exponent

    def _coarsen(self, exponent: int) -> tuple[NDArray[np.int64], int]:
        """The counts and the first bin number at a width 2^exponent that is not finer."""
        counts, first = self.counts, self.first
        for _ in range(min(exponent - self.exponent, _WIDEST_INDEX + 1)):  # from there on every bin is -1 or 0
            counts = np.pad(counts, (first % 2, (first + counts.size) % 2))
            counts, first = counts[0::2] + counts[1::2], first // 2
        return counts, first


def subsample(x: NDArray, limit: int) -> NDArray:
    """At most `limit` values [m] of a sample, evenly spread: every stride-th in C order, a view where x is contiguous.

    The stride is the smallest one that fits and has no divisor in common with the number of values, so that no channel,
    token or pixel is left out in step with it.
    """
    stride = max(-(-x.size // limit), 1)
    while math.gcd(stride, x.size) > 1 and stride < x.size:
        stride += 1
    return x.reshape(-1)[::stride]


def _layout(extremes: Extremes) -> tuple[int, int, int]:
    """Exponent, first bin number and number of bins for data between the extremes."""
    largest = max(-extremes.min, extremes.max)
    exponent = max(math.frexp(largest)[1] - _WIDEST_INDEX, _FINEST) if largest else _FINEST
    while True:
        first, last = math.floor(math.ldexp(extremes.min, -exponent)), math.floor(math.ldexp(extremes.max, -exponent))
        if last - first < BINS:
            return exponent, first, last - first + 1
        exponent += 1
