"""The whole program on one screen: a float ONNX model in, a quantized one out, proven to run."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp import account, runtime, targets
from onnxcomp import recipe as recipes
from onnxcomp.calibrate.samples import Store, can_stack, confirm_tokens
from onnxcomp.choose import choose
from onnxcomp.compress.walk import Walk
from onnxcomp.data import InputSpec, open_data
from onnxcomp.finish import find_kernels, finish, fix
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.prepare import prepare
from onnxcomp.methods import copies, equalization, rotation
from onnxcomp.recipe import Recipe
from onnxcomp.report.model import Decision, Report
from onnxcomp.verify import made_up_feed, verify

if TYPE_CHECKING:
    import onnx

PROOF_BATCHES = 2
"""Batches of calibration samples that the finished file is run on."""


@dataclass(frozen=True)
class Result:
    """A quantized model and the account of how it came about."""

    model: onnx.ModelProto
    report: Report
    terms: tuple[onnx.ModelProto, ...] = ()
    """The low-bit model of every weight term, where `split` asked for them."""


def quantize(
    model: str | Path | bytes | onnx.ModelProto, data: object = None, recipe: str | Path | Recipe = "auto", *,
    output: str | Path | None = None, force: bool = False, split: bool = False,
    progress: runtime.Progress = runtime.ignore,
) -> Result:  # fmt: skip
    """Quantize `model` as `recipe` says, calibrated on `data`, and write it to `output` once it is proven to run.

    model   a path, the bytes of a model, or a ModelProto; never changed
    data    whatever `onnxcomp.data.open_data` takes: a path, arrays, or feeds (dicts of arrays by input name). None: the
            activations' ranges are measured at run time and nothing is calibrated
    recipe  a Recipe, the name of one, or the path of a TOML file
    output  where the file goes; None writes none
    split   make a model of each weight term too, of a recipe with xint of granularity "model" and nothing else; written
            beside `output` as NAME.term1.onnx and so on

    Raises the kinds of `onnxcomp.errors`: ModelError, DataError, RecipeError, UsageError, VerificationError.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.find(recipe)
    data = data if recipe.samples else None
    target = targets.find(recipe.target)
    source = files.load(model)
    files.check_output(output, model, force=force)
    progress("preparing", 0, 1)
    prepared = prepare(source, runtime.infer_types)
    reference = runtime.Session(files.to_bytes(prepared.model))
    specs = [InputSpec(name, kind.dtype or np.dtype(np.float32), kind.shape) for name, kind in reference.inputs]
    samples, store, stackable = None, None, False
    if data is not None:
        samples = open_data(data, specs, preprocess=recipe.preprocess, limit=recipe.samples, seed=recipe.seed)
        stackable = can_stack(reference, samples)
        store = Store(samples, batchable=stackable)
    # enough to run the file on, never to fit it
    single = made_up_feed(reference) if samples is None else samples[0]
    feeds = [single] if store is None else [dict(batch.live) for batch in store.batches[:PROOF_BATCHES]]
    graph, notes = prepared.graph, list(prepared.notes)
    if recipe.rotation != "none":
        graph, said = rotation.rotate_folded(graph, prepared.model, feeds[0])
        notes += said
    choice = choose(graph, recipe, target, with_data=data is not None)
    asked = {k: (s.weight_bits, s.activation_bits) for k, s in choice.settings.items() if s.activations in ("static", "auto")}
    batches = [] if store is None else [dict(batch.live) for batch in store.batches]
    if batches and recipe.equalization == "auto" and min(map(min, asked.values()), default=8) < 8:
        graph, said = equalization.equalize(graph, prepared.model, asked, batches, bounds=target.encoding.where == "regions")
        notes += said
        choice = choose(graph, recipe, target, with_data=True)
    decisions: list[Decision] = []
    if samples is not None:
        sites = confirm_tokens(graph, prepared.model, choice.sites, samples, stackable=stackable)
        blocks = confirm_tokens(graph, prepared.model, choice.blocks, samples, stackable=stackable)
        if recipe.rotation == "auto":
            bits = {name: s.activation_bits for name, s in choice.settings.items() if s.activations != "float"}
            sites, found = rotation.rotate_inputs(graph, prepared.model, sites, bits, feeds[0])
            decisions += [account.decision(name, "rotation", outcome) for name, outcome in found.items()]
        if recipe.equalization == "auto" and target.encoding.where == "regions":
            sites, found = copies.copy_inputs(graph, sites, {name: width for name, (_, width) in asked.items()}, batches)
            decisions += [account.decision(name, "copies", outcome) for name, outcome in found.items()]
        choice = dataclasses.replace(choice, sites=sites, blocks=blocks)
    plan = target.plan(graph, choice.sites, choice.settings)

    walk = Walk(
        graph, graph.copy(), prepared.model, plan, target, recipe.compensate, store, choice.blocks,
        matched=recipe.moments == "auto", decisions=decisions,
    )  # fmt: skip
    walk.run(progress)

    expected = None if store is None else walk.expected(len(feeds))
    terms = tuple(to_model(target.lower(part), prepared.model) for part in (walk.split() if split else ()))
    lowered = target.lower(walk.compressed)
    finished = finish(to_model(lowered, prepared.model), target, recipe, feeds)
    progress("verifying", 0, 1)
    with ExitStack() as proving:
        folder = proving.enter_context(tempfile.TemporaryDirectory())
        proof = proving.enter_context(files.PendingFile(finished, Path(folder) / "model.onnx"))
        proving.enter_context(runtime.provider("cpu"))  # whatever calibration ran on
        verification = verify(proof.path, reference, feeds, expected)
        kernels, by, said = find_kernels(proof.path, target, lowered, account.audit_sites(lowered, plan), feeds, reference)
    if target.fixed:
        fix(finished, single)
    notes += said
    report = account.report(source, model, samples, recipe, choice, walk, notes, kernels, by, verification)
    report = account.stamp(finished, report, walk.quantizers.folds)
    if output is not None:
        with files.PendingFile(finished, output, force=force, source=account.path_of(model)) as pending:
            runtime.Session(pending.path).run(single)
            pending.commit()
        for number, term in enumerate(terms, 1):
            files.save(term, Path(output).with_suffix(f".term{number}.onnx"), force=force)
    progress("verifying", 1, 1)
    return Result(finished, report, terms)
