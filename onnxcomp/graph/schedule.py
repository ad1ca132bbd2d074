"""The schedule: in which steps the graph is walked, and which tensors are alive between them.

The nodes, in topological order, are cut in front of every site and of whatever else must be looked at. A `Step` is the
stretch from one cut to the next; its `live_in` are the tensors that were computed before it and are read in it or later,
`computed` what it adds to them. Walking the steps in order therefore runs every node of the model exactly once per walk,
whatever the depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import outer_reads, tensors_of
from onnxcomp.graph.sites import Site


@dataclass(frozen=True)
class Step:
    """One stretch of the model between two cuts. Names are tensors of the float model."""

    index: int
    head: str
    """The node that the cut was made in front of; empty for the first stretch."""
    site: Site | None
    """The site at the head of the stretch, if the cut was made for one."""
    reads: tuple[str, ...]
    """What the node at the head reads, inside its bodies too; all of it is alive."""
    live_in: tuple[str, ...]
    computed: tuple[str, ...]
    """What the stretch computes and a later stretch, or the caller, reads."""


def schedule(graph: gs.Graph, heads: Mapping[str, Site | None]) -> tuple[Step, ...]:
    """Cut `graph`, which is topologically sorted, in front of each node named in `heads`.

    `heads` maps a node to its site, or to None where a cut is wanted only to look at the tensors it reads. Graph inputs
    are alive from the start, graph outputs to the end.
    """
    stretches: list[tuple[gs.Node | None, list[gs.Node]]] = [(None, [])]
    for node in graph.nodes:
        if node.name in heads:
            stretches.append((node, []))
        stretches[-1][1].append(node)
    tensors = tensors_of(graph)
    read = [[t.name for node in nodes for t in (*node.inputs, *outer_reads(node, tensors))] for _, nodes in stretches]
    last_read = {name: index for index, names in enumerate(read) for name in names}
    last_read |= {t.name: len(stretches) for t in graph.outputs}
    steps = []
    alive = [t.name for t in graph.inputs]
    for index, (head, nodes) in enumerate(stretches):
        alive = [name for name in alive if last_read.get(name, -1) >= index]
        computed = [t.name for n in nodes for t in n.outputs if last_read.get(t.name, -1) > index]
        seen = [] if head is None else [*head.inputs, *outer_reads(head, tensors)]
        reads = tuple(t.name for t in seen if isinstance(t, gs.Variable))
        site = None if head is None else heads[head.name]
        steps.append(Step(index, "" if head is None else head.name, site, reads, tuple(alive), tuple(computed)))
        alive += computed
    return tuple(steps)
