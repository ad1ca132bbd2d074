"""Channels that may be scaled: tensors whose channels change together, found by what makes and reads them.

Between Convs a group is closed under addition and under operators that give s x for s x, s > 0, channel by channel: ReLUs and
maxima. Convs write to it, Convs and Gemms read it. A Clip from 0 upwards belongs to it, with a bound per channel then. Where
nothing but additions lies between, and the readers are 1x1 and pad nothing, the group is `linear`: its channels may be shifted
and mixed by any invertible matrix too. Behind the scale and shift of a norm, where MatMuls and Gemms alone read it, a tensor is
a group too; of a LayerNormalization it may be shifted.

Limits: what is an output of the model, or is made or read by any other operator, is no group. Neither is what is averaged: it
is quantized in front of the average, whose readers do not show what that costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import insert_after
from onnxcomp.graph.fold import input_at, is_op, set_input
from onnxcomp.graph.merge import bias_of
from onnxcomp.graph.sites import is_weight, layer
from onnxcomp.graph.streams import set_constant
from onnxcomp.graph.tidy import add_to_output

_PASSING = ("Relu", "LeakyRelu", "MaxPool", "GlobalMaxPool")
_FLAT = ("Flatten", "Reshape", "Squeeze")


@dataclass
class Group:
    """Tensors [N, C, ..], or [.., C] behind a norm, that one scale per channel fits."""

    width: int
    """Channels C."""
    writers: list[gs.Node] = field(default_factory=list)
    readers: list[gs.Node] = field(default_factory=list)
    clips: list[gs.Node] = field(default_factory=list)
    linear: bool = True
    factor: int | None = None
    """Of a group behind a norm, its writer: which of the norm's inputs is the scale per channel."""

    @property
    def shifted(self) -> set[str]:
        """What layers make and read: the tensors whose shifts a change of a linear group must know."""
        return {node.inputs[0].name for node in self.readers} | {node.outputs[0].name for node in self.writers}


def find_groups(graph: gs.Graph) -> list[Group]:
    """The groups of the main graph, in the order of their first writers."""
    found, seen = list[Group](), set[int]()
    for node in graph.nodes:
        if is_op(node, "Conv") and is_weight(node.inputs[1]) and id(node.outputs[0]) not in seen:
            group = Group(len(node.inputs[1].values))
            found += [group] if _search(graph, node.outputs[0], group, seen) and group.readers else []
        elif (factor := _factor(node)) is not None:
            y, width = node.outputs[0], node.inputs[factor].values.size
            readers = [reader for reader in y.outputs if not is_op(reader, "Shape")]
            alone = bool(readers) and not any(y is t for t in graph.outputs) and all(_is_product(r, y, width) for r in readers)
            found += [Group(width, [node], readers, linear=False, factor=factor)] if alone else []
    return found


def columns(layer: gs.Node) -> np.ndarray:
    """The weight of a reader as [groups, outputs, inputs of a group, kernel], float64."""
    w = layer.inputs[1].values.astype(np.float64)
    if layer.op != "Conv":
        return w.T[None, :, :, None]
    groups = layer.attrs.get("group", 1)
    return w.reshape(groups, len(w) // groups, w.shape[1], -1)


def divide(w: np.ndarray, scale: np.ndarray, mix: np.ndarray | None) -> np.ndarray:
    """The `columns` of a reader of x scale, or of x `mix` where there is one."""
    return w / scale.reshape(len(w), 1, -1, 1) if mix is None else np.einsum("ij,gojk->goik", np.linalg.inv(mix), w)


def transform(
    graph: gs.Graph, group: Group, scale: np.ndarray, mix: np.ndarray | None, shifts: Mapping[str, np.ndarray]
) -> None:
    """Let the group's tensors hold (x - shift) scale, or (x - shift) `mix` [C, C], and its readers undo it. Its Clips become a
    Relu and a Min with a bound per channel.

    `shifts`: of the output of each writer and of every tensor that is read; none where they are 0.
    """
    for node in group.readers:
        w, shift = columns(node), shifts.get(node.inputs[0].name)
        if shift is not None and node.op == "MatMul" and (site := layer(node)) is not None:
            add_to_output(graph, site, w[0, :, :, 0] @ shift, "shift")
        elif shift is not None:
            _set_bias(node, bias_of(node) + w[0, :, :, 0] @ shift)
        w = divide(w, scale, mix)
        set_constant(node, 1, w.reshape(node.inputs[1].shape) if node.op == "Conv" else w[0, :, :, 0].T)
    for node in group.writers:
        shift = shifts.get(node.outputs[0].name, 0.0)
        if group.factor is not None:
            set_constant(node, group.factor, node.inputs[group.factor].values * scale)
            if node.op == "LayerNormalization":
                _set_bias(node, (bias_of(node) - shift) * scale)
            continue
        w = node.inputs[1].values
        new = np.moveaxis(w, 0, -1) * scale if mix is None else np.moveaxis(w, 0, -1) @ mix
        set_constant(node, 1, np.moveaxis(new, -1, 0))
        b = np.full(group.width, bias_of(node) - shift)
        _set_bias(node, b * scale if mix is None else b @ mix)
    for node in group.clips:
        y, bound = node.outputs[0], np.float32(float(node.inputs[2].values) * scale)
        inner = gs.Variable(f"{y.name}/unbounded", y.dtype, y.shape)
        node.op, node.inputs, node.outputs = "Relu", node.inputs[:1], [inner]
        bounds = gs.Constant(f"{node.name}/bounds", bound.reshape(-1, *[1] * (len(y.shape) - 2)))
        insert_after(graph, node, [gs.Node("Min", f"{node.name}/Min", inputs=[inner, bounds], outputs=[y])])


def _factor(node: gs.Node) -> int | None:
    """Which input of a norm, or of what stands for a part of one, is a constant per channel of the last axis."""
    if is_op(node, "LayerNormalization"):
        return 1 if all(isinstance(t, gs.Constant) and len(t.shape) == 1 for t in node.inputs[1:]) else None
    y, constants = node.outputs[0], [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)]
    is_scaled = is_op(node, "Mul") and len(constants) == 1 and y.shape and y.dtype == np.float32
    return constants[0] if is_scaled and node.inputs[constants[0]].values.shape == tuple(y.shape[-1:]) else None


