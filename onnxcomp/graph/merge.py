"""Affine layers in their one form: plain Gemms, and BatchNormalization and arithmetic merged into the layers beside them.

    BN(Conv(x; W, b)) = Conv(x; W s, (b - mean) s + beta),    s = gamma / sqrt(var + eps)    per output channel
    s Conv(x; W, b) + t = Conv(x; W s, b s + t)               s and t constants, of each channel or of all
    Conv(s x + t; W, b) = Conv(x; s W, b + sum W t)           without padding, else Conv(x + t / s; s W, b), for 0 is padded
    s (x W + b) + t = x (W s) + (b s + t)                     of a MatMul, also behind a Reshape that keeps the last axis
    Gemm(A, B, C; alpha, beta, transA, transB) = Gemm(A or A', alpha B or alpha B', beta C)

Arithmetic is in float64 and rounded once to the tensor's type. The merged layer makes the tensor of the last node it
stands for, and reads that of the first. A constant that only this layer reads keeps its name; one that others read is
left for them.

Limits: float32 and float64 weights; an output that anything else reads is not merged over.
"""

import math
from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import detach, fresh_name, insert_after, insert_before, replace_uses
from onnxcomp.graph.fold import input_at, is_op, names_leaving, set_input
from onnxcomp.graph.mapped import keep
from onnxcomp.graph.types import Tensor

_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


class _Constants:
    """Writes changed constants into the graph, one for all nodes that change the same one in the same way."""

    def __init__(self, graph: gs.Graph) -> None:
        parts = (graph, *graph.subgraphs(recursive=True))
        self.leaving = names_leaving(graph)
        self.taken = self.leaving.union(*(part.tensors() for part in parts))
        self._made: dict[Hashable, gs.Constant] = {}

    def put(self, node: gs.Node, index: int, values: np.ndarray, spare: Tensor | None = None, change: Hashable = None) -> None:
        """Make `values` the node's input, in place of the constant there or else of `spare` if none else reads that.

        They are rounded to the type of the node's weight. Nodes that give the same `change` of the same constant share
        the new one.
        """
        old = input_at(node, index)
        key = None if change is None or old is None else (old.name, change)
        constant = self._made.get(key)
        if constant is None:
            base = old if old is not None else spare
            assert isinstance(base, gs.Constant)
            is_own = len(base.outputs) == 1 and base.name not in self.leaving
            constant = base if is_own else gs.Constant(fresh_name(base.name, self.taken), base.values)
            constant.values = keep(np.array(values, dtype=node.inputs[1].dtype, order="C"), base.values)
        if key is not None:
            self._made[key] = constant
        set_input(node, index, constant)


def canonical_gemms(graph: gs.Graph) -> int:
    """Give each Gemm with constant B and C the form A·B + C: alpha = beta = 1, nothing transposed, C of shape [N].

    Gemms with a B or C that is computed, or with a C that has rows, stay as they are. Returns how many were changed.
    """
    constants = _Constants(graph)
    gemms = [node for node in graph.nodes if is_op(node, "Gemm") and _is_constant_gemm(node) and not is_plain_gemm(node)]
    for node in gemms:
        alpha, beta, turned_input, turned = _numbers(node)
        if turned_input:
            x, name = node.inputs[0], fresh_name(f"{node.inputs[0].name}/transposed", constants.taken)
            node.inputs[0] = gs.Variable(name, x.dtype)
            insert_before(graph, node, [gs.Node("Transpose", f"{node.name}/transpose", {"perm": [1, 0]}, [x], node.inputs[:1])])
        weight, bias = node.inputs[1].values, input_at(node, 2)
        if turned or alpha != 1:
            matrix = alpha * (weight.T if turned else weight).astype(np.float64)
            constants.put(node, 1, matrix, change=(turned, alpha))
        width = node.inputs[1].shape[1]
        if bias is None or beta == 0:
            node.inputs = node.inputs[:2]
        elif beta != 1 or tuple(bias.shape) != (width,):
            row = np.broadcast_to(bias.values.astype(np.float64).ravel() * beta, (width,))
            constants.put(node, 2, row, change=(width, beta))
        node.attrs = dict(_PLAIN_GEMM)
    return len(gemms)


