"""Tidying: constant Adds that methods put behind a layer are folded into the layer's own bias.

    Conv(x, W, B) + b = Conv(x, W, B + b)        Gemm(x, W, C) + b = Gemm(x, W, C + b)        (y + B) + b = y + (B + b)
    (y + B) + U V = y + U V'   where the last column of U is 1 and the last row of V' that of V plus B

Sums are taken in float64 and rounded once. A bias that others read is copied, never changed.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.sites import Site


def fold_bias(graph: gs.Graph, site: Site, add_name: str) -> bool:
    """Fold the Add called `add_name` behind `site` into the site's bias; False where there is nothing to fold into."""
    nodes = {node.name: node for node in graph.nodes if node.name in (site.name, site.bias_node, add_name)}
    add, layer = nodes[add_name], nodes[site.name]
    y, operand = add.outputs[0], next(t for t in add.inputs if isinstance(t, gs.Constant) or _is_table(t))
    before = next(t for t in add.inputs if t is not operand)
    if site.bias_node is not None:
        home = nodes[site.bias_node]
        index = next(i for i, t in enumerate(home.inputs) if isinstance(t, gs.Constant) or _is_table(t))
    elif site.op in ("Conv", "Gemm") and isinstance(operand, gs.Constant):
        home, index = layer, 2
    else:
        return False
    old = home.inputs[index] if len(home.inputs) > index else None
    if before.inputs[0] is not home or len(before.outputs) != 1 or (old is not None and not isinstance(old, gs.Constant)):
        return False
    if isinstance(operand, gs.Constant):
        bias: gs.Tensor = gs.Constant(operand.name, _total(old, operand.values, site))
    else:
        bias = operand
        table = operand.inputs[0]
        v = table.inputs[1].values.astype(np.float64)
        v[-1] += 0.0 if old is None else old.values.astype(np.float64).reshape(-1)
        table.inputs[1] = gs.Constant(table.inputs[1].name, v.astype(np.float32))
        graph.nodes.remove(table)
        graph.nodes.insert(next(i for i, n in enumerate(graph.nodes) if n is home), table)
    if old is None:
        home.inputs.append(bias)
    else:
        home.inputs[index] = bias
    add.inputs.clear()
    add.outputs.clear()
    graph.nodes.remove(add)
    home.outputs[0] = y
    return True


def _is_table(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a product of constants, which the runtime computes when it loads the file."""
    return len(tensor.inputs) == 1 and all(isinstance(t, gs.Constant) for t in tensor.inputs[0].inputs)


def _total(old: gs.Constant | None, b: np.ndarray, site: Site) -> np.ndarray:
    """The old bias plus b; behind a Conv b has trailing axes of length 1, which its bias has not."""
    b = b.astype(np.float64).reshape(-1) if site.op == "Conv" else b.astype(np.float64)
    return (b if old is None else old.values.astype(np.float64) + b).astype(np.float32)
