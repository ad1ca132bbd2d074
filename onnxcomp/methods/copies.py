"""Offset copies: an input of few channels, quantized several times, each copy shifted by a part of a step.

    x -> [x + d_1, .., x + d_K],   d_k = (k - (K + 1) / 2) step / K,      W -> [W, .., W] / K

The mean of the copies' codes has K times as many levels: K = 4 copies of 4 bits see an image as 6 bits do, and their weights
together have K times as many levels too.

Cost    K times the multiplications of the layer, a Concat and an Add of its input at run time.
Gate    inputs of the model that one Conv alone reads, of at most `CHANNELS` channels, at fewer than `ENOUGH` bits.
Limits  the model's own input: what a layer computes is cheaper equalized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxcomp.graph.edit import Graph, Tape, apply
from onnxcomp.graph.sites import Site
from onnxcomp.graph.streams import set_constant
from onnxcomp.methods.base import Array, Outcome
from onnxcomp.numerics.affine import Scheme
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram, subsample

CHANNELS = 4
ENOUGH = 6
"""Bits that the copies together come to."""
VALUES_PER_SAMPLE = 1 << 14


def copy_inputs(
    graph: Graph, sites: Sequence[Site], bits: Mapping[str, int], feeds: Sequence[Mapping[str, Array]]
) -> tuple[tuple[Site, ...], dict[str, Outcome]]:
    """Copy, in place, the inputs that are worth it; `sites` as they are then, and what was done at each.

    `bits`: the width of the activations of each site whose input is to be quantized.
    """
    nodes, inputs = {node.name: node for node in graph.nodes}, {t.name: t for t in graph.inputs}
    changed, found = dict[str, Site](), dict[str, Outcome]()
    for site in (s for s in sites if s.op == "Conv" and s.x in inputs and bits.get(s.name, ENOUGH) < ENOUGH):
        x, node = inputs[site.x], nodes[site.name]
        w, count = node.inputs[1].values, 2 ** (ENOUGH - bits[site.name])
        if len(x.outputs) > 1 or w.shape[1] > CHANNELS or node.attrs.get("group", 1) > 1:
            continue
        values = np.concatenate([subsample(feed[site.x], VALUES_PER_SAMPLE) for feed in feeds])
        q = choose(Histogram.of(values), Scheme(bits[site.name]))
        shifts = ((np.arange(count) - (count - 1) / 2) * float(q.scale) / count).astype(np.float32)
        mean = np.mean([q.fake(values + shift) for shift in shifts], axis=0)
        one, all_copies = (max(float(np.square(y - values).mean()), 1e-30) for y in (q.fake(values), mean))
        if one <= all_copies:
            continue
        offsets = np.repeat(shifts, w.shape[1])
        tape = Tape(f"{site.name}/copies")
        stacked = tape("Concat", *[site.x] * count, axis=1)
        made = tape("Add", stacked, tape.constant("offsets", offsets.reshape(-1, *[1] * (w.ndim - 2))))
        apply(graph, "copies", tape, {site.x: made}, (site.name,))
        node.inputs[0].shape = [x.shape[0], len(offsets), *x.shape[2:]]
        set_constant(node, 1, np.concatenate([w / count] * count, axis=1))
        changed[site.name] = replace(site, inputs=(made,))
        found[site.name] = Outcome(
            {"offsets": offsets}, f"{count} copies, each shifted by a part of a step", 10 * float(np.log10(one / all_copies))
        )
    return tuple(changed.get(site.name, site) for site in sites), found
