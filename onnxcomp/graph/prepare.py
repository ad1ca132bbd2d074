"""Bring any float model to the one form that the rest assumes, equal to it in float.

In this form the opset is at least 21, weights are constants of the graph, Gemms are plain products, BatchNormalization
and per-channel Adds are part of the layer before them, GELU and LayerNormalization are single standard nodes, and every
node has a name of its own. Tensors that remain keep their names; the model's inputs and outputs keep names, types and
shapes.

Limits: bodies of If, Loop and Scan are left as they are. Float16 models are prepared no further than their opset and
constants, for arithmetic on their weights would round twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxcomp.graph import fold, merge
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.fuse import fuse_primitives
from onnxcomp.graph.opset import TARGET, raise_opset, standard_opset
from onnxcomp.graph.types import TensorType
from onnxcomp.graph.weights import split_weights

_WEIGHT_BYTES = 1024
"""Bytes from which an initializer is a weight, and no shape or index that a conversion would have to read."""


@dataclass(frozen=True)
class Prepared:
    """A model in prepared form, as a graph and as a model of the same nodes and names, and what was done to it.

    Every tensor of `graph` outside of bodies has the type and, as far as known, the shape that the runtime gives it.
    """

    graph: gs.Graph
    model: ModelProto
    notes: tuple[str, ...]


def prepare(model: ModelProto, infer_types: Callable[[ModelProto], Mapping[str, TensorType]]) -> Prepared:
    """The prepared form of `model`, which is not changed.

    `infer_types` maps the names of a model's tensors to their types. Raises ModelError where the opset cannot be
    raised, and whatever `infer_types` raises.
    """
    notes: list[str] = []
    model = _standardized(model, notes)
    graph = to_graph(model)
    for step, text in _STEPS:
        count = step(graph)
        if count:
            notes.append(text.format(count))
    graph.cleanup(recurse_subgraphs=False)
    unfused = to_model(graph, model)
    _set_types(graph, infer_types(unfused))
    fused = fuse_primitives(graph, unfused)
    if fused:
        notes.append(f"GELU and LayerNormalization in primitive operators became single nodes: {fused}.")
    graph.cleanup(recurse_subgraphs=False)
    bodies = sum(1 for node in graph.nodes for _ in node.subgraphs())
    if bodies:
        notes.append(f"Bodies of If, Loop and Scan left as they are: {bodies}.")
    if _is_float16(graph):
        notes.append("The weights are float16 and stay so.")
    return Prepared(graph, to_model(graph, model), tuple(notes))


_STEPS = (
    (fold.drop_pass_through, "Identity and Dropout nodes removed: {}."),
    (fold.fold_constants, "Nodes with constant inputs only, computed: {}."),
    (merge.canonical_gemms, "Gemm nodes brought to plain form: {}."),
    (merge.merge_affine, "BatchNormalization and Add nodes merged into the layers before them: {}."),
)


def _standardized(model: ModelProto, notes: list[str]) -> ModelProto:
    """A copy with opset >= 21, every weight an initializer, and no node without a name of its own."""
    copy, weights = split_weights(model, _WEIGHT_BYTES)
    stored = _drop_stored_inputs(copy, set(weights))
    if stored:
        notes.append(f"Inputs with a stored value made constants: {stored}.")
    version = standard_opset(copy)
    if version < TARGET:
        notes.append(f"Opset raised from {version} to {TARGET}.")
    _store_constants(copy)
    _name_nodes(copy)
    copy = raise_opset(copy, weights)
    _store_constants(copy)
    _name_nodes(copy)
    copy.graph.initializer.extend(weights.values())
    return copy


def _name_nodes(model: ModelProto) -> None:
    """Give nodes without a name, or with an earlier node's, the name of their first output, in place."""
    taken = {node.name for node in model.graph.node}
    seen = {""}
    for node in model.graph.node:
        if node.name in seen:
            stem = next(name for name in node.output if name)
            names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
            node.name = next(name for name in names if name not in taken)
            taken.add(node.name)
        seen.add(node.name)


def _drop_stored_inputs(model: ModelProto, weights: set[str]) -> int:
    """Take initializers and `weights` off the list of inputs, in place; returns how many."""
    graph = model.graph
    known = weights | {tensor.name for tensor in graph.initializer}
    known |= {sparse.values.name for sparse in graph.sparse_initializer}
    indices = [i for i, value in enumerate(graph.input) if value.name in known]
    for i in reversed(indices):
        del graph.input[i]
    return len(indices)


def _store_constants(model: ModelProto) -> None:
    """Turn Constant nodes into initializers, in place; sparse ones and those that are outputs of the model stay."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        tensor = _constant(node) if node.op_type == "Constant" and node.output[0] not in outputs else None
        if tensor is not None:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            del graph.node[i]


def _constant(node: onnx.NodeProto) -> TensorProto | None:
    """The value of a Constant node, None for a sparse one."""
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(value)
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.asarray(value, np.float32))
    if attribute.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.asarray(value, np.int64))
    if attribute.name in ("value_string", "value_strings"):
        return numpy_helper.from_array(np.asarray(value, object))
    return None


def _set_types(graph: gs.Graph, types: Mapping[str, TensorType]) -> None:
    """Give every variable its type, in place; inputs and outputs keep what they declare."""
    declared = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for name, tensor in graph.tensors().items():
        known = types.get(name)
        if known is None or not isinstance(tensor, gs.Variable):
            continue
        if known.dtype is not None and (tensor.dtype is None or id(tensor) not in declared):
            tensor.dtype = known.dtype
        if known.shape is not None and (tensor.shape is None or id(tensor) not in declared):
            tensor.shape = list(known.shape)  # pyright: ignore[reportAttributeAccessIssue]


def _is_float16(graph: gs.Graph) -> bool:
    dtypes = {t.dtype for t in graph.tensors().values() if isinstance(t, gs.Constant) and len(t.shape) > 1}
    return np.dtype(np.float16) in dtypes and np.dtype(np.float32) not in dtypes
