"""Time models against each other: the same feeds, one process, in turn, ratios round by round.

Without data, the inputs are made up: normal numbers for floats, ones or zeros for integers. A dimension that varies is 1, or
what it takes for the model to run, unless a shape is given; what was assumed is said in the notes.

Limits: made-up numbers time the operators, not branches that depend on values.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.data import Feed, InputSpec, open_data
from onnxcomp.errors import UsageError
from onnxcomp.graph import files
from onnxcomp.preprocess import Preprocess
from onnxcomp.report.model import Benchmark, Operator, Timing
from onnxcomp.targets.audit import INTEGER_KERNELS
from onnxcomp.verify import made_up_feed

FEEDS = 8
"""Samples that are run in turn, where there are data."""


def bench(
    models: Sequence[str | Path], data: object = None, *, shapes: Mapping[str, tuple[int, ...]] | None = None,
    preprocess: Preprocess | None = None, threads: int = 1, rounds: int = 20, operators: bool = False, count: int = FEEDS,
) -> Benchmark:  # fmt: skip
    """Time `models` on the first `count` samples of `data`, or on one made-up feed.

    shapes     of made-up inputs, by name
    operators  measure the time by type of operator too

    Raises UsageError for models that take different inputs and for a shape that does not fit.
    """
    specs = [InputSpec.of(runtime.Session(model).inputs) for model in models]
    taken = [", ".join(sorted(spec.name for spec in own)) for own in specs]
    for model, found in zip(models, taken, strict=True):
        if found != taken[0]:
            raise UsageError(f"{model} takes {found}, but {models[0]} takes {taken[0]}.")
    notes: list[str] = []
    if data is None:
        feeds = [made_up(runtime.Session(models[0]), shapes or {}, notes)]
    else:
        feeds = list(islice(open_data(data, specs[0], preprocess=preprocess), count))
    latencies = runtime.measure(models, feeds, threads=threads, rounds=rounds)
    timings = []
    for model, latency in zip(models, latencies, strict=True):
        costs = tuple(Operator(*cost) for cost in runtime.profile(model, feeds[0], threads)) if operators else ()
        floor = _floor(costs, timings[0].operators) if operators and timings else None
        timings.append(Timing(**vars(latency), model=str(model), file_bytes=files.size(model), operators=costs, floor_ms=floor))
    return Benchmark(tuple(timings), threads, tuple(notes))


def _floor(operators: Sequence[Operator], reference: Sequence[Operator]) -> float:
    """What the integer kernels take, and the float work that the first model does too, at the faster of both paces, ms."""
    before = {o.op: o.milliseconds for o in reference}
    return sum(o.milliseconds if o.op in INTEGER_KERNELS else min(o.milliseconds, before.get(o.op, 0.0)) for o in operators)


def made_up(session: runtime.Session, shapes: Mapping[str, tuple[int, ...]], notes: list[str]) -> Feed:
    """One feed of made-up numbers, the same at every call; what had to be assumed is added to `notes`."""
    specs = InputSpec.of(session.inputs)
    known = [spec.name for spec in specs]
    for name in shapes:
        if name not in known:
            raise UsageError(f"--shape {name}: the model has no such input. Its inputs are: {', '.join(known)}.")
    for spec in specs:
        if spec.shape is None and spec.name not in shapes:
            raise UsageError(f"Input '{spec.name}' has no known rank. Pass its shape as --shape {spec.name}=1x3x224x224.")
        given = shapes.get(spec.name, ())
        if given and spec.misfit(np.empty(given, spec.dtype)) is not None:
            raise UsageError(f"--shape {spec.name}={'x'.join(map(str, given))} does not fit the model's {spec}.")
    feed = made_up_feed(session, shapes)
    for spec in specs:
        sizes = "x".join(map(str, feed[spec.name].shape))
        if feed[spec.name].shape not in (spec.shape, shapes.get(spec.name)):
            notes.append(f"Input '{spec.name}' is {spec}; timed with {sizes}. Change it with --shape.")
    return feed
