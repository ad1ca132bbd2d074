"""Compare two models on the same samples: how far apart their outputs are, and what that does to the answers.

    SQNR = 10 log10( sum r^2 / sum (r - o)^2 )  dB          cosine = mean over samples of  r.o / (|r| |o|)
    agreement = share of positions with argmax r = argmax o, over the last axis, where that has at least two entries

r and o are an output of the reference and of the other model. With labels, an answer is right where the argmax is the
label, and the drop is the difference of the two accuracies in points, with its standard error: both models answer the
same questions, so only the g gained and l lost answers of n count:  100 sqrt(g + l - (g - l)^2 / n) / n.

Outputs that are picked (`graph.selection`) are compared where they are of one shape in both models, and what they are picked
from beside them. One pass, one sample at a time, so a range that a model measures at run time is that of the sample. Limits:
the models must have the same inputs and outputs by name; outputs that are no tensors of numbers are not compared.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxcomp.data import InputSpec, open_data
from onnxcomp.errors import BoundError, DataError, ModelError, UsageError
from onnxcomp.graph import files
from onnxcomp.graph.selection import picked
from onnxcomp.graph.weights import expose
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.preprocess import Preprocess
from onnxcomp.report.model import Accuracy, Comparison, OutputComparison
from onnxcomp.runtime import Model, Progress, Session, ignore, infer_types

Array = np.ndarray


def compare(
    reference: Model, other: Model, data: object, *,
    labels: str | os.PathLike[str] | Array | None = None, limit: int | None = None, preprocess: Preprocess | None = None,
    seed: int = 0, skip: int = 0, progress: Progress = ignore,
) -> Comparison:  # fmt: skip
    """Run both models on `data` and compare their outputs.

    data    whatever `onnxcomp.data.open_data` takes; integer labels that it carries itself are used where they fit
    labels  one whole number per answer: an array, .npy, .npz, or a `file,label` CSV; they must fit an output
    limit   compare on this many samples only, chosen at random by the seed
    skip    leave out those that are chosen first: the ones that as large a limit, and calibration, takes

    Raises ModelError for models that do not match, DataError for data or labels that do not fit.
    """
    models = [files.load(m) if isinstance(m, bytes) else m for m in (reference, other)]
    titles = ["model" if isinstance(m, files.ModelProto) else str(m) for m in models]
    sizes = [files.bytes_of(m) if isinstance(m, files.ModelProto) else files.size(m) for m in models]
    left, right = map(Session, models)
    _check_ports(left, right)
    exposed, chosen = _exposed(models, [name for name, _ in left.outputs])
    if chosen:
        left, right = map(Session, exposed)
    specs = InputSpec.of(left.inputs)
    opened = open_data(data, specs, preprocess=preprocess, labels=labels, limit=limit, seed=seed, skip=skip)
    numeric = [name for name, kind in left.outputs if kind.dtype is not None and kind.dtype.kind != "O"]
    outputs = [_Output(name, name in chosen) for name in numeric]
    for number, feed in enumerate(opened, 1):
        r, o = left.run(feed), right.run(feed)
        for output in outputs:
            output.add(r[output.name], o[output.name])
        progress("comparing", number, len(opened))
    results, accuracy = [o.result() for o in outputs], _accuracy(outputs, opened.labels, is_required=labels is not None)
    return Comparison(titles[0], titles[1], sizes[0], sizes[1], len(opened), tuple(results), accuracy)


def _exposed(models: Sequence[Model], outputs: Sequence[str]) -> tuple[list[Model], frozenset[str]]:
    """The two models with what `outputs` are picked from as outputs too, where both have it; and which ones are picked."""
    reference = models[0]
    nodes = files.read_nodes(Path(reference)) if isinstance(reference, str | Path) else files.load(reference).graph.node
    ops = [(node.op_type, node.input, node.output) for node in nodes]
    if not picked(ops, outputs, lambda _: True)[0]:
        return [*models], frozenset()
    types = [infer_types(model) for model in models]
    floating = {name for name, kind in types[0].items() if kind.dtype is not None and kind.dtype.kind == "f"}
    found, sources = picked(ops, outputs, floating.__contains__)
    shared = [name for name in sources if name not in outputs and all(name in known for known in types)]
    return [expose(files.load(model), shared) for model in models], found


@dataclass
class _Output:
    """Sums over the samples of one output, and the answers that were given."""

    name: str
    is_picked: bool = False
    """So that its shape follows from values."""
    other_shapes: int = 0
    """Samples for which the two have not the same shape."""
    signal: float = 0.0
    noise: float = 0.0
    cosines: list[float] = field(default_factory=list)
    """Of each sample; none of an output that is not of a floating type."""
    not_finite: int = 0
    answers: list[tuple[Array, Array]] = field(default_factory=list)
    """Of each sample, flattened: the reference's and the other's."""

    def add(self, r: Array, o: Array) -> None:
        """Add one sample."""
        if r.shape != o.shape and self.is_picked:
            self.other_shapes += 1
            return
        if r.shape != o.shape:
            shapes = f"{list(r.shape)} and {list(o.shape)}"
            raise ModelError(f"Output '{self.name}' has shapes {shapes} in the two models, so they cannot be compared.")
        if r.dtype.kind in "iub":
            self.answers.append((r.ravel(), o.ravel()))
            return
        if r.ndim and r.shape[-1] >= 2:
            self.answers.append((r.argmax(-1).ravel(), o.argmax(-1).ravel()))
        # Masked positions may be -inf in the reference: they are no signal, and what stands there does not matter.
        finite = np.isfinite(r)
        r, o = r[finite].astype(np.float64), o[finite].astype(np.float64)
        signal, noise = energies(r, o)
        self.signal += signal
        self.noise += noise
        lost = int(np.count_nonzero(~np.isfinite(o)))
        self.not_finite += lost
        norms = 0.0 if lost else math.sqrt(signal * (o @ o))
        self.cosines.append(float(r @ o) / norms if norms > 0 else float(not r.any() and not o.any()))

    def result(self) -> OutputComparison:
        if self.other_shapes:
            return OutputComparison(self.name, None, None, None, 0, self.not_finite, self.other_shapes)
        count = sum(len(r) for r, _ in self.answers)
        same = sum(int(np.count_nonzero(r == o)) for r, o in self.answers)
        sqnr, cosine = (sqnr_db(self.signal, self.noise), float(np.mean(self.cosines))) if self.cosines else (None, None)
        return OutputComparison(self.name, sqnr, cosine, same / count if count else None, count, self.not_finite)


def _accuracy(outputs: Sequence[_Output], labels: Array | None, *, is_required: bool) -> Accuracy | None:
    """Of the first output whose answers are as many as the labels, sample by sample."""
    if labels is None:
        return None
    counts = [np.size(label) for label in labels]
    output = next((output for output in outputs if [len(r) for r, _ in output.answers] == counts), None)
    if output is None or np.any(np.mod(labels, 1)):
        if not is_required:
            return None
        given = ", ".join(f"{len(output.answers[0][0])} in '{output.name}'" for output in outputs if output.answers) or "none"
        needed = "The labels do not fit: one whole number per answer is needed"
        raise DataError(f"{needed}. The first sample has labels: {np.size(labels[0])}; answers: {given}.")
    want = np.ravel(labels)
    right, kept = (np.concatenate(answers) == want for answers in zip(*output.answers, strict=True))
    n, lost, gained = len(want), int(np.count_nonzero(right & ~kept)), int(np.count_nonzero(kept & ~right))
    error = 100 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    drop = 100 * (lost - gained) / n
    return Accuracy(output.name, n, float(right.mean()), float(kept.mean()), drop, error, lost, gained)


def _check_ports(left: Session, right: Session) -> None:
    others = dict(right.inputs)
    for what, a, b in (("inputs", dict(left.inputs), others), ("outputs", dict(left.outputs), dict(right.outputs))):
        if a.keys() != b.keys():
            raise ModelError(f"The models have different {what}: {', '.join(a)} against {', '.join(b)}.")
    for name, kind in left.inputs:
        if kind.dtype is None:
            raise ModelError(f"Input '{name}' is not a tensor, so it cannot be fed.")
        if kind.dtype != others[name].dtype:
            text = f"Input '{name}' is {kind.dtype} in the one model and {others[name].dtype} in the other."
            raise ModelError(f"{text} Only models that take the same tensors can be compared.")


def demand(found: Comparison, max_drop: float) -> None:
    """Raise BoundError where more is lost than `max_drop` points."""
    drop, what = lost(found)
    if drop > max_drop:
        text = f"The quantized model loses {drop:.2f} points of {what} on {found.samples} samples, more than --max-drop"
        raise BoundError(f"{text} {max_drop:g}. Nothing was written. Try more bits, or --exclude the worst sites.")


def lost(found: Comparison) -> tuple[float, str]:
    """Points that are lost, and of what: accuracy where there are labels, else agreement with the reference."""
    shares = [output.agreement for output in found.outputs if output.agreement is not None]
    if found.accuracy is None and not shares:
        raise UsageError("--max-drop needs an output with classes, and the model has none.")
    if found.accuracy is not None:
        return found.accuracy.drop_points, "accuracy"
    return 100 * (1 - min(shares, default=0)), "top-1 agreement"
