"""Compare two models on the same samples: how far apart their outputs are, and what that does to the answers.

    SQNR = 10 log10( sum r^2 / sum (r - o)^2 )  dB          cosine = mean over samples of  r.o / (|r| |o|)
    agreement = share of positions with argmax r = argmax o, over the last axis, where that has at least two entries

r and o are an output of the reference and of the other model. With labels, an answer is right where the argmax is the
label, and the drop is the difference of the two accuracies in points, with its standard error: both models answer the
same questions, so only the g gained and l lost answers of n count:  100 sqrt(g + l - (g - l)^2 / n) / n.

One pass; samples are run together only where that changes nothing. Limits: the models must have the same inputs and
outputs by name; outputs that are no tensors of numbers are not compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.calibrate.samples import can_stack, split
from onnxcomp.data import InputSpec, open_data
from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import files
from onnxcomp.preprocess import Preprocess
from onnxcomp.report.results import Accuracy, Comparison, OutputComparison
from onnxcomp.runtime import Session

if TYPE_CHECKING:
    from onnxcomp.graph.files import ModelProto

Array = np.ndarray
Feed = Mapping[str, Array]
EQUAL_DB = 200.0
"""SQNR of equal outputs, and the cap of any other."""
_STACKED_BYTES = 4 << 20
_STACKED_SAMPLES = 32


def compare(
    reference: str | Path | bytes | ModelProto,
    other: str | Path | bytes | ModelProto,
    data: object,
    *,
    labels: str | os.PathLike[str] | Array | None = None,
    limit: int | None = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Run both models on `data` and compare their outputs.

    data    whatever `onnxcomp.data.open_data` takes; integer labels that it carries itself are used where they fit
    labels  one whole number per answer: an array, .npy, .npz, or a `file,label` CSV; they must fit an output
    limit   compare on this many samples only, chosen with `seed`

    Raises ModelError for models that do not match, DataError for data or labels that do not fit.
    """
    left, right = Session(_loadable(reference)), Session(_loadable(other))
    _check_ports(left, right)
    specs = [InputSpec(name, kind.dtype, kind.shape) for name, kind in left.inputs if kind.dtype is not None]
    opened = open_data(data, specs, preprocess=preprocess, labels=labels, limit=limit, seed=seed)
    outputs = {name: _Output(name) for name, kind in left.outputs if kind.dtype is not None and kind.dtype.kind != "O"}
    size = _stack_size((left, right), (reference, other), opened.samples)
    done = 0
    for group in _groups(opened.samples, size):
        feed = {name: np.concatenate([one[name] for one in group]) for name in group[0]} if len(group) > 1 else group[0]
        r, o = left.run(feed, list(outputs)), right.run(feed, list(outputs))
        for name, output in outputs.items():
            if r[name].shape != o[name].shape:
                shapes = f"{list(r[name].shape)} and {list(o[name].shape)}"
                raise ModelError(f"Output '{name}' has shapes {shapes} in the two models, so they cannot be compared.")
            for a, b in zip(split(r[name], len(group)), split(o[name], len(group)), strict=True):
                output.add(a, b)
        done += len(group)
        if progress is not None:
            progress("comparing", done, len(opened.samples))
    return Comparison(
        reference=_name(reference),
        other=_name(other),
        reference_bytes=_size(reference),
        other_bytes=_size(other),
        samples=done,
        outputs=tuple(output.result() for output in outputs.values()),
        accuracy=_accuracy(list(outputs.values()), opened.labels, is_required=labels is not None),
    )


@dataclass
class _Output:
    """Sums over the samples of one output, and the answers that were given."""

    name: str
    is_float: bool = False
    signal: float = 0.0
    noise: float = 0.0
    cosines: list[float] = field(default_factory=list)
    not_finite: int = 0
    answers: list[tuple[Array, Array]] = field(default_factory=list)
    """Of each sample, flattened: the reference's and the other's."""

    def add(self, r: Array, o: Array) -> None:
        """Add one sample."""
        if r.dtype.kind in "iub":
            self.answers.append((r.ravel(), o.ravel()))
            return
        self.is_float = True
        if r.ndim and r.shape[-1] >= 2:
            self.answers.append((r.argmax(-1).ravel(), o.argmax(-1).ravel()))
        r, o = r.astype(np.float64).ravel(), o.astype(np.float64).ravel()
        # Masked positions may be -inf in the reference: they are no signal, and what stands there does not matter.
        finite = np.isfinite(r)
        r, o = r[finite], o[finite]
        lost = int(np.count_nonzero(~np.isfinite(o)))
        self.not_finite += lost
        self.signal += float(r @ r)
        self.noise += math.inf if lost else float(np.square(r - o).sum())
        norms = 0.0 if lost else math.sqrt((r @ r) * (o @ o))
        are_zero = not lost and not r.any() and not o.any()
        self.cosines.append(float(r @ o) / norms if norms > 0 else float(are_zero))

    def result(self) -> OutputComparison:
        count = sum(len(r) for r, _ in self.answers)
        same = sum(int(np.count_nonzero(r == o)) for r, o in self.answers)
        return OutputComparison(
            name=self.name,
            sqnr_db=_decibels(self.signal, self.noise) if self.is_float else None,
            cosine=float(np.mean(self.cosines)) if self.cosines else None,
            agreement=same / count if count else None,
            answers=count,
            not_finite=self.not_finite,
        )


