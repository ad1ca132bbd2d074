"""Folding: what a method adds in front of a quantizer goes into the constant that the tensor was made with.

    LayerNormalization(h; g, b) + N = LayerNormalization(h; g, b + N)        (h + B) + N = h + (B + N)
    P (V + B) + N = P (V + (B + N))     where P is a Softmax, whose rows sum to 1

Between the constant and the Add there may be operators that only move values. Which channel becomes which is found by
running the stretch between them on channel numbers, never from attributes. Sums are taken in float64 and rounded once; a
constant that others read is copied. A tensor t whose value now has N in it is called `t/with-{method}`.

Limits: the Add stays where anything else reads the tensor, or a channel of B that reaches it; where something on the way
is quantized; and where the lengths of more axes than the first and one other are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError
from onnxcomp.graph.edit import extract, remove
from onnxcomp.graph.fold import is_op
from onnxcomp.graph.tidy import Fold, is_load_time

MOVES = ("Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose output values are a selection of their first input's."""
LENGTH = 5
"""Fed along an axis of unknown length, the first one aside."""
Values = Mapping[str, np.ndarray]
Trace = Callable[[gs.Graph, Values], Values]
"""Runs a part of the graph on feeds and gives its outputs; raises ModelError where it does not run."""


@dataclass(frozen=True)
class _Home:
    """Where a constant per channel enters: input `index` of `holder`, along `axis` of what `node` makes. The constant is
    None where a layer has no bias yet.
    """

    node: gs.Node
    holder: gs.Node
    index: int
    axis: int
    constant: gs.Constant | None


def fold_offset(graph: gs.Graph, add_name: str, method: str, trace: Trace) -> Fold | None:
    """Fold the Add of a constant called `add_name` into what makes its other operand; None where it has to stay."""
    add = next(node for node in graph.nodes if node.name == add_name)
    x, noise = sorted(add.inputs, key=lambda t: isinstance(t, gs.Constant))
    path = _path(x)
    start = _moved(path[0]) if path else x
    home = _home(start.inputs[0]) if start.inputs else None
    channels = None if home is None else _channels(graph, home, path, add, x, noise, trace)
    if home is None or channels is None:
        return None
    old, holder = home.constant, home.holder
    before = np.zeros(noise.values.size) if old is None else old.values
    added = np.zeros(before.size)
    added[channels] = noise.values.reshape(-1)
    added = added.reshape(before.shape)
    name = noise.name if old is None or len(old.outputs) > 1 else old.name
    new = gs.Constant(name, (before.astype(np.float64) + added).astype(np.float32))
    if old is None:
        holder.inputs.append(new)
    else:
        holder.inputs[home.index] = new
    for tensor in (x, *map(_moved, path)):
        tensor.name += f"/with-{method}"
    for reader in list(add.outputs[0].outputs):
        for index in [i for i, tensor in enumerate(reader.inputs) if tensor is add.outputs[0]]:
            reader.inputs[index] = x
    remove(graph, add)
    return Fold(holder.name, home.index, method, "" if old is None else old.name, None if old is None else before, added)


# --- from the tensor back to the constant ----------------------------------------------------------------------------


def _path(x: gs.Tensor) -> list[gs.Node]:
    """The operators between x and what it was made with: moves, and one product with a Softmax at most."""
    path: list[gs.Node] = []
    while x.inputs:
        node = x.inputs[0]
        if not is_op(node, *MOVES) and (not _is_average(node) or any(n.op == "MatMul" for n in path)):
            break
        path.insert(0, node)
        x = _moved(node)
    return path


def _moved(node: gs.Node) -> gs.Tensor:
    """The input whose values a node of the path moves or averages."""
    return node.inputs[1 if node.op == "MatMul" else 0]


def _is_average(node: gs.Node) -> bool:
    """Whether the node is a product whose first operand's rows sum to 1."""
    if not is_op(node, "MatMul") or not node.inputs[0].inputs:
        return False
    softmax = node.inputs[0].inputs[0]
    return is_op(softmax, "Softmax") and softmax.attrs.get("axis", -1) in (-1, len(softmax.outputs[0].shape or ()) - 1)


def _home(node: gs.Node) -> _Home | None:
    rank = len(node.outputs[0].shape or ())
    if is_op(node, "Add", "Sum") and len(node.inputs) == 2:
        return _added(node, 0) or _added(node, 1)
    plain = (is_op(node, "Conv") and rank > 0) or (is_op(node, "Gemm") and node.attrs.get("beta", 1.0) == 1.0)
    if is_op(node, "LayerNormalization"):
        plain = node.attrs.get("axis", -1) in (-1, rank - 1) and len(node.outputs) == 1
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if not plain or not (bias is None or (isinstance(bias, gs.Constant) and bias.values.ndim == 1)):
        return None
    return _Home(node, node, 2, 1 - rank if node.op == "Conv" else -1, bias)


