"""Residual streams: tensors whose channels may be rotated together, found by what makes and what reads them.

A stream is closed under addition and under operators that move tokens but not channels. Constants, embedding tables,
Conv, Gemm and MatMul write to it; norms read it, and so do Gemm and MatMul. What a norm gives is read by layers alone,
into whose weights its scale and shift go. RMS norms in primitive operators are seen through: the mean of squares and the
mean of a row are what they were when the stream is rotated by R with R 1 = 1, and what has one value per token commutes.

Channels are taken to lie on the last axis (of a Conv's output, the first behind the batch): no shape says so where it is
computed at run time, and the caller proves the result by running it.

Limits: post-norm networks (the norm's own output is added to the stream), streams that are an output of the model, and
any operator that is not named here end the search with a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.fold import input_at, is_op
from onnxcomp.graph.mapped import keep
from onnxcomp.graph.offsets import MOVES, Trace, lengths, moved, trace_channels, way_back
from onnxcomp.graph.sites import LAYER_OPS, Site

_MOVES = (*MOVES, "Concat", "Expand")
_MEANS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
Place = tuple[gs.Node, int, int]
"""A constant of the graph: its reader, the input it is there, and its axis that runs over the stream's channels."""


@dataclass
class Stream:
    """One residual stream. `refusal` says why it cannot be rotated; empty where it can."""

    width: int
    """Channels d."""
    written: list[Place] = field(default_factory=list)
    """The constants that the stream is made of: weights and biases of layers, tables, tokens, positions."""
    read: list[gs.Node] = field(default_factory=list)
    """The layers that read it as it is."""
    norms: list[tuple[gs.Node, list[gs.Node]]] = field(default_factory=list)
    """The norms and the layers that read each: LayerNormalization nodes, or the Mul with the scale of an RMS norm."""
    refusal: str = ""


def find_streams(graph: gs.Graph) -> list[Stream]:
    """The residual streams of the main graph that a norm reads, in graph order."""
    found: list[Stream] = []
    seen: set[int] = set()
    for node in graph.nodes:
        x = node.inputs[0] if _is_layer_norm(node) or _is_squares(node) else None
        if x is not None and id(x) not in seen and x.shape and isinstance(x.shape[-1], int):
            found.append(Stream(int(x.shape[-1])))
            seen |= _Search(graph, found[-1]).run(x)
    return found


def _is_layer_norm(node: gs.Node) -> bool:
    """Whether the node normalizes each token of its first input."""
    last = (-1, len(node.inputs[0].shape or ()) - 1) if node.inputs else ()
    return is_op(node, "LayerNormalization") and node.attrs.get("axis", -1) in last and len(node.outputs) == 1


def _is_mean(node: gs.Node) -> bool:
    """Whether the node reduces the channels of each token to one value."""
    axes = input_at(node, 1) if is_op(node, *_MEANS) and node.attrs.get("keepdims", 1) else None
    return isinstance(axes, gs.Constant) and axes.values.tolist() in ([-1], [len(node.inputs[0].shape or ()) - 1])


def _is_token_mean(node: gs.Node) -> bool:
    """Whether the node averages over tokens, each channel for itself."""
    axes, rank = input_at(node, 1) if is_op(node, "ReduceMean") else None, len(node.inputs[0].shape or ()) if node.inputs else 0
    return isinstance(axes, gs.Constant) and rank > 0 and all(axis % rank != rank - 1 for axis in axes.values.tolist())


def _is_squares(node: gs.Node) -> bool:
    """Whether the node squares its input, and the mean over channels is all that is asked for."""
    squares = is_op(node, "Mul") and node.inputs[0] is node.inputs[1]
    if is_op(node, "Pow") and isinstance(node.inputs[1], gs.Constant):
        squares = node.inputs[1].values.tolist() in (2, [2])
    return squares and all(_is_mean(reader) for reader in node.outputs[0].outputs)


def _is_scale(node: gs.Node) -> bool:
    """Whether the node multiplies channels with a constant [d], as an RMS norm does at its end."""
    sizes = [(t.values.size, t.values.shape) for t in node.inputs if isinstance(t, gs.Constant)]
    return is_op(node, "Mul") and len(sizes) == 1 and sizes[0][0] > 1 and sizes[0][0] == sizes[0][1][-1]