def _accuracy(outputs: Sequence[_Output], labels: Array | None, *, is_required: bool) -> Accuracy | None:
    """Of the first output whose answers are as many as the labels, sample by sample."""
    if labels is None:
        return None
    if not np.all(np.equal(np.mod(labels, 1), 0)):
        if is_required:
            raise DataError("The labels are not whole numbers, so they name no classes.")
        return None
    rows = [np.ravel(label) for label in labels]
    for output in outputs:
        if [len(r) for r, _ in output.answers] == [len(row) for row in rows]:
            break
    else:
        if is_required:
            raise DataError(_misfit(outputs, rows))
        return None
    want = np.concatenate(rows)
    right = np.concatenate([r for r, _ in output.answers]) == want
    kept = np.concatenate([o for _, o in output.answers]) == want
    n, lost, gained = len(want), int(np.count_nonzero(right & ~kept)), int(np.count_nonzero(kept & ~right))
    return Accuracy(
        output=output.name,
        answers=n,
        reference=float(right.mean()),
        other=float(kept.mean()),
        drop_points=100 * (lost - gained) / n,
        standard_error=100 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n,
        lost=lost,
        gained=gained,
    )


def _misfit(outputs: Sequence[_Output], rows: Sequence[Array]) -> str:
    given = [f"{len(output.answers[0][0])} in '{output.name}'" for output in outputs if output.answers]
    if not given:
        return "No output has classes (a last axis of at least 2, or integers), so labels cannot be used."
    return f"The first sample has {len(rows[0])} labels, but answers: {', '.join(given)}. Give one label per answer."


def _check_ports(left: Session, right: Session) -> None:
    for what, ours, theirs in (("inputs", left.inputs, right.inputs), ("outputs", left.outputs, right.outputs)):
        a, b = [name for name, _ in ours], [name for name, _ in theirs]
        if sorted(a) != sorted(b):
            raise ModelError(f"The models have different {what}: {', '.join(a)} against {', '.join(b)}.")
    kinds = dict(right.inputs)
    for name, kind in left.inputs:
        if kind.dtype is None:
            raise ModelError(f"Input '{name}' is not a tensor, so it cannot be fed.")
        if kind.dtype != kinds[name].dtype:
            raise ModelError(
                f"Input '{name}' is {kind.dtype} in the one model and {kinds[name].dtype} in the other. "
                "Only models that take the same tensors can be compared."
            )


def _stack_size(sessions: Sequence[Session], models: Sequence[object], samples: Sequence[Feed]) -> int:
    """How many samples to run together: 1 unless both models take more and give the same answers for it."""
    if not all(can_stack(s, samples) for s in sessions) or any(_measures_ranges(model) for model in models):
        return 1
    one = sum(array.nbytes for array in samples[0].values())
    return max(1, min(_STACKED_SAMPLES, _STACKED_BYTES // max(one, 1)))


def _measures_ranges(model: object) -> bool:
    """Whether a range may be measured at run time over all samples of a batch, so that they influence each other."""
    nodes = files.load(model).graph.node  # pyright: ignore[reportArgumentType]
    return any(n.op_type.startswith("DynamicQuantize") or n.op_type in ("ReduceMax", "ReduceMin") for n in nodes)


def _groups(samples: Sequence[Feed], size: int) -> Iterator[list[Feed]]:
    """Runs of up to `size` samples of equal shapes, in order."""
    group: list[Feed] = []
    for feed in samples:
        if group and (len(group) == size or any(feed[name].shape != group[0][name].shape for name in feed)):
            yield group
            group = []
        group.append(feed)
    yield group


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return EQUAL_DB
    if signal == 0.0 or math.isinf(noise):
        return -math.inf
    return min(EQUAL_DB, 10 * math.log10(signal / noise))


def _loadable(model: str | Path | bytes | ModelProto) -> str | Path | bytes:
    return model if isinstance(model, str | Path | bytes) else files.to_bytes(model)


def _name(model: object) -> str:
    return str(model) if isinstance(model, str | Path) else "model"


def _size(model: str | Path | bytes | ModelProto) -> int:
    return files.size(model) if isinstance(model, str | Path) else len(_loadable(model))  # pyright: ignore[reportArgumentType]
