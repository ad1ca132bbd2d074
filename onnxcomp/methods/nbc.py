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
Limits  needs some 15 tokens per input channel; trusts the calibration data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from onnxcomp.errors import RecipeError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Tape
from onnxcomp.methods.activations import RatioErrors
from onnxcomp.methods.base import Array, Batch, Compensation, Fit, Outcome, Samples
from onnxcomp.methods.bias import HOLD_OUT, TRIM
from onnxcomp.numerics.affine import QParams, Scheme, from_range, weight_qparams
from onnxcomp.numerics.prices import X86
from onnxcomp.numerics.regression import Regression, Sums, rows, times
from onnxcomp.numerics.statistics import Extremes, Moments

INF = math.inf
GRID = ((1.0, 1.0), (3.0, 3.0), (10.0, 10.0), (INF, 1.0), (INF, 3.0), (INF, INF))
"""The c of x and of the error that are tried."""
FORMS = ("auto", "float", "int8", "low-rank")
SHARES = (16, 8, 4)
"""Low ranks that are tried: the width divided by these."""
GROUP = 64
"""Channels per group of a Conv."""
TOKENS = 1024
"""Tokens of a sample that are looked at."""
DEAD, TINY = 1e-6, 1e-30
"""Where a channel's standard deviation counts as nothing: beside the largest one, and at all."""
ONE, HUGE = np.array(1.0, np.float32), np.array(1e30, np.float32)


@dataclass(frozen=True)
class Rows:
    """One sample: its number, how many tokens it has, and of at most `TOKENS` of them, evenly spread: x [T, C_in], the float
    output f [T, C_out] and its error e [T, C_out].
    """

    index: int
    tokens: int
    x: Array
    f: Array
    e: Array


@dataclass(frozen=True)
class Spread:
    """Moments per channel of the block's input and of its error, the samples' numbers, and how many tokens they have."""

    x: Moments
    e: Moments
    index: tuple[int, ...]
    tokens: int

    def merge(self, other: Spread) -> Spread:
        """Both, in sample order."""
        return Spread(self.x.merge(other.x), self.e.merge(other.e), self.index + other.index, self.tokens + other.tokens)


@dataclass(frozen=True)
class Products:
    """For every pair of c: the sums over the samples to fit to, and over all the largest |V| of each channel [C_out] and the
    extremes of U.
    """

    sums: tuple[Sums, ...]
    bound: tuple[Array, ...]
    u: tuple[Extremes, ...]

    def merge(self, other: Products) -> Products:
        """Both."""
        sums = tuple(a.merge(b) for a, b in zip(self.sums, other.sums, strict=True))
        u = tuple(a.merge(b) for a, b in zip(self.u, other.u, strict=True))
        return Products(sums, tuple(map(np.maximum, self.bound, other.bound)), u)


@dataclass(frozen=True)
class Scales:
    """For every pair of c [A]: the factors on x [A, C_in], zero for a constant channel, and a_e [A, C_out]."""

    grid: tuple[tuple[float, float], ...]
    x: Array
    e: Array

    @classmethod
    def of(cls, spread: Spread, grid: tuple[tuple[float, float], ...]) -> Scales:
        """From standard deviations; where c is infinite they are taken as they are."""
        c = np.array([[c if math.isfinite(c) else 1.0 for c in pair] for pair in grid])
        x, e = np.sqrt(spread.x.variance), np.sqrt(spread.e.variance)
        alive = x > DEAD * x.max()
        return cls(grid, alive / np.where(alive, x, 1.0) / c[:, :1], np.maximum(e, max(DEAD * e.max(), TINY)) * c[:, 1:])


@dataclass(frozen=True)
class Branch:
    """One way to compensate: in words, as arrays, and its time in percent of the block's (0 where that is unknown)."""

    name: str
    fit: dict[str, Array]
    percent: float


