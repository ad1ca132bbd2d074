"""Time models against each other: the same feeds, one process, in turn, ratios round by round.

Without data, the inputs are made up: normal numbers for floats, zeros for integers. A dimension that varies is 1 unless
a shape is given; what was assumed is said in the notes.

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
from onnxcomp.numerics import arrays
from onnxcomp.preprocess import Preprocess
from onnxcomp.report.model import Benchmark, Operator, Timing
from onnxcomp.targets.audit import INTEGER_KERNELS

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
    specs, *others = [InputSpec.of(runtime.Session(model).inputs) for model in models]
    taken = ", ".join(sorted(spec.name for spec in specs))
    for model, other in zip(models[1:], others, strict=True):
        found = ", ".join(sorted(spec.name for spec in other))
        if found != taken:
            raise UsageError(f"{model} takes {found}, but {models[0]} takes {taken}.")
    notes: list[str] = []
    opened = [made_up(specs, shapes or {}, notes)] if data is None else open_data(data, specs, preprocess=preprocess)
    feeds = list(islice(opened, count))
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


def made_up(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], notes: list[str]) -> Feed:
    """One feed of made-up numbers, the same at every call; what had to be assumed is added to `notes`."""
    known = [spec.name for spec in specs]
    for name in shapes:
        if name not in known:
            raise UsageError(f"--shape {name}: the model has no such input. Its inputs are: {', '.join(known)}.")
    rng = np.random.default_rng(0)
    feed: Feed = {}
    for spec in specs:
        wanted = shapes.get(spec.name, spec.shape)
        if wanted is None:
            raise UsageError(f"Input '{spec.name}' has no known rank. Pass its shape as --shape {spec.name}=1x3x224x224.")
        feed[spec.name] = array = arrays.made_up(spec.dtype, wanted, rng)
        sizes = "x".join(map(str, array.shape))
        if spec.misfit(array) is not None:
            raise UsageError(f"--shape {spec.name}={sizes} does not fit the model's {spec}.")
        if array.shape != wanted:
            notes.append(f"Input '{spec.name}' is {spec}; timed with {sizes}. Change it with --shape.")
    return feed
