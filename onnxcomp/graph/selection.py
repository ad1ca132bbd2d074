"""Outputs that are picked and not computed: boxes behind NonMaxSuppression, the class behind ArgMax, the largest behind TopK.

What is picked, how many there are and in which order turns on the last bit of a value, so two such outputs cannot be compared
place by place. What they are picked from can: the boxes and scores in front.

Limits: bodies of If, Loop and Scan are not entered.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.convert import VARYING
from onnxcomp.graph.edit import tensors_of
from onnxcomp.graph.sites import LAYER_OPS

Op = tuple[str, Sequence[str], Sequence[str]]
"""An operator, and the tensors that it reads and makes."""
_SORTING = frozenset({"ArgMax", "ArgMin", "TopK"})


class _Kind(IntEnum):
    """What a tensor follows from."""

    EXACT = 0
    """From no layer, or only from the shape of what a layer makes."""
    COMPUTED = 1
    SORTED = 2
    VARYING = 3


def picked(
    nodes: Iterable[Op], outputs: Sequence[str], is_floating: Callable[[str], bool]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Of the names `outputs` of what the sorted `nodes` compute: those that are picked, and the floating tensors, by name, that
    they are picked from.
    """
    kinds, read = dict[str, _Kind](), dict[str, Sequence[str]]()
    for op, reads, makes in nodes:
        kind = _kind(op, [kinds.get(name, _Kind.EXACT) for name in reads])
        kinds |= dict.fromkeys(makes, kind)
        read |= dict.fromkeys(makes, reads)
    chosen = [name for name in outputs if kinds.get(name, _Kind.EXACT) >= _Kind.SORTED]
    found, todo, seen = list[str](), list(chosen), set[str]()
    while todo:
        name = todo.pop()
        kind = kinds.get(name, _Kind.EXACT)
        if name in seen or kind == _Kind.EXACT:
            continue
        seen.add(name)
        if kind == _Kind.COMPUTED and is_floating(name):
            found.append(name)
        else:
            todo += read[name]
    return frozenset(chosen), tuple(sorted(found))


def find_picked(graph: gs.Graph) -> tuple[frozenset[str], tuple[str, ...]]:
    """`picked` of a graph whose tensors have types."""
    tensors = tensors_of(graph)
    nodes = ((node.op, [t.name for t in node.inputs], [t.name for t in node.outputs]) for node in graph.nodes)
    return picked(nodes, [t.name for t in graph.outputs], lambda name: np.issubdtype(tensors[name].dtype, np.floating))


def compared(graph: gs.Graph) -> list[gs.Tensor]:
    """The outputs that can be compared place by place."""
    left_out = find_picked(graph)[0]
    return [tensor for tensor in graph.outputs if tensor.name not in left_out]


def _kind(op: str, read: Sequence[_Kind]) -> _Kind:
    """Of what an operator makes. A layer that reads what was sorted computes, as experts do behind a router."""
    kind = max(read, default=_Kind.EXACT)
    if op in ("Shape", "Size"):
        return kind if kind == _Kind.VARYING else _Kind.EXACT
    if op in LAYER_OPS:
        return kind if kind == _Kind.VARYING else _Kind.COMPUTED
    if op.startswith("Scatter"):  # into what has its own shape and order
        return max(read[0], min(kind, _Kind.COMPUTED))
    if op in VARYING and kind:
        return _Kind.VARYING
    return max(kind, _Kind.SORTED) if op in _SORTING and kind else kind
