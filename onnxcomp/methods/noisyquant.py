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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import HOLD_OUT, Array, Batch, Fit, Input, InputMethod, Outcome, Samples, is_held_out, per_channel
from onnxcomp.methods.bias import TRIM, decibel
from onnxcomp.numerics.affine import QParams
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram

ROWS, PEAKS = 16, 3
"""Tokens of each sample that are looked at: evenly spread, and those of the largest values."""
SAMPLES = 512
"""Samples that are looked at: where there are more, every second four of them, or every third and so on."""
EVEN, PEAK, FIRST = range(3)
"""Why a token is looked at. Few as they are, the others depend on those that draw attention and on the first, which is a
class or a start token in most transformers: a range that suits the many may clip just these."""
LEAST_GAIN_DB, RISE = 0.05, 1.02
"""By how much the error of the typical tokens must fall, and by how much that of a few tokens may rise."""
OUTER = 0.01
"""Share of a channel's values on either side that its middle does not look at."""
AMPLITUDES = np.arange(33) / 64
"""The n that are tried, in steps: none, and up to half a step, where the formula is exact."""
OFFSETS = np.array(sorted(range(-8, 9), key=abs)) / 8
"""The moves of a channel that are tried, in steps."""
TIE = 1.0001
"""By how much an error may exceed the least for a shorter move: without clipping, moves a whole step apart are the same."""
FAR = 4.0
"""Squared steps beyond which an error counts no more in the search: an outlier is clipped wherever its channel lies."""


