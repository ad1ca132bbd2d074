"""The proof: a finished model is checked and run before it is moved into place.

It must pass the full checker, load with optimizations on and off, give finite outputs wherever the float model does,
agree with itself, and reproduce what calibration arrived at step by step. Two runs of a quantized model differ where a value
lies at a rounding threshold, so they may differ by a part of the quantization error, never by more:

    |y_on - z|^2 <= max(|z - y_float|^2, 1e-4 |y_float|^2)     z: the plain run, and what calibration arrived at
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.errors import ModelError, VerificationError
from onnxcomp.graph.files import check
from onnxcomp.methods.base import Array
from onnxcomp.report.model import Verification

Feed = Mapping[str, Array]
Outputs = Mapping[str, Array]
EQUAL_DB = 200.0
FLOOR = 1e-4


def verify(path: Path, reference: runtime.Session, feeds: Sequence[Feed], expected: Sequence[Outputs] | None) -> Verification:
    """Prove the model at `path` on `feeds`, against the float session `reference` and the outputs of the walk.

    Raises VerificationError with the first law that does not hold.
    """
    try:
        checker = check(path)
        fast, plain = runtime.Session(path), runtime.Session(path, optimize=False)
        on, off = [fast.run(feed) for feed in feeds], [plain.run(feed) for feed in feeds]
    except ModelError as error:
        raise VerificationError(f"The quantized model does not run: {error} Nothing was written.") from None
    want = [reference.run(feed) for feed in feeds]
    for outputs, target in zip([*on, *off], [*want, *want], strict=True):
        for name, array in target.items():
            if not np.all(np.isfinite(outputs[name][np.isfinite(array)])):
                raise VerificationError(
                    f"Output '{name}' of the quantized model is not finite where the float one's is. Nothing was written."
                )
    _demand(on, off, want, "with optimizations on and off differ by more than the quantization error")
    if expected is not None:
        _demand(on, expected, want, "and calibration differ by more than the quantization error")
    return Verification(
        checker=checker,
        runtime=f"onnxruntime {runtime.version()}",
        samples=sum(_length(feed) for feed in feeds),
        agreement_db=sqnr(on, off),
        sqnr_db=sqnr(on, want),
        expected_db=None if expected is None else sqnr(on, expected),
    )


def _length(feed: Feed) -> int:
    """Samples in a feed: the length of the leading axis that its arrays share, else 1."""
    lengths = {array.shape[0] if array.ndim else 1 for array in feed.values()}
    return lengths.pop() if len(lengths) == 1 else 1


def made_up_feed(session: runtime.Session) -> dict[str, Array]:
    """One feed of the model's own shapes, free dimensions 1, for showing that a file runs; never for calibration."""
    rng, feed = np.random.default_rng(0), {}
    for name, kind in session.inputs:
        shape = tuple(n if isinstance(n, int) else 1 for n in kind.shape or ())
        if kind.dtype is not None and np.issubdtype(kind.dtype, np.floating):
            feed[name] = rng.standard_normal(shape).astype(kind.dtype)
        else:
            feed[name] = np.zeros(shape, kind.dtype)
    return feed


def sqnr(found: Sequence[Outputs], want: Sequence[Outputs]) -> float:
    """The lowest SQNR over the outputs, all feeds together, dB; 200 where all are equal."""
    worst = EQUAL_DB
    for name in want[0]:
        noise, signal = _energies(found, want, name)
        if noise > 0:
            worst = min(worst, 10 * float(np.log10(max(signal, 1e-30) / noise)))
    return worst


def _energies(found: Sequence[Outputs], want: Sequence[Outputs], name: str) -> tuple[float, float]:
    noise = signal = 0.0
    for have, target in zip(found, want, strict=True):
        b = target[name].astype(np.float64)
        finite = np.isfinite(b)
        noise += float(np.square(have[name].astype(np.float64)[finite] - b[finite]).sum())
        signal += float(np.square(b[finite]).sum())
    return noise, signal


def _demand(found: Sequence[Outputs], other: Sequence[Outputs], want: Sequence[Outputs], text: str) -> None:
    for name in want[0]:
        if not np.issubdtype(want[0][name].dtype, np.floating):
            continue
        difference, _ = _energies(found, other, name)
        error, energy = _energies(other, want, name)
        if not difference <= max(error, FLOOR * energy):  # so that NaN does not pass
            raise VerificationError(f"Output '{name}': the runs {text}. Nothing was written.")
