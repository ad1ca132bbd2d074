"""ConvTranspose as a Conv that makes what lies between two positions as channels, and moves them there.

    y[s u + r] = sum_j x[u - j] w[r + s j]        0 <= r < s the stride, j < J, k = J s values under the kernel

One Conv of J values makes all y of one u, in s C channels; what the pads leave out is left out by its own pads and by a Slice.
Along one axis the channels are moved by Reshape, Transpose and Reshape, along two by DepthToSpace. No runtime but OpenVINO and
TensorRT has an integer kernel for ConvTranspose; every one has for Conv.

Limits: one or two axes, with one stride and a kernel of two strides or more; no groups and dilations; 16 channels or more, for
with fewer the moves take what the kernel saves. What makes a result of the model stays, for that would be codes.
"""

from collections.abc import Collection, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import Nodes, insert_before, remove
from onnxcomp.graph.fold import input_at, is_op
from onnxcomp.graph.mapped import keep

LEAST = 16
"""Channels."""
END = np.iinfo(np.int64).max


def write_convs(graph: gs.Graph, names: Collection[str]) -> int:
    """Write these ConvTransposes of `graph` as Convs of the same names, in place, where that is possible; how many were."""
    asked = [node for node in graph.nodes if node.name in names and is_op(node, "ConvTranspose")]
    return sum(_write(graph, node) for node in asked)


def _write(graph: gs.Graph, node: gs.Node) -> bool:
    x, weight, bias, attrs, act = node.inputs[0], node.inputs[1], input_at(node, 2), node.attrs, _activation(graph, node)
    if not isinstance(weight, gs.Constant) or not isinstance(bias, gs.Constant | None):
        return False
    channels, kernel, end = weight.shape[1], weight.shape[2:], (act or node).outputs[0]
    axes, is_result = len(kernel), any(t is end for t in graph.outputs)
    strides, dilations = (set(attrs.get(name) or [1]) for name in ("strides", "dilations"))
    is_plain = attrs.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in attrs and attrs.get("group", 1) == 1
    if not is_plain or is_result or len(strides) > 1 or dilations != {1} or axes > 2 or channels < LEAST:
        return False
    (stride,), pads = strides, attrs.get("pads") or [0] * 2 * axes
    longer = attrs.get("output_padding") or [0] * axes
    ends = [*pads[:axes], *(p - more for p, more in zip(pads[axes:], longer, strict=True))]
    padded = [k // stride - 1 - p // stride for k, p in zip([*kernel, *kernel], ends, strict=True)]
    if any(k % stride or k < 2 * stride for k in kernel) or min(padded) < 0:
        return False

    new, phases = Nodes(node.name), _phases(weight.values, stride)
    inputs = [x, gs.Constant(f"{node.name}.weight", keep(phases, weight.values))]
    if bias is not None:
        inputs.append(gs.Constant(f"{node.name}.bias", np.tile(bias.values, stride**axes)))
    y = new("Conv", "phases", *inputs, kernel_shape=[*phases.shape[2:]], pads=padded)
    new.made[0].name = node.name
    if act is not None:
        y = new(act.op, "activated", y, *act.inputs[1:], **act.attrs)
        new.made[-1].name = act.name
    _move(new, y, stride, channels, [p % stride for p in ends])
    insert_before(graph, node, new.made)
    for replaced in (node, *(() if act is None else (act,))):
        remove(graph, replaced)
    new.made[-1].outputs[0] = end
    return True


def _phases(w: np.ndarray, stride: int) -> np.ndarray:
    """The weight [in, out, J s, (J s)] as that of the Conv, [(s, s,) out, in, J, (J)], with J turned around."""
    axes = range(w.ndim - 2)
    split = w.reshape(*w.shape[:2], *(n for k in w.shape[2:] for n in (k // stride, stride)))
    turned = np.flip(split, tuple(2 + 2 * axis for axis in axes))
    turned = turned.transpose(*(3 + 2 * axis for axis in axes), 1, 0, *(2 + 2 * axis for axis in axes))
    return np.ascontiguousarray(turned.reshape(-1, w.shape[0], *(k // stride for k in w.shape[2:])))


def _move(new: Nodes, y: gs.Tensor, stride: int, channels: int, cut: Sequence[int]) -> None:
    """Move the phases to their positions, of which so many are `cut` off at the beginnings and the ends of the axes."""

    def constant(key: str, numbers: Sequence[int]) -> gs.Constant:
        return gs.Constant(f"{new.name}/{key}", np.array(numbers, np.int64))

    axes = len(cut) // 2
    if axes == 2 and stride > 1:
        y = new("DepthToSpace", "whole", y, blocksize=stride)
    elif stride > 1:
        apart = new("Reshape", "apart", y, constant("phases-shape", [0, stride, channels, -1]))
        turned, whole = new("Transpose", "turned", apart, perm=[0, 2, 3, 1]), Nodes(f"{new.name}/whole", new.made)
        y = whole("Reshape", "joined", turned, constant("whole-shape", [0, channels, -1]))
    if any(cut):
        last = [-p or END for p in cut[axes:]]
        new("Slice", "cut", y, constant("from", cut[:axes]), constant("to", last), constant("axes", range(2, 2 + axes)))


def _activation(graph: gs.Graph, node: gs.Node) -> gs.Node | None:
    """The activation that alone reads the result, which then stands in front of the moves."""
    y = node.outputs[0]
    is_read = len(y.outputs) == 1 and not any(t is y for t in graph.outputs)
    return y.outputs[0] if is_read and is_op(y.outputs[0], "LeakyRelu", "Relu") else None