def merge_affine(graph: gs.Graph) -> int:
    """Merge BatchNormalization, and arithmetic with constants per channel, into the Conv or ConvTranspose before, the former
    also into Gemm.
    """
    constants = _Constants(graph)
    merge = {"BatchNormalization": _merge_batchnorm} | dict.fromkeys(("Add", "Sub", "Mul", "Div"), _merge_constant)
    return sum(merge[node.op](node, constants) for node in graph.nodes if is_op(node, *merge))


def merge_inputs(graph: gs.Graph) -> int:
    """Merge arithmetic with constants per channel in front of a Conv into it."""
    constants = _Constants(graph)
    return sum(_merge_input(node, constants) for node in graph.nodes if is_op(node, "Conv") and _is_constant(node))


def merge_outputs(graph: gs.Graph) -> int:
    """Merge BatchNormalization of rows, and factors of each column or of all, into the MatMul or Gemm before. Types are set."""
    constants = _Constants(graph)
    asked = [node for node in graph.nodes if is_op(node, "BatchNormalization", "Div", "Mul") and node.inputs]
    return sum(_merge_rows(graph, node, constants) for node in asked)


def _is_float(tensor: Tensor | None) -> bool:
    """Whether the tensor is a float32 or float64 constant."""
    return isinstance(tensor, gs.Constant) and tensor.dtype in (np.float32, np.float64)


def _numbers(gemm: gs.Node) -> tuple[float, ...]:
    """Its alpha, beta, transA and transB."""
    return tuple(gemm.attrs.get(key, plain) for key, plain in _PLAIN_GEMM.items())


def _width(gemm: gs.Node) -> int:
    return gemm.inputs[1].shape[0 if gemm.attrs.get("transB", 0) else 1]


def is_plain_gemm(gemm: gs.Node) -> bool:
    """Whether the Gemm is a product and a constant bias per column, if any."""
    bias = input_at(gemm, 2)
    is_row = bias is None or (_is_float(bias) and bias.values.shape == (_width(gemm),))
    return is_row and _numbers(gemm) == tuple(_PLAIN_GEMM.values())


def _is_constant_gemm(gemm: gs.Node) -> bool:
    bias = input_at(gemm, 2)
    return _is_constant(gemm) and (bias is None or bias.values.size == 1 or bias.values.size == bias.shape[-1] == _width(gemm))


def _merge_batchnorm(node: gs.Node, constants: _Constants) -> bool:
    layer, norm = _layer_before(node, 0, constants.leaving, "Conv", "ConvTranspose", "Gemm"), _normalization(node)
    if layer is None or norm is None or (layer.op == "Gemm" and not is_plain_gemm(layer)):
        return False
    scale, shift = norm
    constants.put(layer, 1, _scaled(layer, scale))
    constants.put(layer, 2, bias_of(layer) * scale + shift, node.inputs[2])
    _take_output(layer, node)
    return True


