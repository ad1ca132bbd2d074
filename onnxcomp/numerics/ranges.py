"""From a histogram to the range of a quantizer: exact extremes, percentiles, or least squared error.

For levels v_q = (q - zero_point) scale with thresholds t_q = (v_{q-1} + v_q) / 2, the squared error of N values is

    sum (x - v(x))^2 = sum x^2 - 2 v_max sum x + N v_max^2 + 2 scale sum_q G(t_q),     G(t) = sum_{x < t} (x - t),

because v(x) is v_max less one scale for every threshold above x. G comes from prefix sums over the bins, with the
values of a bin spread evenly over it, so a candidate costs 2^bits look-ups, whatever the number of values; clipping is
included.
Limit: detail finer than a bin, 2^-14 to 2^-15 of the range of the data, is not seen. So at 16 bits the extremes are taken.
"""

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.numerics.affine import SMALLEST_SCALE, Codes, QParams, Scheme, from_range
from onnxcomp.numerics.statistics import Histogram

_TAILS = np.array([1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2])
_SHRINK = np.geomspace(1.0, 1.0 / 32, 12)
# Reach of the scale, and of an 8-bit zero point in halves, round by round
_ROUNDS = ((0.15, 16), (0.06, 8), (0.025, 4), (0.01, 2), (0.004, 1))
_NEAR = np.array([0, -2, -1, 1, 2, -3, 3])  # the present best first: it stays where nothing is better


def choose(h: Histogram, scheme: Scheme, method: str = "mse", percentile: float = 99.99) -> QParams:
    """The per-tensor parameters for data with histogram h.

    "minmax" takes the exact extremes, "percentile" cuts 100 - percentile per cent off either end, "mse" searches both
    ends (one, if the scheme is symmetric) for the least expected squared error, clipping included. Data that are
    nowhere negative get the zero point qmin. Raises DataError on an empty histogram.
    """
    if not h.counts.size:
        raise DataError("A tensor to be quantized had no value in any sample, so it has no range. Check the samples.")
    if method == "mse" and scheme.bits <= 8:
        return _search(h, scheme)
    lo, hi = h.low, h.high
    if method == "percentile":
        lo, hi = _quantiles(h, np.array([1 - percentile / 100, percentile / 100]))
    return from_range(lo, hi, scheme)


def whole_steps(h: Histogram, q: QParams, value: float) -> QParams:
    """The parameters near q of least squared error by which `value` is a whole number of steps, with that many codes below zero
    at least; q itself where its steps are wider than the value, or half of its codes too few for it.
    """
    steps, most = value / float(q.scale), 2 ** (q.scheme.bits - 1)
    if not 1 <= steps <= most:
        return q
    top = (q.scheme.qmax - int(q.zero_point)) * float(q.scale)
    reaching = value * (q.scheme.qmax - q.scheme.qmin) / (top + value)  # to the same top from so many codes below zero
    counts = np.unique(np.maximum(np.floor([steps, steps + 1, min(reaching, steps)]), 1))
    scale = (value / counts).astype(np.float32)
    lowest = (int(q.zero_point) - q.scheme.qmin) * float(q.scale) / scale
    zero = np.minimum(np.maximum(np.rint(lowest), counts) + q.scheme.qmin, q.scheme.qmax).astype(q.scheme.dtype)
    zero = np.full_like(zero, q.zero_point) if q.scheme.symmetric else zero
    best = int(np.argmin(Lookup(h).squared_error(q.scheme, scale, zero)))
    return QParams(q.scheme, np.asarray(scale[best], np.float32), np.asarray(zero[best], q.scheme.dtype))


class Lookup:
    """Prefix sums over a histogram, at the edges of its bins and in bins: counts, G, and the sums over everything."""

    def __init__(self, h: Histogram) -> None:
        counts, middle = h.counts.astype(np.float64), h.first + np.arange(h.counts.size) + 0.5
        self.h = h
        self.density = np.append(counts, 0.0)  # [bins + 1], 0 beyond the last bin
        self.below = np.concatenate([[0.0], np.cumsum(counts)])  # [bins + 1], how many values lie below the edge
        self.g = -np.concatenate([[0.0], np.cumsum(self.below[:-1] + counts / 2)])  # [bins + 1], G at the edge
        squares = np.square(middle) + 1 / 12
        self.sums = float(self.below[-1]), float(np.sum(counts * middle)), float(np.sum(counts * squares))

    def squared_error(self, scheme: Scheme, scale: NDArray[np.float32], zero: Codes) -> NDArray[np.float64]:
        """The summed squared error of every candidate, scale and zero point [k]."""
        step = scale.astype(np.float64) / self.h.width
        centred = np.arange(scheme.qmin, scheme.qmax) + 0.5 - zero.astype(np.float64)[:, None]
        at = np.maximum(centred * step[:, None] - self.h.first, 0.0)
        bins = np.minimum(at, self.density.size - 1).astype(np.intp)
        at -= bins
        g = self.g[bins] - at * (self.below[bins] + at * (self.density[bins] / 2))
        top = (scheme.qmax - zero.astype(np.float64)) * step
        count, total, squares = self.sums
        error = squares - top * (2 * total - count * top) + 2 * step * g.sum(axis=1)
        return np.maximum(error, 0.0) * self.h.width**2


def _quantiles(h: Histogram, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values below which the given shares of the data lie, linear within a bin."""
    below = np.cumsum(h.counts)
    target = share * below[-1]
    i = np.minimum(np.searchsorted(below, target), below.size - 1)
    part = 1 - (below[i] - target) / np.maximum(h.counts[i], 1)
    return np.clip((h.first + i + part) * h.width, h.low, h.high)


def _search(h: Histogram, scheme: Scheme) -> QParams:
    """Every pair of coarse ends, then the neighbourhood of the best scale and zero point, closer each time."""
    table = Lookup(h)
    lo = _coarse_ends(h.low, _quantiles(h, _TAILS))
    hi = -_coarse_ends(-h.high, -_quantiles(h, 1 - _TAILS))
    if scheme.symmetric:
        ends = np.unique(np.concatenate([-lo, hi]))[::-1]
        q = from_range(-ends, ends, scheme, axis=0)
    else:
        q = from_range(np.repeat(lo, hi.size), np.tile(hi, lo.size), scheme, axis=0)
    scale, zero = _best(table, scheme, q.scale, q.zero_point)
    fixed = scheme.symmetric or h.low >= 0 or h.high <= 0
    for reach, shift in _ROUNDS:
        scales = np.maximum(scale * (1 + reach / 3 * _NEAR), SMALLEST_SCALE).astype(np.float32)
        moves = _NEAR[:1] if fixed else _NEAR[:5] * max((shift << scheme.bits) >> 8, 1)
        zeros = np.clip(zero + moves, scheme.qmin, scheme.qmax).astype(scheme.dtype)
        scale, zero = _best(table, scheme, np.repeat(scales, zeros.size), np.tile(zeros, scales.size))
    return QParams(scheme, np.asarray(scale, np.float32), np.asarray(zero, scheme.dtype))


def _best(table: Lookup, scheme: Scheme, scale: NDArray[np.float32], zero: Codes) -> tuple[float, int]:
    i = int(np.argmin(table.squared_error(scheme, scale, zero)))
    return float(scale[i]), int(zero[i])


def _coarse_ends(low: float, quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower ends to try, ascending, none above zero."""
    return np.unique(np.minimum(np.append(quantiles, low * _SHRINK), 0.0)) if low < 0 else np.zeros(1)
