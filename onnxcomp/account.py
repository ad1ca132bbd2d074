"""The account: what the walk, the audit and the proof found out, gathered into one report and stored in the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp import __version__
from onnxcomp import recipe as recipes
from onnxcomp.choose import Choice
from onnxcomp.compress.walk import Walk
from onnxcomp.data import Data
from onnxcomp.graph import files
from onnxcomp.graph.edit import Constant, Graph
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.sites import Site
from onnxcomp.graph.strip import dump_folds
from onnxcomp.graph.tidy import Fold
from onnxcomp.recipe import Recipe
from onnxcomp.report.json import to_stored
from onnxcomp.report.model import Report, SiteReport, Verification
from onnxcomp.targets.audit import AuditSite, Kernel
from onnxcomp.targets.base import Plan, Target


def path_of(model: object) -> Path | None:
    """The model's path, where it was given as one."""
    return Path(model) if isinstance(model, (str, Path)) else None


def audit_sites(lowered: Graph, plan: Plan) -> tuple[AuditSite, ...]:
    """Every site with the tensors that its kernel may produce: its own output, or the codes right behind it."""
    nodes = {node.name: node for node in lowered.nodes}
    found = []
    for site in plan.sites:
        tensor = nodes[site.name].outputs[0]
        outputs = [tensor.name]
        while len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Relu", "Clip", "QuantizeLinear", "Sum", "Mul"):
            reader = tensor.outputs[0]
            if reader.op in ("Sum", "Mul") and not any(isinstance(t, Constant) for t in reader.inputs):
                break
            tensor = reader.outputs[0]
            outputs.append(tensor.name)
            if reader.op == "QuantizeLinear":
                break
        found.append(AuditSite(site.name, tuple(outputs)))
    return tuple(found)


def report(
    source: ModelProto,
    model: object,
    samples: Data | None,
    recipe: Recipe,
    target: Target,
    choice: Choice,
    walk: Walk,
    notes: Sequence[str],
    kernels: Sequence[Kernel],
    verification: Verification,
) -> Report:
    """The whole account. The output's size is filled in by `stamp`."""
    path = path_of(model)
    by_site = {kernel.site: kernel for kernel in kernels}
    used = dataclasses.replace(recipe, target=target.name)
    return Report(
        version=__version__,
        model_name=path.name if path is not None else (source.graph.name or "model"),
        model_sha256=files.sha256(path if path is not None else files.to_bytes(source)),
        model_bytes=files.size(path) if path is not None else source.ByteSize(),
        output_bytes=0,
        data_sha256=None if samples is None else samples.digest,
        samples=0 if samples is None else len(samples),
        target=target.name,
        recipe=recipes.dumps(used),
        requirements=target.requirements(walk.plan),
        sites=tuple(_site_report(site, walk, by_site[site.name]) for site in walk.plan.sites),
        skipped=choice.skipped,
        decisions=tuple(walk.decisions),
        verification=verification,
        notes=(*choice.notes, *notes),
    )


def _site_report(site: Site, walk: Walk, kernel: Kernel) -> SiteReport:
    settings, result = walk.plan.settings.get(site.name), walk.results.get(site.name)
    weight_bytes = 0
    if settings is None:
        bits, activations = "a8", "static"
    elif site.weight is None:
        bits, activations = f"a{settings.activation_bits}", settings.activations
    else:
        activations = (
            settings.activations if settings.activations != "auto" else walk.quantizers.granularity.get(site.name, "static")
        )
        bits = f"w{settings.weight_bits}" + ("" if activations == "float" else f"a{settings.activation_bits}")
        shape = walk.reference.tensors()[site.weight].shape
        weight_bytes = _stored_bytes(tuple(int(n) for n in shape), site.weight_axis, settings.weight_bits)
    return SiteReport(
        name=site.name,
        op=site.op,
        kind=site.kind,
        bits=bits,
        activations=activations,
        before_db=None if result is None else result.before_db,
        after_db=None if result is None else result.after_db,
        kernel=kernel.op,
        integer=kernel.integer,
        reason=kernel.reason,
        weight_bytes=weight_bytes,
    )


def _stored_bytes(shape: tuple[int, ...], axis: int, bits: int) -> int:
    """Codes of 4 or 8 bits, and a float scale and an int8 zero point per channel."""
    count = 1
    for n in shape:
        count *= n
    return (count + 1) // 2 * (1 if bits <= 4 else 2) + 5 * shape[axis]


def stamp(model: ModelProto, account: Report, folds: Sequence[Fold]) -> Report:
    """Store recipe, account and what was folded in the model's metadata; return the account with the file's final size.

    The stored account leaves its own file's size open, which `inspect` reads from the file.
    """
    timeless = tuple(dataclasses.replace(decision, added_ms=None) for decision in account.decisions)
    values: Mapping[str, str] = {
        "onnxcomp.version": account.version,
        "onnxcomp.recipe": account.recipe,
        "onnxcomp.report": to_stored(dataclasses.replace(account, decisions=timeless)),
        "onnxcomp.folds": dump_folds(folds),
    }
    files.set_metadata(model, {**files.metadata(model), **values})
    return dataclasses.replace(account, output_bytes=model.ByteSize())
