"""Where an x86 CPU without VNNI computes 8-bit products wrongly: it adds them in pairs of neighbours in 16 bits, saturating.

    a[2p] w[2p] + a[2p + 1] w[2p + 1]  outside  -32768 .. 32767        a unsigned, w signed, in the order of the kernel

Only weights of one sign can do that. A MatMul's inputs are in their own order, a Conv's by position and then by channel, each
group for itself; a depthwise Conv has a kernel of its own, which is exact. Weights of 7 bits never saturate, for
2 * 255 * 64 < 32768. Seen on such a CPU, emulated.

How far a pair of activations reaches is kept for a few directions; between two of them w . a is bounded by both, to 0.5 %.
"""

import numpy as np

from onnxcomp.numerics.affine import Codes

ANGLES = np.linspace(0.0, np.pi / 2, 9)
STEP = ANGLES[1]
LIMIT = np.iinfo(np.int16).max
Reach = np.ndarray
"""[pairs, angles]: the largest a[2p] cos + a[2p + 1] sin."""


def reach(codes: np.ndarray) -> Reach:
    """How far the pairs of activation codes [T, C] reach."""
    pairs = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).reshape(len(codes), -1, 2)
    return np.stack([(pairs @ [np.cos(angle), np.sin(angle)]).max(axis=0) for angle in ANGLES], axis=-1)


def may_saturate(codes: Codes, highest: np.ndarray, pairs: Reach, groups: int = 1) -> bool:
    """Whether two products may leave 16 bits.

    codes: the weight's, [K, N] of a MatMul or [C_out, C_in / groups, ...] of a Conv; highest: the largest activation code of
    each channel, [K] or [C_in]; pairs: the reach of these.
    """
    if codes.ndim > 2 and codes.shape[1] == 1:
        return False
    rows = codes.T if codes.ndim == 2 else np.moveaxis(codes, 1, -1).reshape(len(codes), -1)
    taps = codes[0, 0].size if codes.ndim > 2 else 1
    if codes.ndim > 2 and codes.shape[1] % 2:  # neighbours lie at different positions, so nothing is known of them together
        tops = np.stack([reach(np.tile(top, taps)[None]) for top in highest.reshape(groups, -1)])
    else:
        tops = np.tile(pairs.reshape(groups, -1, len(ANGLES)), (1, taps, 1))
    w = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(groups, len(rows) // groups, -1, 2).astype(np.float64)
    length, angle = np.hypot(w[..., 0], w[..., 1]), np.arctan2(*np.abs(w[..., ::-1]).T).T
    before = np.minimum((angle / STEP).astype(int), len(ANGLES) - 2)
    low, high = (np.take_along_axis(tops[:, None], (before + i)[..., None], axis=-1)[..., 0] for i in (0, 1))
    bound = length / np.sin(STEP) * (np.sin(ANGLES[before + 1] - angle) * low + np.sin(angle - ANGLES[before]) * high)
    return bool(np.any((w[..., 0] * w[..., 1] > 0) & (bound > LIMIT)))
