"""Models as the runtime sees them: every tensor exposed for inference, an optimized file's operators, element types.

Limits: only the main graph is read; bodies of If, Loop and Scan stay closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from onnxcomp.graph.files import split_weights
from onnxcomp.graph.types import Tensor

Node = gs.Node
"""An operator of the in-memory graph."""

_WEIGHT_MINIMUM = 1024
"""Bytes from which an initializer is a weight, and no shape or index that type inference would have to read."""

_ELEMENTS: dict[str, type] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e5m2": ml_dtypes.float8_e5m2,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "bool": np.bool_,
    "string": np.object_,
}


@dataclass(frozen=True)
class OptimizedNode:
    """One operator of the model that a runtime really executes. An absent input or output is an empty name."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def expose_all(model: ModelProto) -> ModelProto:
    """The model for type inference: all node outputs are graph outputs without a type, large weights are graph inputs.

    It holds no large weight, so it is small whatever the size of `model`, and it is not meant to be run.
    """
    exposed, weights = split_weights(model, _WEIGHT_MINIMUM)
    graph = exposed.graph
    declared = {value.name for value in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in weights.items()
        if name not in declared
    )
    taken = {value.name for value in graph.output}
    for node in graph.node:
        for name in node.output:
            if name and name not in taken:
                taken.add(name)
                graph.output.append(ValueInfoProto(name=name))
    return exposed


def input_names(model: ModelProto) -> tuple[str, ...]:
    """The inputs that a caller feeds: those of the graph that no initializer fills."""
    filled = {tensor.name for tensor in model.graph.initializer}
    return tuple(value.name for value in model.graph.input if value.name not in filled)


def output_names(graph: gs.Graph) -> frozenset[str]:
    """The names of the graph's outputs."""
    outputs: list[Tensor] = list(graph.outputs)  # pyright: ignore[reportAssignmentType]
    return frozenset(tensor.name for tensor in outputs)


def element_type(text: str) -> np.dtype | None:
    """The dtype of a type as a runtime writes it, such as `tensor(float)`; None for what is no tensor."""
    element = _ELEMENTS.get(text.removeprefix("tensor(").removesuffix(")"))
    return None if element is None else np.dtype(element)


def read_nodes(path: Path) -> tuple[OptimizedNode, ...]:
    """The operators of the main graph of a model file, in order; weights beside the file are not read."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return tuple(OptimizedNode(n.op_type, n.domain, n.name, tuple(n.input), tuple(n.output)) for n in nodes)


def saturation_probe() -> bytes:
    """A product y = a b of uint8 a [1, 64] and int8 b [64, 16] with int32 sums, as a model."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "saturation",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 64]),
            helper.make_tensor_value_info("b", TensorProto.INT8, [64, 16]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString(deterministic=True)