def _is_product(node: gs.Node, x: gs.Tensor, width: int) -> bool:
    """Whether a layer multiplies the last axis of x, and nothing else of it, with a weight."""
    if not is_op(node, "MatMul", "Gemm") or node.inputs[0] is not x or not is_weight(node.inputs[1]):
        return False
    is_plain = not node.attrs.get("transB", 0) and not isinstance(input_at(node, 2), gs.Variable)
    return is_plain and node.inputs[1].values.shape[:-1] == (width,)


def _set_bias(node: gs.Node, values: np.ndarray) -> None:
    if input_at(node, 2) is not None:
        set_constant(node, 2, values)
    elif values.any():
        set_input(node, 2, gs.Constant(f"{node.name}/bias", values.astype(np.float32)))


def _search(graph: gs.Graph, start: gs.Tensor, group: Group, seen: set[int]) -> bool:
    """Fill in the group from one of its tensors; whether it is one."""
    todo, outputs, good = [start], {id(t) for t in graph.outputs}, True
    seen.add(id(start))
    while todo:
        tensor = todo.pop()
        good &= id(tensor) not in outputs and len(tensor.inputs) == 1
        for node in {id(n): n for n in (*tensor.inputs, *tensor.outputs)}.values():
            joined = _join(node, tensor, group)
            good &= joined is not None
            fresh = {id(t): t for t in joined or () if id(t) not in seen}
            seen.update(fresh)
            todo += fresh.values()
    return good


def _join(node: gs.Node, tensor: gs.Tensor, group: Group) -> list[gs.Tensor] | None:
    """The tensors of the group that the node brings, which makes or reads one of them; None where there is none then."""
    is_layer = is_op(node, "Conv", "Gemm") and is_weight(node.inputs[1])
    if is_layer and not isinstance(input_at(node, 2), gs.Variable) and not node.attrs.get("transB", 0):
        shape, groups = node.inputs[1].shape, node.attrs.get("group", 1)
        if node.inputs[0] is not tensor:
            group.writers.append(node)
            return [] if node.op == "Conv" and shape[0] == group.width else None
        group.readers.append(node)
        group.linear &= node.op == "Conv" and groups == 1 and set(shape[2:]) == {1} and not any(node.attrs.get("pads") or ())
        is_flat = node.op == "Conv" or len(tensor.shape or ()) == 2
        return [] if is_flat and group.width == (shape[1] * groups if node.op == "Conv" else shape[0]) else None
    around = [t for t in (*node.inputs, *node.outputs) if not isinstance(t, gs.Constant)]
    if is_op(node, "Add", "Sum"):
        return around if len(around) == len(node.inputs) + 1 else None
    group.linear = False
    low, high = input_at(node, 1), input_at(node, 2)
    if is_op(node, "Clip") and isinstance(low, gs.Constant) and low.values == 0 and isinstance(high, gs.Constant):
        group.clips += [] if node in group.clips else [node]
        return around
    flat = is_op(node, *_FLAT) and list(node.outputs[0].shape or ())[1:] == [group.width]
    return around if len(around) == 2 and (flat or is_op(node, *_PASSING)) else None
