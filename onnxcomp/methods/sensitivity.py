"""Sensitive layers: more bits where few weights, or few multiplications, do most of the damage.

    damage    |y(e_s) - y|^2 / |y|^2     e_s: what quantizing does to the input of a layer, or its weight to what it makes
    taken     by damage per cost, while the weights' bytes grow by no more than `BYTES`, and no more than `MACS` of all
              multiplications get wide activations

y are the float model's outputs on a few samples; errors are put in one at a time, where they arise. Kernels that multiply
codes of 8 bits at every width take wide activations for nothing, and others have few of them.

What has 8 bits already is looked at where its range is fixed. Where the activations of a layer do more damage than they have
of the multiplications they stay float, and rough weights are rounded by GPTQ. What a Conv stores counts with it where an
activation reads that, for a float layer stores nothing. Where every tensor is stored and may have 16 bits, those that 8 bits
do not hold get them, such as the residual stream behind massive activations.

Source  the sensitivity of layers alone, as in HAWQ (arXiv:1905.03696) and ZeroQ (arXiv:2001.00281), by running the errors
        themselves through the model: at 4 bits they are too large for a second derivative.
Cost    bytes as above, and nothing at run time; here two runs of `ROWS` samples for every layer, from there to the outputs.
Gate    a part is taken when its share of the damage is more than twice its share of the cost.
Limits  errors are those of rounding to nearest, in front of equalization and compensation; weights in blocks, and models over
        2 GiB, which every stretch would read again, stay as they are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from onnxcomp.graph.behind import function_behind
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph, Node, Tape, Variable, apply, extract, tensors_of
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.schedule import schedule
from onnxcomp.graph.selection import compared
from onnxcomp.graph.sites import PASS_THROUGH_OPS, Site
from onnxcomp.methods.base import Array, Outcome
from onnxcomp.methods.rotation import can_mix, nearest, run_part
from onnxcomp.numerics.affine import Scheme, weight_qparams
from onnxcomp.numerics.arrays import energies
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram, subsample
from onnxcomp.runtime import Session, each

WIDE = 8
BYTES, MACS, WORTH = 1 / 16, 0.1, 2.0
"""Growth of all weights' bytes; share of all multiplications with wide activations; and damage per cost, at least."""
ROUGH, FLOAT = 0.001, 0.25
"""Damage of a part of 8 bits from which something is done: weights are rounded by GPTQ, and activations stay float where
they do more damage than they have of all multiplications, of which no more than `FLOAT` may.
"""
ENOUGH, LITTLE = 0.01, 0.001
"""Damage of all that is stored in 8 bits that is left, 20 dB, and of one tensor for which nothing is done."""
SEEN = 1 << 16
"""Values that the range of what is stored is chosen by."""
ROWS = 4
"""Samples."""
STRETCHES, SHORTEST = 8, 6
"""Of the model at most, and layers of one at least: the errors of one at a time are held, and run from where it begins."""
TINY = 1e-30
Widths = tuple[int, int | None]
"""Bits of weights and of activations; None where these are float."""


class Part(NamedTuple):
    """One source of error: the weight of a layer, or what one layer or more read."""

    sites: tuple[str, ...]
    is_weight: bool
    cost: float
    """By how much of themselves all weights' bytes grow, or the share of all multiplications."""
    damage: float


class Error(NamedTuple):
    """What is put in at a tensor because of these sites: for them alone, or for all who read it."""

    tensor: str
    sites: tuple[str, ...]
    is_weight: bool
    values: Array
    for_all: bool


class Rescued(NamedTuple):
    """A layer of 8 bits that loses too much: whether its activations stay float, and its weights are rounded by GPTQ."""

    is_float: bool
    is_gptq: bool
    outcome: Outcome


class Stored(NamedTuple):
    """A tensor that is stored in 16 bits: the layers that read it so, others reading 8, and why."""

    layers: tuple[str, ...]
    outcome: Outcome


