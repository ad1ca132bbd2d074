"""Tidying: constant Adds that methods put behind a layer are folded into the layer's own bias.

    Conv(x, W, B) + b = Conv(x, W, B + b)        Gemm(x, W, C) + b = Gemm(x, W, C + b)        (y + B) + b = y + (B + b)
    (y + B) + U V = y + (B + U V)   where the runtime computes the bracket once, when it loads the file

Sums are taken in float64 and rounded once. A bias that others read is copied, never changed. What was folded is handed
back, so that it can be taken out again exactly.
"""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import Tape, apply, insert_before, remove
from onnxcomp.graph.fold import input_at, is_load_time, set_input
from onnxcomp.graph.sites import Site


@dataclass(frozen=True)
class Fold:
    """One constant that a method changed: input `index` of the node called `node`; or the range of a quantizer."""

    node: str
    """Empty for a range: `name` is what its constants are called after, `before` its scale, `added` moved its zero point."""
    index: int
    method: str
    """The method whose Add was folded."""
    name: str
    """The constant's name before; empty where the node had none."""
    before: np.ndarray | None
    """Its values before."""
    added: np.ndarray
    """What was added to it."""


def fold_bias(graph: gs.Graph, site: Site, add_name: str, method: str) -> Fold | None:
    """Fold the Add called `add_name` behind `site` into the site's bias; None where nothing could be folded into a
    constant (a table is put beside it).
    """
    nodes = {node.name: node for node in graph.nodes if node.name in (site.name, site.bias_node, add_name)}
    add, layer = nodes[add_name], nodes[site.name]
    y, operand = add.outputs[0], next((t for t in add.inputs if is_load_time(t)), None)
    if operand is None:
        return None
    before = next(t for t in add.inputs if t is not operand)
    if site.bias_node is not None:
        home = nodes[site.bias_node]
        index = next(i for i, t in enumerate(home.inputs) if is_load_time(t))
    elif site.op in ("Conv", "Gemm") and isinstance(operand, gs.Constant):
        home, index = layer, 2
    else:
        return None
    old = input_at(home, index)
    if before.inputs[0] is not home or len(before.outputs) != 1:
        return None
    if isinstance(operand, gs.Constant) and (old is None or isinstance(old, gs.Constant)):
        b = operand.values.astype(np.float64)
        b = b.reshape(-1) if site.op == "Conv" else b  # behind a Conv b has trailing axes of length 1
        fold = Fold(home.name, index, method, "" if old is None else old.name, None if old is None else old.values, b)
        name = operand.name if old is None or len(old.outputs) > 1 else old.name
        total = b if old is None else old.values.astype(np.float64) + b
        set_input(home, index, gs.Constant(name, total.astype(np.float32)))
        remove(graph, add)
    elif old is None or not is_load_time(old):
        return None
    else:
        fold, prefix = None, add_name.rpartition("/")[0] + "/"
        moved = [*(node for node in graph.nodes if node is not add and node.name.startswith(prefix)), add]
        graph.nodes = [node for node in graph.nodes if not any(node is other for other in moved)]
        insert_before(graph, home, moved)
        add.inputs[add.inputs.index(before)] = old
        add.outputs[0] = gs.Variable(f"{add_name}/total", dtype=np.dtype(np.float32))
        home.inputs[index] = add.outputs[0]
    home.outputs[0] = y
    return fold


def add_to_output(graph: gs.Graph, site: Site, b: np.ndarray, method: str) -> None:
    """Add b [C_out] to what the site makes, in its bias where it has one."""
    tape = Tape(f"{site.name}/{method}")
    apply(graph, method, tape, {site.y: tape("Add", site.y, tape.constant("b", b.astype(np.float32)))})
    fold_bias(graph, site, tape.nodes[-1].name, method)
