"""Models in float16: computed in float32, for which there are kernels on every CPU, and whose weights are rounded once. At
the end inputs and outputs are float16 again, and so are weights that stay float.

Limits: bfloat16 stays as it is.
"""

from collections.abc import Collection
from itertools import chain

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Node, Nodes, Tensor, Variable, insert_after, replace_uses, tensors_of
from onnxcomp.graph.files import INLINE_LIMIT
from onnxcomp.graph.mapped import keep

FLOAT, FLOAT16 = 1, 10
"""ONNX's numbers of the two types."""
HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
QUANTIZING = ("DequantizeLinear", "QuantizeLinear")
STORED_BYTES = 1 << 14
"""From which a constant is worth a Cast behind it."""


def widen(graph: Graph) -> tuple[int, tuple[str, ...]]:
    """Compute in float32 what the graph and its bodies compute in float16, in place. How many constants were float16, and which
    of its inputs and outputs.
    """
    parts = [graph, *graph.subgraphs(recursive=True)]
    tensors = {id(t): t for part in parts for t in part.tensors().values()}.values()
    halves = [t for t in tensors if isinstance(t, Constant) and t.dtype == HALF]
    if not halves:
        return 0, ()
    ends = tuple(t.name for t in (*graph.inputs, *graph.outputs) if t.dtype == HALF)
    for node in chain.from_iterable(part.nodes for part in parts):
        node.attrs |= {key: FLOAT for key in ("to", "dtype", "output_dtype") if node.attrs.get(key) == FLOAT16}
        halves += [t for t in node.attrs.values() if isinstance(t, Constant) and t.dtype == HALF]
    for tensor in tensors:
        if isinstance(tensor, Variable) and tensor.dtype == HALF:
            tensor.dtype = SINGLE
    is_large = 2 * sum(t.values.nbytes for t in halves) > INLINE_LIMIT
    for constant in halves:
        constant.to_constant(keep(constant.values.astype(SINGLE), constant.values, always=is_large))
    return len(halves), ends


def narrow(graph: Graph, ends: Collection[str]) -> None:
    """Make these inputs and outputs float16 again, in place, and store the larger weights and tables that stay float in it."""
    for constant in [t for t in tensors_of(graph).values() if isinstance(t, Constant) and t.dtype == SINGLE]:
        if sum(size > 1 for size in constant.shape) < 2 or constant.values.nbytes < STORED_BYTES:
            continue
        with np.errstate(over="ignore"):
            half = constant.values.astype(HALF)
        if np.isfinite(half).all() and not any(n.op in QUANTIZING for n in constant.outputs):
            graph.nodes[:0] = _widened(constant)
            constant.to_constant(half)
    for end in {t.name: t for t in (*graph.inputs, *graph.outputs) if t.name in ends}.values():
        end.dtype = HALF
        if not end.inputs:
            graph.nodes[:0] = _widened(end)
            continue
        (maker,), inside = end.inputs, Variable(f"{end.name}/float32", SINGLE, end.shape)
        new = Nodes(inside.name)
        replace_uses(end, inside)
        maker.outputs[[t is end for t in maker.outputs].index(True)] = inside
        new("Cast", end, inside, to=FLOAT16)
        insert_after(graph, maker, new.made)


def _widened(tensor: Tensor) -> list[Node]:
    """A Cast to float32 that everybody reads in the tensor's place."""
    wide = Variable(f"{tensor.name}/float32", SINGLE, tensor.shape)
    new = Nodes(wide.name)
    replace_uses(tensor, wide)
    new("Cast", wide, tensor, to=FLOAT)
    return new.made
