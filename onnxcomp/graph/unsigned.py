"""Weights as unsigned codes, whose products with unsigned activations any x86 CPU adds up right, in a slower kernel.

For calibration and proof on a CPU that adds those of signed weights wrongly (`numerics.saturation`). ONNX Runtime's own option
for that, `session.x64quantprecision`, leaves out some kernels and cannot load a weight that two layers share (1.32).

Limits: weights of 8-bit codes in the model itself, with a scale per tensor or channel; others are left as they are.
"""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MIDDLE = 128


def unsigned_weights(model: ModelProto) -> ModelProto:
    """The model with weights of type uint8 instead of int8, each code and zero point 128 higher. The one given where there are
    none, or where activations are signed too, whose products are added right.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    signed = {t.name for t in stored.values() if t.data_type == TensorProto.INT8 and not t.external_data}
    if any(node.op_type == "QuantizeLinear" and not signed.isdisjoint(node.input[2:]) for node in model.graph.node):
        return model
    places = list(_places(model, signed))
    if not places:
        return model
    made, raised = ModelProto(), dict[str, np.ndarray]()
    made.CopyFrom(model)
    for index, at, behind in places:
        node = made.graph.node[index]
        codes, zero = node.input[at], node.input[behind] if len(node.input) > behind else ""
        shape = stored[node.input[1]].dims if at == 0 and node.input[1] in stored else ()
        raised[f"{codes}/unsigned"] = numpy_helper.to_array(stored[codes])
        raised[f"{node.output[0]}/zero"] = numpy_helper.to_array(stored[zero]) if zero else np.zeros(tuple(shape), np.int8)
        node.input.extend([""] * (behind + 1 - len(node.input)))
        node.input[at], node.input[behind] = f"{codes}/unsigned", f"{node.output[0]}/zero"
    for name, array in raised.items():
        made.graph.initializer.append(numpy_helper.from_array((array.astype(np.int16) + MIDDLE).astype(np.uint8), name))
    return made


def _places(model: ModelProto, signed: set[str]) -> Iterator[tuple[int, int, int]]:
    """Of the nodes that read such a weight: their number, and which of their inputs it is and its zero point."""
    read = {name for node in model.graph.node if node.op_type in LAYERS for name in node.input[1:2]}
    for index, node in enumerate(model.graph.node):
        at, behind = {"DequantizeLinear": (0, 2), "MatMulInteger": (1, 3)}.get(node.op_type, (0, 0))
        is_weight = node.op_type == "MatMulInteger" or not read.isdisjoint(node.output)
        zero = [name for name in node.input[behind : behind + 1] if name]
        in_blocks = any(a.name == "block_size" and a.i for a in node.attribute)
        if behind and is_weight and node.input[at] in signed and signed.issuperset(zero) and not in_blocks:
            yield index, at, behind
