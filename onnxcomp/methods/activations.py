"""Activation quantizers: the range of one tensor, from what the compressed model really computes there.

    static    Q with a fixed scale and zero point: min-max, percentile or least squared error over calibration samples
    dynamic   scale = max|x| / qmax over the tensor, at run time: no data needed
    token     scale = c * max|x| / qmax over the last axis, at run time; the clip ratio c by least squared error
    auto      token where that lowers the tensor's squared error enough to be worth its price, else static

Every sample contributes about as many evenly spread values to the histogram; min-max looks at all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from onnxcomp.graph.edit import Tape
from onnxcomp.methods.base import Array, Batch, Samples
from onnxcomp.numerics.affine import QParams, Scheme
from onnxcomp.numerics.ranges import choose, whole_steps
from onnxcomp.numerics.statistics import Histogram, spread, subsample

VALUES_PER_SAMPLE = 1 << 14
ROWS_PER_SAMPLE, RATIO_SAMPLES, GAIN_SAMPLES = 64, 32, 16
"""Of how many samples, at least, a clip ratio is judged by so many rows each, and a range per token by all rows."""
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
Fake = Callable[[Array], Array]
"""What quantizing makes of one sample."""
Function = Callable[[Array], Array]
"""Value by value, float32 [n] to [n]."""


def fit_static(
    samples: Samples, scheme: Scheme, ranges: str, percentile: float, highest: float = np.inf, behind: Function | None = None,
    divides: float | None = None, name: str = "",
) -> QParams:  # fmt: skip
    """Scale and zero point of the tensor called `name` and read as `xh`; the largest code stands for no more than `highest`.
    Where only what a function `behind` makes of its values counts, least squared error is that of the function's, to first
    order. `divides`: see `Point`. Raises DataError for values that are not finite.
    """

    def read(batch: Batch) -> Histogram:
        values = [(number, x) for number, x in zip(batch.indices, batch.read("xh"), strict=False) if x.size]
        seen = [] if ranges == "minmax" else [subsample(x, VALUES_PER_SAMPLE, number) for number, x in values]
        if ranges == "minmax" or scheme.bits > 8:  # which has steps enough for all of them
            seen += [np.array([x.min(), x.max()]) for _, x in values]
        return Histogram.of(np.concatenate([np.zeros(0, np.float32), *seen]), name)

    seen = samples.reduce(read)
    seen = seen if behind is None or ranges != "mse" else seen.weighted(behind)
    q = choose(seen, scheme, ranges, percentile)
    if divides is not None:
        return whole_steps(seen, q, divides)
    reach = scheme.qmax - int(q.zero_point)
    if reach * float(q.scale) <= highest:
        return q
    return dataclasses.replace(q, scale=np.asarray(highest / reach, np.float32))


def fit_ratio(samples: Samples, scheme: Scheme) -> float:
    """The clip ratio of a per-token quantizer with the least squared error on the tensor read as `xh`."""
    fakes = [functools.partial(fake, scheme=scheme, granularity="token", ratio=ratio) for ratio in RATIOS]
    return RATIOS[int(np.argmin(_errors(samples, fakes, RATIO_SAMPLES, ROWS_PER_SAMPLE)))]


def token_gain(samples: Samples, q: QParams) -> float:
    """By how many dB a range per token lowers the squared error of the static quantizer `q` on the tensor read as `xh`.

    Over all tokens: what a static range costs is the few tokens of far larger values that it must either clip or make
    room for. Of some `GAIN_SAMPLES` samples, for these tokens are in each.
    """
    fakes = [q.fake, functools.partial(fake, scheme=q.scheme, granularity="token")]
    static, token = _errors(samples, fakes, GAIN_SAMPLES)
    return float(10 * np.log10(max(static, 1e-30) / max(token, 1e-30)))


def fake(x: Array, *, scheme: Scheme, granularity: str, ratio: float = 1.0) -> Array:
    """What a quantizer that measures its range when it runs makes of one sample's x, as the graph computes it."""
    top = 2 ** (scheme.bits - 1) - 1
    largest = np.abs(x).max(axis=-1 if granularity == "token" else None, keepdims=True, initial=0.0)
    scale = np.maximum(largest * np.float32(ratio / top), np.float32(1e-12))
    values = x / scale
    np.clip(np.rint(values, out=values), -top - 1, top, out=values)
    return np.multiply(values, scale, out=values)


def build_static(op: Tape, x: str, q: QParams) -> str:
    """Record an abstract static quantizer of `x`; return its output."""
    return build_shared(op, x, op.constant("scale", q.scale), op.constant("zero_point", q.zero_point), q.scheme)


def build_shared(op: Tape, x: str, scale: str, zero_point: str, scheme: Scheme) -> str:
    """Record a static quantizer of `x` that shares the parameters of another tensor."""
    return op.abstract("FakeQuantize", x, scale, zero_point, bits=scheme.bits, signed=int(scheme.signed), granularity="static")


def build_run_time(op: Tape, x: str, scheme: Scheme, granularity: str, ratio: float) -> str:
    """Record an abstract quantizer of `x` that measures its range when it runs."""
    return op.abstract("FakeQuantize", x, bits=scheme.bits, signed=int(scheme.signed), granularity=granularity, ratio=ratio)


def _errors(samples: Samples, fakes: Sequence[Fake], least: int, rows_per_sample: int | None = None) -> Array:
    """The squared error of each quantizer on the tensor read as `xh`, all of it or some evenly spread rows, in `least` of the
    samples, if there are so many, or up to twice as many.
    """
    step = max(samples.count // least, 1)

    def read(batch: Batch) -> Array:
        rows = [(n, x.reshape(-1, x.shape[-1])) for n, x in zip(batch.indices, batch.read("xh"), strict=False) if n % step == 0]
        seen = [r[spread(len(r), rows_per_sample or len(r) or 1, number)] for number, r in rows]
        return np.array([sum(np.square(f(x) - x).sum(dtype=np.float64) for x in seen) for f in fakes])

    return samples.reduce(read)
