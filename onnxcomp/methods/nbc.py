"""Nonlinear Bipolar Compensation: a small branch beside a block predicts the block's error from the block's input.

    U = L(x / a_x)    V = L((F(xh) - G(xh)) / a_e)    L(t) = sign(t) ln(1 + |t|)
    [W; b] = argmin |U W + b - V|^2 + lambda |W|^2
    y' = y + a_e L^-1( clip(L(x / a_x) W + b, -max|V|, max|V|) )      L^-1(z) = sign(z) (e^|z| - 1)

F is the float block, G its compressed twin, both fed with what the compressed model really computes (the local target).
Per channel a_x = c std(x) and a_e = c std(e), where c is searched; for c = infinity L is the identity, and the branch
linear, y' = y + x W + b. Part of the search bends the error alone: that saves the logarithm, the dearest operator, and
predicts many blocks better. In the logarithm a few large errors do not outweigh the typical token; the clip keeps the
exponential from making such errors. Behind a CNN's blocks W is a 1x1 Conv in groups of 64 channels.

Paper   arXiv:2605.16423 (its constants are not published; ours are measured). Linear: QwT, CVPR 2025.
Cost    C_in C_out weights. On ViT-Ti, in percent of the block's time: 5 linear, 8 with the error bent, 15 with both.
Gate    the branch of the highest gain in dB on held-out samples less its price, where that is above zero. The error is
        relative per token; the worst 5 % of a sample's tokens do not count.
Limits  needs some 15 tokens per input channel; trusts the calibration data; holds the errors of some 16,384
        tokens in memory, or 64 per input channel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat

from onnxcomp.errors import DataError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Tape
from onnxcomp.methods.activations import build_shared
from onnxcomp.methods.base import Array, Batch, Compensation, Fit, Outcome, Samples, is_held_out
from onnxcomp.methods.bias import TRIM
from onnxcomp.numerics.affine import NOT_FINITE, QParams, Scheme, from_range, weight_qparams
from onnxcomp.numerics.prices import X86
from onnxcomp.numerics.regression import Regression, products, rows, times
from onnxcomp.numerics.statistics import spread
from onnxcomp.runtime import each

INF = math.inf
GRID = ((1.0, 1.0), (3.0, 3.0), (10.0, 10.0), (INF, 1.0), (INF, 3.0), (INF, INF))
"""The c of x and of the error that are tried."""
Grid = Sequence[tuple[float, float]]
FINALISTS = 3
"""Pairs of c that are tried with every form of W, by what one is worth."""
SHARES = (16, 8, 4)
"""Low ranks that are tried: the width divided by these."""
GROUP = 64
"""Channels per group of a Conv."""
TOKENS, TOTAL, EACH = 1024, 1 << 14, 64
"""About so many tokens are looked at: of a sample at most, of all at least, and per input of W."""
PART = 8
"""Samples whose products are summed at a time."""
DEAD, TINY = 1e-6, 1e-30
"""Where a channel's standard deviation counts as nothing: beside the largest one, and at all."""
ONE, HUGE = np.array(1.0, np.float32), np.array(1e30, np.float32)


class Rows(NamedTuple):
    """One sample: its number, how many tokens it has, and of some of them, evenly spread: x [T, C_in], the block's
    error e [T, C_out] and the energy of its float output, summed over channels [T].
    """

    number: int
    tokens: int
    x: Array
    e: Array
    energy: Array