def _added(node: gs.Node, index: int) -> _Home | None:
    """The constant at this input of an Add, or the one in a sum with a table, which the runtime adds up at load time."""
    holder, tensor = node, node.inputs[index]
    if isinstance(tensor, gs.Variable) and is_load_time(tensor) and is_op(tensor.inputs[0], "Add", "Sum"):
        holder = tensor.inputs[0]
        index = next((i for i, t in enumerate(holder.inputs) if isinstance(t, gs.Constant)), 0)
        tensor = holder.inputs[index]
    if not isinstance(tensor, gs.Constant) or not tensor.values.ndim:
        return None
    shape = tensor.values.shape
    axis = int(np.argmax(shape)) - len(shape)
    return _Home(node, holder, index, axis, tensor) if shape[axis] == tensor.values.size else None


# --- which channel becomes which -------------------------------------------------------------------------------------


def _channels(
    graph: gs.Graph, home: _Home, path: Sequence[gs.Node], add: gs.Node, x: gs.Tensor, noise: gs.Tensor, trace: Trace
) -> np.ndarray | None:
    """For every channel that `noise` is added to, the one of the home's that alone makes it; None where that is not so,
    or something beside x sees one of them.
    """
    made, axis = home.node.outputs[0], -max(noise.values.ndim, 1)
    inside, exits = _spread(graph, made, path, add)
    size = noise.values.size if home.constant is None else home.constant.values.size
    if not path:
        return np.arange(size) if (axis, size) == (home.axis, noise.values.size) and exits == [] else None
    if home.constant is None or made.shape is None or exits is None or any(t is made for t in exits):
        return None
    numbers = np.arange(size, dtype=np.float32).reshape(-1, *[1] * (-1 - home.axis))
    known = {made.name: np.array(np.broadcast_to(numbers, _lengths(made)))}
    try:
        for product in [node for node in path if node.op == "MatMul"]:
            known |= _run(graph, known, [_moved(product)], inside, trace)
            known[product.outputs[0].name] = known[_moved(product).name]  # an average of equal tokens is one of them
        known |= _run(graph, known, [x, *exits], inside, trace)
    except ModelError:
        return None
    rows = np.moveaxis(known[x.name], axis, -1).reshape(-1, known[x.name].shape[axis])
    alone = len(np.unique(rows[0])) == noise.values.size and bool((rows == rows[0]).all())
    seen = any(np.isin(rows[0], known[t.name]).any() for t in exits)
    return rows[0].astype(int) if alone and not seen else None


def _spread(graph: gs.Graph, made: gs.Tensor, path: Sequence[gs.Node], add: gs.Node) -> tuple[set[int], list[gs.Tensor] | None]:
    """The tensors that hold values of `made`, and those of them that something beside the path and `add` reads; None for
    these where one lies behind the product.
    """
    leaving, on_path = {id(t) for t in graph.outputs}, {id(node) for node in path}
    inside: set[int] = set()
    exits: list[gs.Tensor] | None = []
    pending = [(made, False)]
    while pending:
        tensor, averaged = pending.pop()
        inside.add(id(tensor))
        others = [node for node in tensor.outputs if node is not add and not is_op(node, "Shape", "Size")]
        moves = [n for n in others if (is_op(n, *MOVES) or id(n) in on_path) and _moved(n) is tensor]
        pending += [(t, averaged or n.op == "MatMul") for n in moves for t in n.outputs]
        if id(tensor) in leaving or len(moves) < len(others):
            exits = None if averaged or exits is None else [*exits, tensor]
    return inside, exits


def _run(graph: gs.Graph, known: Values, wanted: Sequence[gs.Tensor], inside: set[int], trace: Trace) -> Values:
    """The `wanted` tensors, from the `known` ones and from the shapes of those that are only asked for their shape."""
    names = [t.name for t in wanted if t.name not in known]
    feeds, met = dict(known), set(map(id, wanted))
    pending = [t for t in wanted if t.name in names]
    while pending:
        producers = pending.pop().inputs
        for read in producers[0].inputs if producers else ():
            if is_op(producers[0], "Shape", "Size") and id(read) not in inside and read.shape is not None:
                feeds[read.name] = np.zeros(_lengths(read), read.dtype)
            elif id(read) not in met and read.name not in known:
                met.add(id(read))
                pending.append(read)
    part = extract(graph, list(feeds), names)
    return trace(part, {t.name: feeds[t.name] for t in part.inputs}) if names else {}


def _lengths(tensor: gs.Tensor) -> list[int]:
    return [n if isinstance(n, int) else LENGTH if axis else 1 for axis, n in enumerate(tensor.shape)]
