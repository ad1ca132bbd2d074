"""Bias Compensation: cancel the mean error that a quantized layer makes.

    y' = G(xh) + b        b = E[F(xh) - G(xh)]

F is the float layer, G its quantized twin, both fed with what the compressed model really computes (the local target).
b is one number per output channel, folded into the layer's own bias. Where the number of tokens T is fixed (vision
transformers), the mean error depends on the token: the class token's is unlike the patches'. There b may be a table
[T, C] of low rank, b = U V, folded into the same Add: U V is computed once when the file is loaded.

Paper   Gong et al. 2024, arXiv:2404.01892, equation of the optimal bias. Its code averages over images only, a full
        table [T, C] per layer; `keep = "always"` does the same.
Cost    no operator: folded into the layer's bias (one Add where a MatMul has none). r (T + C) numbers for a table.
Gate    a channel is kept where |b| exceeds its standard error twice; b is kept where held-out samples improve, a table
        where it lowers their error further.
Limits  removes the mean of the error, not its spread; trusts the calibration data.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Literal, final

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, Batch, Compensation, Fit, Outcome, Samples, add_bias, is_held_out

TRIM = 0.05
FLOAT32 = 1
"""ONNX's number of the element type."""
SAMPLES, IN_A_ROW = 128, 8
"""Samples that a bias per channel is fitted to and judged by, or up to twice as many; and in a row, for some are held out."""
RANK_GAIN_DB = 0.02
"""What a rank must gain over a lower one."""


@dataclass(frozen=True)
class SampleErrors:
    """The errors of some samples, over their typical tokens. Per sample: its number, the mean error per channel [N, C],
    the mean squared error and the mean output energy [N], both summed over channels. Per token, apart for fitted and
    held-out samples and with no token left out, sums [2, T, C + 2] (T = 0 where it is not fixed): of its errors, of their
    squares over all channels, and of ones.
    """

    index: Array
    mean: Array
    error: Array
    energy: Array
    tokens: Array

    @classmethod
    def of(cls, batch: Batch, channel_axis: int, trim: float, *, per_token: bool = False, step: int = 1) -> SampleErrors:
        """Collect from the reads f_xh and g_xh. A token is one position on all axes but the channel's; the share `trim`
        of each sample's tokens with the largest error is left out. `per_token`: T is the second axis of rank 3. Of a batch
        that does not begin in one of `step` times `IN_A_ROW` samples nothing is read.
        """
        if batch.indices[0] // IN_A_ROW % step:
            return cls(*[np.zeros(0)] * 5)
        pairs = list(zip(batch.read("f_xh"), batch.read("g_xh"), strict=True))
        first, index = pairs[0][0], np.array(batch.indices[: len(pairs)])
        length, channels = first.shape[1] if per_token and first.ndim == 3 else 0, first.shape[channel_axis]
        # tokens along an axis of their own, in the order in which they lie: [N, T, C], or behind a Conv [N, C, T]
        names, shape = ("ntc", (1, -1, channels)) if channel_axis == -1 else ("nct", (len(first), channels, -1))
        rows, tokens, squares = [], np.zeros((2, length, channels), np.float32), np.zeros((2, length, 2), np.float32)
        for number, pair in zip(index, pairs, strict=True):
            f, g = (a.reshape(shape) for a in pair)
            e = f - g
            errors, energies = (np.einsum(f"{names},{names}->nt", a, a) for a in (e, f))
            count = errors.size
            n = max(int(np.ceil(count * (1.0 - trim))), 1)
            kept = np.ones(errors.shape, np.float32)
            if n < count:
                kept.reshape(-1)[np.argpartition(errors.reshape(-1), n - 1)[n:]] = 0.0
            sums = (float(np.sum(a * kept, dtype=np.float64)) / n for a in (errors, energies))
            rows.append((np.einsum(f"nt,{names}->c", kept, e).astype(np.float64) / n, *sums))
            for part, square in zip(e.reshape(-1, length, channels), errors.reshape(-1, length), strict=True) if length else ():
                tokens[int(is_held_out(number))] += part
                squares[int(is_held_out(number))] += np.stack([square, np.ones_like(square)], axis=1)
        mean, error, energy = (np.array(column) for column in zip(*rows, strict=True))
        return cls(index, mean, error, energy, np.concatenate([tokens, squares], axis=2))

    def __add__(self, other: SampleErrors) -> SampleErrors:
        """Both, in sample order."""
        if not (self.index.size and other.index.size):
            return self if self.index.size else other
        joined = {k: np.concatenate([getattr(self, k), getattr(other, k)]) for k in ("index", "mean", "error", "energy")}
        return SampleErrors(**joined, tokens=self.tokens + other.tokens)


