"""Folding: what a method adds in front of a quantizer goes into the constant that the tensor was made with.

    LayerNormalization(h; g, b) + N = LayerNormalization(h; g, b + N)        (h + B) + N = h + (B + N)
    P (V + B) + N = P (V + (B + N))     where P is a Softmax, whose rows sum to 1

Between the constant and the Add there may be operators that only move values. Which channel becomes which is found by
running the stretch between them on channel numbers, never from attributes. Sums are taken in float64 and rounded once; a
constant that others read is copied. A tensor t whose value now has N in it is called `t/with-{method}`.

Limits: the Add stays where anything else reads the tensor, or a channel of B that reaches it; where something on the way
is quantized; and where the lengths of more axes than the first and one other are unknown.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError
from onnxcomp.graph.edit import extract, remove, replace_uses
from onnxcomp.graph.fold import input_at, is_load_time, is_op
from onnxcomp.graph.tidy import Fold

MOVES = ("Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose output values are a selection of their first input's."""
LENGTH = 5
"""Fed along an axis of unknown length, the first one aside."""
Values = Mapping[str, np.ndarray]
Trace = Callable[[gs.Graph, Values], Values]
"""Runs a part of the graph on feeds and gives its outputs; raises ModelError where it does not run."""


def fold_offset(graph: gs.Graph, add_name: str, method: str, trace: Trace) -> Fold | None:
    """Fold the Add of a constant called `add_name` into what makes its other operand; None where it has to stay."""
    add = next(node for node in graph.nodes if node.name == add_name)
    x, noise = sorted(add.inputs, key=lambda t: isinstance(t, gs.Constant))
    way = way_back(x)
    home = _home(way[0])
    if home is None or (len(way) > 1 and input_at(*home[:2]) is None):
        return None
    holder, index, shape = home
    old = input_at(holder, index)
    before = np.zeros(noise.values.size) if old is None else old.values
    numbers = np.broadcast_to(np.arange(before.size, dtype=np.float32).reshape(shape), lengths(way[0]))
    found = trace_channels(graph, way, numbers, add, trace)
    if found is None:
        return None
    x_numbers = np.moveaxis(found[x.name], -noise.values.ndim, -1)
    rows = x_numbers.reshape(-1, x_numbers.shape[-1])
    channels = rows[0].astype(int)
    if not len(np.unique(channels)) == len(channels) == noise.values.size or not (rows == rows[0]).all():
        return None
    added = np.zeros(before.size)
    added[channels] = noise.values.reshape(-1)
    added = added.reshape(before.shape)
    name = noise.name if old is None or len(old.outputs) > 1 else old.name
    new = gs.Constant(name, (before.astype(np.float64) + added).astype(np.float32))
    holder.inputs = [*holder.inputs[:index], new, *holder.inputs[index + 1 :]]
    for tensor in way:
        tensor.name += f"/with-{method}"
    replace_uses(add.outputs[0], x)
    remove(graph, add)
    return Fold(holder.name, index, method, "" if old is None else old.name, None if old is None else before, added)


# --- from the tensor back to the constant ----------------------------------------------------------------------------


def way_back(x: gs.Tensor) -> list[gs.Tensor]:
    """The tensors whose values reach x by moves and averages alone, from what the first one was made with to x."""
    way = [x]
    while way[0].inputs and (before := moved(way[0].inputs[0])) is not None:
        way.insert(0, before)
    return way


def moved(node: gs.Node) -> gs.Tensor | None:
    """The input whose values a node only moves, or averages in a product with rows that sum to 1; None where it does else."""
    if is_op(node, "MatMul") and node.inputs[0].inputs:
        softmax = node.inputs[0].inputs[0]
        if is_op(softmax, "Softmax") and softmax.attrs.get("axis", -1) in (-1, len(softmax.outputs[0].shape or ()) - 1):
            return node.inputs[1]
    return node.inputs[0] if is_op(node, *MOVES) else None


def _home(made: gs.Tensor) -> tuple[gs.Node, int, Sequence[int]] | None:
    """Where a constant per channel enters `made`: the node, its input, where a layer without a bias has none yet, and the
    shape in which it lies along the axes of `made`.
    """
    if not made.inputs or not made.shape:
        return None
    node, last = made.inputs[0], len(made.shape) - 1
    if is_op(node, "Add", "Sum"):
        # the constant, or the one in a sum with a table, which the runtime adds up at load time
        tables = [t.inputs[0] for t in node.inputs if t.inputs and is_load_time(t) and is_op(t.inputs[0], "Add", "Sum")]
        holder = tables[0] if tables else node
        shapes = [t.values.shape if isinstance(t, gs.Constant) else () for t in holder.inputs]
        return next(((holder, i, s) for i, s in enumerate(shapes) if s and max(s) == np.prod(s)), None)
    plain = is_op(node, "Conv") or (is_op(node, "Gemm") and node.attrs.get("beta", 1.0) == 1.0)
    if is_op(node, "LayerNormalization"):
        plain = node.attrs.get("axis", -1) in (-1, last) and len(node.outputs) == 1
    bias = input_at(node, 2)
    if not plain or not (bias is None or (isinstance(bias, gs.Constant) and bias.values.ndim == 1)):
        return None
    return node, 2, (-1, *[1] * (last - 1)) if node.op == "Conv" else (-1,)


# --- which channel becomes which -------------------------------------------------------------------------------------


def trace_channels(
    graph: gs.Graph, way: Sequence[gs.Tensor], numbers: np.ndarray, reader: gs.Node, trace: Trace
) -> Values | None:
    """The tensors of the way when the first holds `numbers`, one per channel; None where anything beside `reader` sees
    one of those that reach it, or the stretch does not run.
    """
    readers = [(t, node) for t in way for node in t.outputs if node is not reader and not is_op(node, "Shape", "Size")]
    if any(t in graph.outputs for t in way) or any(moved(node) is not t for t, node in readers):
        return None
    beside = [t.name for _, node in readers for t in node.outputs if t not in way]
    outputs = [*(t.name for t in way[1:]), *beside]
    if not outputs:
        return {way[0].name: numbers}
    averages = {n.outputs[0].name: n.inputs[0].name for t in way for n in t.outputs if n.op == "MatMul" and moved(n) is t}
    on_way, asked = {t.name for t in way}, [n for n in graph.nodes if is_op(n, "Shape", "Size")]
    feeds = {n.outputs[0].name: _measured(n) for n in asked if n.inputs[0].name not in on_way and n.inputs[0].shape is not None}
    feeds[way[0].name] = numbers
    part = extract(graph, list({**feeds, **dict.fromkeys(averages.values())}), outputs)
    for node in part.nodes:
        if node.outputs[0].name in averages:  # an average of equal tokens is one of them
            node.op, node.inputs = "Identity", [node.inputs[1]]
    part.cleanup(remove_unused_graph_inputs=True)
    try:
        known = {way[0].name: numbers, **trace(part, {t.name: feeds[t.name] for t in part.inputs})}
    except ModelError:
        return None
    return None if any(np.isin(known[way[-1].name], known[name]).any() for name in beside) else known


def _measured(node: gs.Node) -> np.ndarray:
    """What a Shape or Size gives, with `LENGTH` for lengths that are not known."""
    found = np.array(lengths(node.inputs[0]), np.int64)
    return found.prod() if node.op == "Size" else found[node.attrs.get("start", 0) : node.attrs.get("end")]


def lengths(tensor: gs.Tensor) -> list[int]:
    """The tensor's shape with numbers in place of what is unknown."""
    return [n if isinstance(n, int) else LENGTH if axis else 1 for axis, n in enumerate(tensor.shape)]
