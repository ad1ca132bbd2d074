"""How the values of samples are distributed.

A `Histogram` is made of values taken as float32; NaN and infinity raise DataError. Histograms can be added up: bins are
laid out so that the sum is exactly the histogram of all values at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.numerics.affine import NOT_FINITE

BINS = 1 << 15
"""The most bins of a histogram, at least 2, so that values on both sides of zero never share one."""
_FINEST = -126  # 2^126 is the largest power of two whose inverse is a normal float32
_GOLDEN = 0.6180339887498949
"""The golden ratio less one: the fractions of its multiples, and of every n-th of them, fill [0, 1) evenly."""
_UNSEEN = 1e-9
"""Of the weight of the heaviest bin: what counts for less is rounding."""
_WIDEST_INDEX = 24  # bits of a bin number: bins are not finer than the float32 spacing of the largest value


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int64 [bins] over equal bins whose width is a power of two.

    Bin i covers [(first + i) 2^exponent, (first + i + 1) 2^exponent), so zero is always an edge. The first bin holds
    the smallest value and the last the largest; the exponent is the smallest, from -126 on, for which these are at most
    `BINS` bins and no bin number exceeds 2^24.
    """

    counts: NDArray[np.int64] | NDArray[np.float64]
    first: int
    width: float
    """Of one bin, 2^exponent."""
    low: float
    high: float
    """The smallest and the largest value."""

    @staticmethod
    def of(x: NDArray[np.floating], name: str = "") -> Histogram:
        """The histogram of all values of x, without bins where there are none; errors are about `name`."""
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which is refused
            flat = np.asarray(x, np.float32).reshape(-1)
        if not flat.size:
            return Histogram(np.zeros(0, np.int64), 0, 2.0**_FINEST, 0.0, 0.0)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(f"{name}: {NOT_FINITE}" if name else NOT_FINITE)
        exponent, first, bins = _layout(low, high)
        # float32 products are exact up to exponent 0; beyond, a tiny negative value could vanish and leave bin -1
        kind = np.float32 if exponent <= 0 else np.float64
        places = np.floor(flat.astype(kind) * kind(2.0**-exponent)) - first
        return Histogram(np.bincount(places.astype(np.intp), minlength=bins), first, 2.0**exponent, low, high)

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of the values of both."""
        parts = [h for h in (self, other) if h.counts.size]
        if len(parts) < 2:
            return parts[0] if parts else self
        low, high = min(h.low for h in parts), max(h.high for h in parts)
        exponent, first, bins = _layout(low, high)
        counts = np.zeros(bins, np.int64)
        for h in parts:
            shift = exponent - math.frexp(h.width)[1] + 1
            if shift:
                np.add.at(counts, ((h.first + np.arange(h.counts.size)) >> shift) - first, h.counts)
            else:
                counts[h.first - first :][: h.counts.size] += h.counts
        return Histogram(counts, first, 2.0**exponent, low, high)

    def weighted(self, function: Callable[[NDArray], NDArray]) -> Histogram:
        """The same bins, each counting by the square of the function's slope there: what becomes of an error of a value. Ends
        where nothing counts are left out; the histogram itself where nothing counts at all.
        """
        if not self.counts.size:
            return self
        edges = (self.first + np.arange(self.counts.size + 1)) * self.width
        slope = np.diff(function(edges.astype(np.float32)).astype(np.float64)) / self.width
        counts = self.counts * np.square(slope)
        there = np.flatnonzero(counts > _UNSEEN * counts.max())
        if not there.size:
            return self
        start, stop = int(there[0]), int(there[-1]) + 1
        low, high = max(self.low, edges[start]), min(self.high, edges[stop])
        return Histogram(counts[start:stop], self.first + start, self.width, float(low), float(high))


@dataclass(frozen=True, eq=False)
class Highest:
    """The largest value at every place of arrays of one shape."""

    values: NDArray

    def __add__(self, other: Highest) -> Highest:
        return Highest(np.maximum(self.values, other.values))


def spread(count: int, limit: int, number: int = 0) -> slice:
    """At least `limit` of the `count` places of sample `number`, if there are so many, evenly spread: every stride-th.

    The stride is the largest without a divisor in common with the count, so that no channel, token or pixel is left out in
    step with it. The first place goes evenly from 0 to stride - 1 over the samples, and over every n-th of them: what lies at
    the same few places in each, as the massive activations of a vision transformer do, would else be seen always or never.
    """
    stride = max(count // limit, 1)
    while math.gcd(stride, count) > 1 and stride > 1:
        stride -= 1
    return slice(int(number * _GOLDEN % 1.0 * stride), None, stride)


def subsample(x: NDArray, limit: int, number: int = 0) -> NDArray:
    """At least `limit` values [m], or all, of sample `number`, by `spread`, in C order; a view where x is contiguous."""
    return x.reshape(-1)[spread(x.size, limit, number)]


def _layout(low: float, high: float) -> tuple[int, int, int]:
    """Exponent, first bin number and number of bins for data from `low` to `high`."""
    largest = max(-low, high)
    exponent = max(math.frexp(largest)[1] - _WIDEST_INDEX, _FINEST) if largest else _FINEST
    while True:
        first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
        if last - first < BINS:
            return exponent, first, last - first + 1
        exponent += 1
