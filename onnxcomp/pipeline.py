"""The whole program on one screen: a float ONNX model in, a quantized one out, proven to run."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxcomp import account, recipe as recipes, runtime, scratch, targets
from onnxcomp.calibrate.cluster import Cluster, connect
from onnxcomp.calibrate.room import Room, free_memory
from onnxcomp.calibrate.samples import BATCH, Store, batch_size, batches, stacking
from onnxcomp.calibrate.work import Work
from onnxcomp.choose import Choice
from onnxcomp.compress.forecast import forecast
from onnxcomp.compress.walk import Walk
from onnxcomp.data import Data, Feed, InputSpec, open_data
from onnxcomp.finish import find_kernels, finish, fix
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.half import narrow
from onnxcomp.graph.mapped import embed, outside
from onnxcomp.graph.prepare import Prepared, correct_ranks, prepare
from onnxcomp.graph.weights import remove_if
from onnxcomp.recipe import Recipe
from onnxcomp.report.model import Forecast, Plan, Report
from onnxcomp.transform import transform
from onnxcomp.verify import demand_equal, made_up_feed, verify

PROOF_SAMPLES = 2
"""Calibration samples that the finished file is run on, at least; where they are run together, `BATCH`."""


@dataclass(frozen=True)
class Result:
    """A quantized model and the account of how it came about."""

    finished: files.ModelProto
    """The model; above 2 GiB it refers to files that are there as long as this object."""
    report: Report
    terms: tuple[files.ModelProto, ...] = ()
    """The low-bit model of every weight term, where `split` asked for them."""
    traffic: Sequence[tuple[str, int, int]] = ()
    """Of a cluster, for every step: its site, the bytes sent from here, and those that workers have sent."""
    _weights: Graph | None = None
    """Keeps the files."""

    @cached_property
    def model(self) -> files.ModelProto:
        """The model with all its weights in memory."""
        return embed(self.finished)


def quantize(
    model: runtime.Model, data: object = None, recipe: str | Path | Recipe = "auto", *,
    output: str | Path | None = None, force: bool = False, split: bool = False, memory: int | None = None,
    work: str | Path | None = None, cluster: str | None = None, progress: runtime.Progress = runtime.ignore,
    announce: Callable[[Forecast], None] | None = None,
) -> Result:  # fmt: skip
    """Quantize `model` as `recipe` says, calibrated on `data`, and write it to `output` once it is proven to run.

    model   a path, the bytes of a model, or a ModelProto; never changed
    data    whatever `onnxcomp.data.open_data` takes: a path, arrays, or feeds (dicts of arrays by input name). None: the
            activations' ranges are measured at run time and nothing is calibrated
    recipe  a Recipe, the name of one, or the path of a TOML file
    output  where the file goes; None writes none
    split   make a model of each weight term too, of a recipe with xint of granularity "model" and nothing else; written
            beside `output` as NAME.term1.onnx and so on
    memory  bytes for the samples' activations; what is more lies in temporary files. None: a quarter of the free memory
    work    a folder, trusted, that keeps what is finished, so that the same call goes on there after whatever has stopped it
    cluster the Dask cluster whose workers hold the samples and run them: tcp://HOST:PORT, or local:N for N processes here
    announce gets, in front of the walk, what it will take; what it raises ends the call with nothing done

    Raises the kinds of `onnxcomp.errors`: ModelError, DataError, RecipeError, UsageError, VerificationError,
    ResourceError.
    """
    files.check_output(output, model, force=force)
    made = compress(model, data, recipe, progress, memory=memory, work=work, cluster=cluster, announce=announce)
    recipe, walk, target, feeds, prepared = made.recipe, made.walk, made.walk.target, made.feeds, made.prepared

    lowered, *parts = (target.lower(part) for part in (walk.compressed, *(walk.split() if split else ())))
    for part in (lowered, *parts) if prepared.is_half else ():
        narrow(part, prepared.half_ends)
    terms = tuple(embed(to_model(part, prepared.model)) for part in parts)
    half = prepared.is_half and target.half if recipe.half == "auto" else recipe.half
    finished = finish(to_model(lowered, prepared.model), target, feeds, half=half)
    progress("verifying", 0, 1)
    with ExitStack() as proving:
        folder = proving.enter_context(scratch.folder())
        proof = proving.enter_context(files.PendingFile(finished, folder / "model.onnx"))
        proving.enter_context(runtime.provider("cpu"))  # whatever calibration ran on
        faithful = outside(prepared.model) > 0 or not target.proves_defaults(walk.plan)  # packed weights would be copies
        verification = verify(proof.path, made.reference, feeds, made.expected, prepared.picked, faithful=faithful)
        how = walk.plan, feeds, made.single, made.reference, prepared.picked
        kernels, by, said = find_kernels(proof.path, target, lowered, *how)
    for made_model in (finished, *terms):  # what was asked for to be compared alone
        remove_if(made_model.graph.output, lambda value: value.name in prepared.watched)
    if target.fixed:
        fix(finished, made.single)
    notes = [*made.notes, *said]
    report = account.report(made.source, model, made.samples, recipe, made.choice, walk, notes, kernels, by, verification)
    report = account.stamp(finished, report, walk.quantizers.folds)
    if output is not None:
        with files.PendingFile(finished, output, force=force, source=account.path_of(model)) as pending:
            runtime.Session(pending.path).run(made.single)
            report = replace(report, output_bytes=files.size(pending.path))
            pending.commit()
        for number, term in enumerate(terms, 1):
            files.save(term, Path(output).with_suffix(f".term{number}.onnx"), force=force)
    progress("verifying", 1, 1)
    return Result(finished, report, terms, walk.store.traffic if isinstance(walk.store, Cluster) else (), lowered)


@dataclass(frozen=True)
class Compressed:
    """A model behind its walk: both graphs, everything that was fitted, and nothing proven yet."""

    source: files.ModelProto
    recipe: Recipe
    prepared: Prepared
    reference: runtime.Session
    """The float model."""
    samples: Data | None
    single: Feed
    """One sample, or a made-up one."""
    feeds: list[Feed]
    """What the file is proven on."""
    choice: Choice
    walk: Walk
    expected: Sequence[Mapping[str, np.ndarray]] | None
    """What the walk arrived at for these feeds; None without samples."""
    notes: list[str]


@runtime.one_thread()
def compress(
    model: runtime.Model, data: object, recipe: str | Path | Recipe, progress: runtime.Progress,
    *, memory: int | None = None, work: str | Path | None = None, cluster: str | None = None,
    announce: Callable[[Forecast], None] | None = None,
) -> Compressed:  # fmt: skip
    """Prepare `model`, choose what is quantized, and walk; arguments as those of `quantize`."""
    start, recipe = time.perf_counter(), recipe if isinstance(recipe, Recipe) else recipes.find(recipe)
    data = data if recipe.samples else None
    target = targets.find(recipe.target)
    source = files.load(model)
    progress("preparing", 0, 1)
    prepared = prepare(source, runtime.infer_types)
    reference = runtime.Session(prepared.model)
    specs = InputSpec.of(reference.inputs)
    samples, stackable, size, feeds, said = None, False, BATCH, [], list[str]()
    if data is not None:
        samples = open_data(data, specs, preprocess=recipe.preprocess, limit=recipe.samples, seed=recipe.seed)
        stackable, said = stacking(reference, samples, is_cut=samples.is_cut and not prepared.picked)
        size = batch_size(prepared.graph, samples[0])
        proven = itertools.islice(batches(samples, stackable, size), -(-BATCH // size) if stackable else PROOF_SAMPLES)
        feeds = [dict(batch.live) for batch in proven]
    # enough to run the file on, never to fit it
    single = made_up_feed(reference) if samples is None else samples[0]
    feeds = feeds or [single]
    outputs = reference.run(single)
    if not outside(prepared.model):  # a second session of another model would take its memory once more
        demand_equal(source, outputs, single, prepared.picked, is_half=prepared.is_half)
    corrected = correct_ranks(prepared, {name: array.ndim for name, array in outputs.items()})
    equal = transform(prepared, recipe, target, single, samples, stackable=stackable)
    graph, recipe, choice = equal.graph, equal.recipe, equal.choice
    plan = target.plan(graph, choice.sites, choice.settings, equal.wide)

    if outside(prepared.model):
        reference = runtime.Session(prepared.model)  # which has read nothing yet
    memory, seed = free_memory() // 4 if memory is None else memory, recipe.seed if recipe.reconstruct else None
    how = graph, graph.copy(), prepared.model, plan, target, recipe.compensate
    if announce is not None and samples is not None:
        ahead = Walk(*how, None, blocks=choice.blocks, seed=seed)
        count = -(-len(samples) // (size if stackable else 1))
        announce(forecast(ahead, feeds[0], count, memory, stays=work is not None, start=start))
    kept = None if work is None else Path(work) / account.fingerprint(source, model, samples, recipe, target)
    with ExitStack() as calibrating:
        past = Work(calibrating.enter_context(Room(memory, kept)))
        store = None if samples is None else Store(samples, stackable, size, past)
        if samples is not None and cluster is not None:
            store = Cluster(calibrating.enter_context(connect(cluster)), samples, stackable, size, past)
        walk = Walk(*how, store, past, choice.blocks, matched=recipe.moments == "auto", seed=seed, decisions=equal.decisions)
        walk.run(progress)
        expected = None if store is None else walk.expected(len(feeds))
    notes = [*equal.notes, *corrected, *said]
    return Compressed(source, recipe, prepared, reference, samples, single, feeds, choice, walk, expected, notes)


def foresee(
    model: runtime.Model, data: object = None, recipe: str | Path | Recipe = "auto", *,
    memory: int | None = None, work: str | Path | None = None,
) -> Plan:  # fmt: skip
    """What `quantize` would do and what it would take, with nothing written. The sites are those of a rehearsal on one batch,
    without compensation; a range per token or a rotated input may be decided otherwise on all samples.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.find(recipe)
    found = list[Forecast]()

    def stop(forecast: Forecast) -> None:
        found.append(forecast)
        raise _ForeseenError

    with suppress(_ForeseenError):
        quantize(model, data if recipe.samples else None, recipe, memory=memory, work=work, announce=stop)
    few = replace(recipe, samples=min(recipe.samples, BATCH), rounding="nearest", compensate=())
    return Plan(quantize(model, data, few).report.sites, found[0] if found else None)


class _ForeseenError(Exception):
    """Ends a call in front of its walk."""
