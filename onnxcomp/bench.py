"""Time models against each other: the same feeds, one process, in turn, ratios round by round.

Without data, the inputs are made up: normal numbers for floats, zeros for integers. A dimension that varies is 1 unless
a shape is given; what was assumed is said in the notes.

Limits: made-up numbers time the operators, not branches that depend on values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.data import InputSpec, open_data
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import files
from onnxcomp.preprocess import Preprocess
from onnxcomp.report.results import Benchmark, Operator, Timing

Feed = dict[str, np.ndarray]
FEEDS = 8
"""Samples that are run in turn, where there are data."""


def bench(
    models: Sequence[str | Path],
    data: object = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    preprocess: Preprocess | None = None,
    threads: int = 1,
    rounds: int = 20,
    operators: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Benchmark:
    """Time `models` on the first samples of `data`, or on one made-up feed.

    shapes     of made-up inputs, by name
    operators  measure the time by type of operator too

    Raises UsageError for models that take different inputs and for a shape that does not fit.
    """
    specs = [_specs(model, threads) for model in models]
    names = [sorted(spec.name for spec in one) for one in specs]
    for model, found in zip(models, names, strict=True):
        if found != names[0]:
            raise UsageError(f"{model} takes {', '.join(found)}, but {models[0]} takes {', '.join(names[0])}.")
    notes: list[str] = []
    if data is None:
        feeds = [made_up(specs[0], shapes or {}, notes)]
    else:
        feeds = list(islice(open_data(data, specs[0], preprocess=preprocess).samples, FEEDS))
    watch = None if progress is None else lambda done, total: progress("timing", done, total)
    latencies = runtime.measure(models, feeds, threads=threads, rounds=rounds, progress=watch)
    timings = []
    for model, t in zip(models, latencies, strict=True):
        costs = runtime.profile(model, feeds[0], threads) if operators else ()
        figures = (t.median_ms, t.low_ms, t.high_ms, t.ratio, t.ratio_low, t.ratio_high)
        timings.append(Timing(str(model), files.size(model), *figures, tuple(Operator(*cost) for cost in costs)))
    return Benchmark(tuple(timings), threads, tuple(notes))


def made_up(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], notes: list[str]) -> Feed:
    """One feed of made-up numbers, the same at every call; what had to be assumed is added to `notes`."""
    for name in shapes:
        if name not in [spec.name for spec in specs]:
            known = ", ".join(spec.name for spec in specs)
            raise UsageError(f"--shape {name}: the model has no such input. Its inputs are: {known}.")
    rng = np.random.default_rng(0)
    feed: Feed = {}
    for spec in specs:
        shape = shapes.get(spec.name) or _shape(spec, notes)
        _check_shape(spec, shape)
        is_whole = spec.dtype.kind in "iub"
        feed[spec.name] = np.zeros(shape, spec.dtype) if is_whole else rng.normal(size=shape).astype(spec.dtype)
    return feed


def _specs(model: str | Path, threads: int) -> list[InputSpec]:
    specs = []
    for name, kind in runtime.Session(model, threads=threads).inputs:
        if kind.dtype is None or kind.dtype.kind == "O":
            raise ModelError(f"{model}: input '{name}' is not a tensor of numbers, so it cannot be fed.")
        specs.append(InputSpec(name, kind.dtype, kind.shape))
    return specs


def _shape(spec: InputSpec, notes: list[str]) -> tuple[int, ...]:
    if spec.shape is None:
        raise UsageError(f"Input '{spec.name}' has no known rank. Pass its shape as --shape {spec.name}=1x3x224x224.")
    shape = tuple(n if isinstance(n, int) else 1 for n in spec.shape)
    if shape != spec.shape:
        notes.append(f"Input '{spec.name}' is {spec}; timed with {'x'.join(map(str, shape))}. Change it with --shape.")
    return shape


def _check_shape(spec: InputSpec, shape: tuple[int, ...]) -> None:
    fits = spec.shape is None or (
        len(shape) == len(spec.shape)
        and all(not isinstance(n, int) or n == found for n, found in zip(spec.shape, shape, strict=True))
    )
    if not fits:
        raise UsageError(f"--shape {spec.name}={'x'.join(map(str, shape))} does not fit the model's {spec}.")
