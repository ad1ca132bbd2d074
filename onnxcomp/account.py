"""The account: what the walk, the audit and the proof found out, gathered into one report and stored in the file."""

import dataclasses
import glob
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxcomp import __version__, recipe as recipes, runtime
from onnxcomp.choose import Choice
from onnxcomp.compress.walk import Walk
from onnxcomp.data import Data
from onnxcomp.graph import files
from onnxcomp.graph.edit import tensors_of
from onnxcomp.graph.sites import Site
from onnxcomp.graph.strip import dump_folds
from onnxcomp.graph.tidy import Fold
from onnxcomp.methods.base import Outcome
from onnxcomp.recipe import Recipe, SiteRule
from onnxcomp.report.json import to_stored
from onnxcomp.report.model import Decision, Report, SiteReport, Verification
from onnxcomp.targets.audit import Kernel
from onnxcomp.targets.base import Encoding, Settings
from onnxcomp.targets.nbits import stored_bits
from onnxcomp.targets.target import Target

NOTHING = Outcome(None, "nothing was measured")


def path_of(model: object) -> Path | None:
    """The model's path, where it was given as one."""
    return Path(model) if isinstance(model, (str, Path)) else None


def fingerprint(source: files.ModelProto, model: object, samples: Data | None, recipe: Recipe, target: Target) -> str:
    """What a run's result follows from, in 16 hex digits: model, data, recipe, target and versions."""
    data = None if samples is None else samples.digest
    parts = __version__, runtime.version(), files.sha256(path_of(model) or source), data, target.name, recipes.dumps(recipe)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def report(
    source: files.ModelProto, model: object, samples: Data | None, recipe: Recipe, choice: Choice, walk: Walk,
    notes: Sequence[str], kernels: Sequence[Kernel], kernels_by: str, verification: Verification,
) -> Report:  # fmt: skip
    """The whole account. The output's size is filled in by `stamp`."""
    path, plan, target = path_of(model), walk.plan, walk.target
    return Report(
        version=__version__,
        model_name=path.name if path is not None else (source.graph.name or "model"),
        model_sha256=files.sha256(path_of(model) or source),
        model_bytes=files.size(path) if path is not None else files.bytes_of(source),
        output_bytes=0,
        data_sha256=None if samples is None else samples.digest,
        samples=0 if samples is None else len(samples),
        target=target.name,
        recipe=recipes.dumps(dataclasses.replace(recipe, target=target.name)),
        requirements=target.requirements(plan),
        sites=tuple(_site_report(site, walk, kernel) for site, kernel in zip(plan.sites, kernels, strict=True)),
        kernels_by=kernels_by,
        skipped=choice.skipped,
        decisions=tuple(walk.decisions),
        verification=verification,
        notes=(*choice.notes, *notes),
    )


def decision(place: str, method: str, outcome: Outcome, added_bytes: int = 0) -> Decision:
    """What the report says of an outcome that adds so many bytes, and what it has fitted."""
    added = added_bytes + sum(array.nbytes for array in (outcome.fit or {}).values())
    return Decision(place, method, outcome.fit is not None, outcome.reason, outcome.gain_db, added)


def bits(site: Site, walk: Walk) -> str:
    """The widths of a site, as `SiteReport.bits` has them."""
    settings = walk.plan.settings.get(site.name)
    if settings is None:  # it joins what is stored
        return f"a{walk.plan.joined[site.name]}"
    activations = f"a{settings.activation_bits}"
    if site.weight is None:
        return activations
    block = f"b{settings.block}" if settings.block else ""
    return f"w{settings.weight_bits}{'' if settings.activations == 'float' else activations}{block}"


def _site_report(site: Site, walk: Walk, kernel: Kernel) -> SiteReport:
    settings, result = walk.plan.settings.get(site.name), walk.results.get(site.name, NOTHING)
    activations = "static" if settings is None else settings.activations
    if activations == "auto":
        activations = walk.quantizers.granularity.get(site.name, "static")
    tensors, weights = tensors_of(walk.reference), () if site.weight is None else (site.weight, *site.others)
    stored = sum(_weight_bytes(site, tensors[name].shape, settings, walk.target.encoding) for name in weights if settings)
    return SiteReport(
        site.name, site.op, site.kind, bits(site, walk), activations, result.before_db, result.after_db,
        kernel.op, kernel.integer, kernel.reason, stored,
        "" if settings is None else settings.rounding,
    )  # fmt: skip


def _weight_bytes(site: Site, shape: Sequence[int], settings: Settings, encoding: Encoding) -> int:
    block = settings.block
    width = stored_bits(settings.weight_bits, math.prod(shape), encoding, in_blocks=block > 0)
    # A float scale and an int8 zero point per channel; of blocks the zero points of at least 4 bits are optional.
    ranges = 5.0 * shape[site.weight_axis]
    if block:
        zeros = max(4, width) / 8 if settings.zero_points else 0
        ranges = (4 + zeros) * shape[site.weight_axis] * math.ceil(shape[1 - site.weight_axis] / block)
    return math.ceil(math.prod(shape) * width / 8 + ranges)


def frozen(report: Report) -> Recipe:
    """The recipe of a report with every automatic choice at its layers written out. On the same model and data it gives the
    same file, but for what the account in its metadata says of choices.
    """
    recipe, kept = recipes.loads(report.recipe), {(d.site, d.method) for d in report.decisions if d.adopted}
    names = [recipes.method_name(method) for method in recipe.compensate if method.scope == "layer"]
    rules: list[SiteRule] = []
    for site in (site for site in report.sites if site.kind != "join"):
        own: dict[str, Any] = {"activations": site.activations, "rounding": site.rounding or None}
        methods = tuple(name for name in names if (site.name, name) in kept)
        rules.append(SiteRule(glob.escape(site.name), mixed=(site.name, "rotation") in kept, methods=methods, **own))
    return dataclasses.replace(recipe, site=tuple(dict.fromkeys((*recipe.site, *rules))))


def stamp(model: files.ModelProto, account: Report, folds: Sequence[Fold]) -> Report:
    """Store recipe, account and what was folded in the model's metadata; return the account with the file's final size.

    The stored account leaves its own file's size open, which `inspect` reads from the file.
    """
    timeless = tuple(dataclasses.replace(decision, added_ms=None) for decision in account.decisions)
    values = {"onnxcomp.version": account.version, "onnxcomp.recipe": account.recipe, files.FOLDS: dump_folds(folds)}
    report = to_stored(dataclasses.replace(account, decisions=timeless))
    files.set_metadata(model, values | {files.REPORT: report})
    return dataclasses.replace(account, output_bytes=files.bytes_of(model))
