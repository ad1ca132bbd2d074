"""Wide ends: 8 bits for the layers that read the model's inputs, and for those that make its outputs.

What the first layers lose, all others work on, and what the last ones lose, nothing repairs. Kernels multiply codes of 8 bits
at every width, so activations of 8 bits cost nothing there; weights of 8 bits cost their bytes.

Cost    nothing at run time; the bytes of weights, where they are few.
Gate    the error of the layer's output must fall on samples; weights besides only where the layer has at most `SHARE` of all.
Limits  layers that read a float input behind no other layer, and layers that none reads; weights in blocks stay as they are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from onnxcomp.graph.edit import Graph, extract, tensors_of
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.sites import Site
from onnxcomp.graph.streams import set_constant
from onnxcomp.methods.base import Array, Outcome
from onnxcomp.methods.rotation import run_part
from onnxcomp.numerics.affine import Scheme, weight_qparams
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram

WIDE = 8
SHARE = 0.05
"""Of all weights, that a layer may have to get wide ones."""
Widths = tuple[int, int | None]
"""Bits of weights and of activations; None where these are float."""


class End(NamedTuple):
    """What was found at a layer: the widths it gets, and by how many bytes its weights grow. The outcome has no fit where the
    widths stay as they are.
    """

    widths: Widths
    added_bytes: int
    outcome: Outcome


def widen(
    graph: Graph, like: ModelProto, sites: Sequence[Site], asked: Mapping[str, Widths], feed: Mapping[str, Array]
) -> dict[str, End]:
    """What wider codes bring at the ends, on `feed`; `asked`: the widths of the sites that may get others."""
    tensors, found = tensors_of(graph), dict[str, End]()
    sizes = {site.name: tensors[site.weight].values.size for site in sites if site.kind == "layer" and site.weight is not None}
    wider = {
        name: (max(bits, WIDE) if sizes[name] <= SHARE * sum(sizes.values()) else bits, activations and max(activations, WIDE))
        for name, (bits, activations) in asked.items()
    }
    ends = [(site, place) for site, place in find_ends(graph, sites) if wider.get(site.name) != asked.get(site.name)]
    unknown = list(dict.fromkeys(site.x for site, _ in ends if site.x not in feed))
    live = {**feed, **(run_part(extract(graph, list(feed), unknown), feed, like) if unknown else {})}
    for site, place in ends:
        wide, part = wider[site.name], extract(graph, [site.x], [site.y])
        exact, before, after = (_output(part, like, site, live[site.x], of) for of in (None, asked[site.name], wide))
        one, other = (max(float(np.square(y - exact).sum(dtype=np.float64)), 1e-30) for y in (before, after))
        gains = other < one
        which = [what for what, a, b in zip(("weights", "activations"), asked[site.name], wide, strict=True) if a != b]
        reason = f"{place}{':' if gains else ', but'} {' and '.join(which)} of {WIDE} bits{'' if gains else ' gain nothing'}"
        added = sizes[site.name] * (wide[0] - asked[site.name][0]) // 8 if gains else 0
        outcome = Outcome({} if gains else None, reason, 10 * float(np.log10(one / other)))
        found[site.name] = End(wide if gains else asked[site.name], added, outcome)
    return found


def find_ends(graph: Graph, sites: Sequence[Site]) -> list[tuple[Site, str]]:
    """The layers at the model's inputs and outputs, in the order of the sites, and where each of them is."""
    layers = {site.name for site in sites if site.kind == "layer"}
    fresh, read = {t.name for t in graph.inputs if t.dtype == np.float32}, set[str]()
    first, last = set[str](), set[str]()
    for node in graph.nodes:
        if any(t.name in fresh for t in node.inputs[:1] if node.name in layers):
            first.add(node.name)
        elif any(t.name in fresh for t in node.inputs):
            fresh |= {t.name for t in node.outputs if t.dtype == np.float32}
    for node in reversed(graph.nodes):
        is_read = any(t.name in read for t in node.outputs)
        if node.name in layers and not is_read:
            last.add(node.name)
        if node.name in layers or is_read:
            read |= {t.name for t in node.inputs}
    places = {True: "it reads the model's input", False: "it makes the model's output"}
    return [(site, places[site.name in first]) for site in sites if site.name in first | last]


def _output(part: Graph, like: ModelProto, site: Site, x: Array, bits: Widths | None) -> Array:
    """What the layer, alone in `part`, makes of x with its weight and x rounded to so many bits; None: as they are."""
    part = part.copy()
    node = next(node for node in part.nodes if node.name == site.name)
    if bits is not None:
        w = node.inputs[1].values
        set_constant(node, 1, weight_qparams(w, site.weight_axis, bits[0]).fake(w))
        x = x if bits[1] is None else choose(Histogram.of(x), Scheme(bits[1])).fake(x)
    return run_part(part, {site.x: x}, like)[site.y]
