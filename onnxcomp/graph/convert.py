"""Between ONNX models and the graphs of onnx-graphsurgeon that everything here works on.

graphsurgeon keeps names, nodes, constants and bodies; it loses metadata, doc strings and a few rare kinds of
attributes, and cannot write empty lists. `to_model` brings these back from `like`, the model that the graph came from,
for every node that still has its operator and its name (or, for nodes without a name, its first output).

Limits: doc strings of values and quantization annotations are not brought back.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TypeVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcomp.graph import mapped
from onnxcomp.graph.weights import remove_if, walk_graphs, walk_nodes

M = TypeVar("M", bound=Message)
STANDARD = ("", "ai.onnx")
VARYING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators that make tensors whose shape follows from values."""
_MODEL_FIELDS = ("producer_name", "producer_version", "domain", "model_version", "doc_string", "functions", "metadata_props")
_KEPT_KINDS = ("FLOAT", "INT", "STRING", "TENSOR", "GRAPH", "FLOATS", "INTS", "STRINGS")
"""Kinds of attributes that graphsurgeon reads; it loses the others, and empty lists of these."""


def to_graph(model: ModelProto) -> gs.Graph:
    """The model's graph, on a copy of its weights, or on the files that they are mapped from. Empty lists among the attributes
    are left to `to_model`.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    stay = {tensor.name: tensor for tensor in model.graph.initializer if mapped.is_mapped(tensor)}
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        graph = gs.import_onnx(copy)
    graph.import_domains = None
    graph.functions.clear()
    for part in (graph, *graph.subgraphs(recursive=True)):
        for constant in (t for t in part.tensors().values() if t.name in stay):
            constant.values = mapped.array_of(stay[constant.name])
        for node in part.nodes:
            node.attrs = {key: value for key, value in node.attrs.items() if not _is_empty_list(value)}
    return graph


def to_model(graph: gs.Graph, like: ModelProto) -> ModelProto:
    """The graph as a model, with what graphsurgeon does not keep taken from `like`; mapped weights stay in their files.

    The opset is `graph.opset`; other domains keep the version of `like` (a domain new to it gets version 1), and those
    that no node uses are left out. The same graph gives the same bytes.
    """
    versions = {o.domain: o.version for o in like.opset_import if o.domain not in STANDARD}
    constants = {id(t): t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}.values()
    arrays = [(t, t._values) for t in constants if isinstance(t._values, np.ndarray)]
    for constant, values in arrays:
        constant.values = mapped.stored(constant.name, values)
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        model = gs.export_onnx(graph, do_type_check=False, opset_imports=[helper.make_opsetid("", graph.opset)])
    for constant, values in arrays:
        constant.values = values
    _forget_varying(model.graph)
    _restore(model.graph, like.graph)
    _share_constants(model.graph, like.graph)
    copy_fields(like, model, _MODEL_FIELDS)
    nodes = (*walk_nodes(model.graph), *(node for function in like.functions for node in function.node))
    used = {node.domain for node in nodes}
    for domain in sorted(used - set(STANDARD)):
        model.opset_import.append(helper.make_opsetid(domain, versions.get(domain, 1)))
    least = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(like.ir_version, least)
    return model


def matching_nodes(body: GraphProto, like: GraphProto) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Nodes of `body` with the node of `like` that has the same operator and name (first output where nameless)."""
    names = {node.name for node in body.node}
    originals = {_key(node): node for node in like.node if node.name in names}
    count = Counter(_key(node) for node in body.node)
    for node in body.node:
        original = originals.get(_key(node))
        if original is not None and count[_key(node)] == 1:
            yield node, original


def copy_fields(origin: M, copy: M, names: Collection[str]) -> None:
    """Set these fields of `copy` as in `origin`, also to being absent."""
    for name in names:
        copy.ClearField(name)
    copy.MergeFrom(type(origin)(**{field.name: value for field, value in origin.ListFields() if field.name in names}))


def copy_notes(original: NodeProto, node: NodeProto) -> None:
    """Copy what no converter keeps of a node: its doc string, metadata and overload."""
    copy_fields(original, node, ("doc_string", "metadata_props", "overload"))


def packed_int4(name: str, codes: np.ndarray) -> gs.Constant:
    """A constant of type INT4 and the shape of `codes` (integers in -8..7), stored two to a byte, low half first."""
    assert -8 <= codes.min(initial=0) <= codes.max(initial=0) <= 7, name
    return gs.Constant(name, LazyValues(numpy_helper.from_array(codes.astype(ml_dtypes.int4), name)))


def _forget_varying(graph: GraphProto) -> None:
    """Drop the types of what has as many rows as are found at run time: where there are none, ONNX Runtime's optimizer makes
    Reshapes of such types that it cannot run (1.32).
    """
    found = set[str]()
    for node in graph.node:
        if node.op_type in VARYING or not found.isdisjoint(node.input):
            found.update(node.output)
    remove_if(graph.value_info, lambda value: value.name in found)


def _restore(body: GraphProto, like: GraphProto) -> None:
    """Bring back what graphsurgeon dropped from the nodes, here and in their bodies."""
    for node, original in matching_nodes(body, like):
        copy_notes(original, node)
        present = {attribute.name: attribute for attribute in node.attribute}
        for attribute in original.attribute:
            if attribute.name not in present and _is_dropped(attribute):
                node.attribute.add().CopyFrom(attribute)
            elif attribute.name in present and attribute.type == AttributeProto.GRAPH:
                _restore(present[attribute.name].g, attribute.g)


def _share_constants(graph: GraphProto, like: GraphProto) -> None:
    """Store the graph's constants in the graph alone: graphsurgeon repeats them in every body that reads them."""
    _, *bodies = walk_graphs(graph)
    _, *original_bodies = walk_graphs(like) if bodies else (like,)
    local = {tensor.name for body in original_bodies for tensor in body.initializer}
    stored = {tensor.name for tensor in graph.initializer}
    for body in bodies:
        for tensor in reversed(remove_if(body.initializer, lambda tensor: tensor.name not in local)):
            if tensor.name not in stored:
                graph.initializer.append(tensor)
                stored.add(tensor.name)


def _is_empty_list(value: object) -> bool:
    return isinstance(value, list) and not value


def _is_dropped(attribute: AttributeProto) -> bool:
    kind = AttributeProto.AttributeType.Name(attribute.type)
    return kind not in _KEPT_KINDS or _is_empty_list(helper.get_attribute_value(attribute))


def _key(node: NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.name or f"-> {next(iter(node.output), '')}"
