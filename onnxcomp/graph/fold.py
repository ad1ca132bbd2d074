"""Exact rewrites that only take away: nodes of constants are computed, those that change nothing removed.

Nodes that have become idle are detached; the graph's `cleanup` takes them out.

Limits: constants are computed for the operators of `_FOLDABLE` and only where the result takes at most twice the bytes
of its inputs. DequantizeLinear is not one of them: a tensor that is stored quantized stays so.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcomp.graph.convert import STANDARD
from onnxcomp.graph.edit import detach, replace_uses
from onnxcomp.graph.mapped import keep
from onnxcomp.graph.types import Tensor

_FOLDABLE = (
    *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Cast", "Shape"),
    *("LayerNormalization", "MatMul", "Pow", "ReduceL2", "ReduceMean", "ReduceSum"),
    *("Concat", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"),
)
SHAPES = ("Shape", "Size")
_GROWTH = 2
_SMALL_BYTES = 1024
_PLAIN = tuple(np.dtype(t) for t in "efd?bBhHiIlLqQ")


def is_op(node: gs.Node, *ops: str) -> bool:
    """Whether the node is one of these standard operators."""
    return node.op in ops and (node.domain or "") in STANDARD


def input_at(node: gs.Node, index: int) -> Tensor | None:
    """The node's input at this place, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) and not node.inputs[index].is_empty() else None


def is_load_time(tensor: gs.Tensor, *, fixed: bool = False) -> bool:
    """Whether `tensor` is made of constants alone, so that the runtime computes it when it loads the file. `fixed`: every axis
    is, so shapes are constants too.
    """
    seen, left = set[int](), [tensor]
    while left:
        found = left.pop()
        if isinstance(found, gs.Constant) or id(found) in seen or found.is_empty():
            continue
        if fixed and found.inputs and is_op(found.inputs[0], *SHAPES):
            continue
        if not found.inputs or not found.inputs[0].inputs:
            return False
        seen.add(id(found))
        left.extend(found.inputs[0].inputs)
    return True


def names_of_shapes(graph: gs.Graph) -> set[str]:
    """Names of what is made of constants and shapes alone, so that it is computed once where every axis is fixed."""
    found = set[str]()
    for node in graph.nodes:
        given = [t.name in found for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        is_plain = bool(node.inputs) and not any(isinstance(value, gs.Graph) for value in node.attrs.values())
        if is_op(node, *SHAPES) or (is_plain and all(given)):
            found |= {t.name for t in node.outputs}
    return found


def names_leaving(graph: gs.Graph) -> set[str]:
    """Names of the outputs of the graph and of all its bodies: tensors that must keep their names."""
    return {tensor.name for part in (graph, *graph.subgraphs(recursive=True)) for tensor in part.outputs}


def set_input(node: gs.Node, index: int, tensor: Tensor) -> None:
    """Make the tensor the node's input at this place, which may be one that was left out."""
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = tensor


def evaluate(nodes: list[NodeProto], output: str, feeds: dict[str, np.ndarray], opset: int) -> np.ndarray:
    """The value of one tensor by onnx's reference implementation; `nodes` in order, `feeds` their free inputs."""
    inputs = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()]
    body = helper.make_graph(nodes, "evaluate", inputs, [onnx.ValueInfoProto(name=output)])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    (value,) = ReferenceEvaluator(model).run(None, dict(feeds))
    return np.asarray(value)


def fold_constants(graph: gs.Graph) -> int:
    """Compute the nodes whose inputs are all constant; returns how many."""
    leaving = names_leaving(graph)
    return sum(_fold(node, leaving, graph.opset) for node in graph.nodes)


def drop_pass_through(graph: gs.Graph) -> int:
    """Remove Identity nodes, inference Dropouts and Casts to the type that a tensor is known to have, where every output of
    the graph and its bodies keeps its name.
    """
    leaving = names_leaving(graph)
    own = {tensor.name for tensor in graph.outputs}
    return sum(_passes_through(node, leaving) and _bypass(node, leaving, own) for node in graph.nodes)


def _fold(node: gs.Node, leaving: set[str], opset: int) -> bool:
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if not is_op(node, *_FOLDABLE) or len(node.outputs) != 1 or node.outputs[0].name in leaving or not inputs:
        return False
    if not all(isinstance(tensor, gs.Constant) and tensor.dtype in _PLAIN for tensor in inputs):
        return False
    output = node.outputs[0]
    feeds = {tensor.name: tensor.values for tensor in inputs}
    value = evaluate([OnnxExporter.export_node(node)], output.name, feeds, opset)
    limit = max(_GROWTH * sum(v.nbytes for v in feeds.values()), _SMALL_BYTES)
    if value.dtype not in _PLAIN or value.nbytes > limit:
        return False
    detach(node)
    output.to_constant(keep(np.array(value, order="C"), *feeds.values()))
    return True


def _passes_through(node: gs.Node, leaving: set[str]) -> bool:
    if is_op(node, "Cast"):
        return "to" in node.attrs and node.inputs[0].dtype == helper.tensor_dtype_to_np_dtype(node.attrs["to"])
    if not is_op(node, "Dropout"):
        return is_op(node, "Identity")
    training = input_at(node, 2)
    if training is not None and (not isinstance(training, gs.Constant) or bool(training.values)):
        return False
    return all(not t.outputs and t.name not in leaving for t in node.outputs[1:])


def _bypass(node: gs.Node, leaving: set[str], own: set[str]) -> bool:
    """Join the node's input and output, under the name that leaves a graph; False where both do."""
    x, y = node.inputs[0], node.outputs[0]
    if y.name not in leaving:
        replace_uses(y, x)
    elif y.name in own and x.name not in leaving and len(x.inputs) == 1:
        (producer,) = x.inputs
        node.outputs.clear()
        producer.outputs[[t is x for t in producer.outputs].index(True)] = y
        replace_uses(x, y)
    else:
        return False
    detach(node)
    return True