@final
@dataclass(frozen=True)
class BiasCompensation(Compensation):
    """Bias Compensation: local target, per channel or per token, folded, gated."""

    significance: NonNegativeFloat = 2.0
    """A channel's b is kept where |b| exceeds this many standard errors; 0 keeps every channel."""
    trim: Annotated[float, Field(ge=0, lt=1)] = TRIM
    """Share of each sample's tokens, those of the largest error, that the bias per channel does not look at: a few
    outliers (attention sinks, clipped activations) would otherwise move all the others. 0 is the paper's plain mean."""
    tokens: bool = True
    """Allow one bias per token where their number is fixed."""
    level: Literal["layer", "block", "output"] = "layer"
    """What is fitted: every `layer`, every `block` of the residual stream, or the model's `output`."""
    rank: NonNegativeInt = 4
    """Largest rank of a table per token; 0 stores the full table, T C numbers per layer, as the paper does."""
    table_gain: NonNegativeFloat = 0.5
    """What a table, an Add of its own, must gain over one number per channel, which the kernel adds for nothing, dB."""

    @property
    def scope(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.level

    def fit(self, place: Site | Block, samples: Samples) -> Outcome:
        per_token = self.tokens and place.fixed_tokens
        step = 1 if per_token or self.keep == "always" else max(samples.count // SAMPLES, 1)
        how = {"channel_axis": place.channel_axis, "trim": self.trim, "per_token": per_token, "step": step}
        errors = samples.reduce(functools.partial(SampleErrors.of, **how))
        tokens, held_out = errors.tokens.shape[1], is_held_out(errors.index)
        if self.keep == "always":
            held_out[:] = False
        judged = held_out if held_out.any() else ~held_out
        b, before, energy = self._channels(errors.mean[~held_out]), errors.error[judged], errors.energy[judged]
        before_db = decibel(energy, before)
        if self.keep == "always":
            total = errors.tokens.sum(axis=0)
            table = total[:, :-2] / total[:, -1:] if tokens else b
            if not table.any():
                return Outcome(None, "there is no error to correct", None, before_db, before_db)
            return Outcome({"b": table.astype(np.float32)}, "kept as the paper does", None, before_db, None)
        if held_out.any() and tokens:
            u, v, gain = self._table(errors, b)
            if gain > 0:
                reason = f"per token, rank {u.shape[1] - 1}"
                return Outcome({"u": u, "v": v}, reason, gain, before_db, before_db + gain)
        if not b.any():
            return Outcome(None, "the mean error is not significant in any channel", 0.0, before_db, before_db)
        change = np.sum(np.square(b)) - 2.0 * errors.mean[judged] @ b
        after_db = decibel(energy, np.maximum(before + change, 0.0))
        if np.median(change / np.maximum(before, 1e-30)) >= 0.0 or change.sum() >= 0.0:
            return Outcome(None, "held-out samples do not improve", after_db - before_db, before_db, before_db)
        reason = f"{np.count_nonzero(b)} of {b.size} channels"
        return Outcome({"b": b.astype(np.float32)}, reason, after_db - before_db, before_db, after_db)

    def _channels(self, means: Array) -> Array:
        """B [C]: the mean over samples, zero where it is not significant."""
        b = means.mean(axis=0)
        if len(means) < 2 or self.keep == "always":
            return b
        standard_error = means.std(axis=0, ddof=1) / np.sqrt(len(means))
        return np.where(np.abs(b) > self.significance * standard_error, b, 0.0)

    def _table(self, errors: SampleErrors, b: Array) -> tuple[Array, Array, float]:
        """U [T, r + 1], V [r + 1, C] and the gain in dB on held-out samples: the lowest rank that is as good as any, 0
        where none beats the bias per channel.
        """
        fitted, judge = errors.tokens.astype(np.float64)
        table, held_out = fitted[:, :-2] / fitted[:, -1:], judge[0, -1]
        centre = table.mean(axis=0)
        left = np.linalg.eigh((table - centre) @ (table - centre).T)[1][:, ::-1][:, : self.rank or len(table)]
        left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])  # which sign they have is arbitrary
        right = left.T @ (table - centre)

        def loss(candidate: Array) -> float:
            """Held-out error over the error without compensation."""
            change = held_out * np.square(candidate).sum() * (len(table) / len(candidate))
            change -= 2.0 * float((candidate * judge[:, :-2]).sum())
            return max(1.0 + change / max(float(judge[:, -2].sum()), 1e-30), 1e-30)

        plain = least = min(loss(b[None]), 1.0)
        best = np.zeros((0, 0)), np.zeros((0, 0))
        for r in (r for r in (1, 2, 4, 8, 16, 32, 64, 128, len(table)) if r <= left.shape[1]):
            u = np.concatenate([left[:, :r], np.ones((len(table), 1))], axis=1).astype(np.float16)
            v = np.concatenate([right[:r], centre[None]]).astype(np.float16)
            found = loss(u.astype(np.float64) @ v.astype(np.float64))
            if 10.0 * np.log10(least / found) > (RANK_GAIN_DB if best[0].size else self.table_gain):
                best, least = (u, v), found
        return best[0], best[1], float(-10.0 * np.log10(least)) if least < plain else 0.0

    def build(self, op: Tape, place: Site | Block, fit: Fit) -> dict[str, str]:
        home = place if isinstance(place, Site) or place.last is None else place.last
        if "u" not in fit:
            return add_bias(op, home, fit["b"])
        u, v = (op("Cast", op.constant(key, fit[key]), to=FLOAT32) for key in ("u", "v"))
        return {home.y: op("Add", home.y, op("MatMul", u, v))}


def decibel(energy: Array, error: Array) -> float:
    """SQNR: the summed energy over the summed error, dB."""
    return float(10 * np.log10(max(float(energy.sum()), 1e-30) / max(float(error.sum()), 1e-30)))


METHOD = BiasCompensation