class Wide(NamedTuple):
    """What a layer gets, by how many bytes its weights grow, and the part of the output's error that goes with that."""

    widths: Widths
    added_bytes: int
    outcome: Outcome


def widen(
    graph: Graph, like: ModelProto, sites: Sequence[Site], asked: Mapping[str, Widths], feed: Mapping[str, Array],
    open_to: frozenset[str] = frozenset(), *, mixed: bool = False,
) -> dict[str, Wide]:  # fmt: skip
    """The layers that get more than the widths that are `asked` for, measured on the samples of `feed` at the float outputs.

    asked     bits of the layers that may get others
    open_to   layers whose activations may have a range per token
    mixed     whether inputs may be rotated
    """
    layers = [site for site in sites if site.name in asked and min(asked[site.name][0], asked[site.name][1] or WIDE) < WIDE]
    parts = measure(graph, like, layers, asked, feed, open_to, mixed=mixed)
    damages = np.array([part.damage for part in parts])
    taken = dict[int, str]()
    for is_weight, budget, what in ((True, BYTES, "weights' bytes"), (False, MACS, "multiplications")):
        name = "weights" if is_weight else "activations"
        some = [i for i, part in enumerate(parts) if part.is_weight == is_weight]
        shares = damages / max(damages[some].sum(), TINY)
        for i in sorted(some, key=lambda i: -shares[i] / max(parts[i].cost, TINY)):
            cost = parts[i].cost
            if cost <= budget and shares[i] > WORTH * cost:
                budget -= cost
                taken[i] = f"{name} of {WIDE} bits: {shares[i]:.1%} of what {name} lose, {cost:.1%} of the {what}"
    sizes, found = _sizes(graph, layers), dict[str, Wide]()
    for site in dict.fromkeys(site for i in taken for site in parts[i].sites):
        own = [i for i in taken if site in parts[i].sites]
        left = max(1 - float(damages[own].sum() / damages.sum()), TINY)
        outcome = Outcome({}, "; ".join(taken[i] for i in own), float(-10 * np.log10(left)))
        (weights, activations), wide = asked[site], {parts[i].is_weight for i in own}
        widths = WIDE if True in wide else weights, WIDE if False in wide else activations
        found[site] = Wide(widths, sizes[site] * (widths[0] - weights) // 8, outcome)
    return found


def rescue(
    graph: Graph, like: ModelProto, sites: Sequence[Site], asked: Mapping[str, Widths], feed: Mapping[str, Array],
    *, floats: bool = True, gptq: bool = True,
) -> dict[str, Rescued]:  # fmt: skip
    """The layers among those `asked` for, of 8-bit activations with a fixed range, that lose too much; arguments as those of
    `widen`, and what is open: `floats` for activations, `gptq` for weights.
    """
    layers = [site for site in sites if site.name in asked]
    parts = measure(graph, like, layers, asked, feed, least=ROUGH)
    budget, taken = FLOAT, set[int]()
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].damage / max(parts[i].cost, TINY)):
        cost, is_open = (0.0, gptq) if parts[i].is_weight else (parts[i].cost, floats)
        if is_open and parts[i].damage > max(ROUGH, cost) and cost <= budget:
            budget -= cost
            taken.add(i)
    total, found = sum(part.damage for part in parts), dict[str, Rescued]()
    for site in dict.fromkeys(site for i in sorted(taken) for site in parts[i].sites):
        own = [parts[i] for i in taken if site in parts[i].sites]
        is_float, is_gptq = (any(part.is_weight == kind for part in own) for kind in (False, True))
        what = " and ".join(name for name, holds in (("activations", is_float), ("weights", is_gptq)) if holds)
        lost = sum(part.damage for part in own)
        reason = f"{what} of {WIDE} bits cost the outputs {-10 * np.log10(lost):.0f} dB alone"
        gain = float(-10 * np.log10(max(1 - lost / total, TINY)))
        found[site] = Rescued(is_float, is_gptq, Outcome({}, reason, gain))
    return found


