"""Channels filled up with zeros, where a kernel computes so many at a time.

ONNX Runtime's integer kernel of a depthwise Conv takes 16 channels at once and what is left one by one: for 120 channels three
times as long as for 128. What Convs alone make and read may have more channels than it needs: those that write it have weights
of 0 there, and so have those that read it.

Limits: a tensor that an operator other than those below makes or reads stays as it is, and so does a network's output.
"""

from dataclasses import dataclass, field

import numpy as np

from onnxcomp.graph.behind import ELEMENTWISE
from onnxcomp.graph.edit import DOMAIN, Constant, Graph, Node, Tensor

_PASSING = ELEMENTWISE - {"Div"} | {"AveragePool", "FakeQuantize", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Sum"}
"""Operators that make each channel of the same one of every input, and of zeros what is finite."""


@dataclass
class _Tied:
    """Tensors [N, C, ..] whose channels are filled up together, and what has to be changed for that."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    writers: dict[str, Node] = field(default_factory=dict)
    """Convs, by name; depthwise ones are both writers and readers."""
    readers: dict[str, Node] = field(default_factory=dict)
    constants: dict[str, tuple[Node, int]] = field(default_factory=dict)
    """Which input of which node is a constant per channel."""


def fill_channels(graph: Graph, multiple: int) -> None:
    """Fill the channels of depthwise Convs with stored weights up to a multiple, in place, before quantizers are lowered."""
    results = {t.name for t in graph.outputs}
    for conv in [node for node in graph.nodes if node.op == "Conv" and is_depthwise(node)]:
        if not any(maker.attrs.get("granularity") == "static" for maker in conv.inputs[0].inputs):
            continue
        channels = _codes(conv).shape[0]
        if channels % multiple and (tied := _search(conv, channels, results)) is not None:
            _fill(tied, channels, -channels % multiple)


def is_depthwise(conv: Node) -> bool:
    """Whether every channel of a Conv with constant weights is made of the same channel of its input alone."""
    shape = _codes(conv).shape
    return len(shape) > 2 and shape[1] == 1 and conv.attrs.get("group", 1) == shape[0] > 1


def _codes(conv: Node) -> np.ndarray:
    """The weight of a Conv, stored or as it is; empty where it is none of both."""
    stored = weight_codes(conv)
    source = conv.inputs[1] if stored is None else stored.inputs[0]
    return source.values if isinstance(source, Constant) else np.zeros(0)


def weight_codes(node: Node) -> Node | None:
    """The abstract Dequantize that makes the node's weight."""
    makers = node.inputs[1].inputs
    return makers[0] if len(makers) == 1 and makers[0].op == "Dequantize" and makers[0].domain == DOMAIN else None


def _search(start: Node, channels: int, results: set[str]) -> _Tied | None:
    """What is tied to the channels of a depthwise Conv; None where it cannot be filled up."""
    tied, todo = _Tied(), [start.inputs[0], start.outputs[0]]
    while todo:
        tensor = todo.pop()
        if tensor.name in tied.tensors:
            continue
        known = len(tensor.shape or ()) < 2 or tensor.shape[1] in (channels, None) or isinstance(tensor.shape[1], str)
        if tensor.name in results or len(tensor.inputs) != 1 or not known:
            return None
        tied.tensors[tensor.name] = tensor
        for node in (*tensor.inputs, *tensor.outputs):
            more = _conv(tied, node, tensor) if node.op == "Conv" else _around(tied, node, channels)
            if more is None:
                return None
            todo += more
    return tied


def _conv(tied: _Tied, conv: Node, tensor: Tensor) -> list[Tensor] | None:
    """What a Conv that makes or reads the tensor ties to it."""
    bias = conv.inputs[2:3]
    if not _codes(conv).size or len(conv.inputs[1].outputs) > 1 or not all(isinstance(t, Constant) for t in bias):
        return None
    if is_depthwise(conv):
        tied.writers[conv.name] = tied.readers[conv.name] = conv
        return [conv.inputs[0], conv.outputs[0]]
    (tied.readers if tensor is conv.inputs[0] else tied.writers)[conv.name] = conv
    return [] if conv.attrs.get("group", 1) == 1 else None


def _around(tied: _Tied, node: Node, channels: int) -> list[Tensor] | None:
    """What any other operator ties to what it makes or reads."""
    if node.op not in _PASSING or node.attrs.get("granularity") == "token" or len(node.outputs) != 1:
        return None
    y, around = node.outputs[0], list(node.outputs)
    for index, tensor in enumerate(node.inputs):
        if not isinstance(tensor, Constant):
            around += [] if tensor.is_empty() else [tensor]
        elif tensor.values.size > 1:
            rank, shape = len(y.shape or ()), tensor.values.shape
            if rank < 2 or len(shape) < rank - 1 or shape[1 - rank] != channels:
                return None
            tied.constants[f"{node.name}:{index}"] = (node, index)
    return around


def _fill(tied: _Tied, channels: int, lacking: int) -> None:
    for tensor in tied.tensors.values():
        if tensor.shape and len(tensor.shape) > 1:
            tensor.shape = [tensor.shape[0], channels + lacking, *tensor.shape[2:]]
    for node, index in tied.constants.values():
        rank = len(node.outputs[0].shape)
        node.inputs[index] = _longer(node.inputs[index], lacking, len(node.inputs[index].values.shape) + 1 - rank)
    for name, conv in {**tied.writers, **tied.readers}.items():
        stored, writes, reads = weight_codes(conv), name in tied.writers, name in tied.readers and not is_depthwise(conv)
        owner, at = (conv, 1) if stored is None else (stored, 0)
        if is_depthwise(conv):
            conv.attrs["group"] = channels + lacking
        for axis in [axis for axis, is_filled in enumerate((writes, reads)) if is_filled]:
            owner.inputs[at] = _longer(owner.inputs[at], lacking, axis)
        if writes and stored is not None and stored.inputs[1].values.ndim:
            stored.inputs[1] = _longer(stored.inputs[1], lacking, 0, 1.0)
        if writes and len(conv.inputs) > 2:
            conv.inputs[2] = _longer(conv.inputs[2], lacking, 0)
        if stored is not None:
            conv.inputs[1].shape = None


def _longer(constant: Tensor, lacking: int, axis: int, value: float = 0.0) -> Constant:
    """The constant with more entries along an axis."""
    values = constant.values
    widths = [(0, lacking if at == axis else 0) for at in range(values.ndim)]
    return Constant(constant.name, np.pad(values, widths, constant_values=value))