@final
@dataclass(frozen=True)
class NonlinearBipolarCompensation(Compensation):
    """Nonlinear Bipolar Compensation: local target, searched, priced, gated."""

    alpha: float = 0.0
    """c, in standard deviations, of x and of the error; inf is a linear branch. 0 tries 1, 3 and 10 on both, 1 and 3 on the
    error alone, and inf."""
    weight: str = "auto"
    """How W is stored: `float`; `int8`, with an integer MatMul (behind a CNN's block only stored so); `low-rank`, as two
    float factors; or `auto`, whichever gains most for its time."""
    ridge: float = 1e-3
    """lambda, in mean squares of U."""
    price: float = 0.012
    """The gain in dB that one percent of the block's time must bring; 0 takes the best at any price."""
    reads: ClassVar[frozenset[str]] = frozenset({"xh", "f_xh", "g_xh"})

    @property
    def scope(self) -> str:
        return "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.alpha >= 0 and self.ridge > 0 and self.price >= 0):
            raise RecipeError("alpha and price must not be negative, and ridge must be positive.")
        if self.weight not in FORMS:
            raise RecipeError(f"weight = '{self.weight}' is unknown. Use one of: {', '.join(FORMS)}.")

    def fit(self, place: Block, samples: Samples) -> Outcome:
        spread = samples.reduce(lambda batch: _spread(batch, place), self.reads)
        if spread.x.count != spread.e.count:
            return Outcome(None, "its input and output do not line up")
        if not spread.e.squares.any():
            return Outcome(None, "there is no error to correct")
        always = self.keep == "always"
        held_out = set() if always else {i for i in spread.index if i % HOLD_OUT == HOLD_OUT - 1}
        scales = Scales.of(spread, ((self.alpha, self.alpha),) if self.alpha else GRID)
        products = samples.reduce(lambda batch: _products(batch, place, scales, held_out), self.reads)
        branches = self._branches(place, scales, products, spread.tokens / len(spread.index))
        judges = held_out or set(spread.index)
        errors = samples.reduce(lambda batch: _errors(batch, place, branches, judges), self.reads).errors
        db = -10.0 * np.log10(np.maximum(errors / len(judges), TINY))
        gains, prices = db[1:] - db[0], np.array([0.0 if always else self.price * branch.percent for branch in branches])
        best = int(np.argmax(gains - prices))
        gain, before_db, chosen = float(gains[best]), float(db[0]), branches[best]
        if gains.max() <= 0 and not always:
            return Outcome(None, "held-out samples do not improve", float(gains.max()), before_db, before_db)
        if gain <= prices[best] and not always:
            reason = f"{gain:.2f} dB are not worth {chosen.percent:.1f} % of the block's time"
            return Outcome(None, reason, gain, before_db, before_db)
        time = f", {chosen.percent:.1f} % of the block's time" if place.macs else ""
        return Outcome(chosen.fit, chosen.name + time, gain, before_db, float(db[best + 1]))

    def _branches(self, block: Block, scales: Scales, products: Products, tokens: float) -> list[Branch]:
        """Every branch to try."""
        found: list[Branch] = []
        integer = block.channel_axis == -1
        for i, (c_x, c_e) in enumerate(scales.grid):
            regression = Regression.of(products.sums[i], self.ridge)
            groups = len(regression.weight)
            unit, inverse = scales.e[i].reshape(groups, 1, -1), scales.x[i].reshape(groups, -1, 1)
            # A linear branch ends behind its bias; any other has W in units of the bound and goes on with clip and L^-1.
            behind, common = unit, dict[str, Array]()
            if c_e != INF:
                behind = 1.0 / np.maximum(products.bound[i], TINY).reshape(groups, 1, -1)
                common |= {"bound": products.bound[i], "unit": scales.e[i]}
            if c_x != INF:
                common |= {"factor": scales.x[i], "log": ONE}
            bent = "linear" if c_e == INF else f"c = {c_e:g}" + (" on the error" if c_x == INF else "")
            for form, left, right in self._factors(regression, unit, integer=integer):
                w = left if right is None else left @ right
                arrays = common | {"bias": (regression.bias(w) * behind).reshape(-1)}
                if form == "int8" and integer:
                    q = from_range(products.u[i].min, products.u[i].max, Scheme(8))
                    arrays |= {"factor": scales.x[i], "input_scale": q.scale, "input_zero_point": q.zero_point}
                if "factor" not in arrays:
                    left = inverse * left
                if right is not None:
                    arrays |= {"left": rows(left), "right": rows(right * behind)}
                else:
                    arrays |= _codes(rows(left * behind)) if form == "int8" else {"weight": rows(left * behind)}
                arrays = {k: v if v.dtype.kind in "iu" else _rounded(v).astype(np.float32) for k, v in arrays.items()}
                percent = 100.0 * _time(arrays, block, tokens) if block.macs else 0.0
                found.append(Branch(f"{bent}, {form}", arrays, percent))
        return found

    def _factors(self, regression: Regression, unit: Array, *, integer: bool) -> Iterator[tuple[str, Array, Array | None]]:
        """W, or its two factors, in every form that is asked for. A Conv gains no time by integers: `auto` stores it in 8
        bits all the same.
        """
        w = regression.weight
        for form in ("float", "int8"):
            if self.weight == form or (self.weight == "auto" and (integer or form == "int8")):
                yield form, w, None
        if self.weight in ("auto", "low-rank"):
            left, right = regression.factors(unit)
            for rank in sorted({max(w.shape[1] // share, 1) for share in SHARES}):
                yield f"rank {rank}", left[:, :, :rank], right[:, :rank]

    def build(self, op: Tape, place: Block, fit: Fit) -> dict[str, str]:
        def channels(key: str) -> str:
            return op.constant(key, fit[key] if place.channel_axis == -1 else fit[key].reshape(-1, *[1] * (place.rank - 2)))

        u = place.x
        if any(stride > 1 for stride in place.strides):
            axes = np.arange(2, 2 + len(place.strides))
            bounds = (np.zeros_like(axes), np.full_like(axes, np.iinfo(np.int64).max), axes, np.array(place.strides))
            u = op("Slice", u, *(op.constant(k, v) for k, v in zip(("from", "to", "axes", "steps"), bounds, strict=True)))
        if "factor" in fit:
            u = op("Mul", u, channels("factor"))
        if "log" in fit:
            u = _log(op, u)
        z = _regression(op, place, fit, u)
        if "unit" in fit:
            z = op("Mul", op("Clip", z, op.constant("minus-one", -ONE), op.constant("one", ONE)), channels("bound"))
            z = op("Mul", _exp(op, z), channels("unit"))
        return {place.y: op("Add", place.y, z)}


METHOD = NonlinearBipolarCompensation


def compensation(fit: Fit, x: Array) -> Array:
    """What the branch gives for x [T, C_in]: [T, C_out] float32, as `build` writes it down."""
    u = x * fit["factor"] if "factor" in fit else x
    if "log" in fit:
        u = _bent(u)
    if "input_scale" in fit:
        u = QParams(Scheme(8), fit["input_scale"], fit["input_zero_point"]).fake(u)
    if "left" in fit:
        z = times(times(u, fit["left"]), fit["right"])
    else:
        z = times(u, fit["codes"] * fit["scale"][:, None] if "codes" in fit else fit["weight"])
    z += fit["bias"]
    if "unit" in fit:
        z = np.clip(z, -1.0, 1.0) * fit["bound"]
        z = np.sign(z) * np.expm1(np.abs(z)) * fit["unit"]
    return z


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


def _regression(op: Tape, block: Block, fit: Fit, u: str) -> str:
    """U W + b: MatMuls, or grouped 1x1 Convs."""
    conv, channels = block.channel_axis == 1, block.channels[0]
    keys = ("left", "right") if "left" in fit else ("codes",) if "codes" in fit else ("weight",)
    if "input_scale" in fit:
        q = (op.constant(key, fit[key]) for key in ("input_scale", "input_zero_point"))
        u = op.abstract("FakeQuantize", u, *q, bits=8, signed=0, granularity="static")
    for key in keys:
        stored = fit[key].reshape(*fit[key].shape, *[1] * (block.rank - 2)) if conv else np.ascontiguousarray(fit[key].T)
        w = op.constant(key, stored)
        if key == "codes":
            w = op.abstract("Dequantize", w, op.constant("scale", fit["scale"]), bits=8, axis=0 if conv else 1)
        bias = [op.constant("bias", fit["bias"])] if conv and key == keys[-1] else []
        u = op("Conv", u, w, *bias, group=channels // fit[key].shape[1]) if conv else op("MatMul", u, w)
        channels = len(fit[key])
    return u if conv else op("Add", u, op.constant("bias", fit["bias"]))


def _bent(t: Array) -> Array:
    return np.sign(t) * np.log1p(np.abs(t))


def _rounded(a: Array) -> Array:
    """To 16 significant bits, which do not tell in which order the threads of a product have added up."""
    mantissa, exponent = np.frexp(a)
    return np.ldexp(np.rint(mantissa * 2.0**16), exponent - 16)


def _codes(rows: Array) -> dict[str, Array]:
    kept = _rounded(rows)
    q = weight_qparams(kept, 0, 8)
    return {"codes": q.quantize(kept), "scale": q.scale}


def _time(fit: Fit, block: Block, tokens: float) -> float:
    """The branch's time as a share of the block's."""
    weights = [fit[key].size for key in ("weight", "codes", "left", "right") if key in fit]
    sizes = (tokens * block.channels[0], tokens * block.channels[1], tokens * sum(weights))
    spatial = block.channel_axis == 1
    marks = {"integer": "input_scale", "scaled": "factor", "log": "log", "exp": "unit"}
    added = X86.branch_ns(sizes, len(weights), spatial=spatial, **{name: key in fit for name, key in marks.items()})
    return added / X86.block_ns(block.macs, sizes[1], spatial=spatial)


def _groups(block: Block) -> int:
    """As many groups of `GROUP` channels behind a CNN's block as divide its channels; 1 elsewhere."""
    inputs, outputs = block.channels
    wanted = max(inputs // GROUP, 1) if block.channel_axis == 1 else 1
    return next(g for g in range(wanted, 0, -1) if inputs % g == 0 and outputs % g == 0)


def _samples(batch: Batch, block: Block) -> Iterator[Rows]:
    """Every sample of the batch; x where the strides take it."""
    reads = [batch.read(name) for name in ("xh", "f_xh", "g_xh")]
    for index, x, f, g in zip(batch.indices[: len(reads[0])], *reads, strict=True):
        if block.strides:
            x = x[(slice(None), slice(None), *(slice(None, None, stride) for stride in block.strides))]
        x, f, g = (np.moveaxis(a, block.channel_axis, -1).reshape(-1, a.shape[block.channel_axis]) for a in (x, f, g))
        step = -(-len(f) // TOKENS)
        yield Rows(index, len(f), x[::step], f[::step], f[::step] - g[::step])


def _spread(batch: Batch, block: Block) -> Spread:
    parts = (Spread(Moments.of(s.x), Moments.of(s.e), (s.index,), s.tokens) for s in _samples(batch, block))
    return functools.reduce(Spread.merge, parts)


def _products(batch: Batch, block: Block, scales: Scales, held_out: set[int]) -> Products:
    parts = (_sample_products(s, scales, _groups(block), fitted=s.index not in held_out) for s in _samples(batch, block))
    return functools.reduce(Products.merge, parts)


def _sample_products(sample: Rows, scales: Scales, groups: int, *, fitted: bool) -> Products:
    columns = []
    for (c_x, c_e), x_scale, e_scale in zip(scales.grid, scales.x, scales.e, strict=True):
        u, v = sample.x * x_scale, sample.e / e_scale
        u, v = (a if c == INF else _bent(a) for a, c in ((u, c_x), (v, c_e)))
        fold = slice(None if fitted else 0)
        columns.append((Sums.of(u[fold], v[fold], groups), np.abs(v).max(axis=0), Extremes.of(u)))
    return Products(*zip(*columns, strict=True))


def _errors(batch: Batch, block: Block, branches: Sequence[Branch], judges: set[int]) -> RatioErrors:
    """Of the samples to judge by: the typical relative squared error, as it is and with each branch [1 + K], summed."""
    total = np.zeros(1 + len(branches))
    for sample in _samples(batch, block):
        if sample.index in judges:
            left = [sample.e, *(sample.e - compensation(branch.fit, sample.x) for branch in branches)]
            errors = np.array([_squares(e) for e in left]) / np.maximum(_squares(sample.f), TINY)
            kept = max(math.ceil(errors.shape[1] * (1.0 - TRIM)), 1)
            total += np.sort(errors, axis=1)[:, :kept].mean(axis=1)
    return RatioErrors(total)


def _squares(a: Array) -> Array:
    """The sum over channels [T]."""
    return np.einsum("tc,tc->t", a, a, dtype=np.float64)