def _normalization(node: gs.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift [channels], float64, of a BatchNormalization; None where they are no constants."""
    trains = node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:])
    if trains or not all(map(_is_float, node.inputs[1:5])):
        return None
    gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in node.inputs[1:5])
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _merge_rows(graph: gs.Graph, node: gs.Node, constants: _Constants) -> bool:
    for i in range(2 if node.op == "Mul" else 1):
        affine = _affine_rows(node, i)
        way = [] if affine is None else _way_to_product(node, i, affine[0].size, constants.leaving)
        if affine is None or not way:
            continue
        (scale, shift), layer = affine, way[-1]
        holders = [(n, at) for n in way if n.op == "Add" and (at := _constant_at(n)) is not None]
        if layer.op == "Gemm" and (shift.any() or input_at(layer, 2) is not None):
            holders.append((layer, 2))
        for holder, at in holders:
            is_last = holder is holders[-1][0]
            old = input_at(holder, at)
            values = 0 * scale if old is None else old.values.astype(np.float64) * scale
            constants.put(holder, at, values + shift if is_last else values, None if old is not None else node.inputs[2])
        constants.put(layer, 1, layer.inputs[1].values.astype(np.float64) * scale)
        if shift.any() and not holders:
            raw, (y,) = gs.Variable(fresh_name(f"{layer.outputs[0].name}/raw", constants.taken)), layer.outputs
            raw.dtype, raw.shape = y.dtype, y.shape
            layer.outputs[0] = raw
            bias = gs.Constant(fresh_name(f"{layer.name}/bias", constants.taken), shift.astype(layer.inputs[1].dtype))
            insert_after(graph, layer, [gs.Node("Add", f"{layer.name}/bias", inputs=[raw, bias], outputs=[y])])
        replace_uses(node.inputs[i], node.outputs[0])  # a Shape may read it
        _take_output(way[0], node)
        return True
    return False


def _affine_rows(node: gs.Node, i: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift, of each column or of all, by which `node` makes its output of the rows that are its input i."""
    rank = len(node.inputs[i].shape or ())
    if node.op == "BatchNormalization":
        return _normalization(node) if rank == 2 else None
    other = node.inputs[1 - i]
    if not _is_float(other) or other.values.ndim > rank or other.values.size != (other.shape or (1,))[-1]:
        return None
    values = other.values.astype(np.float64).ravel()
    if node.op == "Div" and not values.all():
        return None
    return 1 / values if node.op == "Div" else values, np.zeros(values.size)


def _way_to_product(node: gs.Node, index: int, columns: int, leaving: set[str]) -> list[gs.Node]:
    """What lies between this input and the product of a constant matrix that it is made of, and the product: Adds of a constant
    row, and moves that keep the last axis, any moves where `columns` is 1. Empty where it is made of anything else.
    """
    way = list[gs.Node]()
    while (maker := _only_maker(node, index, leaving, "Shape", "Size")) is not None:
        way.append(maker)
        at = _constant_at(maker) if is_op(maker, "Add") else None
        ends = {(t.shape or [None])[-1] for t in (*maker.inputs[:1], *maker.outputs)}
        if is_op(maker, "Gemm", "MatMul") and _is_float(maker.inputs[1]) and maker.inputs[1].values.ndim == 2:
            fits = columns in (1, maker.inputs[1].shape[1])
            return way if fits and (maker.op == "MatMul" or is_plain_gemm(maker)) else []
        keeps = ends == {columns} and maker.op != "Transpose"
        if is_op(maker, "Flatten", "Reshape", "Transpose") and (columns == 1 or keeps):
            node, index = maker, 0
        elif at is not None and columns in (1, *maker.inputs[at].values.shape[-1:]):
            node, index = maker, 1 - at
        else:
            break
    return []


def _constant_at(add: gs.Node) -> int | None:
    """Which input of the Add is a float constant."""
    return next((at for at, tensor in enumerate(add.inputs) if _is_float(tensor)), None)


def _merge_constant(node: gs.Node, constants: _Constants) -> bool:
    for i in (0, 1):
        layer = _layer_before(node, i, constants.leaving, "Conv", "ConvTranspose")
        affine = None if layer is None else _affine(node, i, layer)
        if layer is None or affine is None:
            continue
        scale, shift = affine
        if (scale != 1).any():
            constants.put(layer, 1, _scaled(layer, scale))
        if input_at(layer, 2) is not None or shift.any():
            constants.put(layer, 2, bias_of(layer) * scale + shift, node.inputs[1 - i])
        _take_output(layer, node)
        return True
    return False


def _merge_input(layer: gs.Node, constants: _Constants) -> int:
    """Merge what stands in front of a Conv into it, as far back as it goes; returns how many nodes."""
    weight, groups, count = layer.inputs[1].values, layer.attrs.get("group", 1), 0
    padded = any(layer.attrs.get("pads") or ()) or layer.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")

    def by_input(values: np.ndarray) -> np.ndarray:
        grouped = layer.inputs[1].values.astype(np.float64).reshape(groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
        return grouped * values.reshape(groups, 1, -1, 1)

    while (found := _affine_before(layer, layer, constants.leaving)) is not None:
        node, i, scale, shift = found
        before = _affine_before(node, layer, constants.leaving, i) if padded and shift.any() else None
        if not shift.any():
            constants.put(layer, 1, by_input(scale).reshape(weight.shape))
        elif not padded:
            constants.put(layer, 2, bias_of(layer) + by_input(shift).sum(axis=(2, 3)).ravel(), node.inputs[1 - i])
        elif before is not None and before[2].all() and not before[3].any():  # the shift moves in front of the scale
            scaler, at, scale, _ = before
            moved = ((shift if node.op == "Add" else -shift) / scale).reshape(-1, *(1 for _ in weight.shape[2:]))
            constants.put(layer, 1, by_input(scale).reshape(weight.shape))
            constants.put(node, 1 - i, moved if np.ptp(moved) else moved.ravel()[0])
            node.inputs[i] = scaler.inputs[at]
            node.outputs[0].name = fresh_name(f"{node.outputs[0].name}/unscaled", constants.taken)
            detach(scaler)
            count += 1
            continue
        else:
            break
        layer.inputs[0] = node.inputs[i]
        detach(node)
        count += 1
    return count


def _affine(node: gs.Node, i: int, layer: gs.Node, *, reads: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift [channels], float64, by which `node` makes its output of its input i; the channels are those that the
    layer makes, or those that it `reads`.
    """
    other, weight, groups = node.inputs[1 - i], layer.inputs[1].values, layer.attrs.get("group", 1)
    channels = weight.shape[0] if (layer.op == "Conv") != reads else weight.shape[1] * groups
    if not _is_float(other) or (node.op == "Div" and (i or not other.values.all())) or other.values.ndim > weight.ndim:
        return None
    shape = (1,) * (weight.ndim - other.values.ndim) + other.values.shape
    if shape[1] not in (1, channels) or other.values.size != shape[1]:
        return None
    values, ones = np.broadcast_to(other.values.astype(np.float64).ravel(), (channels,)), np.ones(channels)
    affine = {
        "Add": lambda: (ones, values), "Mul": lambda: (values, 0 * ones), "Div": lambda: (1 / values, 0 * ones),
        "Sub": lambda: (-ones, values) if i else (ones, -values),
    }  # fmt: skip
    return affine[node.op]()


def _affine_before(
    node: gs.Node, layer: gs.Node, leaving: set[str], index: int = 0
) -> tuple[gs.Node, int, np.ndarray, np.ndarray] | None:
    """The operator that alone makes this input for `node` and scales, or shifts, what it reads for the layer: the operator, the
    input that it reads, and [channels] scale and shift.
    """
    maker = _only_maker(node, index, leaving)
    if maker is None or not is_op(maker, "Add", "Sub", "Mul", "Div"):
        return None
    for i in (0, 1):
        affine = _affine(maker, i, layer, reads=True)
        if affine is not None and ((affine[0] == 1).all() or not affine[1].any()):
            return maker, i, *affine
    return None


def _only_maker(node: gs.Node, index: int, leaving: set[str], *beside: str) -> gs.Node | None:
    """What makes this input, if `node` alone reads it, but for operators `beside`."""
    tensor = node.inputs[index]
    readers = [reader for reader in tensor.outputs if not is_op(reader, *beside)]
    return tensor.inputs[0] if len(tensor.inputs) == len(readers) == 1 and tensor.name not in leaving else None


def _layer_before(node: gs.Node, index: int, leaving: set[str], *ops: str) -> gs.Node | None:
    """The layer with constant weights that makes this input, if this node alone reads it."""
    layer = _only_maker(node, index, leaving)
    return layer if layer is not None and is_op(layer, *ops) and _is_constant(layer) else None


def _is_constant(layer: gs.Node) -> bool:
    """Whether the layer's weight, and its bias if any, are constants."""
    return _is_float(layer.inputs[1]) and (input_at(layer, 2) is None or _is_float(layer.inputs[2]))


def bias_of(layer: gs.Node) -> np.ndarray:
    """The layer's bias in float64, zero where it has none."""
    bias = input_at(layer, 2)
    return np.zeros(1) if bias is None else bias.values.astype(np.float64)


def _scaled(layer: gs.Node, scale: np.ndarray) -> np.ndarray:
    """The layer's weight in float64, each output channel times its scale."""
    weight = layer.inputs[1].values.astype(np.float64)
    # As [groups, inputs, outputs, taps]: a Conv's channels are groups of one output, for each has rows of its own.
    groups = {"Conv": len(weight), "ConvTranspose": layer.attrs.get("group", 1), "Gemm": 1}[layer.op]
    grouped = weight.reshape(groups, len(weight) // groups, scale.size // groups, -1) * scale.reshape(groups, 1, -1, 1)
    return grouped.reshape(weight.shape)


def _take_output(layer: gs.Node, node: gs.Node) -> None:
    output = node.outputs[0]
    detach(node)
    layer.outputs = [output]
