"""Sensitive layers: 8 bits where few weights, or few multiplications, do most of the damage.

    damage    |y(e_s) - y|^2 / |y|^2     e_s: what quantizing does to the input of a layer, or its weight to what it makes
    taken     by damage per cost, while the weights' bytes grow by no more than `BYTES`, and no more than `MACS` of all
              multiplications get wide activations

y are the float model's outputs on a few samples; errors are put in one at a time. Kernels that multiply codes of 8 bits at
every width take wide activations for nothing, and others have few of them.

Source  the sensitivity of layers alone, as in HAWQ (arXiv:1905.03696) and ZeroQ (arXiv:2001.00281), by running the errors
        themselves through the model: at 4 bits they are too large for a second derivative.
Cost    bytes as above, and nothing at run time; here two passes over `ROWS` samples for every layer, and the memory of these.
Gate    a part is taken when its share of the damage is more than twice its share of the cost.
Limits  errors are those of rounding to nearest, in front of equalization and compensation; weights in blocks, and models over
        2 GiB, of which two would have to be held, stay as they are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph, Tape, Variable, apply, tensors_of
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, Outcome
from onnxcomp.methods.rotation import can_mix, nearest
from onnxcomp.numerics.affine import Scheme, weight_qparams
from onnxcomp.numerics.arrays import energies
from onnxcomp.runtime import Session

WIDE = 8
BYTES, MACS, WORTH = 1 / 16, 0.1, 2.0
"""Growth of all weights' bytes; share of all multiplications with wide activations; and damage per cost, at least."""
ROWS = 4
"""Samples: of all inputs and outputs of layers, and errors of both, so many are held."""
TINY = 1e-30
Widths = tuple[int, int | None]
"""Bits of weights and of activations; None where these are float."""


class Part(NamedTuple):
    """One source of error: the weight of a layer, or what one layer or more read."""

    sites: tuple[str, ...]
    is_weight: bool
    error: Array
    cost: float
    """By how much of themselves all weights' bytes grow, or the share of all multiplications."""


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
    if not layers or all(t.dtype != np.float32 for t in graph.outputs):
        return {}
    parts = _parts(graph, like, layers, asked, feed, open_to, mixed=mixed)
    damages = _damages(graph, like, {site.name: site for site in layers}, parts, feed)
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


def _sizes(graph: Graph, layers: Sequence[Site]) -> dict[str, int]:
    """The number of weights of each layer."""
    nodes = {node.name: node for node in graph.nodes}
    return {site.name: nodes[site.name].inputs[1].values.size for site in layers}


def _parts(
    graph: Graph, like: ModelProto, layers: Sequence[Site], asked: Mapping[str, Widths], feed: Mapping[str, Array],
    open_to: frozenset[str], *, mixed: bool,
) -> list[Part]:  # fmt: skip
    """The errors, from one pass in which every layer has a twin whose weight is what rounding changes."""
    both, twins, nodes = graph.copy(), dict[str, str](), {node.name: node for node in graph.nodes}
    for site in layers:
        node, op = nodes[site.name], Tape(f"{site.name}/twin")
        w = node.inputs[1].values
        lost = (weight_qparams(w, site.weight_axis, asked[site.name][0]).fake(w) - w).astype(np.float32)
        twins[site.name] = op(node.op, site.x, op.constant("lost", lost), **node.attrs)
        apply(both, "twin", op, {})
    tensors = tensors_of(both)
    both.outputs = [tensors[name] for name in dict.fromkeys([*(site.x for site in layers), *twins.values()])]
    live, sizes = Session(to_model(both, like)).run(feed), _sizes(graph, layers)
    stored = sum(sizes[site.name] * asked[site.name][0] for site in layers)
    macs = {s.name: sizes[s.name] * live[twins[s.name]].size // nodes[s.name].inputs[1].shape[s.weight_axis] for s in layers}
    found = list[Part]()
    for site in [site for site in layers if asked[site.name][0] < WIDE]:
        cost = sizes[site.name] * (WIDE - asked[site.name][0]) / stored
        found.append(Part((site.name,), True, live[twins[site.name]], cost))
    for x in dict.fromkeys(site.x for site in layers):
        readers = [site.name for site in layers if site.x == x]
        bits = min(asked[name][1] or WIDE for name in readers)
        if bits < WIDE:
            how = {"token": open_to.issuperset(readers), "mixed": mixed and all(can_mix(nodes[name]) for name in readers)}
            cost = sum(macs[name] for name in readers) / sum(macs.values())
            found.append(Part(tuple(readers), False, nearest(live[x], Scheme(bits), **how) - live[x], cost))
    return found


def _damages(
    graph: Graph, like: ModelProto, sites: Mapping[str, Site], parts: Sequence[Part], feed: Mapping[str, Array]
) -> Array:
    """What each error, put in alone, does to the outputs, over their energy."""
    other = graph.copy()
    for number, part in enumerate(parts):
        op, name = Tape(f"error-{number}/put"), f"error-{number}"
        other.inputs.append(Variable(name, np.dtype(np.float32), [f"{name}-{d}" for d in range(part.error.ndim)]))
        old = sites[part.sites[0]].raw if part.is_weight else sites[part.sites[0]].x
        apply(other, "put", op, {old: op("Add", old, name)}, None if part.is_weight else part.sites)
    other.outputs = [t for t in other.outputs if t.dtype == np.float32]
    session = Session(to_model(other, like))
    none = {f"error-{number}": np.zeros([1] * part.error.ndim, np.float32) for number, part in enumerate(parts)}
    exact = session.run({**feed, **none})
    runs = (session.run({**feed, **none, f"error-{number}": part.error}) for number, part in enumerate(parts))
    pairs = ([energies(y, found[name]) for name, y in exact.items()] for found in runs)
    return np.nan_to_num([sum(noise / (signal + TINY) for signal, noise in outputs) for outputs in pairs])
