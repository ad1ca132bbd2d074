"""Where an x86 CPU without VNNI computes 8-bit products wrongly: it adds them in pairs of neighbours in 16 bits, saturating.

    a[2p] w[2p] + a[2p + 1] w[2p + 1]  outside  -32768 .. 32767        a unsigned, w signed, in the order of the kernel

Only weights of one sign can do that. A MatMul's inputs are in their own order, a Conv's by position and then by channel, each
group for itself; a depthwise Conv has a kernel of its own, which is exact. Weights of 7 bits never saturate, for
2 * 255 * 64 < 32768. Seen on an EPYC 7003.

How far a pair of activations reaches is kept for a few directions; between two of them w . a is bounded by both, to 0.5 %.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.affine import Codes

ANGLES = np.linspace(0.0, np.pi / 2, 9)
STEP = ANGLES[1]
LIMIT = np.iinfo(np.int16).max - 2 * 127
"""With room for two activations that come out one code higher than they did at calibration."""
WIDER = np.geomspace(1.0, 2.0, 9)
"""Times the step of an output channel, to try; at twice the step nothing saturates."""
CHUNK = 1 << 18
Reach = np.ndarray
"""[pairs, angles]: the largest a[2p] cos + a[2p + 1] sin."""


def reach(codes: np.ndarray) -> Reach:
    """How far the pairs of activation codes [T, C] reach."""
    pairs = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).reshape(len(codes), -1, 2)
    return np.stack([(pairs @ [np.cos(angle), np.sin(angle)]).max(axis=0) for angle in ANGLES], axis=-1)


def hold(
    w: NDArray[np.floating], codes: Codes, scale: NDArray[np.float32], highest: np.ndarray, pairs: Reach, groups: int = 1
) -> tuple[Codes, NDArray[np.float32], int]:
    """Codes (int8) and scales [C_out] for the weight w, near the given ones, of which no two products leave 16 bits, and of how
    many output channels they are others.

    codes: of w, [K, N] of a MatMul or [C_out, C_in / groups, ...] of a Conv; highest: the largest activation code of each
    channel, [K] or [C_in]; pairs: the `reach` of these. A channel that may saturate has the step, up to twice its own, that
    lets it come closest to w once the pairs that still leave 16 bits are shortened to what fits.
    """
    if codes.ndim > 2 and codes.shape[1] == 1 < groups == len(codes):
        return codes, scale, 0
    rows, orders, steps = _rows(codes, groups), _orders(codes, highest, pairs, groups), scale.reshape(groups, -1).copy()
    wanted, changed = _rows(w, groups), 0
    for g in range(groups):
        mine = [order[g] for order in orders]
        for some in np.array_split(np.arange(rows.shape[1]), -(-rows[g].size // CHUNK) or 1):
            some = some[np.any([(_bounds(rows[g, some], order) > LIMIT).any(axis=1) for order in mine], axis=0)]
            rows[g, some], steps[g, some] = _nearest(wanted[g, some].astype(np.float64), steps[g, some], mine)
            changed += len(some)
    rows, steps = rows.reshape(-1, rows.shape[2])[:, :-1], steps.reshape(-1)
    if codes.ndim == 2:
        return np.ascontiguousarray(rows.T), steps, changed
    behind = rows.reshape(len(codes), *codes.shape[2:], codes.shape[1])
    return np.ascontiguousarray(np.moveaxis(behind, -1, 1)), steps, changed


@dataclass(frozen=True)
class _Pairs:
    """Which inputs of a row are neighbours, [pairs, 2], and how far what meets them reaches."""

    places: np.ndarray
    top: Reach


def _rows(weight: np.ndarray, groups: int) -> np.ndarray:
    """The weight as [groups, outputs, K + 1]: its inputs in the order of the kernel, and 0."""
    rows = weight.T if weight.ndim == 2 else np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    return np.pad(rows, ((0, 0), (0, 1))).reshape(groups, len(rows) // groups, -1)


def _orders(codes: Codes, highest: np.ndarray, pairs: Reach, groups: int) -> list[list[_Pairs]]:
    """The pairs of each group, in each order that its inputs may be stored in: those of an odd number of channels as they are,
    or with a channel of zeros behind each position (`targets.filling`).
    """
    taps = codes[0, 0].size if codes.ndim > 2 else 1
    channels = codes.shape[1] if codes.ndim > 2 else len(codes)
    at = np.pad(np.arange(taps * channels).reshape(taps, -1), ((0, 0), (0, channels % 2)), constant_values=taps * channels)
    if channels % 2 and groups > 1:  # there the last channel is paired with one of the next group
        pairs = np.concatenate([reach(top[None]) for top in highest.reshape(groups, -1)])
    tops = np.tile(pairs.reshape(groups, -1, len(ANGLES)), (1, taps, 1))
    found = [[_Pairs(at.reshape(-1, 2), top) for top in tops]]
    if channels % 2 and taps > 1:  # neighbours lie at different positions, so nothing is known of them together
        size = taps * channels
        places = np.arange(size + size % 2).reshape(-1, 2)
        found.append([_Pairs(places, reach(np.tile(top, taps)[None])) for top in highest.reshape(groups, -1)])
    return found


def _nearest(w: NDArray[np.float64], scale: NDArray[np.float32], orders: list[_Pairs]) -> tuple[Codes, NDArray[np.float32]]:
    """Codes and scales of rows w [R, K + 1] of least squared error among those that `WIDER` gives."""
    best, steps, least = np.zeros(w.shape, np.int8), scale.copy(), np.full(len(w), np.inf)
    for factor in WIDER:
        step = (scale * factor).astype(np.float32)
        codes = np.clip(np.rint(w / step[:, None]), -128, 127)
        for order in orders:
            fits = np.minimum(LIMIT / np.maximum(_bounds(codes, order), 1.0), 1.0)
            codes[:, order.places] = np.trunc(codes[:, order.places] * fits[..., None])
        error = np.square(codes * step[:, None] - w).sum(axis=1)
        better = error < least
        best[better], steps[better], least[better] = codes[better], step[better], error[better]
    return best, steps


def _bounds(rows: np.ndarray, order: _Pairs) -> NDArray[np.float64]:
    """[R, pairs]: no sum of two products of rows [R, K + 1] is larger, in size; 0 for weights of two signs, whose sums fit."""
    w = rows[:, order.places].astype(np.float64)
    length, angle = np.hypot(w[..., 0], w[..., 1]), np.arctan2(np.abs(w[..., 1]), np.abs(w[..., 0]))
    before, pair = np.minimum((angle / STEP).astype(int), len(ANGLES) - 2), np.arange(w.shape[1])
    low, high = order.top[pair, before], order.top[pair, before + 1]
    bound = length / np.sin(STEP) * (np.sin(ANGLES[before + 1] - angle) * low + np.sin(angle - ANGLES[before]) * high)
    return np.where(w[..., 0] * w[..., 1] > 0, bound, 0.0)
