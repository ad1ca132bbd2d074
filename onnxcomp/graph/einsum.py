"""Einsum of two operands as the matrix product that it is, between moves: layers and attention of Keras and of torch.einsum.

    w constant    x -> [free of x, summed], w -> [summed, free of w]          MatMul -> [free of x, free of w]
    activations   a -> [.., batch, free of a, k], b -> [batch, k, free of b]  MatMul -> [.., batch, free of a, free of b]

All that is summed is one axis of the product, and so is all that w has of its own; a constant that is added there afterwards
is added to the product, whose bias it is. A Transpose or a Reshape that would change nothing is left out.

Limits: of two activations one axis is summed, and one of them has one axis of its own. Axes in an ellipsis are not moved. What
is repeated in one operand or summed in one alone stays an Einsum, and so does a constant with axes that the other operand
shares with the result.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import Nodes, insert_before, remove
from onnxcomp.graph.fold import is_op
from onnxcomp.graph.mapped import keep

REST = "."
"""The axes of an ellipsis."""


def write_products(graph: gs.Graph) -> int:
    """Write every such Einsum of `graph` as a matrix product, in place; how many there were."""
    asked = [node for node in graph.nodes if is_op(node, "Einsum") and len(node.inputs) == 2]
    return sum(_write(graph, node) for node in asked)


def _write(graph: gs.Graph, node: gs.Node) -> bool:
    terms, made = _axes(node.attrs["equation"])
    (a, first), (b, second) = sorted(zip(node.inputs, terms, strict=True), key=lambda pair: isinstance(pair[0], gs.Constant))
    batch, summed, a_own, b_own = _sorted_out(first, second, made)
    is_layer = isinstance(b, gs.Constant)
    if not (summed and a_own and b_own) or {*first, *second} != {*batch, *summed, *a_own, *b_own}:
        return False
    if any(len(set(term)) < len(term) for term in (*terms, made)) or isinstance(a, gs.Constant):
        return False
    if is_layer:
        is_flat = len(summed) == len(b_own) == 1
        if batch or b.dtype != np.float32 or REST in second or (REST in first and not is_flat):
            return False
    else:
        if len(b_own) > 1 or (len(a_own) == 1 and made.index(a_own[0]) > made.index(b_own[0])):
            a, first, a_own, b, second, b_own = b, second, b_own, a, first, a_own
        if len(b_own) > 1 or len(summed) > 1 or REST in (a_own[-1], b_own[0]):
            return False
    lead = [*a_own[:-1], *batch, a_own[-1]]
    moves = [(first, [*lead, *summed]), ([*lead, *b_own], made), *([] if is_layer else [(second, [*batch, *summed, *b_own])])]
    if any(REST in old and [*old] != [*new] for old, new in moves):
        return False

    new, end, add = Nodes(node.name), node.outputs[0], None
    x = _moved(new, "first", a, *moves[0])
    if isinstance(b, gs.Constant):
        sizes = dict(zip(second, b.shape, strict=True))
        own, matrix = [sizes[c] for c in b_own], b.values.transpose([second.index(c) for c in (*summed, *b_own)])
        matrix = matrix.reshape(-1, int(np.prod(own)))
        if len(summed) > 1:
            x = _shaped(new, "flat", x, [*[0] * len(lead), len(matrix)])
        if [*second] != [*summed, *b_own] or matrix.shape != b.shape:
            b = gs.Constant(f"{node.name}.weight", keep(np.ascontiguousarray(matrix), b.values))
        y = new("MatMul", "product", x, b)
        if len(own) > 1:
            add = _bias_behind(graph, end, own) if [*lead, *b_own] == [*made] else None
            if add is not None:
                bias = next(t for t in add.inputs if isinstance(t, gs.Constant))
                y, end = new("Add", "biased", y, gs.Constant(f"{add.name}.bias", bias.values.reshape(-1))), add.outputs[0]
            y = _shaped(new, "whole", y, [*[0] * len(lead), *own])
    else:
        y = new("MatMul", "product", x, _moved(new, "second", b, *moves[2]))
    _moved(new, "result", y, *moves[1])
    next(n for n in new.made if n.op == "MatMul").name = node.name
    insert_before(graph, node, new.made)
    for replaced in (node, *(() if add is None else (add,))):
        remove(graph, replaced)
    new.made[-1].outputs[0] = end
    return True


def _axes(equation: str) -> tuple[list[str], str]:
    """The axes of the operands and of the result, a letter each."""
    left, arrow, made = equation.replace(" ", "").replace("...", REST).partition("->")
    return left.split(","), made if arrow else "".join(sorted(c for c in {*left} - {","} if c == REST or left.count(c) == 1))


def _sorted_out(first: str, second: str, made: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """The axes that both operands share with the result, those that are summed, and those that either has of its own."""
    batch, summed = [c for c in made if c in first and c in second], [c for c in second if c in first and c not in made]
    a_own, b_own = ([c for c in made if c in one and c not in other] for one, other in ((first, second), (second, first)))
    return batch, summed, a_own, b_own


def _moved(new: Nodes, name: str, x: gs.Tensor, axes: Sequence[str], wanted: Sequence[str]) -> gs.Tensor:
    """The tensor with its axes as wanted."""
    order = [axes.index(c) for c in wanted]
    return x if order == sorted(order) else _step(new, "Transpose", name, x, perm=order)


def _shaped(new: Nodes, name: str, x: gs.Tensor, shape: Sequence[int]) -> gs.Tensor:
    return _step(new, "Reshape", name, x, gs.Constant(f"{new.name}/{name}-shape", np.array(shape, np.int64)))


def _step(new: Nodes, op: str, name: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Tensor:
    """One of several nodes of an operator, so it is called after what it makes."""
    made = new(op, name, *inputs, **attrs)
    new.made[-1].name = made.name
    return made


def _bias_behind(graph: gs.Graph, y: gs.Tensor, own: Sequence[int]) -> gs.Node | None:
    """The Add that alone reads `y`, of a constant in its last axes, which have these sizes."""
    if len(y.outputs) != 1 or any(t is y for t in graph.outputs) or not is_op(y.outputs[0], "Add"):
        return None
    constants = [t for t in y.outputs[0].inputs if isinstance(t, gs.Constant)]
    is_bias = len(constants) == 1 and [*constants[0].shape[-len(own) :]] == [*own]
    return y.outputs[0] if is_bias and constants[0].values.size == np.prod(own) else None
