"""Between ONNX models and the graphs of onnx-graphsurgeon that everything here works on.

graphsurgeon keeps names, nodes, constants and bodies; it loses metadata, doc strings, a few rare kinds of attributes
and empty lists. `to_model` brings these back from `like`, the model that the graph came from, for every node that still
has its operator and its name (or, for nodes without a name, its first output).

Limits: doc strings of values and quantization annotations are not brought back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcomp.graph.weights import node_bodies, walk_nodes

STANDARD = ("", "ai.onnx")
_MODEL_FIELDS = ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string")
_KEPT_ATTRIBUTES = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
}


def to_graph(model: ModelProto) -> gs.Graph:
    """The model's graph, on a copy of its weights."""
    copy = ModelProto()
    copy.CopyFrom(model)
    with _silence():
        graph = gs.import_onnx(copy)
    graph.import_domains = None
    graph.functions.clear()
    return graph


def to_model(graph: gs.Graph, like: ModelProto) -> ModelProto:
    """The graph as a model, with what graphsurgeon does not keep taken from `like`.

    The opset is `graph.opset`; other domains keep the version of `like` (a domain new to it gets version 1), and those
    that no node uses are left out. The same graph gives the same bytes.
    """
    versions = {o.domain: o.version for o in like.opset_import if o.domain not in STANDARD}
    with _silence(), _without_empty_lists(graph):
        model = gs.export_onnx(graph, do_type_check=False, opset_imports=[helper.make_opsetid("", graph.opset)])
    _restore(model.graph, like.graph)
    _share_constants(model.graph, like.graph)
    copy_fields(like, model, _MODEL_FIELDS)
    model.functions.extend(like.functions)
    model.metadata_props.extend(like.metadata_props)
    nodes = (*walk_nodes(model.graph), *(node for function in like.functions for node in function.node))
    used = {node.domain for node in nodes}
    for domain in sorted(used - set(STANDARD)):
        model.opset_import.append(helper.make_opsetid(domain, versions.get(domain, 1)))
    least = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(like.ir_version, least)
    return model


def matching_nodes(body: GraphProto, like: GraphProto) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Nodes of `body` with the node of `like` that has the same operator and name (first output where nameless)."""
    originals = {_key(node): node for node in like.node}
    count = Counter(_key(node) for node in body.node)
    for node in body.node:
        original = originals.get(_key(node))
        if original is not None and count[_key(node)] == 1:
            yield node, original


def copy_fields(origin: Message, copy: Message, names: Iterable[str]) -> None:
    """Set these plain fields of `copy` as in `origin`, also to being absent."""
    for name in names:
        copy.ClearField(name)
        if origin.HasField(name):
            setattr(copy, name, getattr(origin, name))


def copy_notes(original: NodeProto, node: NodeProto) -> None:
    """Copy what does not change a node's meaning: its doc string and metadata."""
    copy_fields(original, node, ("doc_string",))
    del node.metadata_props[:]
    node.metadata_props.extend(original.metadata_props)


def packed_int4(name: str, codes: np.ndarray) -> gs.Constant:
    """A constant of type INT4 and the shape of `codes` (integers in -8..7), stored two to a byte, low half first."""
    assert -8 <= codes.min(initial=0) <= codes.max(initial=0) <= 7, name
    flat = np.zeros(codes.size + codes.size % 2, np.uint8)
    flat[: codes.size] = codes.astype(np.int8).ravel().view(np.uint8) & 0x0F
    packed = (flat[0::2] | (flat[1::2] << 4)).tobytes()
    tensor = helper.make_tensor(name, TensorProto.INT4, codes.shape, packed, raw=True)
    return gs.Constant(name, LazyValues(tensor))


@contextmanager
def _silence() -> Iterator[None]:
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = severity


@contextmanager
def _without_empty_lists(graph: gs.Graph) -> Iterator[None]:
    """Take empty list attributes off while the graph is exported, where their type could not be told."""
    taken: list[tuple[gs.Node, dict[str, object]]] = []
    for part in (graph, *graph.subgraphs(recursive=True)):
        for node in part.nodes:
            if any(isinstance(value, list) and not value for value in node.attrs.values()):
                taken.append((node, node.attrs))
                node.attrs = {k: v for k, v in node.attrs.items() if not (isinstance(v, list) and not v)}
    try:
        yield
    finally:
        for node, attrs in taken:
            node.attrs = attrs


def _restore(body: GraphProto, like: GraphProto) -> None:
    """Bring back what graphsurgeon dropped from the nodes, here and in their bodies."""
    for node, original in matching_nodes(body, like):
        copy_notes(original, node)
        copy_fields(original, node, ("overload",))
        present = {attribute.name: attribute for attribute in node.attribute}
        for attribute in original.attribute:
            if attribute.name not in present and _is_dropped(attribute):
                node.attribute.add().CopyFrom(attribute)
            elif attribute.name in present and attribute.type == AttributeProto.GRAPH:
                _restore(present[attribute.name].g, attribute.g)


def _share_constants(graph: GraphProto, like: GraphProto) -> None:
    """Store the graph's constants in the graph alone: graphsurgeon repeats them in every body that reads them."""
    local = {tensor.name for body in _bodies(like) for tensor in body.initializer}
    stored = {tensor.name for tensor in graph.initializer}
    for body in _bodies(graph):
        for i in reversed(range(len(body.initializer))):
            name = body.initializer[i].name
            if name in local:
                continue
            if name not in stored:
                graph.initializer.append(body.initializer[i])
                stored.add(name)
            del body.initializer[i]


def _bodies(graph: GraphProto) -> list[GraphProto]:
    return [body for node in walk_nodes(graph) for body in node_bodies(node)]


def _is_dropped(attribute: AttributeProto) -> bool:
    lists = (attribute.floats, attribute.ints, attribute.strings, attribute.tensors, attribute.graphs)
    return attribute.type not in _KEPT_ATTRIBUTES and (
        attribute.type not in (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS) or not any(lists)
    )


def _key(node: NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.name or f"-> {next(iter(node.output), '')}"
