"""What several parts say about arrays: type and shape in words, how far two are apart, and one made up to be fed.

    SQNR = 10 log10( sum r^2 / sum (r - o)^2 )  dB          r: the reference, o: the other array

Limits: where the reference is not finite (a mask, say) there is no signal, and what the other holds does not matter.
"""

from collections.abc import Mapping, Sequence

import numpy as np

EQUAL_DB = 200.0
"""SQNR of equal arrays, and the cap of any other."""


def describe(dtype: object, shape: Sequence[int | str | None] | None) -> str:
    """`float32[N, ?, 3]`, where a size without a name is `?`; `float32 of unknown rank` for a shape of None."""
    if shape is None:
        return f"{dtype} of unknown rank"
    return f"{dtype}[{', '.join('?' if size is None else str(size) for size in shape)}]"


def made_up(
    dtype: np.dtype | None, shape: Sequence[int | str | None], rng: np.random.Generator,
    lengths: Mapping[str, int] | None = None, whole: int = 1,
) -> np.ndarray:  # fmt: skip
    """Standard normal numbers for a floating type, empty strings or `whole` else; a size that is no number is what `lengths`
    says of its name, or 1.
    """
    sizes = [size if isinstance(size, int) else (lengths or {}).get(size or "", 1) for size in shape]
    if dtype is not None and dtype.kind == "f":
        return rng.standard_normal(sizes).astype(dtype)
    return np.full(sizes, "" if dtype is not None and dtype.kind == "O" else whole, dtype)


def energies(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Signal and noise: the sums of r^2 and (r - o)^2 in float64."""
    finite = np.isfinite(reference)
    r, o = reference[finite].astype(np.float64), other[finite].astype(np.float64)
    return float(np.square(r).sum()), float(np.square(r - o).sum())


def sqnr_db(signal: float, noise: float) -> float:
    """The formula above; `EQUAL_DB` without noise, -inf without signal or where the noise is not finite."""
    if noise == 0.0:
        return EQUAL_DB
    if signal == 0.0 or not np.isfinite(noise):
        return -np.inf
    return min(EQUAL_DB, 10 * float(np.log10(signal / noise)))
