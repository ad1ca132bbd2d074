"""Affine quantization, bit for bit as ONNX Runtime computes it.

    code  = clip(rint(x / scale) + zero_point, qmin, qmax)          (float32 division, halves to even)
    value = (code - zero_point) * scale                             (float32 product)

For fewer than 8 bits the codes live in the int8 or uint8 that holds them: ORT's QuantizeLinear saturates to 8 bits, an
integer Clip then to [qmin, qmax], and the two in a row are the one above. NaN has no code and must not come here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.errors import DataError, RecipeError

SMALLEST_SCALE = 1e-12  # the step of a tensor that is zero everywhere; its inverse is still finite
NOT_FINITE = "The values to quantize hold NaN or infinity, so they have no range. Check the samples and the model."

Codes = NDArray[np.integer]


@dataclass(frozen=True)
class Scheme:
    """What a tensor is quantized to: unsigned codes 0..2^bits-1 or signed ones -2^(bits-1)..2^(bits-1)-1, of 2 to 8 or 16 bits.

    A symmetric scheme fixes the zero point: 0 if signed, the midpoint 2^(bits-1) if unsigned. Raises RecipeError unless
    the width is one of these.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (*range(2, 9), 16):
            raise RecipeError(f"bits = {self.bits!r} is not supported. Give a whole number from 2 to 8, or 16.")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return self.qmin + (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric tensor."""
        return self.qmin + (1 << (self.bits - 1))

    @property
    def dtype(self) -> type[np.integer]:
        if self.bits == 16:
            return np.int16 if self.signed else np.uint16
        return np.int8 if self.signed else np.uint8


@dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point of one tensor, and the arithmetic that goes with them.

    scale: float32, positive, shape () or [C]; zero_point: scheme.dtype, the same shape; axis: the dimension of length C
    that a scale of shape [C] runs along, None for shape ().
    """

    scheme: Scheme
    scale: NDArray[np.float32]
    zero_point: Codes
    axis: int | None = None

    def __post_init__(self) -> None:
        assert self.scale.shape == self.zero_point.shape
        assert bool(np.all(np.isfinite(self.scale) & (self.scale > 0)))
        assert bool(np.all((self.zero_point >= self.scheme.qmin) & (self.zero_point <= self.scheme.qmax)))
        assert not self.scheme.symmetric or bool(np.all(self.zero_point == self.scheme.midpoint))

    def quantize(self, x: NDArray[np.floating]) -> Codes:
        """The codes of x, scheme.dtype, x's shape: QuantizeLinear, then Clip to [qmin, qmax]."""
        return self._levels(x).astype(self.scheme.dtype)

    def dequantize(self, codes: NDArray[np.integer | np.floating]) -> NDArray[np.float32]:
        """The float32 values of codes: DequantizeLinear."""
        values = np.asarray(codes, np.float32) - self._spread(self.zero_point, np.ndim(codes))
        values *= self._spread(self.scale, values.ndim)
        return values

    def fake(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        """dequantize(quantize(x)), without the detour through integers."""
        return self.dequantize(self._levels(x))

    def _levels(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        x = np.asarray(x, np.float32)
        values = np.empty_like(x)
        with np.errstate(over="ignore"):  # a quotient of infinity saturates like any other
            np.divide(x, self._spread(self.scale, x.ndim), out=values)
        np.rint(values, out=values)
        values += self._spread(self.zero_point, x.ndim)  # exact wherever the sum is not clipped
        return np.clip(values, self.scheme.qmin, self.scheme.qmax, out=values)

    def _spread(self, a: NDArray, ndim: int) -> NDArray[np.float32]:
        return a.astype(np.float32) if self.axis is None else along(a.astype(np.float32), self.axis, ndim)


def along(values: NDArray, axis: int, ndim: int) -> NDArray:
    """Values [C] with axes of length 1 around them, so that they run along `axis` of an array of rank `ndim`."""
    return np.expand_dims(values, [d for d in range(ndim) if d != axis % ndim])


def coarsened(codes: Codes, scale: NDArray[np.float32], least: NDArray, axis: int) -> tuple[Codes, NDArray[np.float32]]:
    """The int8 codes and scales [C] that stand for the same values as closely as a scale of `least` [C] or more can."""
    wide = np.maximum(scale, least.astype(np.float32))
    return np.rint(codes * along(scale.astype(np.float64) / wide, axis, codes.ndim)).astype(np.int8), wide


def from_range(lo: ArrayLike, hi: ArrayLike, scheme: Scheme, axis: int | None = None) -> QParams:
    """The parameters whose codes span [lo, hi], widened first to hold zero, which is always represented exactly.

    lo, hi: numbers, or arrays [C] together with axis. Asymmetric: scale = (hi - lo) / (2^bits - 1), zero_point =
    rint(qmin - lo / scale), so lo = 0 gives qmin. Symmetric: scale = max(-lo, hi) / (2^(bits-1) - 1). Raises DataError
    on a range that is not finite.
    """
    lo, hi = np.minimum(np.asarray(lo, np.float64), 0.0), np.maximum(np.asarray(hi, np.float64), 0.0)
    if not bool(np.all(np.isfinite(lo) & np.isfinite(hi))):
        raise DataError(NOT_FINITE)
    span, start = (np.maximum(-lo, hi), scheme.midpoint) if scheme.symmetric else (hi - lo, scheme.qmin)
    scale = np.asarray(np.maximum(span / (scheme.qmax - start), SMALLEST_SCALE), np.float32)
    zero = np.clip(np.rint(scheme.qmin - lo / scale.astype(np.float64)), scheme.qmin, scheme.qmax)
    zero = np.full_like(zero, scheme.midpoint) if scheme.symmetric else zero
    return QParams(scheme, scale, np.asarray(zero, scheme.dtype), axis)


def weight_qparams(w: NDArray[np.floating], axis: int, bits: int, *, symmetric: bool = True) -> QParams:
    """Signed parameters of a weight, one scale per index of `axis` (its output channels), scale [C].

    It is the smallest scale that clips nothing, codes over the whole of -2^(bits-1)..2^(bits-1)-1, times the factor in
    [0.1, 1] with the smallest squared error, found per channel to better than 1 %. A channel of zeros gets SMALLEST_SCALE.
    Not symmetric: the same of the range from its smallest to its largest value. Works on a few channels at a time, so the
    memory on top of w is small. Raises RecipeError on an unknown width.
    """
    scheme = Scheme(bits, True, symmetric)
    rows, channels = np.moveaxis(w, axis, 0), w.shape[axis]
    scale, zero = np.full(channels, SMALLEST_SCALE), np.zeros(channels, np.int8)
    chunk = max((1 << 16) * channels // max(w.size, 1), 1)
    for start in range(0, channels if w.size else 0, chunk):
        some = rows[start : start + chunk]
        part = np.ascontiguousarray(some.reshape(len(some), -1), np.float32)
        if not symmetric:
            best = _best_range(part, scheme)
            scale[start : start + chunk], zero[start : start + chunk] = best.scale, best.zero_point
            continue
        ends = np.maximum(part.max(axis=1) / scheme.qmax, part.min(axis=1) / scheme.qmin).astype(np.float64)
        ends = np.maximum(ends, SMALLEST_SCALE)
        error = functools.partial(_shrunk_error, rows=part, scale=ends, scheme=scheme)
        scale[start : start + chunk] = ends * _best_shrink(error, len(ends))
    scale = np.maximum(scale, SMALLEST_SCALE).astype(np.float32)
    return QParams(scheme, scale, zero, axis)


def _best_range(rows: NDArray[np.float32], scheme: Scheme) -> QParams:
    """The parameters of the range of each of rows [c, n], zero included, shrunk to the least squared error."""
    lo, hi = rows.min(axis=1, initial=0.0), rows.max(axis=1, initial=0.0)

    def error(factor: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.square(from_range(lo * factor, hi * factor, scheme, 0).fake(rows) - rows).sum(axis=1, dtype=np.float64)

    factor = _best_shrink(error, len(rows))
    return from_range(lo * factor, hi * factor, scheme, 0)


def _best_shrink(measure: Callable[[NDArray[np.float64]], NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    """The factors [count] of the least error that `measure` gives them: of 21, then of 8 closer ones, twice."""
    candidates = np.repeat(10.0 ** -np.linspace(0.0, 1.0, 21)[:, None], count, axis=1)
    best, error = np.ones(count), np.full(count, np.inf)
    for reach in (0.04, 0.008, 0.0):
        for factor in candidates:
            tried = measure(factor)
            better = tried < error
            best, error = np.where(better, factor, best), np.where(better, tried, error)
        around = 10.0 ** np.delete(np.linspace(-reach, reach, 9), 4)
        candidates = np.minimum(best * around[:, None], 1.0)
    return best


def _shrunk_error(
    factor: NDArray[np.float64], rows: NDArray[np.float32], scale: NDArray[np.float64], scheme: Scheme
) -> NDArray[np.float64]:
    """The squared error of each of rows [c, n] with its scale times its factor."""
    scale = scale * factor
    steps = rows * (1.0 / scale).astype(np.float32)[:, None]
    codes = np.rint(steps)
    np.clip(codes, scheme.qmin, scheme.qmax, out=codes)
    codes -= steps
    return np.einsum("cn,cn->c", codes, codes).astype(np.float64) * scale * scale
