"""Affine layers in their one form: plain Gemms, and BatchNormalization and Add merged into the layer before them.

    BN(Conv(x; W, b)) = Conv(x; W s, (b - mean) s + beta),    s = gamma / sqrt(var + eps)    per output channel
    Gemm(A, B, C; alpha, beta, transA, transB) = Gemm(A or A', alpha B or alpha B', beta C)

Arithmetic is in float64 and rounded once to the tensor's type. The merged layer makes the tensor of the last node it
stands for. A constant that only this layer reads keeps its name; one that others read is left for them.

Limits: float32 and float64 weights; an output that anything else reads is not merged over.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.fold import detach, input_at, is_op, names_leaving, sweep
from onnxcomp.graph.types import Tensor


class _Constants:
    """Writes changed constants into the graph, one for all nodes that change the same one in the same way."""

    def __init__(self, graph: gs.Graph) -> None:
        parts = (graph, *graph.subgraphs(recursive=True))
        self.leaving = names_leaving(graph)
        self._taken = self.leaving.union(*(part.tensors() for part in parts))
        self._made: dict[Hashable, gs.Constant] = {}

    def fresh(self, name: str) -> str:
        """The name, or the first of name_2, name_3 ... that no tensor of the graph has."""
        number, candidate = 1, name
        while candidate in self._taken:
            number, candidate = number + 1, f"{name}_{number + 1}"
        self._taken.add(candidate)
        return candidate

    def put(self, node: gs.Node, index: int, values: np.ndarray, spare: Tensor | None = None, change: Hashable = None) -> None:
        """Make `values` the node's input, in place of the constant there or else of `spare` if none else reads that.

        Nodes that give the same `change` of the same constant share the new one.
        """
        old = input_at(node, index)
        key = None if change is None or old is None else (old.name, change)
        constant = self._made.get(key) if key is not None else None
        if constant is None:
            base = old if old is not None else spare
            assert isinstance(base, gs.Constant)
            if len(base.outputs) == 1 and base.name not in self.leaving:
                base.values = values
                constant = base
            else:
                constant = gs.Constant(self.fresh(base.name), values)
        if key is not None:
            self._made[key] = constant
        while len(node.inputs) <= index:
            node.inputs.append(gs.Variable.empty())
        node.inputs[index] = constant


def canonical_gemms(graph: gs.Graph) -> int:
    """Give each Gemm with constant B and C the form A·B + C: alpha = beta = 1, nothing transposed, C of shape [N].

    Gemms with a B or C that is computed, or with a C that has rows, stay as they are. Returns how many were changed.
    """
    constants = _Constants(graph)
    nodes: list[gs.Node] = []
    count = 0
    for node in graph.nodes:
        nodes.append(node)
        if not is_op(node, "Gemm") or _is_plain(node) or not _is_constant_gemm(node):
            continue
        if _number(node, "transA", 0):
            nodes.insert(-1, _transpose_input(node, constants))
        alpha, beta, turned = _number(node, "alpha", 1), _number(node, "beta", 1), _number(node, "transB", 0)
        weight = _floats(node.inputs[1])
        if turned or alpha != 1:
            matrix = alpha * (weight.T if turned else weight).astype(np.float64)
            constants.put(node, 1, _rounded(matrix, weight), None, (turned, alpha))
        if input_at(node, 2) is None or beta == 0:
            while len(node.inputs) > 2:
                node.inputs.pop()
        else:
            bias, width = _floats(node.inputs[2]), _floats(node.inputs[1]).shape[1]
            if beta != 1 or bias.shape != (width,):
                row = np.broadcast_to(bias.astype(np.float64).ravel() * beta, (width,))
                constants.put(node, 2, _rounded(row, bias), None, (width, beta))
        node.attrs = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        count += 1
    graph.nodes = nodes
    return count


def merge_affine(graph: gs.Graph) -> int:
    """Merge BatchNormalization and per-channel Add into the Conv or ConvTranspose before, the former also into Gemm."""
    constants = _Constants(graph)
    count = 0
    for node in graph.nodes:
        if is_op(node, "BatchNormalization"):
            count += _merge_batchnorm(node, constants)
        elif is_op(node, "Add"):
            count += _merge_add(node, constants)
    sweep(graph)
    return count


def _is_float(tensor: Tensor | None) -> bool:
    """Whether the tensor is a float32 or float64 constant."""
    return isinstance(tensor, gs.Constant) and tensor.dtype in (np.float32, np.float64)


def _floats(tensor: Tensor) -> np.ndarray:
    assert isinstance(tensor, gs.Constant)
    return tensor.values


def _number(node: gs.Node, attribute: str, default: float) -> float:
    value = node.attrs.get(attribute, default)
    assert isinstance(value, int | float)
    return value


def _is_plain(node: gs.Node) -> bool:
    bias = input_at(node, 2)
    numbers = (
        _number(node, "alpha", 1),
        _number(node, "beta", 1),
        _number(node, "transA", 0),
        _number(node, "transB", 0),
    )
    return numbers == (1, 1, 0, 0) and (bias is None or (_is_float(bias) and _floats(bias).shape == (_width(node),)))


def _width(node: gs.Node) -> int:
    return _floats(node.inputs[1]).shape[0 if _number(node, "transB", 0) else 1]


def _is_constant_gemm(node: gs.Node) -> bool:
    if not _is_float(node.inputs[1]):
        return False
    bias = input_at(node, 2)
    if bias is None:
        return True
    if not _is_float(bias):
        return False
    values = _floats(bias)
    return values.size == 1 or values.size == values.shape[-1] == _width(node)


def _transpose_input(node: gs.Node, constants: _Constants) -> gs.Node:
    turned = gs.Variable(constants.fresh(f"{node.inputs[0].name}/transposed"), node.inputs[0].dtype)
    transpose = gs.Node("Transpose", f"{node.name}/transpose", {"perm": [1, 0]}, [node.inputs[0]], [turned])
    node.inputs[0] = turned
    return transpose


def _merge_batchnorm(node: gs.Node, constants: _Constants) -> bool:
    layer = _layer_before(node, 0, constants.leaving, "Conv", "ConvTranspose", "Gemm")
    trains = _number(node, "training_mode", 0) or any(t.name for t in node.outputs[1:])
    if layer is None or trains or not all(map(_is_float, node.inputs[1:5])) or (layer.op == "Gemm" and not _is_plain(layer)):
        return False
    gamma, beta, mean, variance = (_floats(t).astype(np.float64) for t in node.inputs[1:5])
    scale = gamma / np.sqrt(variance + _number(node, "epsilon", 1e-5))
    weight = _floats(layer.inputs[1])
    shift = (_bias(layer) - mean) * scale + beta
    constants.put(layer, 1, _rounded(_scaled(layer, scale), weight))
    constants.put(layer, 2, _rounded(shift, weight), node.inputs[2])
    _take_output(layer, node)
    return True


def _merge_add(node: gs.Node, constants: _Constants) -> bool:
    for i in (0, 1):
        layer, other = _layer_before(node, i, constants.leaving, "Conv", "ConvTranspose"), node.inputs[1 - i]
        if layer is None or not _is_float(other):
            continue
        weight, added = _floats(layer.inputs[1]), _floats(other)
        channels = weight.shape[0] if layer.op == "Conv" else weight.shape[1] * int(_number(layer, "group", 1))
        shape = (1,) * (weight.ndim - added.ndim) + added.shape
        if added.ndim > weight.ndim or shape[1] not in (1, channels) or added.size != shape[1]:
            continue
        total = np.broadcast_to(_bias(layer) + added.astype(np.float64).ravel(), (channels,))
        constants.put(layer, 2, _rounded(total, weight), other)
        _take_output(layer, node)
        return True
    return False


def _layer_before(node: gs.Node, index: int, leaving: set[str], *ops: str) -> gs.Node | None:
    """The layer with constant weights that makes this input, if this node alone reads it."""
    tensor = node.inputs[index]
    if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or tensor.name in leaving:
        return None
    layer = tensor.inputs[0]
    if not is_op(layer, *ops) or not _is_float(layer.inputs[1]):
        return None
    return layer if input_at(layer, 2) is None or _is_float(layer.inputs[2]) else None


def _bias(layer: gs.Node) -> np.ndarray:
    """The layer's bias in float64, zero where it has none."""
    return np.zeros(1) if input_at(layer, 2) is None else _floats(layer.inputs[2]).astype(np.float64)


def _scaled(layer: gs.Node, scale: np.ndarray) -> np.ndarray:
    """The layer's weight in float64, each output channel times its scale."""
    weight = _floats(layer.inputs[1]).astype(np.float64)
    if layer.op == "Gemm":
        return weight * scale
    tail = (1,) * (weight.ndim - 2)
    if layer.op == "Conv":
        return weight * scale.reshape(-1, 1, *tail)
    group = int(_number(layer, "group", 1))
    grouped = weight.reshape(group, -1, *weight.shape[1:]) * scale.reshape(group, 1, -1, *tail)
    return grouped.reshape(weight.shape)


def _take_output(layer: gs.Node, node: gs.Node) -> None:
    output = node.outputs[0]
    detach(node)
    layer.outputs.clear()
    layer.outputs.append(output)


def _rounded(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.array(values, dtype=like.dtype, order="C")
