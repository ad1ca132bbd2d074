"""The proof: a finished model is checked and run before it is moved into place.

It must pass the full checker, load with optimizations on and off, give finite outputs wherever the float model does,
agree with itself, and reproduce what calibration arrived at step by step. Two runs of a quantized model differ where a value
lies at a rounding threshold, and in a deep network one such code changes all that follow. So they may differ as two runs do
that are each as far from the float model as the quantization error:

    |y_on - z|^2 <= max(4 |z - y_float|^2, 1e-4 |y_float|^2)     z: the plain run, and what calibration arrived at

The float model is the one given, rewritten. The two may differ by roundings, of which the given model's own, with
optimizations and without, are the measure:

    |y_float - y_given|^2 <= max(100 |y_given,off - y_given|^2, 1e-6 |y_given|^2)

with 1e-4 in place of 1e-6, and what float16 cannot hold besides, where the model given computes in float16.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from types import MappingProxyType

import numpy as np

from onnxcomp.errors import ModelError, VerificationError
from onnxcomp.graph.files import check
from onnxcomp.numerics.arrays import EQUAL_DB, energies, made_up, sqnr_db
from onnxcomp.report.model import Verification
from onnxcomp.runtime import Feed, Model, Session, version

SIDES, LENGTHS = (32, 256), (32, 1024, 16384)
"""Tried for images and for what is long; the last is a second of speech."""
FLOOR = 1e-4
APART = 4.0
"""Energy of the difference of two errors, at most, over that of either: they may point in opposite directions."""
ROUNDINGS, ROUNDED, ROUNDED_HALF = 100.0, 1e-6, 1e-4
"""Energy of what rewriting does, at most, over that of what optimizing does, and over that of the output; the last where a
model in float16 was computed in float32."""


def verify(
    path: Path, reference: Session, feeds: Sequence[Feed], expected: Sequence[Feed] | None,
    picked: Collection[str] = (), *, faithful: bool = True,
) -> Verification:  # fmt: skip
    """Prove the model at `path` on `feeds`, against the float session `reference` and the outputs of the walk. Outputs that are
    `picked` must be there, and that is all. `faithful`: of the session with optimizations, see `Session`.

    Raises VerificationError with the first law that does not hold.
    """
    try:
        checker = check(path)
        on, off = (_outputs(path, feeds, picked, optimize=optimize, faithful=faithful) for optimize in (True, False))
    except ModelError as error:
        raise VerificationError(f"The quantized model does not run: {error} Nothing was written.") from None
    want = [without(reference.run(feed), picked) for feed in feeds]
    for outputs, target in zip([*on, *off], [*want, *want], strict=True):
        for name, array in target.items():
            if not np.all(np.isfinite(outputs[name][np.isfinite(array)])):
                text = f"Output '{name}' of the quantized model is not finite where the float one's is."
                raise VerificationError(f"{text} Nothing was written.")
    demand(on, off, want, "with optimizations on and off differ by more than twice the quantization error")
    expected = None if expected is None else [without(y, picked) for y in expected]
    if expected is not None:
        demand(on, expected, want, "and calibration differ by more than twice the quantization error")
    samples, calibrated = sum(_length(feed) for feed in feeds), None if expected is None else sqnr(on, expected)
    return Verification(checker, f"onnxruntime {version()}", samples, sqnr(on, off), sqnr(on, want), calibrated)


def without(outputs: Feed, left_out: Collection[str]) -> Feed:
    """The outputs but for some."""
    return {name: array for name, array in outputs.items() if name not in left_out}


def demand_equal(given: Model, rewritten: Feed, feed: Feed, picked: Collection[str] = (), *, is_half: bool = False) -> None:
    """Raise VerificationError where the outputs `rewritten`, of the float model in standard form, are not those of `given`, but
    for those that are `picked`. `is_half`: which computes in float16.
    """
    want, plain = without(Session(given).run(feed), picked), None
    for name in (name for name, array in want.items() if np.issubdtype(array.dtype, np.floating)):
        energy, difference = energies(want[name], rewritten[name])
        vanishing = want[name].size * float(np.finfo(np.float16).smallest_normal) ** 2
        if difference <= (ROUNDED_HALF * energy + vanishing if is_half else ROUNDED * energy):
            continue
        plain = plain or Session(given, optimize=False).run(feed)
        if not difference <= ROUNDINGS * energies(want[name], plain[name])[1]:
            text = f"Output '{name}': the model as it is rewritten before it is quantized is only within"
            tail = "of the one given. This is a fault of onnxcomp, please report it. Nothing was written."
            raise VerificationError(f"{text} {sqnr_db(energy, difference):.0f} dB {tail}")


def _outputs(path: Path, feeds: Sequence[Feed], picked: Collection[str], *, optimize: bool, faithful: bool) -> list[Feed]:
    session = Session(path, optimize=optimize, faithful=faithful)  # one at a time, for each holds the model
    return [without(session.run(feed), picked) for feed in feeds]


def _length(feed: Feed) -> int:
    """Samples in a feed: the length of the leading axis that its arrays share, else 1."""
    lengths = {array.shape[0] if array.ndim else 1 for array in feed.values()}
    return lengths.pop() if len(lengths) == 1 else 1


def made_up_feed(session: Session, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})) -> dict[str, np.ndarray]:
    """One feed on which the model runs, for showing that it does and how fast; never for calibration. Integers are 1, where it
    runs so, for a mask of zeros hides everything, else 0.

    Of the model's own shapes, or of `shapes` by input. Free dimensions are 1, or, where it does not run so, those of one or two
    names 2, for what a decoder attends to is as long as its cache and the new tokens together, or all but the first more, for
    images, or those of one name, for what is cut into frames. Raises ModelError if nothing runs.
    """
    wanted = {name: (kind.dtype, shapes.get(name, kind.shape or ())) for name, kind in session.inputs}
    names, errors = dict.fromkeys(n for _, shape in wanted.values() for n in shape if isinstance(n, str)), list[ModelError]()
    tried = [dict.fromkeys(some, 2) for count in range(3) for some in combinations(names, count)]
    tried += [dict.fromkeys([*names][1:], side) for side in SIDES] + [{name: n} for n in LENGTHS for name in names]
    for lengths, whole in product(tried, (1, 0)):
        rng = np.random.default_rng(0)
        feed = {name: made_up(dtype, shape, rng, lengths, whole) for name, (dtype, shape) in wanted.items()}
        try:
            session.run(feed)
        except ModelError as error:
            errors.append(error)
        else:
            return feed
    raise ModelError(f"{errors[0]} It was fed made-up inputs; pass some that it takes with --data.")


def sqnr(found: Sequence[Feed], want: Sequence[Feed]) -> float:
    """The lowest SQNR over the outputs, all feeds together, dB; 200 where all are equal."""
    return min((sqnr_db(*_energies(found, want, name)) for name in want[0]), default=EQUAL_DB)


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