class Spread(NamedTuple):
    """Of all samples, per channel: the standard deviation of x and of e, the ends of x, and the largest |e|."""

    x: Array
    e: Array
    low: Array
    high: Array
    largest: Array

    @staticmethod
    def of(seen: Sequence[Rows]) -> Spread:
        """Over the tokens of all samples."""
        x, e = _deviation([s.x for s in seen]), _deviation([s.e for s in seen])
        low, high = np.min([s.x.min(axis=0) for s in seen], axis=0), np.max([s.x.max(axis=0) for s in seen], axis=0)
        return Spread(x, e, low, high, np.max([np.abs(s.e).max(axis=0) for s in seen], axis=0))

    def factor(self, c: float) -> Array:
        """1 / a_x, and 0 of a channel that never varies."""
        alive = self.x > DEAD * self.x.max()
        return alive / np.where(alive, self.x, 1.0) / (1.0 if c == INF else c)

    def unit(self, c: float) -> Array:
        """a_e."""
        return np.maximum(self.e, max(DEAD * self.e.max(), TINY)) * (1.0 if c == INF else c)


@final
@dataclass(frozen=True)
class NonlinearBipolarCompensation(Compensation):
    """Nonlinear Bipolar Compensation: local target, searched, priced, gated."""

    alpha: NonNegativeFloat = 0.0
    """c, in standard deviations, of x and of the error; inf is a linear branch. 0 tries 1, 3 and 10 on both, 1 and 3 on the
    error alone, and inf."""
    weight: Literal["auto", "float", "int8", "low-rank"] = "auto"
    """How W is stored: `float`; `int8`, with an integer MatMul (behind a CNN's block only stored so); `low-rank`, as two
    float factors; or `auto`, whichever gains most for its time."""
    ridge: PositiveFloat = 1e-3
    """lambda, in mean squares of U."""
    price: NonNegativeFloat = 0.012
    """The gain in dB that one percent of the block's time must bring; 0 takes the best at any price."""
    scope: ClassVar[str] = "block"

    def fit(self, place: Block, samples: Samples) -> Outcome:
        # Kept, not summed: every pair of c looks at them anew, and what both blocks give is computed but once.
        limit = min(TOKENS, max(TOTAL // samples.count, EACH * place.channels[0] // _groups(place) // samples.count, 1))
        seen = samples.reduce(lambda batch: tuple(_samples(batch, place, limit)))
        if any(len(s.x) != len(s.e) for s in seen):
            return Outcome(None, "its input and output do not line up")
        if not any(s.e.any() for s in seen):
            return Outcome(None, "there is no error to correct")
        always = self.keep == "always"
        fitted = [s for s in seen if always or not is_held_out(s.number)]
        judges = [s for s in seen if not always and is_held_out(s.number)] or seen
        tokens = sum(s.tokens for s in seen) / len(seen)

        def judge(branches: dict[str, Fit]) -> tuple[float, Array, Array]:
            """The error in dB as it is, the gain of each branch and the block's percent that it takes."""
            errors = each(functools.partial(_errors, branches=tuple(branches.values())), judges)
            db = -10.0 * np.log10(np.maximum(np.mean(list(errors), axis=0), TINY))
            return float(db[0]), db[1:] - db[0], np.array([_percent(branch, place, tokens) for branch in branches.values()])

        def worth(gains: Array, percents: Array) -> Array:
            return gains - (0.0 if always else self.price) * percents

        grid = ((self.alpha, self.alpha),) if self.alpha else GRID
        spread = Spread.of(seen)
        found = dict(zip(grid, _regressions(place, spread, fitted, grid, self.ridge), strict=True))
        if len(grid) > FINALISTS:  # every c in one form, the best in all
            _, *judged = judge(dict(self._branches(place, spread, found, first=True)))
            found = {grid[i]: found[grid[i]] for i in np.sort(np.argsort(-worth(*judged), kind="stable")[:FINALISTS])}
        branches = dict(self._branches(place, spread, found))
        before_db, gains, percents = judge(branches)
        worths = worth(gains, percents)
        best = int(np.argmax(worths))
        gain, time = float(gains[best]), f"{percents[best]:.1f} % of the block's time"
        if not always and gains.max() <= 0:
            return Outcome(None, "held-out samples do not improve", float(gains.max()), before_db, before_db)
        if not always and worths[best] <= 0:
            return Outcome(None, f"{gain:.2f} dB are not worth {time}", gain, before_db, before_db)
        name, branch = list(branches.items())[best]
        return Outcome(branch, f"{name}, {time}" if place.macs else name, gain, before_db, before_db + gain)

    def _branches(
        self, block: Block, spread: Spread, found: Mapping[tuple[float, float], Regression], *, first: bool = False
    ) -> Iterator[tuple[str, Fit]]:
        """W in every form to try, or the first one, for every pair of c: in words, and as arrays."""
        integer, groups = block.channel_axis == -1, _groups(block)
        for (c_x, c_e), regression in found.items():
            factor, unit = spread.factor(c_x), spread.unit(c_e)
            # A linear branch ends behind its bias; any other has W in units of the bound and goes on with clip and L^-1.
            bound = _bent(spread.largest / unit, c_e)
            behind = unit if c_e == INF else 1.0 / np.maximum(bound, TINY)
            ends = {} if c_e == INF else {"bound": bound, "unit": unit}
            common = ends if c_x == INF else ends | {"factor": factor, "log": ONE}
            bent = "linear" if c_e == INF else f"c = {c_e:g}" + (" on the error" if c_x == INF else "")
            for form, parts in self._forms(regression, unit, integer=integer, first=first).items():
                weights = list(parts.values())
                arrays = common | {"bias": regression.bias(functools.reduce(np.matmul, weights)).reshape(-1) * behind}
                if "codes" in parts and integer:
                    low, high = (_bent(end * factor, c_x) for end in (spread.low, spread.high))
                    q = from_range(low.min(), high.max(), Scheme(8))
                    arrays |= {"factor": factor, "input_scale": q.scale, "input_zero_point": q.zero_point}
                if "factor" not in arrays:
                    weights[0] = factor.reshape(groups, -1, 1) * weights[0]
                *left, last = map(rows, weights)
                arrays |= zip(parts, [*left, last * behind[:, None]], strict=True)
                if "codes" in parts:
                    kept = _rounded(arrays["codes"])
                    q = weight_qparams(kept, 0, 8)
                    arrays |= {"codes": q.quantize(kept), "scale": q.scale}
                fit = {k: v if v.dtype.kind in "iu" else _rounded(v).astype(np.float32) for k, v in arrays.items()}
                yield f"{bent}, {form}", fit

    def _forms(self, regression: Regression, unit: Array, *, integer: bool, first: bool) -> dict[str, dict[str, Array]]:
        """W, or its two factors, in every form that is asked for, or the `first`. A Conv gains no time by integers: `auto`
        stores it in 8 bits all the same.
        """
        auto, w, forms = self.weight == "auto", regression.weight, dict[str, dict[str, Array]]()
        if self.weight == "float" or (auto and integer):
            forms["float"] = {"weight": w}
        if self.weight == "int8" or (auto and not (first and forms)):
            forms["int8"] = {"codes": w}
        if self.weight == "low-rank" or (auto and not first):
            left, right = regression.factors(unit)
            ranks = sorted({max(w.shape[1] // share, 1) for share in SHARES})
            forms |= {f"rank {rank}": {"left": left[:, :, :rank], "right": right[:, :rank]} for rank in ranks}
        return dict(list(forms.items())[:1]) if first else forms

    def build(self, op: Tape, place: Block, fit: Fit) -> dict[str, str]:
        spatial = [1] * (place.rank - 2) if place.channel_axis == 1 else []

        def stored(key: str) -> str:
            """A vector or a matrix [C_out, C_in] as the operators take it."""
            a = fit[key].reshape(*fit[key].shape, *spatial) if spatial else np.ascontiguousarray(fit[key].T)
            return op.constant(key, a)

        u = place.x
        if any(stride > 1 for stride in place.strides):
            axes = np.arange(2, 2 + len(place.strides))
            bounds = {"from": 0 * axes, "to": np.full_like(axes, np.iinfo(np.int64).max), "axes": axes}
            u = op("Slice", u, *(op.constant(k, v) for k, v in (bounds | {"steps": np.array(place.strides)}).items()))
        if "factor" in fit:
            u = op("Mul", u, stored("factor"))
        if "log" in fit:
            u = _log(op, u)
        if "input_scale" in fit:
            scale, zero = (op.constant(key, fit[key]) for key in ("input_scale", "input_zero_point"))
            u = build_shared(op, u, scale, zero, Scheme(8))
        for key in _weights(fit):
            w = stored(key)
            if key == "codes":
                w = op.abstract("Dequantize", w, op.constant("scale", fit["scale"]), bits=8, axis=0 if spatial else 1)
            bias = [op.constant("bias", fit["bias"])] if spatial and key != "left" else []
            u = op("Conv", u, w, *bias, group=_groups(place)) if spatial else op("MatMul", u, w)
        if not spatial:
            u = op("Add", u, op.constant("bias", fit["bias"]))
        if "unit" in fit:
            u = op("Mul", op("Clip", u, op.constant("minus-one", -ONE), op.constant("one", ONE)), stored("bound"))
            u = op("Mul", _exp(op, u), stored("unit"))
        return {place.y: op("Add", place.y, u)}


METHOD = NonlinearBipolarCompensation


def compensation(fit: Fit, x: Array) -> Array:
    """What the branch gives for x [T, C_in]: [T, C_out] float32, as `build` writes it down."""
    z = x * fit["factor"] if "factor" in fit else x
    if "log" in fit:
        z = _bent(z)
    if "input_scale" in fit:
        z = QParams(Scheme(8), fit["input_scale"], fit["input_zero_point"]).fake(z)
    for key in _weights(fit):
        z = times(z, fit[key] * fit["scale"][:, None] if key == "codes" else fit[key])
    z += fit["bias"]
    if "unit" in fit:
        z = np.clip(z, -1.0, 1.0) * fit["bound"]
        z = np.sign(z) * np.expm1(np.abs(z)) * fit["unit"]
    return z


def _regressions(block: Block, spread: Spread, fitted: Sequence[Rows], grid: Grid, ridge: float) -> Iterator[Regression]:
    """W for every pair of c. What two pairs have in common is computed but once."""
    pairs = {c: [e for x, e in grid if x == c] for c, _ in grid}
    factors = {c: spread.factor(c).astype(np.float32) for c in pairs}
    units = {c: (1.0 / spread.unit(c)).astype(np.float32) for _, c in grid}

    def read(part: Sequence[Rows]) -> list[list[Array]]:
        x, e = (np.concatenate([s[i] for s in part]) for i in (2, 3))
        v = {c: _bent(e * unit, c) for c, unit in units.items()}
        return [products(_bent(x * factors[c], c), [v[other] for other in pairs[c]], _groups(block)) for c in pairs]

    parts = [fitted[start : start + PART] for start in range(0, len(fitted), PART)]
    sums = functools.reduce(lambda a, b: [[*map(np.add, *both)] for both in zip(a, b, strict=True)], each(read, parts))
    found = {(c, e): (uu, uv) for c, (uu, *uvs) in zip(pairs, sums, strict=True) for e, uv in zip(pairs[c], uvs, strict=True)}
    return (Regression.of(*found[pair], ridge) for pair in grid)


def _weights(fit: Fit) -> list[str]:
    """The names of W, or of its two factors in the order in which they are applied."""
    return [key for key in ("weight", "codes", "left", "right") if key in fit]


def _log(op: Tape, t: str) -> str:
    """L(t). Sign has no vector code in ONNX Runtime, Clip has. Log(1 + Max(t, Softsign(t))) would be 3 % faster, and loses
    its digits where t is large and negative.
    """
    one = op.constant("one", ONE)
    sign = op("Clip", op("Mul", t, op.constant("huge", HUGE)), op.constant("minus-one", -ONE), one)
    return op("Mul", sign, op("Log", op("Add", op("Abs", t), one)))


def _exp(op: Tape, z: str) -> str:
    """L^-1(z) = (e^z - 1) / min(e^z, 1): one Exp and no sign."""
    power, one = op("Exp", z), op.constant("one", ONE)
    return op("Div", op("Sub", power, one), op("Clip", power, op.constant("minus-one", -ONE), one))


def _bent(t: Array, c: float = 1.0) -> Array:
    """L(t); t where c is infinite."""
    return t if c == INF else np.copysign(np.log1p(np.abs(t)), t)


def _rounded(a: Array) -> Array:
    """To 16 significant bits, which do not tell in which order the threads of a product have added up."""
    mantissa, exponent = np.frexp(a)
    return np.ldexp(np.rint(mantissa * 2.0**16), exponent - 16)


def _percent(branch: Fit, block: Block, tokens: float) -> float:
    """The branch's time in percent of the block's, for so many tokens; 0 where that is unknown."""
    inputs, outputs = tokens * block.channels[0], tokens * block.channels[1]
    macs, spatial = tokens * sum(branch[key].size for key in _weights(branch)), block.channel_axis == 1
    added = X86.branch_ns(branch, inputs, outputs, macs, spatial=spatial)
    return 100.0 * (added / X86.block_ns(block.macs, outputs, spatial=spatial)) if block.macs else 0.0


def _groups(block: Block) -> int:
    """As many groups of `GROUP` channels behind a CNN's block as divide its channels; 1 elsewhere."""
    inputs, outputs = block.channels
    wanted = max(inputs // GROUP, 1) if block.channel_axis == 1 else 1
    return next(g for g in range(wanted, 0, -1) if inputs % g == 0 and outputs % g == 0)


def _samples(batch: Batch, block: Block, limit: int) -> Iterator[Rows]:
    """Every sample of the batch, `limit` tokens of it; x where the strides take it."""
    reads = [batch.read(name) for name in ("xh", "f_xh", "g_xh")]
    for index, x, f, g in zip(batch.indices[: len(reads[0])], *reads, strict=True):
        x = x[(..., *(slice(None, None, stride) for stride in block.strides))]
        x, f, g = (np.moveaxis(a, block.channel_axis, -1).reshape(-1, a.shape[block.channel_axis]) for a in (x, f, g))
        seen = spread(len(f), limit, index)
        yield Rows(index, len(f), np.ascontiguousarray(x[seen]), f[seen] - g[seen], _squares(f[seen]))


def _errors(s: Rows, branches: Iterable[Fit]) -> Array:
    """The typical relative squared error of a sample, as it is and with each branch [1 + K]."""
    left = [s.e, *(s.e - compensation(branch, s.x) for branch in branches)]
    errors = np.array([_squares(e) for e in left]) / np.maximum(s.energy, TINY)
    kept = max(math.ceil(errors.shape[1] * (1.0 - TRIM)), 1)
    return np.sort(errors, axis=1)[:, :kept].mean(axis=1)


def _deviation(parts: Sequence[Array]) -> Array:
    """The standard deviation per channel over all parts [T, C]. Raises DataError where it is not finite."""
    tokens = sum(map(len, parts))
    mean = np.sum([a.sum(axis=0, dtype=np.float64) for a in parts], axis=0) / tokens
    squares = np.sum([np.square(a, dtype=np.float64).sum(axis=0) for a in parts], axis=0) / tokens
    if not np.isfinite(squares).all():
        raise DataError(NOT_FINITE)
    return np.sqrt(np.maximum(squares - np.square(mean), 0.0))


def _squares(a: Array) -> Array:
    """The sum over channels [T]."""
    return np.einsum("tc,tc->t", a, a, dtype=np.float64)
