"""Orthogonal transforms that spread outliers over the channels, computed by adding and never as a matrix product.

    K = H (x) C     H: Walsh-Hadamard of the largest power of two in d; C: DCT-II of what is left. Column 0 is constant
    R = K S K'      S = diag(1, +-1, ...), so R = R' = R^-1 and R 1 = 1: rotating keeps each row's mean

R is its own inverse, and a LayerNormalization without affine commutes with it. The signs are those, of a few hundred drawn
from a fixed seed, that spread a single channel most evenly. Sums run in one order whatever the number of threads.

Source  offline rotation as in QuaRot (arXiv:2404.00456, section 3); the constraint R 1 = 1 keeps LayerNormalization.
Cost    d (log2 d + the odd part of d) additions per row.
"""

from functools import cache

import numpy as np

Array = np.ndarray
DRAWS = 256


def rotate(x: Array, axis: int = -1) -> Array:
    """Compute x R along `axis`, in float64."""
    signs = _signs(x.shape[axis])
    return np.moveaxis(_transform(_transform(np.moveaxis(x, axis, -1)) * signs, inverse=True), -1, axis)


def rotation(d: int) -> Array:
    """R as a matrix [d, d], float64."""
    return rotate(np.eye(d))


def _transform(x: Array, *, inverse: bool = False) -> Array:
    """Compute x K along the last axis, or x K', in float64."""
    d = x.shape[-1]
    rows, odd = np.ascontiguousarray(x.astype(np.float64).reshape(-1, d).T), d // (d & -d)  # by column: those are added up
    c = _cosines(odd)
    rows = np.einsum("hmn,mk->hkn", rows.reshape(d // odd, odd, -1), c.T if inverse else c)
    step = 1
    while step < d // odd:
        pairs = rows.reshape(-1, 2, step, odd, rows.shape[-1])
        rows = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        rows *= np.sqrt(0.5)
        step *= 2
    return np.ascontiguousarray(rows.reshape(d, -1).T).reshape(x.shape)


def _cosines(m: int) -> Array:
    """The orthonormal DCT-II [m, m]; column 0 is constant."""
    angles = np.pi / m * np.outer(np.arange(m) + 0.5, np.arange(m))
    return np.cos(angles) * np.where(np.arange(m), np.sqrt(2 / m), np.sqrt(1 / m))


@cache
def _signs(d: int) -> Array:
    """The diagonal of S [d]."""
    drawn = np.where(np.random.default_rng(0).random((DRAWS, d)) < 0.5, -1.0, 1.0)
    drawn[:, 0] = 1.0
    odd = d // (d & -d)
    units = _transform(np.eye(d)[:odd])  # the others are these, their channels exchanged
    spread = np.abs(_transform(units * drawn[:, None], inverse=True)).max(axis=(1, 2))
    return drawn[int(np.argmin(spread))]