def store(
    graph: Graph, like: ModelProto, sites: Sequence[Site], tensors: Collection[str], feed: Mapping[str, Array]
) -> dict[str, Stored]:
    """Those of the `tensors`, stored in 8 bits each, that get 16: the ones that the float outputs lose most by on the samples
    of `feed`, until the rest does no more than `ENOUGH` damage. What layers read and others too counts for both apart. The
    layers of `sites` that make them, or read them so, do no more than `FLOAT` of the multiplications.
    """
    homes = {t.name: node.name for node in graph.nodes for t in node.outputs if t.name in tensors}
    nodes, layers = {node.name: node for node in graph.nodes}, {site.name: site for site in sites if site.kind == "layer"}
    steps, sizes = schedule(graph, dict.fromkeys([*homes.values(), *layers])), _sizes(graph, [*layers.values()])
    length, live, macs = -(-len(steps) // STRETCHES), dict(feed), dict[str, int]()
    found = list[tuple[str, tuple[str, ...], float]]()
    for start in range(0, len(steps), length):
        stretch, behind = steps[start : start + length], steps[start + length : start + length + 1]
        live = {name: live[name] for name in stretch[0].live_in}
        heads = {step.head for step in stretch}  # an input has no home, and the first stretch no head
        here = [name for name in tensors if homes.get(name, "") in heads]
        made = [site for name, site in layers.items() if name in heads]
        needed = [*(site.raw for site in made), *(name for step in behind for name in step.live_in)]
        passed, _ = _run(graph, like, [], {}, live, [*here, *needed])
        lost = {name: _rounding(passed[name], name) for name in here if passed[name].size}
        parts = [(*readers, name) for name in lost for readers in _readers(graph, name, layers)]
        errors = [Error(name, direct, False, lost[name], is_all) for direct, _, is_all, name in parts]
        damages = _damages(graph, like, errors, live, LITTLE)
        found += [(name, readers, damage) for (_, readers, _, name), damage in zip(parts, damages, strict=True)]
        macs |= {s.name: sizes[s.name] * passed[s.raw].size // nodes[s.name].inputs[1].shape[s.weight_axis] for s in made}
        live = passed
    total, damages, taken, wide = sum(damage for *_, damage in found), dict[str, float](), dict[str, Stored](), set[str]()
    left, budget = total, FLOAT * sum(macs.values())
    for name, readers, damage in sorted(found, key=lambda part: -part[2]):
        if left <= ENOUGH or damage < LITTLE:
            break
        more = wide.union(readers, (site.name for site in layers.values() if name in (site.raw, site.y)))
        if sum(macs[site] for site in more) > budget:
            continue
        wide, left = more, left - damage
        damages[name] = damages.get(name, 0.0) + damage
        reason = f"stored in {WIDE} bits it costs the outputs {-10 * np.log10(damages[name]):.0f} dB alone"
        gain = float(-10 * np.log10(max(1 - damages[name] / total, TINY)))
        before = taken[name].layers if name in taken else ()
        taken[name] = Stored((*before, *readers), Outcome({}, reason, gain))
    return taken


def measure(
    graph: Graph, like: ModelProto, layers: Sequence[Site], asked: Mapping[str, Widths], feed: Mapping[str, Array],
    open_to: frozenset[str] = frozenset(), *, mixed: bool = False, least: float = 0.0,
) -> list[Part]:  # fmt: skip
    """Every part with its damage, stretch by stretch; arguments as those of `widen`. With `least` it is the parts of 8 bits,
    and what Convs store, that are looked at, where they do as much damage together.
    """

    def is_asked(bits: int) -> bool:
        return bits == WIDE if least else bits < WIDE

    steps, nodes = schedule(graph, {site.name: site for site in layers}), {node.name: node for node in graph.nodes}
    sizes, macs, found, live = _sizes(graph, layers), dict[str, int](), list[tuple[tuple[str, ...], bool, float]](), dict(feed)
    length = max(-(-len(steps) // STRETCHES), SHORTEST)
    for start in range(0, len(steps), length):
        stretch, behind = steps[start : start + length], steps[start + length : start + length + 1]
        here, live = [step.site for step in stretch if step.site is not None], {name: live[name] for name in stretch[0].live_in}
        functions = {s: part for s in here if least and s.op == "Conv" and (part := _activation(graph, s)) is not None}
        needed = [*(name for step in behind for name in step.live_in), *(site.y for site in functions)]
        passed, lost = _run(graph, like, here, asked, live, needed)
        macs |= {s.name: sizes[s.name] * lost[s.name].size // nodes[s.name].inputs[1].shape[s.weight_axis] for s in here}
        errors = [Error(s.raw, (s.name,), True, lost[s.name], for_all=True) for s in here if is_asked(asked[s.name][0])]
        for x in dict.fromkeys(site.x for site in here):
            readers = tuple(site.name for site in layers if site.x == x)
            bits = min(asked[name][1] or WIDE for name in readers)
            if is_asked(bits) and readers[0] in lost:
                how = {"token": open_to.issuperset(readers), "mixed": mixed and all(can_mix(nodes[name]) for name in readers)}
                values = nearest(passed[x], Scheme(bits), **how, name=x) - passed[x]
                errors.append(Error(x, readers, False, values, for_all=False))
        errors += [_stored(like, site, passed[site.y], part) for site, part in functions.items()]
        damages = _damages(graph, like, errors, live, least)
        found += [(error.sites, error.is_weight, damage) for error, damage in zip(errors, damages, strict=True)]
        live = passed
    stored, multiplied, parts = sum(sizes[name] * asked[name][0] for name in sizes), sum(macs.values()), list[Part]()
    for names, is_weight, damage in _joined(found):
        added = sizes[names[0]] * (WIDE - asked[names[0]][0])
        cost = added / stored if is_weight else sum(macs[name] for name in names) / multiplied
        parts.append(Part(names, is_weight, cost, damage))
    return parts


def _run(
    graph: Graph, like: ModelProto, here: Sequence[Site], asked: Mapping[str, Widths], live: Mapping[str, Array],
    needed: Sequence[str],
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """What these layers read and what is `needed` behind them; and by layer what its weight loses: the output of a twin,
    whose weight is what rounding changes.
    """
    read = dict.fromkeys([*(site.x for site in here), *needed])
    part, twins = extract(graph, list(live), list(dict.fromkeys([*read, *(site.raw for site in here)]))), dict[str, str]()
    nodes = {node.name: node for node in part.nodes}
    for site in here:
        node, op = nodes[site.name], Tape(f"{site.name}/twin")
        w = node.inputs[1].values
        lost = (weight_qparams(w, site.weight_axis, asked[site.name][0]).fake(w) - w).astype(np.float32)
        twins[site.name] = op(node.op, site.x, op.constant("lost", lost), **node.attrs)
        apply(part, "twin", op, {})
    tensors = tensors_of(part)
    part.outputs = [tensors[name] for name in [*read, *twins.values()] if name not in live]
    part.cleanup()
    found = {**live, **(run_part(part, live, like) if part.outputs else {})}
    return {name: found[name] for name in read}, {name: found[twin] for name, twin in twins.items()}


def _readers(
    graph: Graph, name: str, layers: Collection[str]
) -> list[tuple[tuple[str, ...], tuple[str, ...], bool]]:  # fmt: skip
    """Who reads a tensor: layers and others apart where there are both. Of each their names, those of the layers among them and
    behind mere moves, and whether they are all.
    """

    def behind(readers: Sequence[Node]) -> Iterator[str]:
        for node in readers:
            if node.name in layers:
                yield node.name
            elif node.op in PASS_THROUGH_OPS:
                yield from behind([n for t in node.outputs for n in t.outputs])

    every = tensors_of(graph)[name].outputs
    parts = [[n for n in every if n.name not in layers], [n for n in every if n.name in layers]]
    parts = parts if all(parts) else [every]
    return [(tuple(n.name for n in part), tuple(behind(part)), len(parts) == 1) for part in parts]


def _rounding(values: Array, name: str) -> Array:
    """What storing the values of a tensor in 8 bits does to them."""
    q = choose(Histogram.of(subsample(values, SEEN), name), Scheme(WIDE))
    return np.asarray(q.fake(values) - values)  # also of a single one


def _activation(graph: Graph, site: Site) -> Graph | None:
    """The activation that alone reads what the site makes; None for a ReLU, whose result layers read."""
    part = function_behind(graph, site.y)
    return None if part is None or all(node.op in ("Relu", "Clip") for node in part.nodes) else part


def _stored(like: ModelProto, site: Site, y: Array, part: Graph) -> Error:
    """What storing y, the result of a Conv, in 8 bits does behind the activation `part`."""
    result = part.outputs[0].name

    def after(values: Array) -> Array:
        return run_part(part, {site.y: values}, like)[result]

    q = choose(Histogram.of(subsample(y, SEEN)).weighted(lambda x: after(x).ravel()), Scheme(WIDE))
    return Error(result, (site.name,), False, after(q.fake(y)) - after(y), for_all=True)


def _joined(found: Sequence[tuple[tuple[str, ...], bool, float]]) -> list[tuple[tuple[str, ...], bool, float]]:
    """The parts, what a layer stores being one with what it reads."""
    joined = dict[tuple[tuple[str, ...], bool], float]()
    for names, is_weight, damage in found:
        home = next((key for key in joined if key[1] == is_weight and set(names) <= set(key[0])), (names, is_weight))
        joined[home] = joined.get(home, 0.0) + damage
    return [(*key, damage) for key, damage in joined.items()]


def _damages(
    graph: Graph, like: ModelProto, errors: Sequence[Error], live: Mapping[str, Array], least: float = 0.0
) -> list[float]:
    """What each error, put in alone, does to the outputs, over their energy; `live`: what the model goes on from. Zero for
    those that do less than `least` together: groups of errors that do more are halved.
    """
    ends = [t.name for t in compared(graph) if t.dtype == np.float32 and t.name not in live]
    if not errors or not ends:
        return [0.0] * len(errors)
    rest = extract(graph, list(live), ends)
    feed, reached = {t.name: live[t.name] for t in rest.inputs}, tensors_of(rest).keys()
    for number, error in enumerate(errors):
        name, op = f"error-{number}", Tape(f"error-{number}/put")
        feed[name] = np.zeros([1] * error.values.ndim, np.float32)
        rest.inputs.append(Variable(name, np.dtype(np.float32), [f"{name}-{d}" for d in range(error.values.ndim)]))
        if error.tensor in reached:  # else no output depends on it
            consumers = None if error.for_all else error.sites
            apply(rest, "put", op, {error.tensor: op("Add", error.tensor, name)}, consumers)
    session = Session(to_model(rest, like), threads=1)
    exact = session.run(feed)

    def damage(group: Sequence[int]) -> float:
        found = session.run(feed | {f"error-{number}": errors[number].values for number in group})
        return sum(noise / (signal + TINY) for signal, noise in (energies(exact[name], found[name]) for name in exact))

    every = range(len(errors))
    damages, groups = [0.0] * len(errors), [every] if least else [every[number : number + 1] for number in every]
    while groups:
        seen, groups = list(zip(groups, each(damage, groups), strict=True)), []
        for group, found in seen:
            if len(group) == 1:
                damages[group[0]] = float(np.nan_to_num(found))
            elif not found < least:
                groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    return damages


def _sizes(graph: Graph, layers: Sequence[Site]) -> dict[str, int]:
    """The number of weights of each layer."""
    nodes = {node.name: node for node in graph.nodes}
    return {site.name: nodes[site.name].inputs[1].values.size for site in layers}
