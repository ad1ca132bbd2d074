"""NoisyQuant: a constant vector is added in front of a quantizer and taken out exactly behind the layers that read it.

    y = Q(x + N) W_q + (b - N W_q)        N [C_in]

Rounding then sees x at other places of its grid, per channel, and the output loses exactly what N brought in.

uniform  as published: N is drawn once from U(-n, n). With levels 2b apart and x at the distance d <= n from the nearest
         threshold, the expected squared error changes by n^2/3 - (b/n) (n - d)^2, by n^2/3 where d > n (exact for n <= b).
         n minimises the sum over values; of a few draws the best is kept. The quantizer stays as it is.
offset   N by search: the channels are left where they are, or centred by the middle of their 1 and 99 % quantiles and the
         range fitted anew to what comes out; then each channel is moved by up to a step to where it rounds best.

Paper   Liu et al., CVPR 2023, arXiv:2211.16056: the method and its theorem on the expected error. The sum over values, the
        search and the gate are ours. Centring is the shift of Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145.
Cost    nothing where N goes into the LayerNorm or the bias that x was made with (graph/offsets.py); one Add elsewhere, and
        one behind a layer that has no bias.
Gate    on held-out samples the squared error at the layers' outputs, of all but the 5 % worst tokens, falls by 0.05 dB and
        by twice its standard error; that of the tokens of the largest values and of the first ones does not rise by 2 %.
Limits  static ranges only; no Conv that pads, for its zeros would have to be N. Draws bring what their luck brings: on a
        tensor whose values spread smoothly over many steps, nothing.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from onnxcomp.errors import RecipeError
from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, Batch, Fit, Input, InputMethod, Outcome, Samples
from onnxcomp.methods.bias import HOLD_OUT, TRIM, decibel
from onnxcomp.numerics.affine import QParams
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram

ROWS, PEAKS = 16, 3
"""Tokens of each sample that are looked at: evenly spread, and those of the largest values."""
EVEN, PEAK, FIRST = range(3)
"""Why a token is looked at. Few as they are, the others depend on those that draw attention and on the first, which is a
class or a start token in most transformers: a range that suits the many may clip just these."""
LEAST_GAIN_DB = 0.05
RISE = 1.02
"""By how much the error of a few tokens may rise."""
OUTER = 0.01
"""Share of a channel's values on either side that its middle does not look at."""
AMPLITUDES = np.arange(1, 33) / 64
"""The n that are tried, in steps: up to half a step the formula is exact."""
OFFSETS = np.array(sorted(range(-8, 9), key=abs)) / 8
"""The moves of a channel that are tried, in steps."""
TIE = 1.0001
"""By how much an error may exceed the least for a shorter move: without clipping, moves a whole step apart are the same."""
FAR = 4.0
"""Squared steps beyond which an error counts no more in the search: an outlier is clipped wherever its channel lies."""
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Some tokens: the number of the sample that each is of [n], why it is looked at [n], and its channels [n, C]."""

    sample: Array
    kind: Array
    x: Array

    @classmethod
    def of(cls, batch: Batch, channel_axis: int) -> Rows:
        """Of each sample of `xh` at most ROWS tokens EVENly spread, the first one later from sample to sample; the PEAKS
        tokens of the largest values; and the FIRST.
        """
        samples, kinds, found = [], [], []
        for index, x in zip(batch.indices, batch.read("xh"), strict=False):
            rows = np.moveaxis(x, channel_axis, -1).reshape(-1, x.shape[channel_axis])
            stride = -(-len(rows) // ROWS)
            even = np.arange(index % stride, len(rows), stride)
            peaks = np.argsort(-np.maximum(rows.max(axis=1), -rows.min(axis=1)), kind="stable")[:PEAKS]
            found.append(rows[np.concatenate([even, peaks, [0]])])
            kinds.append(np.repeat([EVEN, PEAK, FIRST], [len(even), len(peaks), 1]))
            samples.append(np.full(len(kinds[-1]), index))
        return cls(np.concatenate(samples), np.concatenate(kinds), np.concatenate(found))

    def merge(self, other: Rows) -> Rows:
        """Both, in sample order."""
        pairs = ((self.sample, other.sample), (self.kind, other.kind), (self.x, other.x))
        return Rows(*(np.concatenate(pair) for pair in pairs))

    def where(self, mask: Array) -> Rows:
        """Those that `mask` [n] names; all where it names none."""
        return Rows(self.sample[mask], self.kind[mask], self.x[mask]) if mask.any() else self


@dataclass(frozen=True)
class Candidate:
    """What may be added, and the quantizer behind it."""

    noise: Array
    q: QParams

    def errors(self, x: Array, weight: Array) -> Array:
        """The squared error of each row at the outputs: |(Q(x + N) - N - x) W|^2, [n]."""
        e = self.q.fake(x + self.noise)
        e -= self.noise
        e -= x
        y = e @ weight
        return np.einsum("nc,nc->n", y, y, dtype=np.float64)


@final
@dataclass(frozen=True)
class NoisyQuant(InputMethod):
    """A fixed noise or a searched offset in front of each static quantizer, taken out again behind it."""

    mode: str = "offset"
    """`offset`: centred and searched, with a range of its own; `uniform`: drawn from U(-n, n), as published."""
    draws: int = 8
    """How many noises `uniform` draws to keep the best."""
    seed: int = 0
    """What the draws follow from, together with the place's name."""
    reads: ClassVar[frozenset[str]] = frozenset({"xh"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("offset", "uniform"):
            raise RecipeError(f"mode = '{self.mode}' is unknown. Use 'offset' or 'uniform'.")
        if self.draws < 1 or self.seed < 0:
            raise RecipeError("draws must be positive, and seed must not be negative.")

    def fit(self, place: Input, samples: Samples) -> Outcome:
        if place.q is None:
            return Outcome(None, "the range is measured at run time: a fixed noise has no fixed step to work on")
        if any(site.padded for site in place.sites):
            return Outcome(None, "a Conv that reads it pads with zeros, from which the noise could not be taken out")
        rows = samples.reduce(lambda batch: Rows.of(batch, 1 if place.sites[0].op == "Conv" else -1), self.reads)
        held_out = rows.sample % HOLD_OUT == HOLD_OUT - 1
        fitted, judged = rows.where(~held_out), rows.where(held_out)
        channels = fitted.x.shape[1]
        weight = np.concatenate([_matrix(w, s, channels) for w, s in zip(place.weights, place.sites, strict=True)], axis=1)
        plain = Candidate(np.zeros(channels, np.float32), place.q)
        before = plain.errors(fitted.x, weight)

        def best_of(candidates: list[Candidate]) -> Candidate:
            return min(candidates, key=lambda c: _rank(_ratios(fitted, before, c.errors(fitted.x, weight))))

        if self.mode == "uniform":
            found = self._uniform(place, plain, fitted.x)
        else:
            found = [_searched(fitted, start) for start in (plain, best_of(_centred(fitted, plain.q)))]
        if not found:
            return Outcome(None, "no noise lowers the expected error")
        best = best_of(found)
        before, after = (candidate.errors(judged.x, weight) for candidate in (plain, best))
        kept = _typical(judged, before + after)
        energy = np.square(judged.x[kept] @ weight)
        before_db, after_db = decibel(energy, before[kept]), decibel(energy, after[kept])
        if self.keep != "always" and not _is_better(judged, before, after):
            return Outcome(None, "held-out samples do not improve", after_db - before_db, before_db, before_db)
        if best.q is place.q:
            return Outcome({"noise": best.noise}, "the same range", after_db - before_db, before_db, after_db)
        fit = {"noise": best.noise, "scale": best.q.scale, "zero_point": best.q.zero_point}
        return Outcome(fit, "a range of its own", after_db - before_db, before_db, after_db)

    def _uniform(self, place: Input, plain: Candidate, x: Array) -> list[Candidate]:
        n = amplitude(x, plain.q)
        rng = np.random.default_rng([self.seed, zlib.crc32(place.name.encode())])
        drawn = rng.uniform(-n, n, size=(self.draws, x.shape[1])).astype(np.float32)
        return [Candidate(noise, plain.q) for noise in drawn] if n else []

    def quantizer(self, fit: Fit, q: QParams) -> QParams:
        """What quantizes x + N, given what quantized x."""
        return QParams(q.scheme, fit["scale"], fit["zero_point"]) if "scale" in fit else q

    def correction(self, fit: Fit, weight: Array, site: Site) -> Array:
        return denoise(fit["noise"], weight, site)

    def build(self, op: Tape, place: Input, fit: Fit) -> dict[str, str]:
        first = place.sites[0]
        noise = fit["noise"].reshape(-1, *[1] * (first.rank - 2)) if first.op == "Conv" else fit["noise"]
        return {place.x: op("Add", place.x, op.constant("noise", noise))}


def denoise(noise: Array, weight: Array, site: Site) -> Array:
    """-N W_q, float32 [C_out], summed in float64: what the layer's output is given back. `weight` is the dequantized one,
    [C_in, C_out], of a Conv [C_out, C_in / groups, ...].
    """
    if site.op != "Conv":
        return (-(noise.astype(np.float64) @ weight.astype(np.float64))).astype(np.float32)
    total = weight.astype(np.float64).reshape(*weight.shape[:2], -1).sum(axis=2)
    groups = len(noise) // weight.shape[1]
    by_group = total.reshape(groups, -1, weight.shape[1]) @ noise.astype(np.float64).reshape(groups, -1, 1)
    return (-by_group.reshape(-1)).astype(np.float32)


def amplitude(x: Array, q: QParams) -> float:
    """The n of the theorem for values x, 0 where no noise is better than none."""
    steps = (x.astype(np.float64) / q.scale + q.zero_point).reshape(-1)
    inside = steps[(steps > q.scheme.qmin) & (steps < q.scheme.qmax)]
    distance = np.sort(np.abs(inside - np.floor(inside) - 0.5))
    first, second = (np.concatenate([[0.0], np.cumsum(distance**k)]) for k in (1, 2))
    reached = np.searchsorted(distance, AMPLITUDES, side="right")
    # sum over d <= n of (n - d)^2; b is half a step
    sums = reached * AMPLITUDES**2 - 2 * AMPLITUDES * first[reached] + second[reached]
    change = len(distance) * AMPLITUDES**2 / 3 - 0.5 / AMPLITUDES * sums
    best = int(np.argmin(change))
    return float(AMPLITUDES[best] * q.scale) if change[best] < 0 else 0.0


def _centred(rows: Rows, q: QParams) -> list[Candidate]:
    """The channels centred on the many tokens, or on the few as well, and the range fitted to the ones or to all."""
    found, even = [], rows.x[rows.kind == EVEN]
    for x, ranges in ((even, [even]), (rows.x, [even, rows.x])):
        low = int(OUTER * len(x))
        outer = np.partition(np.ascontiguousarray(x.T), (low, -1 - low), axis=1)[:, [low, -1 - low]]
        noise = -outer.mean(axis=1)
        found += [Candidate(noise, choose(Histogram.of(seen + noise), q.scheme)) for seen in ranges]
    return found


def _searched(rows: Rows, start: Candidate) -> Candidate:
    """`start`, with every channel moved to where its own squared error is least."""
    q, x = start.q, rows.x[rows.kind == EVEN]
    errors = np.zeros((len(OFFSETS), x.shape[1]))
    length = max(_CHUNK // x.shape[1], 1)
    for first in range(0, len(x), length):
        steps = (x[first : first + length] + start.noise) / q.scale + np.float32(q.zero_point)
        for k, offset in enumerate(OFFSETS.astype(np.float32)):
            moved = steps + offset
            codes = np.rint(moved)
            np.clip(codes, q.scheme.qmin, q.scheme.qmax, out=codes)
            codes -= moved
            np.square(codes, out=codes)
            errors[k] += np.minimum(codes, FAR, out=codes).sum(axis=0)
    shortest = (errors <= TIE * errors.min(axis=0)).argmax(axis=0)
    return Candidate((start.noise + OFFSETS[shortest] * q.scale).astype(np.float32), q)


def _matrix(weight: Array, site: Site, channels: int) -> Array:
    """[C_in, K] such that |e times it|^2 is the error that e makes at the output; of a Conv that of one pixel, as if its
    errors were independent of its neighbours' and of the other channels'.
    """
    if site.op != "Conv":
        return weight
    by_group = np.square(weight).reshape(channels // weight.shape[1], -1, weight.shape[1], int(np.prod(weight.shape[2:])))
    return np.diag(np.sqrt(by_group.sum(axis=(1, 3)).reshape(-1)))


def _typical(rows: Rows, errors: Array) -> Array:
    """The evenly spread rows but for the share TRIM with the largest errors."""
    order = np.flatnonzero(rows.kind == EVEN)
    order = order[np.argsort(errors[order], kind="stable")]
    return order[: max(int(np.ceil(len(order) * (1.0 - TRIM))), 1)]


def _ratios(rows: Rows, before: Array, after: Array) -> list[float]:
    """The error after over that before: of the typical rows, and of those of each kind."""
    groups = [_typical(rows, before + after), *(rows.kind == kind for kind in (EVEN, PEAK, FIRST))]
    return [float(after[group].sum()) / max(float(before[group].sum()), 1e-30) for group in groups]


def _rank(ratios: list[float]) -> tuple[float, float]:
    """What the best candidate has least of: first nothing may rise, then the typical tokens decide."""
    return max(*ratios, RISE), ratios[0]


def _is_better(rows: Rows, before: Array, after: Array) -> bool:
    """Whether the error of the typical rows falls, by enough and beyond chance, and none rises more than a little."""
    typical, *kinds = _ratios(rows, before, after)
    kept = _typical(rows, before + after)
    change = np.bincount(rows.sample[kept], (after - before)[kept])[np.unique(rows.sample[kept])]
    chance = 2.0 * change.std(ddof=1) * np.sqrt(len(change)) if len(change) > 1 else 0.0
    return typical < 10 ** (-LEAST_GAIN_DB / 10) and float(change.sum()) < -chance and max(kinds) <= RISE


METHOD = NoisyQuant
