"""Models as the runtime sees them: every tensor exposed for inference, an optimized file's operators, element types.

Limits: only the main graph is read; bodies of If, Loop and Scan stay closed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxcomp.graph.weights import declare_inputs, split_weights

OptimizedNode = NodeProto
"""One operator of the model that a runtime really executes. An absent input or output is an empty name."""


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


def input_names(model: ModelProto) -> tuple[str, ...]:
    """The inputs that a caller feeds: those of the graph that no initializer fills."""
    filled = {tensor.name for tensor in model.graph.initializer}
    return tuple(value.name for value in model.graph.input if value.name not in filled)


def element_type(text: str) -> np.dtype | None:
    """The dtype of a type as a runtime writes it, such as `tensor(float)`; None for what is no tensor."""
    element = dict(TensorProto.DataType.items()).get(text.removeprefix("tensor(").removesuffix(")").upper())
    return None if element is None else helper.tensor_dtype_to_np_dtype(element)


def read_nodes(path: Path) -> tuple[OptimizedNode, ...]:
    """The operators of the main graph of a model file, in order; weights beside the file are not read."""
    return tuple(onnx.load(str(path), load_external_data=False).graph.node)


def saturation_probe() -> bytes:
    """A product y = a b of uint8 a [1, 64] and int8 b [64, 16] with int32 sums, as a model."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
        saturation (uint8[1,64] a, int8[64,16] b) => (int32[1,16] y) { y = MatMulInteger(a, b) }"""
    return onnx.parser.parse_model(text).SerializeToString(deterministic=True)
