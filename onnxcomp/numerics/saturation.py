"""Where an x86 CPU without VNNI computes 8-bit products wrongly: it adds them in pairs of neighbours in 16 bits, saturating.

    a[2p] w[2p] + a[2p + 1] w[2p + 1]  outside  -32768 .. 32767        a unsigned, w signed, in the order of the kernel

Only weights of one sign can do that. A MatMul's inputs are in their own order, a Conv's by position and then by channel, each
group for itself; a depthwise Conv has a kernel of its own, which is exact. Weights of 7 bits never saturate, for
2 * 255 * 64 < 32768. Seen on an EPYC 7003.

How far a pair of activations reaches is kept for a few directions; between two of them w . a is bounded by both, to 0.5 %.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.affine import Codes

ANGLES = np.linspace(0.0, np.pi / 2, 9)
STEP = ANGLES[1]
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)]).astype(np.float32)
LIMIT = np.iinfo(np.int16).max - 2 * 127
"""With room for two activations that come out one code higher than they did at calibration."""
WIDER = np.geomspace(1.0, 2.0, 9)
"""Times the step of an output channel, to try; at twice the step nothing saturates."""
CHUNK, VALUES = 1 << 18, 3 << 14
"""Weights, and codes of activations, that are looked at together."""
Reach = np.ndarray
"""[pairs, angles]: the largest a[2p] cos + a[2p + 1] sin."""


def reach(codes: np.ndarray) -> Reach:
    """How far the pairs of activation codes [T, C] reach."""
    codes = np.pad(codes, ((0, 0), (0, 1))) if codes.shape[1] % 2 else codes
    rows = max(VALUES // codes.shape[1], 1)
    parts = (codes[at : at + rows].astype(np.float32).reshape(-1, 2) @ DIRECTIONS for at in range(0, len(codes), rows))
    return functools.reduce(np.maximum, (part.reshape(-1, codes.shape[1] // 2, len(ANGLES)).max(axis=0) for part in parts))


def is_exact(codes: Codes, groups: int) -> bool:
    """Whether these are the codes of a depthwise Conv."""
    return codes.ndim > 2 and codes.shape[1] == 1 < groups == len(codes)


def crowded(codes: Codes, highest: np.ndarray, groups: int) -> np.ndarray:
    """The pairs of channels, bool [pairs], whose products would leave 16 bits were both at their `highest`: those whose `reach`
    matters to `hold`.
    """
    pairs, rows = reach(highest[None]), _rows(codes, groups)
    if groups > 1 and codes.shape[1] % 2:  # neighbours are of two groups
        return np.zeros(len(pairs), bool)
    orders = _orders(codes, highest, pairs, groups)[0]
    found = np.zeros((groups, len(orders[0].places)), bool)
    for over, mine, order in zip(found, rows, orders, strict=True):
        for some in np.array_split(mine, -(-mine.size // CHUNK) or 1):
            over[_over(some, order)[1]] = True
    return found.reshape(groups, -1, len(pairs) // groups).any(axis=1).reshape(-1)


def hold(
    w: NDArray[np.floating], codes: Codes, scale: NDArray[np.float32], highest: np.ndarray, pairs: Reach, groups: int = 1
) -> tuple[Codes, NDArray[np.float32]]:
    """Codes (int8) and scales [C_out] for the weight w, near the given ones, of which no two products leave 16 bits.

    codes: of w, [K, N] of a MatMul or [C_out, C_in / groups, ...] of a Conv; highest: the largest activation code of each
    channel, [K] or [C_in]; pairs: the `reach` of these. A channel that may saturate has the step, up to twice its own, that
    lets it come closest to w once the pairs that still leave 16 bits are shortened to what fits.
    """
    if is_exact(codes, groups):
        return codes, scale
    rows, orders, steps = _rows(codes, groups), _orders(codes, highest, pairs, groups), scale.reshape(groups, -1).copy()
    wanted = _rows(w, groups)
    for g in range(groups):
        mine = [order[g] for order in orders]
        for some in np.array_split(np.arange(rows.shape[1]), -(-rows[g].size // CHUNK) or 1):
            some = some[np.unique(np.concatenate([_over(rows[g, some], order)[0] for order in mine]))]
            rows[g, some], steps[g, some] = _nearest(wanted[g, some].astype(np.float64), steps[g, some], mine)
    rows, steps = rows.reshape(-1, rows.shape[2])[:, :-1], steps.reshape(-1)
    if codes.ndim == 2:
        return np.ascontiguousarray(rows.T), steps
    behind = rows.reshape(len(codes), *codes.shape[2:], codes.shape[1])
    return np.ascontiguousarray(np.moveaxis(behind, -1, 1)), steps


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
            row, pair, sums = _over(codes, order)
            at = row[:, None], order.places[pair]
            codes[at] = np.trunc(codes[at] * (LIMIT / sums)[:, None])
        error = np.square(codes * step[:, None] - w).sum(axis=1)
        better = error < least
        best[better], steps[better], least[better] = codes[better], step[better], error[better]
    return best, steps


def _over(rows: np.ndarray, order: _Pairs) -> tuple[np.ndarray, np.ndarray, NDArray[np.float64]]:
    """The row and the pair of every two weights in rows [R, K + 1] whose products may leave 16 bits in sum, and how large
    their sum may be. Weights of two signs always fit.
    """
    w = rows[:, order.places].astype(np.float32)
    most = np.abs(w[..., 0] * order.top[:, 0] + w[..., 1] * order.top[:, -1])  # were both at their largest at once
    row, pair = np.nonzero((most > LIMIT) & (w[..., 0] * w[..., 1] > 0))
    w = np.abs(w[row, pair]).astype(np.float64)
    length, angle = np.hypot(w[:, 0], w[:, 1]), np.arctan2(w[:, 1], w[:, 0])
    before = np.minimum((angle / STEP).astype(int), len(ANGLES) - 2)
    low, high = order.top[pair, before], order.top[pair, before + 1]
    sums = length / np.sin(STEP) * (np.sin(ANGLES[before + 1] - angle) * low + np.sin(angle - ANGLES[before]) * high)
    over = sums > LIMIT
    return row[over], pair[over], sums[over]
