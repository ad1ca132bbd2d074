"""What is quantized: the sites that a recipe names, with the settings that each one gets."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcomp.errors import ModelError, RecipeError, UnsupportedSite
from onnxcomp.graph.blocks import Block, find_blocks, find_rest
from onnxcomp.graph.convert import STANDARD
from onnxcomp.graph.edit import Constant, Graph, Node, Tensor, tensors_of
from onnxcomp.graph.fold import is_load_time
from onnxcomp.graph.sites import HOLDERS, LAYER_OPS, Site, check_pattern, find_holders, find_sites, is_weight, matches, select
from onnxcomp.methods import reconstruction
from onnxcomp.recipe import Bits, Recipe, SiteRule
from onnxcomp.report.model import Skipped
from onnxcomp.targets import lowering, regions
from onnxcomp.targets.base import Encoding, Settings
from onnxcomp.targets.target import Target

RECURRENT = ("GRU", "LSTM", "RNN")
LARGE = 1 << 16
"""Numbers from which a table is worth an operator or two for each of its readers."""
NO_DATA = "No data were given, so activations are quantized at run time and nothing is calibrated or compensated"
NO_SAMPLES = "No data were given, so weights are rounded to nearest and nothing is compensated. Pass --data for GPTQ."


@dataclass(frozen=True)
class Choice:
    """The sites to quantize in graph order, their settings by name, and what stays float and why."""

    sites: tuple[Site, ...]
    settings: Mapping[str, Settings]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    blocks: tuple[Block, ...] = ()
    """What methods on blocks and on the output are fitted to."""


def choose(graph: Graph, recipe: Recipe, target: Target, *, with_data: bool) -> Choice:
    """Apply the recipe's patterns and rules to the sites of the float `graph`, as far as `target` takes them.

    Without data nothing static can be fitted: MatMul and Gemm measure their activations' range at run time, Conv keeps
    float activations, and no method is fitted. Raises RecipeError for a pattern that matches nothing, and for what the
    target does not take.
    """
    if recipe.half is True and not target.half:
        raise RecipeError(f"{target.name} takes no float16 beside codes. Leave --half out, or use --target tensorrt.")
    sites, tensors = find_sites(graph), tensors_of(graph)
    results = {t.name for t in graph.outputs}
    results |= {s.y for s in sites if regions.tail(tensors[s.y], results).name in results}
    every = (*sites, *(site for site in find_holders(graph) if _is_taken(site, target.encoding)))
    names = [node.name for node in graph.nodes]
    for rule in recipe.site:
        check_pattern(rule.where, every, names, required=False)
    scopes = {method.scope for method in recipe.compensate} if with_data else set()
    if recipe.reconstruct:
        reconstruction.check(with_data=with_data)
    blocks = find_blocks(graph, sites) if "block" in scopes or recipe.reconstruct else ()
    blocks += _outputs(graph, every) if "output" in scopes else ()
    for method in recipe.compensate:
        places = [b for b in blocks if b.kind == method.scope] if method.scope in ("block", "output") else every
        if places:
            check_pattern(method.where, places, names, required=False)
    chosen = select(every, recipe.include, recipe.exclude, names)
    wanted = {"layer": True, "product": recipe.products, "table": recipe.embeddings is True, "stored": True}
    named = {s.name for s in chosen if s.kind == "product" and _is_included(s, recipe)}
    if recipe.embeddings == "auto" and target.encoding.embeddings:
        tables = [(s.name, tensors[s.weight].shape) for s in chosen if s.kind == "table" and s.weight is not None]
        named |= {name for name, shape in tables if math.prod(shape) >= LARGE}
    chosen = tuple(s for s in chosen if wanted[s.kind] or s.name in named)
    if any(node.op in ("QuantizeLinear", "DynamicQuantizeLinear") for node in graph.nodes):
        raise ModelError("The model is quantized already. Give the float model that it was made from.")
    if not chosen:
        text = "No Conv, Gemm or MatMul with a constant float32 weight is left to quantize."
        raise UnsupportedSite(f"{text} {_why_none(graph, _skipped(graph, every, chosen))}")
    settings = {site.name: _settings(tensors, site, recipe, target, results, with_data=with_data) for site in chosen}
    chosen = tuple(s for s in chosen if s.kind != "product" or settings[s.name].activations != "float")
    # A table per token is read at every run; beside codes of 8 bits it repairs too little for that.
    narrow = {s.name for s in chosen if target.encoding.tables and settings[s.name].activation_bits < 8}
    chosen = tuple(replace(s, fixed_tokens=s.fixed_tokens and s.name in narrow) for s in chosen)
    convs = "; Conv activations stay float" if any(site.op == "Conv" for site in chosen) else ""
    is_float = all(s.activations == "float" for s in settings.values()) and recipe.bits.activations is None
    said = NO_SAMPLES if is_float else f"{NO_DATA}{convs}. Pass --data for static ranges."
    notes = () if with_data else (said,)
    if recipe.reconstruct:
        blocks += find_rest(graph, [site for site in chosen if site.kind == "layer"], blocks)
    skipped = _skipped(graph, every, chosen)
    if target.encoding.where == "units" and any(s.activations == "static" for s in settings.values()):
        products = {site.name for site in sites if site.kind == "product"}  # units as everything is
        skipped = tuple(s for s in skipped if s.name not in products and s.op not in lowering.OPERANDS)
    return Choice(chosen, settings, skipped, notes, blocks)


def _is_taken(holder: Site, encoding: Encoding) -> bool:
    """Whether weights that become floats when the file is loaded are taken there; OpenVINO wants those of an LSTM whole."""
    return holder.kind == "table" or (encoding.tables and (encoding.fused or holder.op not in RECURRENT))


def open_widths(recipe: Recipe, choice: Choice) -> dict[str, tuple[int, int | None]]:
    """The bits of weights and activations of the layers whose bits no rule of the recipe gives; None: float."""
    fixed = [rule.where for rule in recipe.site if rule.bits is not None]
    chosen = {
        s.name: choice.settings[s.name] for s in choice.sites if s.kind == "layer" and not any(matches(w, s) for w in fixed)
    }
    return {
        k: (s.weight_bits, None if s.activations == "float" else s.activation_bits) for k, s in chosen.items() if not s.block
    }


def widened(recipe: Recipe, widths: Mapping[str, tuple[int, int | None]]) -> Recipe:
    """The recipe with these bits at these sites."""
    return replace(recipe, site=(*(SiteRule(glob.escape(name), Bits(*bits)) for name, bits in widths.items()), *recipe.site))


def _outputs(graph: Graph, sites: Sequence[Site]) -> tuple[Block, ...]:
    """The whole model as one block, for each float output."""
    inputs, by_output = tuple(t.name for t in graph.inputs), {site.y: site for site in sites if site.kind == "layer"}
    found = []
    for tensor in graph.outputs:
        if tensor.dtype == np.float32 and tensor.shape and not tensor.outputs:
            name, last = tensor.name, by_output.get(tensor.name)
            axis = -1 if last is None else last.channel_axis
            found.append(Block(name, inputs, name, axis, len(tensor.shape), last=last, kind="output", op="output"))
    return tuple(found)


def _is_included(site: Site, recipe: Recipe) -> bool:
    """Whether a pattern names this very product, so that it need not be switched on for all."""
    return any(pattern != "*" and matches(pattern, site) for pattern in recipe.include)


def _settings(
    tensors: Mapping[str, Tensor], site: Site, recipe: Recipe, target: Target, results: set[str], *, with_data: bool
) -> Settings:
    own: dict[str, Any] = {}
    for rule in recipe.site:
        if matches(rule.where, site):
            own |= {key: value for key, value in vars(rule).items() if value is not None}
    if site.kind == "stored" or (site.kind == "table" and recipe.embeddings == "auto"):
        own = {"bits": Bits(8, None), "block": 0, "zero_points": False} | own
    decided = {key: own.pop(key) for key in ("mixed", "methods") if key in own}
    recipe = replace(recipe, **{key: value for key, value in own.items() if key != "where"})
    activations, rounding = "float" if recipe.bits.activations is None else recipe.activations, recipe.rounding
    if site.op == "Conv" and activations == "auto" and target.encoding.where == "regions" and site.y in results:
        activations = "float"  # else what the model returns would be codes
    if site.op == "Conv" and activations in ("dynamic", "token", "auto"):
        activations = "static"  # no runtime has an integer Conv with a range measured at run time
    if site.kind == "product" and activations in ("token", "auto"):
        activations = "static"
    if activations in ("static", "auto") and not with_data:
        measured = site.op != "Conv" and site.kind != "product"
        activations = next(iter(target.encoding.run_time), "float") if measured else "float"
    if activations == "auto" and "token" not in target.encoding.run_time:
        activations = "static"
    if activations in ("dynamic", "token") and activations not in target.encoding.run_time:
        raise RecipeError(f"{target.name} takes no ranges measured at run time ('{activations}'). Calibrate with --data.")
    widths = recipe.bits.weights, recipe.bits.activations or 8
    if widths[1] > 8 and activations != "float" and not target.encoding.wide:
        raise RecipeError(f"{target.name} takes activations of 2 to 8 bits, not {widths[1]}.")
    if rounding == "auto":  # at 8 bits rounding to nearest loses nothing that can be measured
        rounding = "gptq" if with_data and recipe.bits.weights < 8 else "nearest"
    block = _block(tensors, site, recipe, target, activations)
    zeros = recipe.zero_points and block > 0
    if site.kind in ("table", "stored"):  # a row is read as it is, whatever the samples
        activations, rounding = "float", "nearest"
    more = recipe.ranges, recipe.percentile, recipe.symmetric, rounding, block, zeros
    return Settings(*widths, activations, *more, **decided)


def _block(tensors: Mapping[str, Tensor], site: Site, recipe: Recipe, target: Target, activations: str) -> int:
    """How many inputs share a scale of the site's weight; 0 where all do.

    Raises RecipeError for blocks that the target, or what else the recipe asks for, does not take.
    """
    encoding, shape = target.encoding, tensors[site.weight].shape if site.weight is not None else [0, 0]
    bits, taken = recipe.bits.weights, ", ".join(map(str, encoding.blocks))
    has_terms = any(method.scope == "terms" and matches(method.where, site) for method in recipe.compensate)
    block = recipe.block
    if block == "auto":  # above 4 bits a scale per channel is enough
        is_alone = recipe.activations == "float" or recipe.bits.activations is None
        takes = is_alone and bits <= min(4, encoding.block_bits) and not has_terms
        block = next((size for size in encoding.blocks if size >= 32), 0) if takes else 0
    if site.kind == "table" and not encoding.embeddings:
        raise RecipeError(f"{target.name} takes no embedding tables of codes. Leave embeddings = true out.")
    if recipe.zero_points and (not block or encoding.symmetric):
        why = f"{target.name} takes symmetric weights" if block else "Only weights in blocks have them"
        raise RecipeError(f"zero_points = true cannot be written: {why}. Leave it out.")
    if site.kind == "table":
        return block if block and shape[1] % block == 0 else shape[1]
    if not block or site.op == "Conv" or site.kind in ("product", "stored"):
        return 0
    if block not in encoding.blocks or bits > encoding.block_bits:
        which = f", only blocks of {taken} and {encoding.block_bits} bits or fewer" if taken else ". Leave block out"
        raise RecipeError(f"{target.name} takes no weights of {bits} bits in blocks of {block}{which}.")
    if activations != "float":
        raise RecipeError(f"{site.name}: weights in blocks stand beside float activations alone. Write bits = 'w{bits}'.")
    if has_terms:
        raise RecipeError(f"{site.name}: the terms of xint have one scale per output channel. Leave xint or block out.")
    return block if encoding.partial or shape[0] % block == 0 else 0


def _skipped(graph: Graph, every: tuple[Site, ...], chosen: tuple[Site, ...]) -> tuple[Skipped, ...]:
    sites, kept = {site.name: site for site in every}, {site.name for site in chosen}
    holders = {node.name for node in graph.nodes if _is_holder(node) and any(map(is_weight, node.inputs))}
    left = [node for node in graph.nodes if (node.op in LAYER_OPS or node.name in holders) and node.name not in kept]
    return tuple(Skipped(node.name, node.op, _reason(node, sites.get(node.name))) for node in left)


def _is_holder(node: Node) -> bool:
    return node.op in HOLDERS.keys() - set(LAYER_OPS) or (node.domain or "") not in STANDARD


def _why_none(graph: Graph, skipped: Sequence[Skipped]) -> str:
    """Why there is nothing to quantize, or what to do about it."""
    inside = sum(node.op in LAYER_OPS for body in graph.subgraphs(recursive=True) for node in body.nodes)
    if skipped:
        return f"The first of {len(skipped)}, {skipped[0].name}: {skipped[0].reason}."
    text = f"There are {inside} inside bodies of If, Loop and Scan, which are left as they are"
    return f"{text}: quantize the models that were merged into this one." if inside else "It has none."


def _reason(node: Node, site: Site | None) -> str:
    """Why the operator, which is a site or none, stays float."""
    if site is not None and site.kind == "product":
        return "a product of two activations: quantized with --products"
    if site is not None:
        return "not included by the recipe"
    if _is_holder(node):
        inside = f"weights inside an operator of {node.domain}: give the model as it was exported, without it"
        return f"weights of {node.op} stay as they are" if node.op in HOLDERS else inside
    weight = node.inputs[1]
    if is_load_time(node.inputs[0]):
        return "it reads constants alone, so it is computed when the file is loaded"
    if isinstance(weight, Constant):
        return f"weight '{weight.name}' has type {weight.dtype} and rank {len(weight.shape)}"
    return f"weight '{weight.name}' is not a constant of type float32"
