"""Bring any float model to the one form that the rest assumes, equal to it in float.

In this form the opset is at least 21, what was float16 is float32, weights are constants of the graph, Gemms are plain
products, BatchNormalization and arithmetic with constants per channel are part of the layer before them, GELU, HardSwish and
LayerNormalization are single standard nodes, and every node has a name of its own. Tensors that remain keep their names; the
model's inputs and outputs keep names, shapes and, but for float16, types.

Limits: bodies of If, Loop and Scan are left as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto, TensorProto, TensorShapeProto, helper, numpy_helper

from onnxcomp.graph import fold, merge, selection
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import fresh_name, tensors_of
from onnxcomp.graph.einsum import write_products
from onnxcomp.graph.fuse import fuse_primitives, pool_means, write_out_norms
from onnxcomp.graph.half import widen
from onnxcomp.graph.opset import TARGET, raise_opset, standard_opset
from onnxcomp.graph.types import TensorType
from onnxcomp.graph.weights import remove_if, split_weights


@dataclass(frozen=True)
class Prepared:
    """A model in prepared form, as a graph and as a model of the same nodes and names, and what was done to it.

    Every tensor of `graph` outside of bodies has the type and, as far as known, the shape that the runtime gives it.
    """

    graph: gs.Graph
    """Its outputs are those of the model, and what some of them are picked from."""
    model: ModelProto
    notes: tuple[str, ...]
    picked: frozenset[str] = frozenset()
    """Outputs that cannot be compared place by place (`graph.selection`)."""
    watched: tuple[str, ...] = ()
    """The outputs that were added for that."""
    is_half: bool = False
    """Whether the model given computes in float16; the prepared one does not."""
    half_ends: tuple[str, ...] = ()
    """Inputs and outputs that were float16 and are float32."""


def prepare(model: ModelProto, infer_types: Callable[[ModelProto], Mapping[str, TensorType]]) -> Prepared:
    """The prepared form of `model`, which is not changed.

    `infer_types` maps the names of a model's tensors to their types. Raises ModelError where the opset cannot be
    raised, and whatever `infer_types` raises.
    """
    notes: list[str] = []

    def note(count: int, text: str) -> None:
        notes.extend([text.format(count)] if count else [])

    model = _standardized(model, note)
    graph = to_graph(model)
    halves, ends = widen(graph)
    note(halves, "Computed in float32: {} constants were float16.")
    for step, text in _STEPS:
        note(step(graph), text)
        graph.cleanup(recurse_subgraphs=False)
    unfused = to_model(graph, model)
    set_types(graph, infer_types(unfused))
    casts = fold.drop_pass_through(graph)  # now that the types are known
    if casts:
        unfused = to_model(graph, model)
    note(casts, _IDLE)
    fused = fuse_primitives(graph, unfused, is_half=halves > 0)
    note(fused, "GELU, HardSwish and LayerNormalization in primitive operators became single nodes: {}.")
    note(pool_means(graph), "Means over whole images written as GlobalAveragePool: {}.")
    merged = merge.merge_inputs(graph)  # now that what scales and shifts is no part of an activation
    note(merged, "Arithmetic with constants merged into the Convs behind it: {}.")
    note(merge.merge_outputs(graph), "Arithmetic with constants merged into the matrix products before it: {}.")
    graph.cleanup(recurse_subgraphs=False)
    bodies = sum(1 for node in graph.nodes for _ in node.subgraphs())
    note(bodies, "Bodies of If, Loop and Scan left as they are: {}.")
    picked, sources = selection.find_picked(graph)
    watched = tuple(name for name in sources if all(name != t.name for t in graph.outputs))
    tensors = tensors_of(graph)
    graph.outputs += [tensors[name] for name in watched]
    return Prepared(graph, to_model(graph, model), tuple(notes), picked, watched, halves > 0, ends)


def correct_ranks(prepared: Prepared, ranks: Mapping[str, int]) -> list[str]:
    """Leave open, in place, the shapes of outputs that declare another rank than the one in `ranks`, which they have: tools
    that infer shapes refuse them. What was done, one note per output.
    """
    wrong = {t.name: len(t.shape) for t in prepared.graph.outputs if t.shape is not None and len(t.shape) != ranks[t.name]}
    for tensor in [t for t in prepared.graph.outputs if t.name in wrong]:
        tensor.shape = [None] * ranks[tensor.name]
    for value in [value for value in prepared.model.graph.output if value.name in wrong]:
        value.type.tensor_type.shape.CopyFrom(TensorShapeProto(dim=[TensorShapeProto.Dimension()] * ranks[value.name]))
    text = "Output '{}' declares rank {} and has {}: its shape is left open."
    return [text.format(name, was, ranks[name]) for name, was in wrong.items()]


_IDLE = "Identity, Dropout and Cast nodes that change nothing removed: {}."
_STEPS = (
    (write_out_norms, "SimplifiedLayerNormalization written in standard operators: {}."),
    (fold.drop_pass_through, _IDLE),
    (fold.fold_constants, "Nodes with constant inputs only, computed: {}."),
    (write_products, "Einsum nodes written as matrix products: {}."),
    (merge.canonical_gemms, "Gemm nodes brought to plain form: {}."),
    (merge.merge_affine, "BatchNormalization and arithmetic with constants merged into the layers before them: {}."),
)


def _standardized(model: ModelProto, note: Callable[[int, str], None]) -> ModelProto:
    """A copy with opset >= 21, every weight an initializer, and no node without a name of its own."""
    copy, weights = split_weights(model)
    known = weights.keys() | {tensor.name for tensor in copy.graph.initializer}
    known |= {sparse.values.name for sparse in copy.graph.sparse_initializer}
    stored = remove_if(copy.graph.input, lambda value: value.name in known)
    note(len(stored), "Inputs with a stored value made constants: {}.")
    version = standard_opset(copy)
    note(version if version < TARGET else 0, f"Opset raised from {{}} to {TARGET}.")
    tidy_nodes(copy)
    copy = raise_opset(copy, weights)
    tidy_nodes(copy)
    copy.graph.initializer.extend(weights.values())
    return copy


def tidy_nodes(model: ModelProto) -> None:
    """Turn Constant nodes into initializers and give every node a name of its own, in place.

    Constants that are sparse or outputs of the model stay. Nodes without a name, or with an earlier node's, are named
    by their first output.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}

    def is_stored(node: NodeProto) -> bool:
        is_dense = node.op_type == "Constant" and node.attribute[0].name.startswith("value")
        return is_dense and node.output[0] not in outputs

    graph.initializer.extend(_constant(node) for node in remove_if(graph.node, is_stored))
    taken = {node.name for node in graph.node}
    seen = {""}
    for node in graph.node:
        if node.name in seen:
            node.name = fresh_name(next(name for name in node.output if name), taken)
        seen.add(node.name)


def _constant(node: NodeProto) -> TensorProto:
    """The value of a Constant node as an initializer, of the node's own tensor where it has one."""
    attribute, name = node.attribute[0], node.output[0]
    if attribute.name == "value":
        attribute.t.name = name
        return attribute.t
    kind = {"value_float": np.float32, "value_int": np.int64, "value_string": object}[attribute.name.removesuffix("s")]
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), kind), name)


def set_types(graph: gs.Graph, types: Mapping[str, TensorType]) -> None:
    """Give every variable its type, in place; inputs and outputs keep what they declare."""
    declared = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for name, tensor in graph.tensors().items():
        if name not in types or isinstance(tensor, gs.Constant):
            continue
        keeps, known = id(tensor) in declared, types[name]
        if known.dtype is not None and not (keeps and tensor.dtype is not None):
            tensor.dtype = known.dtype
        # The runtime gives a scalar and a tensor of unknown rank the same empty shape.
        if known.shape and not (keeps and tensor.shape is not None):
            tensor.shape = list(known.shape)
