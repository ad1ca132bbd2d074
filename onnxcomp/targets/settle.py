"""What ONNX Runtime needs around quantizers and products, so that it keeps them integer kernels.

Every rule was read from the runtime's optimized models, and the tests probe it: `Sum` is never fused into a float Gemm,
`Add` is as soon as shapes are known; a ReLU in front of a quantizer disappears where the zero point is the smallest code.
"""

from __future__ import annotations

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Node, Tensor, Variable, insert_after, remove
from onnxcomp.graph.tidy import is_load_time
from onnxcomp.targets.regions import clip_bounds


def settle(graph: Graph) -> None:
    """Bring what stands around the quantizers and products of a lowered `graph` into the form that keeps them integer kernels.
    Doing it twice changes nothing: it is done again where operators were taken out.
    """
    for node in list(graph.nodes):
        if node.op == "QuantizeLinear" and all(isinstance(t, Constant) for t in node.inputs[1:]):
            _absorb(graph, node)
        if node.op == "MatMul" and is_load_time(node.inputs[1]) and any(t.inputs for t in node.inputs[1:]):
            _keep_integer(graph, node)
        if node.op in ("Conv", "Gemm") and _would_be_quantized(node):
            put_behind(graph, node, "Sum", "float")


def _absorb(graph: Graph, quantize: Node) -> None:
    """Drop the Relu or Clip in front of a static quantizer where its bounds lie outside the codes' range."""
    x, scale, zero_point = quantize.inputs
    if len(x.inputs) != 1 or len(x.outputs) != 1 or any(t is x for t in graph.outputs):
        return
    clip, reader = x.inputs[0], quantize.outputs[0].outputs[0]
    if clip.op not in ("Relu", "Clip") or any(isinstance(t, Variable) and not t.is_empty() for t in clip.inputs[1:]):
        return
    step, zero, codes = float(scale.values), int(zero_point.values), np.iinfo(zero_point.dtype)
    smallest, largest = (codes.min, codes.max) if reader.op != "Clip" else (int(t.values) for t in reader.inputs[1:3])
    low, high = clip_bounds(clip)
    if low is not None and (smallest - zero) * step < low:
        return
    # The largest code may exceed the bound by a rounding of its scale: no value in between has another code.
    if high is not None and (largest - zero) * step > high * (1 + 1e-6):
        return
    quantize.inputs[0] = clip.inputs[0]
    remove(graph, clip)
    if not x.name.endswith("/before-quantize"):
        dequantize = reader if reader.op != "Clip" else reader.outputs[0].outputs[0]
        dequantize.outputs[0].name = x.name  # the tensor's name goes on naming its best approximation


def _keep_integer(graph: Graph, node: Node) -> None:
    """Keep the runtime from fusing a product of quantized operands with what reads it into a float operator: an Add
    becomes a Sum, and in front of a ReLU, or of several readers, stands a Sum of one.
    """
    reader = first = only_reader(node.outputs[0])
    while reader is not None and reader.op in ("Add", "Sum", "Mul") and reader.outputs[0].outputs:
        if reader.op == "Add" or (reader.op == "Sum" and any(is_load_time(t) for t in reader.inputs)):
            reader.op = "Sum"
            return
        reader = only_reader(reader.outputs[0])
    if first is not None and first.op == "Add":
        first.op = "Sum"
    elif node.outputs[0].outputs and (first is None or first.op in ("Relu", "Clip")):
        put_behind(graph, node, "Sum", "product")


def _would_be_quantized(node: Node) -> bool:
    """Whether the runtime would take a float layer between integers, weight per tensor, for one that should be integer."""
    reader = only_reader(node.outputs[0])
    if reader is not None and reader.op in ("Relu", "Clip"):
        reader = only_reader(reader.outputs[0])
    is_float = isinstance(node.inputs[1], Constant) and any(n.op == "DequantizeLinear" for n in node.inputs[0].inputs)
    return is_float and reader is not None and reader.op == "QuantizeLinear"


def put_behind(graph: Graph, node: Node, op: str, suffix: str, *others: Tensor, name: str = "") -> None:
    """Let an operator on what `node` makes, and on `others`, make it in its place; `suffix` names the value before."""
    y = node.outputs[0]
    node.outputs[0] = Variable(f"{y.name}/{suffix}", dtype=y.dtype)
    new = Node(op, name or f"{node.name}/{op}", inputs=[node.outputs[0], *others], outputs=[y])
    insert_after(graph, node, [new])


def only_reader(tensor: Tensor) -> Node | None:
    """The only node that reads `tensor`."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 else None