class Rows(NamedTuple):
    """Some tokens: the number of the sample that each is of [n], why it is looked at [n], and its channels [n, C]."""

    sample: Array
    kind: Array
    x: Array

    @staticmethod
    def of(batch: Batch, channel_axis: int) -> Iterator[Rows]:
        """Of each sample of `xh`: at most ROWS tokens EVENly spread, the first one later from sample to sample; the PEAKS
        tokens of the largest values; and the FIRST.
        """
        for index, x in zip(batch.indices, batch.read("xh"), strict=False):
            rows = np.moveaxis(x, channel_axis, -1).reshape(-1, x.shape[channel_axis])
            stride = -(-len(rows) // ROWS)
            even = np.arange(index % stride, len(rows), stride)
            peaks = np.argsort(-np.abs(rows).max(axis=1), kind="stable")[:PEAKS]
            kind = np.repeat([EVEN, PEAK, FIRST], [len(even), len(peaks), 1])
            yield Rows(np.full(len(kind), index), kind, rows[np.concatenate([even, peaks, [0]])])

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All parts in order."""
        return Rows(*map(np.concatenate, zip(*parts, strict=True)))

    def split(self) -> list[Rows]:
        """Those that are fitted to and those that are held out; all where there are none."""
        held_out = is_held_out(self.sample)
        return [Rows(*(part[mask] for part in self)) if mask.any() else self for mask in (~held_out, held_out)]

    def compare(self, before: Array, after: Array) -> tuple[Array, list[float]]:
        """The typical rows, which are the evenly spread ones but for the share TRIM with the largest errors; and the error
        after over that before [n]: of these rows, and of those of each kind.
        """
        even = np.flatnonzero(self.kind == EVEN)
        order = even[np.argsort((before + after)[even], kind="stable")]
        typical = order[: int(np.ceil(len(order) * (1.0 - TRIM)))]
        groups = [typical, *(self.kind == kind for kind in (EVEN, PEAK, FIRST))]
        return typical, [float(after[group].sum()) / max(float(before[group].sum()), 1e-30) for group in groups]


class Candidate(NamedTuple):
    """What may be added, and the quantizer behind it."""

    noise: Array
    q: QParams

    def errors(self, x: Array, weight: Array) -> Array:
        """The squared error of each row at the outputs: |(Q(x + N) - N - x) W|^2, [n]."""
        y = (self.q.fake(x + self.noise) - self.noise - x) @ weight
        return np.einsum("nc,nc->n", y, y, dtype=np.float64)


@final
@dataclass(frozen=True)
class NoisyQuant(InputMethod):
    """A fixed noise or a searched offset in front of each static quantizer, taken out again behind it."""

    mode: Literal["offset", "uniform"] = "offset"
    """`offset`: centred and searched, with a range of its own; `uniform`: drawn from U(-n, n), as published."""
    draws: PositiveInt = 8
    """How many noises `uniform` draws to keep the best."""
    seed: NonNegativeInt = 0
    """What the draws follow from, together with the place's name."""

    def fit(self, place: Input, samples: Samples) -> Outcome:
        if place.q is None:
            return Outcome(None, "the range is measured at run time: a fixed noise has no fixed step to work on")
        if any(site.padded for site in place.sites):
            return Outcome(None, "a Conv that reads it pads with zeros, from which the noise could not be taken out")
        apart, axis = -(-samples.count // SAMPLES), place.sites[0].channel_axis
        seen = samples.reduce(lambda batch: tuple(r for r in Rows.of(batch, axis) if r.sample[0] // HOLD_OUT % apart == 0))
        fitted, judged = Rows.joined(seen).split()
        channels = fitted.x.shape[1]
        weight = np.concatenate([_effect(w, s, channels) for w, s in zip(place.weights, place.sites, strict=True)], axis=1)
        plain = Candidate(np.zeros(channels, np.float32), place.q)
        error = plain.errors(fitted.x, weight)

        def rank(candidate: Candidate) -> tuple[float, float]:
            """What the best has least of: first nothing may rise, then the typical tokens decide."""
            _, ratios = fitted.compare(error, candidate.errors(fitted.x, weight))
            return max(*ratios, RISE), ratios[0]

        if self.mode == "offset":
            found = [_searched(fitted, start) for start in (plain, min(_centred(fitted, plain.q), key=rank))]
        elif n := amplitude(fitted.x, plain.q):
            rng = np.random.default_rng([self.seed, zlib.crc32(place.name.encode())])
            drawn = rng.uniform(-n, n, size=(self.draws, channels)).astype(np.float32)
            found = [Candidate(noise, plain.q) for noise in drawn]
        else:
            return Outcome(None, "no noise lowers the expected error")
        best = min(found, key=rank)
        before, after = (candidate.errors(judged.x, weight) for candidate in (plain, best))
        typical, (_, *ratios) = judged.compare(before, after)
        energy = np.square(judged.x[typical] @ weight)
        before_db, after_db = (decibel(energy, errors[typical]) for errors in (before, after))
        gain = after_db - before_db
        change = np.bincount(judged.sample[typical], (after - before)[typical])[np.unique(judged.sample[typical])]
        chance = 2.0 * change.std(ddof=1) * np.sqrt(len(change)) if len(change) > 1 else 0.0
        better = gain > LEAST_GAIN_DB and change.sum() < -chance and max(ratios) <= RISE
        if self.keep != "always" and not better:
            return Outcome(None, "held-out samples do not improve", gain, before_db, before_db)
        own = {} if best.q is place.q else {"scale": best.q.scale, "zero_point": best.q.zero_point}
        reason = "a range of its own" if own else "the same range"
        return Outcome({"noise": best.noise, **own}, reason, gain, before_db, after_db)

    def quantizer(self, fit: Fit, q: QParams) -> QParams:
        """What quantizes x + N, given what quantized x."""
        return QParams(q.scheme, fit["scale"], fit["zero_point"]) if "scale" in fit else q

    def correction(self, fit: Fit, weight: Array, site: Site) -> Array:
        """-N W_q, float32 [C_out], summed in float64: what the layer's output is given back."""
        w = _by_group(weight, site, len(fit["noise"])).sum(axis=3, dtype=np.float64)
        return (-(w @ fit["noise"].astype(np.float64).reshape(len(w), -1, 1)).reshape(-1)).astype(np.float32)

    def build(self, op: Tape, place: Input, fit: Fit) -> dict[str, str]:
        return {place.x: op("Add", place.x, op.constant("noise", per_channel(place.sites[0], fit["noise"])))}


def amplitude(x: Array, q: QParams) -> float:
    """The n of the theorem for values x, 0 where no noise is better than none."""
    steps = x.astype(np.float64) / q.scale + q.zero_point
    inside = steps[(steps > q.scheme.qmin) & (steps < q.scheme.qmax)]
    distance = np.abs(inside - np.floor(inside) - 0.5)
    # b is half a step
    change = [np.sum(n**2 / 3 - 0.5 / max(n, 1e-30) * np.maximum(n - distance, 0.0) ** 2) for n in AMPLITUDES]
    return float(AMPLITUDES[np.argmin(change)] * q.scale)


def _centred(rows: Rows, q: QParams) -> Iterator[Candidate]:
    """The channels centred on the many tokens, or on the few as well, and the range fitted to the ones or to all."""
    even = rows.x[rows.kind == EVEN]
    for x, ranges in ((even, [even]), (rows.x, [even, rows.x])):
        low = int(OUTER * len(x))
        noise = -np.partition(x, (low, -1 - low), axis=0)[[low, -1 - low]].mean(axis=0)
        yield from (Candidate(noise, choose(Histogram.of(seen + noise), q.scheme)) for seen in ranges)


def _searched(rows: Rows, start: Candidate) -> Candidate:
    """`start`, with every channel moved to where its own squared error is least."""
    q, moves = start.q, OFFSETS.astype(np.float32)
    steps = (rows.x[rows.kind == EVEN] + start.noise) / q.scale + np.float32(q.zero_point)
    errors = np.zeros((len(moves), steps.shape[1]))
    for k, move in enumerate(moves):
        error = np.clip(np.rint(steps + move), q.scheme.qmin, q.scheme.qmax) - (steps + move)
        errors[k] = np.minimum(np.square(error), FAR).sum(axis=0)
    shortest = (errors <= TIE * errors.min(axis=0)).argmax(axis=0)
    return Candidate((start.noise + OFFSETS[shortest] * q.scale).astype(np.float32), q)


def _by_group(weight: Array, site: Site, channels: int) -> Array:
    """The weight of a MatMul or Gemm [C_in, C_out] or of a Conv [C_out, C_in / groups, ...] as [groups, C_out / groups,
    C_in / groups, pixels].
    """
    w = weight if site.op == "Conv" else weight.T
    return w.reshape(channels // w.shape[1], -1, w.shape[1], int(np.prod(w.shape[2:])))


def _effect(weight: Array, site: Site, channels: int) -> Array:
    """[C_in, K] such that |e times it|^2 is the error that e makes at the output; of a Conv that of one pixel, as if its
    errors were independent of its neighbours' and of the other channels'.
    """
    if site.op != "Conv":
        return weight
    return np.diag(np.sqrt(np.square(_by_group(weight, site, channels)).sum(axis=(1, 3)).reshape(-1)))


METHOD = NoisyQuant
