"""The proof: a finished model is checked and run before it is moved into place.

It must pass the full checker, load with optimizations on and off, give finite outputs wherever the float model does,
agree with itself, and reproduce what calibration arrived at step by step. Two runs of a quantized model differ where a value
lies at a rounding threshold, and in a deep network one such code changes all that follow. So they may differ as two runs do
that are each as far from the float model as the quantization error:

    |y_on - z|^2 <= max(4 |z - y_float|^2, 1e-4 |y_float|^2)     z: the plain run, and what calibration arrived at
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxcomp.errors import ModelError, VerificationError
from onnxcomp.graph.files import check
from onnxcomp.numerics.arrays import energies, made_up, sqnr_db
from onnxcomp.report.model import Verification
from onnxcomp.runtime import Feed, Session, version

FLOOR = 1e-4
APART = 4.0
"""Energy of the difference of two errors, at most, over that of either: they may point in opposite directions."""


def verify(path: Path, reference: Session, feeds: Sequence[Feed], expected: Sequence[Feed] | None) -> Verification:
    """Prove the model at `path` on `feeds`, against the float session `reference` and the outputs of the walk.

    Raises VerificationError with the first law that does not hold.
    """
    try:
        checker = check(path)
        on, off = (_outputs(path, feeds, optimize=optimize) for optimize in (True, False))
    except ModelError as error:
        raise VerificationError(f"The quantized model does not run: {error} Nothing was written.") from None
    want = [reference.run(feed) for feed in feeds]
    for outputs, target in zip([*on, *off], [*want, *want], strict=True):
        for name, array in target.items():
            if not np.all(np.isfinite(outputs[name][np.isfinite(array)])):
                text = f"Output '{name}' of the quantized model is not finite where the float one's is."
                raise VerificationError(f"{text} Nothing was written.")
    demand(on, off, want, "with optimizations on and off differ by more than twice the quantization error")
    if expected is not None:
        demand(on, expected, want, "and calibration differ by more than twice the quantization error")
    samples, calibrated = sum(_length(feed) for feed in feeds), None if expected is None else sqnr(on, expected)
    return Verification(checker, f"onnxruntime {version()}", samples, sqnr(on, off), sqnr(on, want), calibrated)


def _outputs(path: Path, feeds: Sequence[Feed], *, optimize: bool) -> list[dict[str, np.ndarray]]:
    session = Session(path, optimize=optimize)  # one at a time, for each holds the model
    return [session.run(feed) for feed in feeds]


def _length(feed: Feed) -> int:
    """Samples in a feed: the length of the leading axis that its arrays share, else 1."""
    lengths = {array.shape[0] if array.ndim else 1 for array in feed.values()}
    return lengths.pop() if len(lengths) == 1 else 1


def made_up_feed(session: Session) -> dict[str, np.ndarray]:
    """One feed of the model's own shapes, free dimensions 1, for showing that a file runs; never for calibration."""
    rng = np.random.default_rng(0)
    return {name: made_up(kind.dtype, kind.shape or (), rng) for name, kind in session.inputs}


def sqnr(found: Sequence[Feed], want: Sequence[Feed]) -> float:
    """The lowest SQNR over the outputs, all feeds together, dB; 200 where all are equal."""
    return min(sqnr_db(*_energies(found, want, name)) for name in want[0])


def _energies(found: Sequence[Feed], want: Sequence[Feed], name: str) -> np.ndarray:
    """Signal and noise of one output over all feeds."""
    return np.sum([energies(target[name], have[name]) for have, target in zip(found, want, strict=True)], axis=0)


def demand(found: Sequence[Feed], other: Sequence[Feed], want: Sequence[Feed], text: str) -> None:
    """Raise VerificationError where two runs differ by more than `other` does from the float outputs `want`."""
    for name in (name for name, array in want[0].items() if np.issubdtype(array.dtype, np.floating)):
        _, difference = _energies(found, other, name)
        energy, error = _energies(other, want, name)
        if not difference <= max(APART * error, FLOOR * energy):  # so that NaN does not pass
            raise VerificationError(f"Output '{name}': the runs {text}. Nothing was written.")