def _is_scaled(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether the node changes each token of `tensor` by one value: x * s, x / s, x - m."""
    if not is_op(node, "Mul", "Div", "Sub") or (node.op != "Mul" and node.inputs[0] is not tensor):
        return False
    others = [t for t in node.inputs if t is not tensor]
    sizes = [t.values.size if isinstance(t, gs.Constant) else (t.shape or [0])[-1] for t in others]
    return sizes == [1]


class _RefusedError(Exception):
    """The stream cannot be rotated; the message is the reason."""


class _Search:
    """The walk from one tensor of a stream to all of it."""

    def __init__(self, graph: gs.Graph, stream: Stream) -> None:
        self.stream, self.outputs = stream, {id(t) for t in graph.outputs}
        self.seen: set[int] = set()
        self.todo: list[gs.Tensor] = []

    def run(self, start: gs.Tensor) -> set[int]:
        """Fill in the stream; return the identities of its tensors."""
        self._join(start)
        try:
            while self.todo:
                tensor = self.todo.pop()
                if id(tensor) in self.outputs:
                    raise _RefusedError(f"'{tensor.name}' is an output of the model")
                if tensor.shape and isinstance(tensor.shape[-1], int) and self.stream.width not in tensor.shape:
                    raise _RefusedError(f"'{tensor.name}' has other channels")
                if not tensor.inputs:
                    raise _RefusedError(f"'{tensor.name}' is an input of the model")
                self._made(tensor.inputs[0])
                for node in tensor.outputs:
                    self._reads(node, tensor)
        except _RefusedError as refused:
            self.stream.refusal = str(refused)
        return self.seen

    def _join(self, *tensors: gs.Tensor) -> None:
        fresh = [t for t in tensors if id(t) not in self.seen]
        self.seen |= {id(t) for t in fresh}
        self.todo += fresh

    def _write(self, node: gs.Node, index: int, axis: int = -1) -> None:
        constant = input_at(node, index)
        if constant is None:
            return
        known = isinstance(constant, gs.Constant) and constant.values.ndim > 0
        if not known or constant.values.shape[axis] != self.stream.width:
            raise _RefusedError(f"{node.name}: '{constant.name}' does not hold {self.stream.width} channels")
        self.stream.written.append((node, index, axis))

    def _made(self, node: gs.Node) -> None:
        """What the stream is made by."""
        if is_op(node, *LAYER_OPS) and isinstance(node.inputs[1], gs.Constant):
            if node.attrs.get("transB", 0) or (node.op == "Conv" and node.attrs.get("group", 1) != 1):
                raise _RefusedError(f"{node.name} writes to it group by group")
            self._write(node, 1, 0 if node.op == "Conv" else -1)
            self._write(node, 2)
        elif is_op(node, "Add", "Sum", *_MOVES):
            for index, tensor in enumerate(node.inputs if is_op(node, "Add", "Sum", "Concat") else node.inputs[:1]):
                if isinstance(tensor, gs.Constant):  # of a Gather or an Expand, the table
                    self._write(node, index)
                else:
                    self._join(tensor)
        elif _is_token_mean(node):
            self._join(node.inputs[0])
        elif (scaled := next((t for t in node.inputs if _is_scaled(node, t)), None)) is not None:
            self._join(scaled)
        else:
            raise _RefusedError(f"{node.name} ({node.op}) writes to it")

    def _reads(self, node: gs.Node, tensor: gs.Tensor) -> None:
        """What reads a tensor of the stream."""
        index = next(i for i, t in enumerate(node.inputs) if t is tensor)
        if (_is_layer_norm(node) and index == 0) or _is_scale(node):
            self.stream.norms.append((node, self._layers(node, node.outputs[0])))
        elif is_op(node, "Gemm", "MatMul") and index == 0 and isinstance(node.inputs[1], gs.Constant):
            self.stream.read.append(node)
        elif is_op(node, "Shape", "Size") or _is_mean(node) or _is_squares(node):
            return
        elif is_op(node, "Add", "Sum", *_MOVES) or _is_scaled(node, tensor) or _is_token_mean(node):
            self._join(*node.outputs)
        else:
            raise _RefusedError(f"{node.name} ({node.op}) reads it")

    def _layers(self, norm: gs.Node, normed: gs.Tensor) -> list[gs.Node]:
        """The layers that read what a norm gives, its tokens moved or not."""
        if id(normed) in self.outputs:
            raise _RefusedError(f"{norm.name}: what the norm gives is an output of the model")
        found: list[gs.Node] = []
        for node in normed.outputs:
            if is_op(node, "Gemm", "MatMul") and node.inputs[0] is normed and isinstance(node.inputs[1], gs.Constant):
                found.append(node)
            elif is_op(node, *_MOVES) and node.inputs[0] is normed and not is_op(node, "Concat"):
                found += [layer for t in node.outputs for layer in self._layers(norm, t)]
            elif not is_op(node, "Shape", "Size"):
                raise _RefusedError(f"{norm.name}: what the norm gives is read by {node.name} ({node.op}), not by layers alone")
        return found


@dataclass(frozen=True)
class Heads:
    """The attention heads between the layer that makes values and the projection that reads them."""

    value: Site
    projection: Site
    channels: np.ndarray
    """Output channels of `value` [heads, channels of a head]."""
    rows: np.ndarray
    """Rows of the projection's weight that read them, in the same order."""


def find_heads(graph: gs.Graph, sites: Sequence[Site], trace: Trace) -> list[Heads]:
    """The heads of every attention whose values go from one layer to one other by moves and the product with a Softmax."""
    nodes, made_by = {node.name: node for node in graph.nodes}, {s.y: s for s in sites if s.kind == "layer" and s.op != "Conv"}
    found = []
    for site in made_by.values():
        reader = nodes[site.name]
        way = way_back(reader.inputs[0])
        value = made_by.get(way[0].name)
        products = [t for t in way if t.outputs and any(is_op(n, "MatMul") and moved(n) is t for n in t.outputs)]
        if value is None or len(products) != 1 or not way[0].shape or not isinstance(way[0].shape[-1], int):
            continue
        numbers = np.broadcast_to(np.arange(way[0].shape[-1], dtype=np.float32), lengths(way[0]))
        known = trace_channels(graph, way, numbers, reader, trace)
        if known is None:
            continue
        width = known[products[0].name].shape[-1]
        heads = np.unique(known[products[0].name].reshape(-1, width), axis=0).astype(int)
        rows = known[way[-1].name].reshape(-1, known[way[-1].name].shape[-1])
        place = {int(channel): row for row, channel in enumerate(rows[0])}
        if len(place) == rows.shape[1] == heads.size and (rows == rows[0]).all():
            found.append(Heads(value, site, heads, np.vectorize(place.__getitem__)(heads)))
    return found


def set_constant(node: gs.Node, index: int, values: np.ndarray) -> None:
    """Give the node a constant of its own, float32, as its input at this place."""
    old = node.inputs[index]
    name = old.name if len(old.outputs) == 1 else f"{node.name}/{old.name}"
    node.inputs[index] = gs.Constant(name, keep(np.ascontiguousarray(values, np.float32), old.values))
