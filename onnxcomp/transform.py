"""The equal float model: what computes the same as the one given and loses less when it is quantized.

In order: masks are bounded, streams and values are rotated, sensitive layers get more bits, channels are equalized, inputs are
mixed. Each step says itself what it looks at and when it changes nothing; what is quantized is chosen anew where one has
changed the graph.
"""

import glob
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxcomp import account
from onnxcomp.calibrate.samples import batches, confirm_tokens
from onnxcomp.choose import Choice, choose, open_widths, widened
from onnxcomp.data import Feed
from onnxcomp.graph.edit import Graph, Tape, apply, extract, tensors_of
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.mapped import outside
from onnxcomp.graph.masks import MASK, bound_masks
from onnxcomp.graph.prepare import Prepared
from onnxcomp.graph.sites import matches
from onnxcomp.graph.transposed import write_convs
from onnxcomp.methods import equalization, rotation, sensitivity
from onnxcomp.methods.base import Outcome
from onnxcomp.recipe import Recipe, SiteRule
from onnxcomp.report.model import Decision
from onnxcomp.targets.target import Target
from onnxcomp.targets.timing import faster_in_float

BATCHES = 8
"""That channels are equalized on."""


@dataclass
class Equal:
    """A float graph on its way to be quantized, and what of it is."""

    graph: Graph
    recipe: Recipe
    """As it was given, with the widths of sensitive layers."""
    choice: Choice
    notes: list[str]
    decisions: list[Decision] = field(default_factory=list)
    wide: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The stored tensors that have 16 bits, and the layers that read them so."""


def transform(
    prepared: Prepared, recipe: Recipe, target: Target, single: Feed, samples: Sequence[Feed] | None, *, stackable: bool
) -> Equal:
    """Fit the equal model to `samples`; where these are None, only what needs none is done, and shown equal on `single`.

    stackable   whether samples may be run together

    Raises RecipeError for a pattern that matches nothing, and for what the target does not take.
    """
    graph, notes, like = prepared.graph.copy(), list(prepared.notes), prepared.model
    if target.encoding.where == "units":
        bounded = graph.copy()
        if count := bound_masks(bounded):
            agreed = rotation.agreement(graph, bounded, like, single)
            graph, done = (bounded, "set") if agreed > rotation.EQUAL_DB else (graph, "not set")
            notes.append(f"Masks of attention {done} to {-MASK:g}: {count}, equal to {agreed:.0f} dB in float.")
    if recipe.rotation != "none":
        graph, said = rotation.rotate_folded(graph, like, single)
        notes += said
    found = Equal(graph, recipe, choose(graph, recipe, target, with_data=samples is not None), notes)
    if samples is None:
        return found
    more = (dict(batch.live) for batch in itertools.islice(batches(samples, stackable), BATCHES))  # read when asked for
    few = next(more)
    rows = {name: array[: sensitivity.ROWS] if stackable else array for name, array in few.items()}
    if target.encoding.convs and recipe.bits.activations is not None:
        _write_convs(found, target, like, single)
    is_open = recipe.sensitive == "auto" and not outside(like)
    if is_open:
        row = {name: array[:1] if stackable else array for name, array in few.items()}
        _keep_fast(found, prepared, target, row)
        _widen(found, prepared, target, rows)
        if _rescue(found, prepared, target, rows):
            _keep_fast(found, prepared, target, row)
    ranged = {k: s for k, s in found.choice.settings.items() if s.activations in ("static", "token", "auto")}
    asked = {k: (s.weight_bits, s.activation_bits) for k, s in ranged.items()}
    if recipe.equalization == "auto" and min(map(min, asked.values()), default=8) < 8:
        how = asked, itertools.chain([few], more)
        found.graph, said = equalization.equalize(found.graph, like, *how, bounds=target.encoding.where == "regions")
        notes += said
        found.choice = choose(found.graph, found.recipe, target, with_data=True)
    choice = found.choice
    sites = confirm_tokens(found.graph, like, choice.sites, samples, stackable=stackable)
    blocks = confirm_tokens(found.graph, like, choice.blocks, samples, stackable=stackable)
    if recipe.rotation == "auto":
        bits = {name: s.activation_bits for name, s in choice.settings.items() if s.activations != "float"}
        decided = {name: s.mixed for name, s in choice.settings.items()}
        sites, mixed = rotation.rotate_inputs(found.graph, like, sites, bits, few, decided)
        found.decisions += [account.decision(name, "rotation", outcome) for name, outcome in mixed.items()]
    found.choice = replace(choice, sites=sites, blocks=blocks)
    if is_open and target.encoding.where == "units" and target.encoding.wide:
        _store_wide(found, prepared, target, rows)
    return found


def _write_convs(found: Equal, target: Target, like: ModelProto, single: Feed) -> None:
    """Write ConvTransposes as Convs, which have an integer kernel."""
    recipe, asked = found.recipe, set[str]()
    for site in [s for s in found.choice.sites if s.kind == "stored"]:
        rules = [rule.activations for rule in recipe.site if rule.activations is not None and matches(rule.where, site)]
        asked |= {site.name} if [recipe.activations, *rules][-1] != "float" else set()
    written = found.graph.copy()
    if count := write_convs(written, asked):
        agreed = rotation.agreement(found.graph, written, like, single)
        found.graph = written if agreed > rotation.EQUAL_DB else found.graph
        found.notes.append(f"ConvTransposes written as Convs and moves: {count}, equal to {agreed:.0f} dB in float.")
        found.choice = choose(found.graph, recipe, target, with_data=True)


def _keep_fast(found: Equal, prepared: Prepared, target: Target, row: Feed) -> None:
    """Let layers stay float where that is faster."""
    if not target.encoding.timed or found.recipe.activations != "auto":
        return

    def shapes_of(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        part, op = extract(found.graph, [t.name for t in found.graph.inputs], list(names)), Tape("shapes")
        asked = {op("Shape", name): name for name in names}
        apply(part, "shapes", op, {})
        part.outputs = [tensor for name, tensor in tensors_of(part).items() if name in asked]
        for tensor in part.outputs:
            tensor.dtype = np.dtype(np.int64)
        made = rotation.run_part(part, row, prepared.model)
        return {name: tuple(map(int, made[shape])) for shape, name in asked.items()}

    given = [rule.where for rule in found.recipe.site if rule.activations is not None]
    ranged = [s for s in found.choice.sites if s.kind == "layer" and found.choice.settings[s.name].activations != "float"]
    is_open = [site for site in ranged if not any(matches(where, site) for where in given)]
    floats = [s for s in found.choice.sites if s.op == "Conv" and found.choice.settings[s.name].activations == "float"]
    kept = faster_in_float(found.graph, is_open, shapes_of, floats) if is_open else {}
    if not kept:
        return
    rounding = "gptq" if found.recipe.rounding == "auto" else None  # which takes no time of theirs
    rules = (SiteRule(glob.escape(name), activations="float", rounding=rounding) for name in kept)
    found.recipe = replace(found.recipe, site=(*rules, *found.recipe.site))
    found.choice = choose(found.graph, found.recipe, target, with_data=True)
    found.decisions += [account.decision(name, "float", Outcome({}, reason)) for name, reason in kept.items()]


def _widen(found: Equal, prepared: Prepared, target: Target, rows: Feed) -> None:
    """Let sensitive layers have 8 bits."""
    choice, tokens = found.choice, frozenset(k for k, s in found.choice.settings.items() if s.activations == "auto")
    how = found.graph, prepared.model, choice.sites, open_widths(found.recipe, choice), rows, tokens
    wide = sensitivity.widen(*how, mixed=found.recipe.rotation == "auto")
    found.recipe = widened(found.recipe, {name: layer.widths for name, layer in wide.items()})
    found.choice = choose(found.graph, found.recipe, target, with_data=True)
    found.decisions += [account.decision(name, "8 bits", layer.outcome, layer.added_bytes) for name, layer in wide.items()]


def _store_wide(found: Equal, prepared: Prepared, target: Target, rows: Feed) -> None:
    """Let tensors that 8 bits do not hold have 16, where nothing was asked to."""
    points = target.plan(found.graph, found.choice.sites, found.choice.settings).points
    if any(point.scheme.bits > sensitivity.WIDE for point in points):
        return
    stored = [p for p in points if p.consumers is None and p.same_as is None and p.scheme.bits == sensitivity.WIDE]
    given = [s for s in found.choice.sites if s.kind == "layer" and s.name not in open_widths(found.recipe, found.choice)]
    closed = {name for site in given for name in (*site.inputs, site.raw, site.y)}  # whose bits a rule gives
    names = [point.tensor for point in stored if point.tensor not in closed]
    wide = sensitivity.store(found.graph, prepared.model, found.choice.sites, names, rows)
    found.wide = {name: tensor.layers for name, tensor in wide.items()}
    found.decisions += [account.decision(name, "16 bits", tensor.outcome) for name, tensor in wide.items()]


def _rescue(found: Equal, prepared: Prepared, target: Target, rows: Feed) -> bool:
    """Let layers of 8-bit activations with a fixed range that lose too much stay float there, or have their weights rounded by
    GPTQ; whether one stays float.
    """
    is_closed = target.encoding.where == "units"  # where nothing is float
    is_open = {"floats": found.recipe.activations == "auto" and not is_closed, "gptq": found.recipe.rounding == "auto"}
    if not any(is_open.values()):
        return False
    asked = {name: w for name, w in open_widths(found.recipe, found.choice).items() if w[1] == sensitivity.WIDE}
    asked = {name: w for name, w in asked.items() if found.choice.settings[name].activations == "static"}
    rescued = sensitivity.rescue(found.graph, prepared.model, found.choice.sites, asked, rows, **is_open)
    floats = {name: (asked[name][0], None) for name, layer in rescued.items() if layer.is_float}
    gptq = [SiteRule(glob.escape(name), rounding="gptq") for name, layer in rescued.items() if layer.is_gptq]
    found.recipe = widened(found.recipe, floats)
    found.recipe = replace(found.recipe, site=(*gptq, *found.recipe.site))
    found.choice = choose(found.graph, found.recipe, target, with_data=True)
    found.decisions += [account.decision(name, "rescue", layer.outcome) for name, layer in rescued.items()]
    return bool(floats)
