"""The exported file against torch, on three random draws: the sizes given, and other sizes where axes vary.

    tolerance = 2^12 u max|y|        u: the unit roundoff of the type, 2^-24 for float32

Sums of up to 2^12 terms, added in another order, differ by about 2^6 u of their size, and 2^6 layers add that up. In
half precision sums run in float32, which leaves one rounding per layer: 2^6 u. Integers and truth values must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.errors import VerificationError
from onnxcomp.export.inputs import Input, draw
from onnxcomp.export.network import Network, leaves
from onnxcomp.runtime import Session


@dataclass(frozen=True)
class Agreement:
    """The largest absolute difference of an output to torch, and what rounding explains of it."""

    error: float
    tolerance: float

    @property
    def share(self) -> float:
        """How much of the tolerance is used up."""
        return self.error / self.tolerance if self.error else 0.0


def check(network: Network, session: Session, inputs: Sequence[Input], rng: np.random.Generator) -> Agreement:
    """The output, of all draws, that comes closest to its tolerance. Raises VerificationError if one exceeds it."""
    found = []
    for sizes in _sizes(session, inputs):
        feed = draw(sizes, rng)
        from_torch = leaves(network.run(feed))
        values = session.run({name: feed[name] for name, _ in session.inputs})
        for (name, value), expected in zip(values.items(), from_torch, strict=True):
            agreement = Agreement(_difference(value, expected.numpy()), _tolerance(network, expected.numpy()))
            if agreement.error > agreement.tolerance:
                raise VerificationError(
                    f"{network.title}: output '{name}' of the ONNX model differs from torch by {agreement.error:.3g}, "
                    f"more than the {agreement.tolerance:.3g} that rounding explains. No file was written."
                )
            found.append(agreement)
    return max(found, key=lambda agreement: agreement.share)


def _sizes(session: Session, inputs: Sequence[Input]) -> Iterator[Sequence[Input]]:
    """The inputs as given; then, where the file's axes vary, with one row more and fewer elsewhere; then two more.

    A program may tie axes together, such as `2*s0`: then its inputs stay as they are.
    """
    shapes = {name: kind.shape or () for name, kind in session.inputs}
    symbols = [size for shape in shapes.values() for size in shape if not isinstance(size, int)]
    are_free = all(symbol is not None and symbol.isidentifier() for symbol in symbols)
    for number in range(3):
        yield [replace(i, shape=_resize(i, shapes.get(i.name, ()), number)) for i in inputs] if are_free else inputs


def _resize(described: Input, stored: Sequence[int | str | None], number: int) -> tuple[int, ...]:
    shape = list(described.shape)
    for axis in (axis for axis, size in enumerate(stored) if isinstance(size, str)):
        if axis == 0:
            shape[axis] += number
        elif number == 1:
            shape[axis] = shape[axis] // 2 if shape[axis] >= 4 else shape[axis] + 1
    return tuple(shape)


def _difference(value: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference; infinite where shapes, infinities or NaNs differ."""
    if value.shape != expected.shape:
        return np.inf
    value, expected = value.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(value[~finite], expected[~finite], equal_nan=True) or not np.isfinite(value[finite]).all():
        return np.inf
    return float(np.abs(value[finite] - expected[finite]).max(initial=0.0))


def _tolerance(network: Network, expected: np.ndarray) -> float:
    """The formula above; the roundoff is the coarser of the output's and the weights'."""
    import torch

    if expected.dtype.kind != "f":
        return 0.0
    types = [torch.from_numpy(expected).dtype, *(p.dtype for p in network.module.parameters() if p.is_floating_point())]
    roundoff = max(torch.finfo(kind).eps for kind in types) / 2
    magnitude = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    return (2.0**12 if roundoff < 2.0**-20 else 2.0**6) * roundoff * magnitude
