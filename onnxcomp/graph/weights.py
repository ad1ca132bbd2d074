"""The tensors stored in a model: walking over them, telling their sizes, and reading those kept in files beside it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from google.protobuf.message import Message
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.checker import ValidationError
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, set_external_data

from onnxcomp.errors import ModelError

WEIGHT_BYTES = 1024
"""Bytes from which an initializer is a weight, and no shape or index that a conversion would have to read."""

T = TypeVar("T")
_SUB_BYTE_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


def walk_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and the bodies of its If, Loop and Scan nodes, each before those inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from walk_graphs(body)


def walk_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of the graph and of its bodies."""
    return (node for part in walk_graphs(graph) for node in part.node)


def walk_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers and attributes, those of bodies too."""
    for part in walk_graphs(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in part.node:
            for attribute in node.attribute:
                yield from [attribute.t] if attribute.HasField("t") else attribute.tensors


def tensor_bytes(tensor: TensorProto) -> int:
    """The bytes that the tensor's values take when packed as ONNX stores them; 0 for strings."""
    if tensor.data_type == TensorProto.STRING:
        return 0
    bits = _SUB_BYTE_BITS.get(TensorProto.DataType.Name(tensor.data_type))
    bits = bits or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (math.prod(tensor.dims) * bits + 7) // 8


def split_weights(model: ModelProto, minimum: int = WEIGHT_BYTES) -> tuple[ModelProto, dict[str, TensorProto]]:
    """A copy of the model without its initializers of at least `minimum` bytes, and those (not copied), by name."""
    large = {tensor.name: tensor for tensor in model.graph.initializer if tensor_bytes(tensor) >= minimum}
    small = [tensor for tensor in model.graph.initializer if tensor.name not in large]
    graph = GraphProto(**_fields_except(model.graph, "initializer"), initializer=small)
    return ModelProto(**_fields_except(model, "graph"), graph=graph), large


def declare_inputs(skeleton: ModelProto, weights: Mapping[str, TensorProto]) -> None:
    """Make the weights that were split off inputs of the model, in place, where they are not already."""
    declared = {value.name for value in skeleton.graph.input}
    missing = (tensor for name, tensor in weights.items() if name not in declared)
    skeleton.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in missing)


def expose_all(model: ModelProto) -> ModelProto:
    """The model for type inference: all node outputs are graph outputs without a type, large weights are graph inputs.

    It holds no large weight, so it is small whatever the size of `model`, and it is not meant to be run.
    """
    exposed, weights = split_weights(model)
    declare_inputs(exposed, weights)
    declared = {value.name for value in exposed.graph.output}
    produced = dict.fromkeys(name for node in exposed.graph.node for name in node.output if name)
    exposed.graph.output.extend(ValueInfoProto(name=name) for name in produced if name not in declared)
    return exposed


def expose(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy of the model with these tensors as outputs too, without a type."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    exposed.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return exposed


def remove_if(items: MutableSequence[T], condition: Callable[[T], bool]) -> list[T]:
    """Take the messages that fulfil the condition out of a repeated field; returns them."""
    removed = [item for item in items if condition(item)]
    kept = [item for item in items if not condition(item)]
    del items[:]
    items.extend(kept)
    return removed


def external_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """The stored tensors whose values lie in another file."""
    return (tensor for tensor in walk_tensors(graph) if tensor.data_location == TensorProto.EXTERNAL)


def read_external(tensor: TensorProto, model_path: Path) -> None:
    """Bring the tensor's values into the tensor, in place. Raises what `find_external` raises."""
    file, start = find_external(tensor, model_path)
    with reading(file) as stream:
        stream.seek(start)
        set_values(tensor, stream.read(tensor_bytes(tensor)))


def set_values(tensor: TensorProto, values: bytes) -> None:
    """Let the tensor hold these values, in place."""
    tensor.raw_data = values
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def find_external(tensor: TensorProto, model_path: Path) -> tuple[Path, int]:
    """The file that holds the tensor's values, and where in it they begin. Raises ModelError where that is missing, lies
    outside the model's folder or holds too few bytes.
    """
    probe, needed = TensorProto(name=tensor.name), tensor_bytes(tensor)
    try:
        info = ExternalDataInfo(tensor)
        refer(probe, info.location, 0, 1)
        load_external_data_for_tensor(probe, str(model_path.parent))
        file, start = model_path.parent / info.location, info.offset or 0
        held = file.stat().st_size - start
    except (ValidationError, ValueError, OSError) as error:
        text = f"{model_path}: the weight '{tensor.name}' cannot be read: {str(error).rstrip('.')}."
        raise ModelError(f"{text} Copy its file beside the model.") from error
    if start < 0 or min(held, info.length or held) < needed:
        text = f"{model_path}: the weight '{tensor.name}' needs {needed} bytes, but its file holds fewer."
        raise ModelError(f"{text} The file is cut short or belongs to another model.")
    return file, start


def refer(tensor: TensorProto, location: str, start: int, length: int) -> None:
    """Let the tensor's values be those that lie in a file, in place."""
    tensor.raw_data = b""
    set_external_data(tensor, location, start, length)
    tensor.ClearField("raw_data")


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file, open. Raises ModelError where it cannot be opened or read."""
    try:
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}.") from error


def reason(error: OSError) -> str:
    """What the system says, as part of a sentence."""
    return (error.strerror or str(error)).lower()


def _fields_except(message: Message, left_out: str) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields() if field.name != left_out}
