"""Activation quantizers: the range of one tensor, from what the compressed model really computes there.

    static    Q with a fixed scale and zero point: min-max, percentile or least squared error over calibration samples
    dynamic   scale = max|x| / qmax over the tensor, at run time: no data needed
    token     scale = c * max|x| / qmax over the last axis, at run time; the clip ratio c by least squared error
    auto      token where that lowers the tensor's squared error enough to be worth its price, else static

Every sample contributes a fixed number of evenly spread values to the histogram; min-max looks at all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from onnxcomp.graph.edit import Tape
from onnxcomp.methods.base import Array, Batch, Samples
from onnxcomp.numerics.affine import QParams, Scheme, from_range
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Extremes, Histogram, subsample

VALUES_PER_SAMPLE = 1 << 14
ROWS_PER_SAMPLE = 64
RATIOS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6])
XH = frozenset({"xh"})


@dataclass(frozen=True)
class RatioErrors:
    """Squared error of each of some quantizers [R], summed over what was seen."""

    errors: Array

    def merge(self, other: RatioErrors) -> RatioErrors:
        """The sum of both."""
        return RatioErrors(self.errors + other.errors)


def fit_static(samples: Samples, scheme: Scheme, ranges: str, percentile: float, highest: float = np.inf) -> QParams:
    """Scale and zero point of the tensor read as `xh`; the largest code stands for no more than `highest`."""
    if ranges == "minmax":
        extremes = samples.reduce(_extremes, XH)
        q = from_range(extremes.min, extremes.max, scheme)
    else:
        q = choose(samples.reduce(_histogram, XH), scheme, ranges, percentile)
    reach = scheme.qmax - int(q.zero_point)
    if reach * float(q.scale) <= highest:
        return q
    return dataclasses.replace(q, scale=np.asarray(highest / reach, np.float32))


def fit_ratio(samples: Samples, scheme: Scheme) -> float:
    """The clip ratio of a per-token quantizer with the least squared error on the tensor read as `xh`."""
    errors = samples.reduce(lambda batch: _ratio_errors(batch, scheme), XH).errors
    return float(RATIOS[int(np.argmin(errors))])


def token_gain(samples: Samples, q: QParams) -> float:
    """By how many dB a range per token lowers the squared error of the static quantizer `q` on the tensor read as `xh`.

    Over all tokens: what a static range costs is the few tokens of far larger values that it must either clip or make
    room for.
    """
    errors = samples.reduce(lambda batch: _both_errors(batch, q), XH).errors
    return float(10 * np.log10(max(errors[0], 1e-30) / max(errors[1], 1e-30)))


def fake(
    x: Array, *, scheme: Scheme, granularity: str, q: QParams | None = None, ratio: float = 1.0, noise: Array | None = None
) -> Array:
    """What the quantizer makes of one sample's x, as the graph computes it up to rounding; `noise` is added in front of it
    and taken out behind.
    """
    if q is not None and granularity == "static":
        return q.fake(x) if noise is None else q.fake(x + noise) - noise
    top = 2 ** (scheme.bits - 1) - 1
    largest = np.abs(x).max(axis=-1, keepdims=True) if granularity == "token" else np.abs(x).max(initial=0.0)
    scale = np.maximum(largest * np.float32(ratio / top), np.float32(1e-12))
    return np.clip(np.rint(x / scale), -top - 1, top).astype(np.float32) * scale


def build_static(op: Tape, x: str, q: QParams) -> str:
    """Record an abstract static quantizer of `x`; return its output."""
    return build_shared(op, x, op.constant("scale", q.scale), op.constant("zero_point", q.zero_point), q.scheme)


def build_shared(op: Tape, x: str, scale: str, zero_point: str, scheme: Scheme) -> str:
    """Record a static quantizer of `x` that shares the parameters of another tensor."""
    return op.abstract("FakeQuantize", x, scale, zero_point, bits=scheme.bits, signed=int(scheme.signed), granularity="static")


def build_run_time(op: Tape, x: str, scheme: Scheme, granularity: str, ratio: float) -> str:
    """Record an abstract quantizer of `x` that measures its range when it runs."""
    return op.abstract("FakeQuantize", x, bits=scheme.bits, signed=int(scheme.signed), granularity=granularity, ratio=ratio)


def _histogram(batch: Batch) -> Histogram:
    parts = [Histogram.of(subsample(x, VALUES_PER_SAMPLE)) for x in batch.read("xh")]
    return functools.reduce(Histogram.merge, parts)


def _extremes(batch: Batch) -> Extremes:
    return functools.reduce(Extremes.merge, [Extremes.of(x) for x in batch.read("xh")])


def _both_errors(batch: Batch, q: QParams) -> RatioErrors:
    """Squared error of `q` and of the per-token quantizer of the same width."""
    top, errors = 2 ** (q.scheme.bits - 1) - 1, np.zeros(2)
    for x in batch.read("xh"):
        scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / np.float32(top), np.float32(1e-12))
        for i, quantized in enumerate((q.fake(x), np.rint(x / scale) * scale)):
            errors[i] += float(np.square(quantized - x).sum(dtype=np.float64))
    return RatioErrors(errors)


def _ratio_errors(batch: Batch, scheme: Scheme) -> RatioErrors:
    top = 2 ** (scheme.bits - 1) - 1
    errors = np.zeros(len(RATIOS))
    for x in batch.read("xh"):
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[:: max(1, len(rows) // ROWS_PER_SAMPLE)].astype(np.float64)
        largest = np.abs(rows).max(axis=-1, keepdims=True)
        for i, ratio in enumerate(RATIOS):
            scale = np.maximum(largest * ratio / top, 1e-12)
            errors[i] += np.square(np.clip(np.rint(rows / scale), -top - 1, top) * scale - rows).sum()
    return RatioErrors(errors)
