"""ConvTranspose as a Conv that makes what lies between two positions as channels, and moves them there.

    y[s u + r] = sum_j x[u - j] w[r + s j]        0 <= r < s the stride, j < J, k = J s values under the kernel

One Conv of J values makes all y of one u, in s C channels; what the pads leave out is left out by its own pads and by a Slice.
Along one axis the channels are moved by Reshape, Transpose and Reshape, along two by DepthToSpace. No runtime but OpenVINO and
TensorRT has an integer kernel for ConvTranspose; every one has for Conv.

Limits: one or two axes, with one stride and a kernel of two strides or more; no groups and dilations; 16 channels or more, for
with fewer the moves take what the kernel saves.
"""

from collections.abc import Collection

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
    x, weight, bias, attrs = node.inputs[0], node.inputs[1], input_at(node, 2), node.attrs
    if not isinstance(weight, gs.Constant) or not isinstance(bias, gs.Constant | None):
        return False
    axes, channels = len(weight.shape) - 2, weight.shape[1]
    strides, dilations = (set(attrs.get(name) or [1]) for name in ("strides", "dilations"))
    (stride, *others), kernel = strides, weight.shape[2:]
    is_plain = attrs.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in attrs and attrs.get("group", 1) == 1
    if not is_plain or others or dilations != {1} or axes > 2 or channels < LEAST:
        return False
    pads, more = attrs.get("pads") or [0] * 2 * axes, attrs.get("output_padding") or [0] * axes
    first, last = pads[:axes], [end - extra for end, extra in zip(pads[axes:], more, strict=True)]
    reach = [k // stride for k in kernel]
    padded = [j - 1 - p // stride for j, p in zip(reach * 2, [*first, *last], strict=True)]
    if any(k % stride or k < 2 * stride for k in kernel) or min(padded) < 0:
        return False

    # [in, out, J, s, (J, s)], with J turned around, becomes [(s, s), out, in, J, (J)]
    split = weight.values.reshape(*weight.shape[:2], *(n for j in reach for n in (j, stride)))
    turned = np.flip(split, tuple(2 + 2 * axis for axis in range(axes)))
    turned = turned.transpose(*(3 + 2 * axis for axis in range(axes)), 1, 0, *(2 + 2 * axis for axis in range(axes)))
    turned = np.ascontiguousarray(turned.reshape(stride**axes * channels, weight.shape[0], *reach))
    inputs = [x, gs.Constant(f"{weight.name}/phases", keep(turned, weight.values))]
    if bias is not None:
        inputs.append(gs.Constant(f"{bias.name}/phases", np.tile(bias.values, stride**axes)))
    end, act = node.outputs[0], _activation(graph, node)
    new = Nodes(node.name)
    y = new("Conv", "phases", *inputs, kernel_shape=reach, pads=padded)
    new.made[0].name = node.name
    if act is not None:
        y, end = new(act.op, "activated", y, *act.inputs[1:], **act.attrs), act.outputs[0]
        new.made[-1].name = act.name
    if axes == 2 and stride > 1:
        y = new("DepthToSpace", "whole", y, blocksize=stride)
    elif stride > 1:
        shapes = [
            gs.Constant(f"{node.name}/{n}-axes", np.array(a))
            for n, a in ((4, [0, stride, channels, -1]), (3, [0, channels, -1]))
        ]
        y = new("Transpose", "turned", new("Reshape", "apart", y, shapes[0]), perm=[0, 2, 3, 1])
        y = Nodes(f"{node.name}/whole", new.made)("Reshape", "joined", y, shapes[1])
    cuts = [p % stride for p in first], [-(p % stride) or END for p in last]
    if any(cuts[0]) or min(cuts[1]) < 0:
        bounds = zip(("from", "to", "along"), (*cuts, range(2, 2 + axes)), strict=True)
        new("Slice", "cut", y, *(gs.Constant(f"{node.name}/{key}", np.array(ends, np.int64)) for key, ends in bounds))
    insert_before(graph, node, new.made)
    for replaced in (node, *(() if act is None else (act,))):
        remove(graph, replaced)
    new.made[-1].outputs[0] = end
    return True


def _activation(graph: gs.Graph, node: gs.Node) -> gs.Node | None:
    """The activation that alone reads the result, which then stands in front of the moves."""
    y = node.outputs[0]
    is_read = len(y.outputs) == 1 and not any(t is y for t in graph.outputs)
    return y.outputs[0] if is_read and is_op(y.outputs[0], "LeakyRelu", "Relu") else None
