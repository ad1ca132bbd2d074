"""Taking a method out of a finished graph again: its nodes by their names, what it folded into constants by the record.

A node that belongs to a method carries the prefix `{place}/{method}/`. Such nodes make, from one value of the rest of the
graph, the value that takes its place; without them the first stands there again, under its own name.
"""

import base64
import io
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError
from onnxcomp.graph.edit import replace_uses
from onnxcomp.graph.tidy import Fold

_OF_QUANTIZER = (".scale", ".zero_point", "/a", "/b")
"""What the constants of a quantizer are called after it."""


def dump_folds(folds: Sequence[Fold]) -> str:
    """The record as text. What was added to a bias is stored only where it took in more than one thing."""
    places = [(f.node, f.index) for f in folds]
    arrays = {"folds": np.array(json.dumps([[f.node, f.index, f.method, f.name] for f in folds]))}
    for number, fold in enumerate(folds):
        if fold.before is not None:
            arrays[f"before{number}"] = fold.before
        if not fold.node or places.count((fold.node, fold.index)) > 1:
            arrays[f"added{number}"] = fold.added
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return base64.b64encode(zlib.compress(stream.getvalue(), 9)).decode("ascii")


def load_folds(text: str) -> list[Fold]:
    """The record that `dump_folds` wrote."""
    arrays = np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False)
    heads = json.loads(str(arrays["folds"]))
    return [
        Fold(*head, before=arrays.get(f"before{number}"), added=arrays.get(f"added{number}", np.zeros(0)))
        for number, head in enumerate(heads)
    ]


def strip(graph: gs.Graph, prefixes: Collection[str], folds: Sequence[Fold], methods: Collection[str]) -> list[Fold]:
    """Take the nodes with one of `prefixes`, and what `methods` folded, out of `graph`, in place; the folds that stay.

    Raises ModelError for nodes that stand in place of what was there, instead of adding to it.
    """
    for prefix in prefixes:
        _bypass(graph, prefix, tuple(prefixes))
    tensors = graph.tensors()
    for fold in folds:
        if not fold.node and fold.method in methods:
            _restore(tensors, fold)
    for key in dict.fromkeys((f.node, f.index) for f in folds if f.node and f.method in methods):
        _unfold(graph, [f for f in folds if (f.node, f.index) == key], methods)
    for tensor in graph.tensors().values():
        for method in methods:
            tensor.name = tensor.name.removesuffix(f"/with-{method}").replace(f"/before-{method}/", "/")
    graph.cleanup(remove_unused_node_outputs=False)
    first = {(f.node, f.index): f for f in reversed(folds)}
    kept = [f for f in folds if f.method not in methods]
    return [replace(f, name=first[f.node, f.index].name, before=first[f.node, f.index].before) if f.node else f for f in kept]


def _restore(tensors: Mapping[str, gs.Tensor], fold: Fold) -> None:
    """Give the quantizer whose constants are called after the fold the range that it had before, signed or not."""
    scale, zero, *ends = (tensors[name] for name in (f"{fold.name}{part}" for part in _OF_QUANTIZER) if name in tensors)
    assert fold.before is not None, "a range has been there before"
    for end in ends:  # bounds of values are whole steps from zero
        end.values = ((np.rint(end.values / scale.values) + fold.added) * fold.before).astype(end.values.dtype)
    zero.values = (zero.values - fold.added).astype(zero.values.dtype)
    scale.values = fold.before.astype(scale.values.dtype)


def _bypass(graph: gs.Graph, prefix: str, leaving: tuple[str, ...]) -> None:
    """Let what reads the nodes under `prefix` read the one value that they start from. `leaving`: all such prefixes."""
    place, label = prefix.rstrip("/").rsplit("/", 1)
    mine = [node for node in graph.nodes if node.name.startswith(prefix)]
    inside = {id(node) for node in mine}
    results = {id(t) for t in graph.outputs}
    for node in mine:
        y = node.outputs[0]
        if id(y) in results or any(id(reader) not in inside for reader in y.outputs):
            source, adds = _source(node, inside)
            if not adds and not all(reader.name.startswith(leaving) for reader in y.outputs):
                text = f"{place}: {label} merged what it adds into one tensor with what was there, so it cannot be taken out."
                raise ModelError(f"{text} Quantize the float model again without {label}.")
            _replace(graph, y, source, rename=f"/before-{label}" in source.name)


def _replace(graph: gs.Graph, tensor: gs.Tensor, source: gs.Tensor, *, rename: bool) -> None:
    """Let what reads `tensor` read `source`; with `rename` under its name, with its type and shape."""
    replace_uses(tensor, source)
    if rename:
        source.name, tensor.name = tensor.name, f"{source.name}-removed"
        source.dtype, source.shape = tensor.dtype, tensor.shape
    graph.outputs[:] = [source if t is tensor else t for t in graph.outputs]


def _source(node: gs.Node, inside: Collection[int]) -> tuple[gs.Tensor, bool]:
    """What the method's last node, or the quantizer behind it, starts from: its first input, and so on back to the outside;
    and whether anything is added to it on the way.
    """
    tensor, adds = node.outputs[0], False
    while tensor.inputs and id(tensor.inputs[0]) in inside:
        adds |= tensor.inputs[0].op in ("Add", "Sum")
        tensor = tensor.inputs[0].inputs[0]
    return tensor, adds


def _unfold(graph: gs.Graph, folds: Sequence[Fold], methods: Collection[str]) -> None:
    """Give one constant the values that it has without `methods`, in whatever form the target wrote it down."""
    first = folds[0]
    kept = [f for f in folds if f.method not in methods]
    values = None if first.before is None else first.before.astype(np.float64)
    for fold in kept:
        values = (fold.added if values is None else values + fold.added).astype(np.float32).astype(np.float64)
    node, index = _home(graph, first)
    tensor = node.inputs[index]
    if values is not None and isinstance(tensor, gs.Constant):
        node.inputs[index] = gs.Constant(first.name or tensor.name, values.astype(tensor.dtype))
    elif values is not None:
        stored, (x, w) = tensor.inputs[0], (t.inputs[0].inputs[1].values.astype(np.float64) for t in node.inputs[:2])
        step = (x * w).astype(np.float32)  # the range may be another now
        for at, found in enumerate((np.rint(values / step).astype(np.int32), step)):
            stored.inputs[at] = gs.Constant(stored.inputs[at].name, found)
    elif node.name == first.node:
        del node.inputs[index]
    else:  # an operator that was put there for the bias alone
        _replace(graph, node.outputs[0], node.inputs[1 - index], rename=True)


def _home(graph: gs.Graph, fold: Fold) -> tuple[gs.Node, int]:
    """The node that adds the constant, and which input it is: a target may have split the bias off a Gemm, and another
    method may have put a table beside it.
    """
    node, index = next(n for n in graph.nodes if n.name == fold.node), fold.index
    if node.op.startswith("MatMul"):
        index = 1
        while node.op not in ("Add", "Sum"):
            node = node.outputs[0].outputs[0]
    if any(maker.op in ("Add", "Sum") for maker in node.inputs[index].inputs):
        node = node.inputs[index].inputs[0]
        index = next(i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant))
    return node, index
