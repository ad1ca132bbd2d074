"""GELU, HardSwish and LayerNormalization spelled out in primitive operators become single standard nodes, and so does pooling.
A norm that is in no standard becomes primitive operators.

    Gelu(x) = x/2 · (1 + erf(x/√2)),    with approximate = "tanh": x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
    HardSwish(x) = x · min(max(x/6 + 1/2, 0), 1)

The patterns are those of onnxruntime.transformers, used as a matcher only, for it compares constants loosely and reads no
reduction axes; of HardSwish, whatever multiplies x with what stands around a Clip or a HardSigmoid of it. Each match is run
against the standard node on trial values and dropped if they differ by more than rounding. The new node keeps the name and the
output of the last node it replaces.

Limits: float32 only; LayerNormalization needs a constant scale and bias and an epsilon of at most 1e-4, as the matcher
does; RMSNorm has no standard node before opset 23.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto, helper

from onnxcomp.graph.edit import Nodes, detach, insert_after, insert_before, remove
from onnxcomp.graph.fold import evaluate, input_at, is_op, names_leaving
from onnxcomp.graph.types import Tensor

_TRIAL_WIDTH = 257
_SPREAD = 8.0
_LONGEST = 5
"""Nodes of a HardSwish at most: Add, Clip, Mul and two that divide or multiply by constants."""
_ROUNDINGS = 16
"""Roundings on the longest way through a pattern, each of half a unit in the last place of `_SPREAD`."""


@dataclass(frozen=True)
class _Match:
    """A standard operator that may stand for `replaced`, nodes in the graph's order that make the tensors `inside`."""

    node: NodeProto
    attrs: dict[str, Any]
    replaced: list[NodeProto]
    inside: set[str]


def fuse_primitives(graph: gs.Graph, model: ModelProto, *, is_half: bool = False) -> int:
    """Replace the patterns found in `model`, the model of this graph (with types set); returns how many. `is_half`: its
    constants were float16, so they are right to 11 bits only.
    """
    leaving = names_leaving(graph)
    tensors: dict[str, Tensor] = graph.tensors()
    count, precision = 0, np.float16 if is_half else np.float32
    for match in (*_matches(model), *_hard_swishes(model)):
        if _is_closed(match, tensors, leaving) and _is_equal(match, tensors, graph.opset, precision):
            _replace(match, tensors)
            count += 1
    return count


def pool_means(graph: gs.Graph) -> int:
    """Write means over all of an image, or of a volume, as the pooling that they are: that has an integer kernel. How many."""
    found = [node for node in graph.nodes if _is_pooling(node)]
    for node in found:
        (x, _), (y,), keeps = node.inputs, node.outputs, node.attrs.get("keepdims", 1)
        node.op, node.attrs, node.inputs = "GlobalAveragePool", {}, [x]
        if not keeps:
            whole = [*x.shape[:2], *[1] * (len(x.shape) - 2)]
            node.outputs = [gs.Variable(f"{y.name}/pooled", y.dtype, whole)]
            insert_after(graph, node, [gs.Node("Flatten", f"{node.name}/Flatten", {"axis": 1}, list(node.outputs), [y])])
    return len(found)


def write_out_norms(graph: gs.Graph) -> int:
    """Write ONNX Runtime's SimplifiedLayerNormalization, which is in no standard, as x / sqrt(mean(x^2) + epsilon) * scale: it
    makes its own of that again. How many.
    """
    norms = [node for node in graph.nodes if is_op(node, "SimplifiedLayerNormalization")]
    found = [node for node in norms if len(node.outputs) == 1 and node.attrs.get("axis", -1) == -1]
    for node in found:
        (x, scale), (y,), new = node.inputs, node.outputs, Nodes(node.name)
        values = {"two": np.float32(2), "axes": [-1], "epsilon": np.float32(node.attrs.get("epsilon", 1e-5))}
        two, axes, epsilon = (gs.Constant(f"{node.name}.{key}", np.array(value)) for key, value in values.items())
        mean = new("ReduceMean", "mean", new("Pow", "square", x, two), axes)
        root = new("Sqrt", "root", new("Add", "sum", mean, epsilon))
        new("Mul", y, new("Div", "normed", x, root), scale)
        insert_before(graph, node, new.made)
        remove(graph, node)
    return len(found)


def _is_pooling(node: gs.Node) -> bool:
    axes, rank = input_at(node, 1), len(node.inputs[0].shape or ()) if node.inputs else 0
    if not is_op(node, "ReduceMean") or rank < 4 or node.inputs[0].dtype != np.float32 or not isinstance(axes, gs.Constant):
        return False
    return sorted(int(axis) % rank for axis in axes.values.ravel()) == [*range(2, rank)]


