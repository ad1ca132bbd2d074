"""Ridge regression in groups, from sums over the data, and its approximation by a product of two thin matrices.

    [W; b] = argmin |U W + b - V|^2 + lambda |W|^2        lambda = ridge * the mean variance of U's columns

The bias is not shrunk. Of all W' of rank r, P_r S_r Q_r' back in U's coordinates is the one with the least |U (W - W')|:
with S = U'U = L L' it comes from the singular vectors of L' W. Sums are float64, the products of one pair of u and v as
precise as these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TINY = 1e-12
"""Added to lambda, in units of the largest variance, so that columns that never vary can be solved for."""


def split(a: NDArray, groups: int) -> NDArray:
    """[T, n] as [G, T, n / G]."""
    return a.reshape(len(a), groups, a.shape[1] // groups).transpose(1, 0, 2)


def times(x: NDArray, rows: NDArray) -> NDArray:
    """X [T, n] times W, given as one row per output channel [m, c] of n / c groups: [T, m]."""
    groups = x.shape[1] // rows.shape[1]
    product = split(x, groups) @ rows.reshape(groups, -1, rows.shape[1]).transpose(0, 2, 1)
    return product.transpose(1, 0, 2).reshape(len(x), -1)


def rows(weight: NDArray) -> NDArray:
    """W [G, c, o] as one row per output channel [G o, c]."""
    return weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])


def products(u: NDArray, vs: Iterable[NDArray], groups: int) -> list[Floats]:
    """U'U, and U'V for every V, of u [T, n] with a column of ones behind each group and each v [T, m]."""
    left = np.concatenate([split(u, groups), np.ones((groups, len(u), 1), u.dtype)], axis=2)
    return [(left.transpose(0, 2, 1) @ right).astype(np.float64) for right in (left, *(split(v, groups) for v in vs))]


@dataclass(frozen=True, eq=False)
class Regression:
    """W [G, c, o] of G groups, the means of U [G, 1, c] and V [G, 1, o], and U's covariance [G, c, c], lambda included."""

    weight: Floats
    u: Floats
    v: Floats
    covariance: Floats

    @staticmethod
    def of(uu: Floats, uv: Floats, ridge: float) -> Regression:
        """Fitted to the sums of all `products`: U'U [G, c + 1, c + 1] and U'V [G, c + 1, o], U with a column of ones behind."""
        uu, uv = uu / uu[0, -1, -1], uv / uu[0, -1, -1]
        u, v = uu[:, -1:, :-1], uv[:, -1:]
        covariance = uu[:, :-1, :-1] - u.transpose(0, 2, 1) @ u
        variance = np.einsum("gcc->gc", covariance)
        variance += ridge * variance.mean(axis=1, keepdims=True) + TINY * variance.max() + 1e-300
        return Regression(np.linalg.solve(covariance, uv[:, :-1] - u.transpose(0, 2, 1) @ v), u, v, covariance)

    def bias(self, weight: Floats) -> Floats:
        """The b [G, 1, o] that goes with another W."""
        return self.v - self.u @ weight

    def factors(self, unit: Floats) -> tuple[Floats, Floats]:
        """[G, c, n] and [G, n, o], n = min(c, o), whose product is W and whose first r columns and rows give the W of rank
        r with the least squared error, column o of V counting in `unit`s [G o].
        """
        unit = unit.reshape(len(self.v), 1, -1)
        upper = np.linalg.cholesky(self.covariance).transpose(0, 2, 1)
        product = upper @ (self.weight * unit)
        right = np.linalg.eigh(product.transpose(0, 2, 1) @ product)[1][:, :, ::-1][:, :, : product.shape[1]]
        return np.linalg.solve(upper, product @ right), right.transpose(0, 2, 1) / unit
