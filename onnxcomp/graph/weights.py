"""The tensors stored in a model: walking over them, telling their sizes, and reading those kept in files beside it."""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxcomp.errors import ModelError

_SUB_BYTE_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


def walk_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of the graph and of its bodies."""
    for node in graph.node:
        yield node
        for body in node_bodies(node):
            yield from walk_nodes(body)


def node_bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def walk_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers and attributes, those of bodies too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for body in node_bodies(node):
            yield from walk_tensors(body)


def tensor_bytes(tensor: TensorProto) -> int:
    """The bytes that the tensor's values take when packed as ONNX stores them; 0 for strings."""
    if tensor.data_type == TensorProto.STRING:
        return 0
    count = 1
    for dimension in tensor.dims:
        count *= dimension
    bits = _SUB_BYTE_BITS.get(TensorProto.DataType.Name(tensor.data_type))
    return (count * (bits or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) + 7) // 8


def split_weights(model: ModelProto, minimum: int) -> tuple[ModelProto, dict[str, TensorProto]]:
    """A copy of the model without its initializers of at least `minimum` bytes, and those (not copied), by name."""
    skeleton = ModelProto()
    _copy_fields(model, skeleton, skip="graph")
    _copy_fields(model.graph, skeleton.graph, skip="initializer")
    weights: dict[str, TensorProto] = {}
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) >= minimum:
            weights[tensor.name] = tensor
        else:
            skeleton.graph.initializer.add().CopyFrom(tensor)
    return skeleton, weights


def is_external(tensor: TensorProto) -> bool:
    """Whether the values lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def external_file(tensor: TensorProto, model_path: Path) -> Path:
    """The file that holds the tensor's values. Raises ModelError if it is missing or not in the model's folder."""
    location = _entries(tensor).get("location", "")
    folder = model_path.parent.resolve()
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise ModelError(
            f"{model_path}: the weight '{tensor.name}' points to '{location}', outside the model's folder. "
            "Copy that file beside the model."
        )
    if not file.is_file():
        raise ModelError(f"{model_path}: the weight file '{location}' is missing. Copy it beside the model.")
    return file


def read_external(tensor: TensorProto, model_path: Path) -> None:
    """Bring the tensor's values into the tensor, in place. Raises ModelError if its file holds too few bytes."""
    file = external_file(tensor, model_path)
    entries, needed = _entries(tensor), tensor_bytes(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length < needed or file.stat().st_size < offset + needed:
        raise ModelError(
            f"{model_path}: the weight '{tensor.name}' needs {needed} bytes, but '{entries['location']}' holds fewer. "
            "The file is cut short or belongs to another model."
        )
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(needed)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {reason(error)}.") from error
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def reason(error: OSError) -> str:
    """What the system says, as part of a sentence."""
    return (error.strerror or str(error)).lower()


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _copy_fields(origin: Message, copy: Message, skip: str) -> None:
    for field, value in origin.ListFields():
        target: Any = getattr(copy, field.name)
        if field.name == skip:
            continue
        if isinstance(value, Message):
            target.CopyFrom(value)
        elif isinstance(value, MutableSequence):
            target.extend(value)
        else:
            setattr(copy, field.name, value)