def _matches(model: ModelProto) -> Iterator[_Match]:
    wrapped, fusions = _matchers(model)
    consumers, producers = wrapped.input_name_to_nodes(), wrapped.output_name_to_node()
    for fusion in fusions:
        fusion.this_graph_name = model.graph.name
        for node in [node for node in model.graph.node if node.op_type in fusion.search_op_types]:
            fusion.nodes_to_add, fusion.nodes_to_remove = [], []
            fusion.fuse(node, consumers, producers)
            names = {removed.output[0] for removed in fusion.nodes_to_remove}
            replaced = [node for node in model.graph.node if node.output[0] in names]
            if len(fusion.nodes_to_add) == 1 and len(replaced) == len(names):
                (fused,) = fusion.nodes_to_add
                op, attrs = _standard(fused)
                inside = {name for node in replaced for name in node.output}
                yield _Match(helper.make_node(op, fused.input, fused.output[:1], **attrs), attrs, replaced, inside)


def _hard_swishes(model: ModelProto) -> Iterator[_Match]:
    """From each Clip or HardSigmoid back to x, through one Add, and on, node by node, while x or a number is multiplied in."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    numbers = {tensor.name for tensor in model.graph.initializer if math.prod(tensor.dims) == 1}
    for gate in [node for node in model.graph.node if node.op_type in ("Clip", "HardSigmoid")]:
        replaced, x = [gate], gate.input[0]
        shift = makers.get(x)
        if gate.op_type == "Clip" and shift is not None and shift.op_type == "Add" and numbers & {*shift.input}:
            replaced.insert(0, shift)
            x = next((name for name in shift.input if name not in numbers), "")
        while len(readers.get(replaced[-1].output[0], ())) == 1 and len(replaced) < _LONGEST:
            (reader,) = readers[replaced[-1].output[0]]
            others = [name for name in reader.input if name != replaced[-1].output[0]]
            if reader.op_type not in ("Mul", "Div") or len(others) != 1 or others[0] not in numbers | {x}:
                break
            replaced.append(reader)
            if any(x in node.input for node in replaced[replaced.index(gate) + 1 :]):
                inside = {node.output[0] for node in replaced}
                yield _Match(helper.make_node("HardSwish", [x], reader.output), {}, list(replaced), inside)


def _matchers(model: ModelProto) -> tuple[Any, tuple[Any, ...]]:
    path = list(sys.path)
    from onnxruntime.transformers.fusion_fastgelu import FusionFastGelu
    from onnxruntime.transformers.fusion_gelu import FusionGelu
    from onnxruntime.transformers.fusion_layernorm import FusionLayerNormalization
    from onnxruntime.transformers.onnx_model import OnnxModel

    sys.path[:] = path  # onnxruntime.transformers appends its own folder, with modules named models, metrics ...
    wrapped = OnnxModel(model)
    return wrapped, (FusionGelu(wrapped), FusionFastGelu(wrapped), FusionLayerNormalization(wrapped))


def _standard(fused: NodeProto) -> tuple[str, dict[str, Any]]:
    """The standard operator, and its attributes, that the matcher's is."""
    if fused.op_type == "LayerNormalization":
        return "LayerNormalization", {"axis": -1, "epsilon": next(a.f for a in fused.attribute if a.name == "epsilon")}
    return "Gelu", {"approximate": "tanh" if fused.op_type == "FastGelu" else "none"}


def _is_closed(match: _Match, tensors: dict[str, Tensor], leaving: set[str]) -> bool:
    """Whether nothing outside reads what the replaced nodes compute on the way."""
    if any(name not in tensors or not tensors[name].inputs for name in match.inside):
        return False
    hidden = match.inside - {match.node.output[0]}
    readers = {reader.outputs[0].name for name in hidden for reader in tensors[name].outputs}
    return not hidden & leaving and readers <= match.inside


def _is_equal(match: _Match, tensors: dict[str, Tensor], opset: int, precision: type[np.floating]) -> bool:
    """Whether the standard node does what the replaced nodes do, on trial values of the input's rank, but for roundings."""
    inputs, x = match.node.input, tensors[match.node.input[0]]
    outside = {name for node in (*match.replaced, match.node) for name in node.input} - match.inside - {x.name, ""}
    constants = {name: t.values for name in sorted(outside) if isinstance(t := tensors[name], gs.Constant)}
    if x.dtype != np.float32 or x.shape is None or len(constants) < len(outside):
        return False
    width = constants[inputs[1]].shape[0] if len(inputs) > 1 else _TRIAL_WIDTH
    shape = (*range(2, 1 + len(x.shape)), width)
    trial = np.linspace(-_SPREAD, _SPREAD, math.prod(shape), dtype=np.float32)
    feeds = {x.name: np.random.default_rng(0).permutation(trial).reshape(shape), **constants}
    before, after = (evaluate(nodes, match.node.output[0], feeds, opset) for nodes in (match.replaced, [match.node]))
    bound = _ROUNDINGS * _SPREAD * np.finfo(precision).eps / 2
    return before.shape == after.shape and bool(np.max(np.abs(before - after)) <= bound)


def _replace(match: _Match, tensors: dict[str, Tensor]) -> None:
    output = tensors[match.node.output[0]]
    last: gs.Node = output.inputs[0]
    for node in [tensors[replaced.output[0]].inputs[0] for replaced in match.replaced]:
        detach(node)
    last.op, last.attrs = match.node.op_type, match.attrs
    last.inputs.extend([tensors[name] for name in match.node.input])
    last.outputs.append(output)
