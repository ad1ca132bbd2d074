"""Rotation: an equal float model whose channels are mixed by an orthogonal R, so that no outlier decides a range.

    stream    x -> x R: writers W R, b R; readers R W; behind a norm R diag(g) W and b + B W   (LayerNorm scale g, shift B)
    values    V -> V R_h per attention head, R_h W of the projection behind: rows of a Softmax sum over tokens alone
    inputs    x -> x R_w in groups of w channels in front of a layer, R_w W behind: one small MatMul at run time

Paper   QuaRot (arXiv:2404.00456, section 4), with R 1 = 1 so that LayerNormalization stays one fused node.
Cost    stream and values: nothing at run time. Inputs: 64 multiplications per value, 8 % of ViT-Ti's time for all its fc2.
Gate    the rotated model must equal the float one to 90 dB on a sample. Inputs: where that lowers the quantizer's error.
Limits  see `graph.streams`; inputs of MatMul and Gemm behind an activation, in groups of the largest power of two up to 64.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Constant, Graph, Node, Tape, apply, detach, extract, replace_uses
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.selection import compared
from onnxcomp.graph.sites import Site, find_sites
from onnxcomp.graph.streams import Heads, Stream, find_heads, find_streams, set_constant
from onnxcomp.graph.tidy import add_to_output
from onnxcomp.methods.activations import fake
from onnxcomp.methods.base import Array, Outcome, least_gain_db
from onnxcomp.numerics.affine import Scheme
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.rotation import rotate, rotation
from onnxcomp.numerics.statistics import Histogram
from onnxcomp.runtime import Session

EQUAL_DB = 90.0
"""SQNR from which a rotated model counts as equal to the float one."""
GROUP = 64
"""Channels that are mixed with one another in front of a layer: 64 gain 0.7 dB more on ViT-Ti than 16."""
INPUT_GAIN_DB, INPUT_ENOUGH_DB = 1.0, 16.0
"""Fall of a 4-bit quantizer's error from which mixing a layer's input is worth its time, and of any quantizer's."""
ROWS = 512
"""Rows of an input that are looked at, about."""
_ACTIVATIONS = ("Gelu", "Relu", "Mul", "Sigmoid", "Tanh", "Erf")


def rotate_folded(graph: Graph, like: ModelProto, feed: Mapping[str, Array]) -> tuple[Graph, list[str]]:
    """The graph with every stream and every attention head's values rotated that can be, and notes on both.

    A copy; the graph itself where nothing can be rotated, or where the result is not equal on `feed`.
    """
    rotated = graph.copy()
    streams = find_streams(rotated)
    for stream in streams:
        if not stream.refusal:
            _rotate_stream(rotated, stream)
    heads = find_heads(rotated, find_sites(rotated), functools.partial(run_part, like=like))
    for head in heads:
        _rotate_values(rotated, head)
    refused = [stream.refusal for stream in streams if stream.refusal]
    notes = [f"Residual streams not rotated: {len(refused)}. The first, because {reason}." for reason in refused[:1]]
    if len(refused) == len(streams) and not heads:
        return graph, notes
    equal = agreement(graph, rotated, like, feed)
    if equal < EQUAL_DB:
        return graph, [*notes, f"Nothing is rotated: the rotated model agrees to {equal:.0f} dB with the float one only."]
    parts = f"Residual streams rotated: {len(streams) - len(refused)}, attention layers: {len(heads)}"
    return rotated, [*notes, f"{parts}; equal to {equal:.0f} dB in float."]


def agreement(graph: Graph, other: Graph, like: ModelProto, feed: Mapping[str, Array]) -> float:
    """The SQNR of the worst output of `other` against `graph` on one feed, dB."""
    want, found = (run_part(part, feed, like) for part in (graph, other))
    return min(sqnr_db(*energies(want[t.name], found[t.name])) for t in compared(graph))


def run_part(part: Graph, feed: Mapping[str, Array], like: ModelProto) -> Mapping[str, Array]:
    """The outputs of a float graph, for the arrays of `feed` that are its inputs."""
    return Session(to_model(part, like)).run({t.name: feed[t.name] for t in part.inputs})


def rotate_inputs(
    graph: Graph, like: ModelProto, sites: Sequence[Site], bits: Mapping[str, int], feed: Mapping[str, Array],
    decided: Mapping[str, bool | None] | None = None,
) -> tuple[tuple[Site, ...], dict[str, Outcome]]:  # fmt: skip
    """Mix, in place, the inputs that are worth it on `feed`; `sites` as they are then, and what was found at each.

    `bits`: the width of the activations of each site whose input is to be quantized; `decided`: whether to mix it, where
    that is decided.
    """
    nodes = {node.name: node for node in graph.nodes}
    asked = [s for s in sites if s.name in bits and s.kind == "layer" and can_mix(nodes[s.name])]
    if not asked:
        return tuple(sites), {}
    part = extract(graph, [t.name for t in graph.inputs], list(dict.fromkeys(site.x for site in asked)))
    live = run_part(part, feed, like)
    found, mixed = dict[str, Outcome](), dict[str, Site]()
    for site in asked:
        x, scheme = _few(live[site.x]), Scheme(bits[site.name])
        gain = 10 * float(np.log10(max(_error(x, scheme), 1e-30) / max(_error(_mix(x), scheme), 1e-30)))
        least = least_gain_db(scheme.bits, INPUT_GAIN_DB, INPUT_ENOUGH_DB)
        verb = "lowers" if gain > least else "does not lower"
        is_mixed = (decided or {}).get(site.name)
        is_mixed = gain > least if is_mixed is None else is_mixed
        fit = {"matrix": rotation(_width(x.shape[-1])).astype(np.float32)} if is_mixed else None
        found[site.name] = Outcome(fit, f"mixing {verb} the input's error by the {least:g} dB that it must for its time", gain)
        if fit is not None:
            mixed[site.name] = replace(site, inputs=(_mix_input(graph, nodes[site.name], fit["matrix"]),))
    return tuple(mixed.get(site.name, site) for site in sites), found


def _rotate_stream(graph: Graph, stream: Stream) -> None:
    sites = {site.name: site for site in find_sites(graph)}
    for node, index, axis in stream.written:
        set_constant(node, index, rotate(node.inputs[index].values, axis))
    for layer in stream.read:
        set_constant(layer, 1, rotate(layer.inputs[1].values, axis=0))
    for norm, layers in stream.norms:
        is_layer_norm = norm.op == "LayerNormalization"
        scale = next(t for t in norm.inputs[is_layer_norm:] if isinstance(t, Constant)).values.reshape(-1, 1)
        shift = norm.inputs[2].values if is_layer_norm and len(norm.inputs) > 2 else np.zeros(stream.width)
        for layer in layers:
            w = layer.inputs[1].values.astype(np.float64)
            if shift.any():
                add_to_output(graph, sites[layer.name], shift @ w, "rotation")
            set_constant(layer, 1, rotate(w * scale, axis=0))
        if is_layer_norm:
            set_constant(norm, 1, np.ones(stream.width))
            norm.inputs = norm.inputs[:2]
        else:
            replace_uses(norm.outputs[0], next(t for t in norm.inputs if not isinstance(t, Constant)))
            detach(norm)
    graph.cleanup()


def _rotate_values(graph: Graph, head: Heads) -> None:
    nodes = {node.name: node for node in graph.nodes}
    value, projection = nodes[head.value.name], nodes[head.projection.name]
    w, rows = value.inputs[1].values.copy(), projection.inputs[1].values.copy()
    w[:, head.channels] = rotate(w[:, head.channels])
    rows[head.rows] = rotate(rows[head.rows], axis=1)
    set_constant(value, 1, w)
    set_constant(projection, 1, rows)
    if head.value.bias is not None:
        home = nodes[head.value.bias_node or head.value.name]
        index = next(i for i, t in enumerate(home.inputs) if t.name == head.value.bias)
        b = home.inputs[index].values.copy()
        b.reshape(-1)[head.channels] = rotate(b.reshape(-1)[head.channels])
        set_constant(home, index, b)


def _mix_input(graph: Graph, node: Node, r: Array) -> str:
    """Put the mixing by r [w, w] in front of the layer and take it out of its weight; the name of what the layer reads then."""
    w, old, shape = node.inputs[1].values, node.inputs[0].name, list(node.inputs[0].shape)
    width, tape = len(r), Tape(f"{node.name}/rotation")
    groups = tape.constant("groups", np.array([*[0] * (len(shape) - 1), -1, width], np.int64))
    whole = tape.constant("whole", np.array([*[0] * (len(shape) - 1), len(w)], np.int64))
    # [1, w, w]: of three axes, so that it is no layer's weight and stays float
    matrix = tape.constant("matrix", r[None])
    x = tape("Reshape", tape("MatMul", tape("Reshape", old, groups), matrix), whole)
    apply(graph, "rotation", tape, {old: x}, (node.name,))
    node.inputs[0].shape = shape
    set_constant(node, 1, rotate(w.reshape(-1, width, w.shape[1]), axis=1).reshape(w.shape))
    return x


def nearest(x: Array, scheme: Scheme, *, token: bool = True, mixed: bool = False, name: str = "") -> Array:
    """What the best quantizer that is open makes of x: of a static range, one per `token`, and both behind mixing. Raises
    DataError, about `name`, for values that are not finite.
    """
    found = [choose(Histogram.of(_few(x), name), scheme, "mse", 100.0).fake(x)]
    if token:
        found.append(fake(x, scheme=replace(scheme, signed=True, symmetric=True), granularity="token"))
    if mixed:
        found.append(_mix(nearest(_mix(x), scheme, token=token), back=True))
    return min(found, key=lambda y: float(np.square(y - x).sum(dtype=np.float64)))


def _few(x: Array) -> Array:
    """About `ROWS` rows of x, evenly spread."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[:: max(len(rows) // ROWS, 1)]


def can_mix(node: Node) -> bool:
    """Whether the input of the layer may be mixed: of a MatMul or Gemm, behind an activation."""
    x = node.inputs[0]
    is_behind = bool(x.inputs) and x.inputs[0].op in _ACTIVATIONS and bool(x.shape)
    return node.op in ("Gemm", "MatMul") and is_behind and _width(node.inputs[1].shape[0]) > 1


def _mix(x: Array, *, back: bool = False) -> Array:
    """Mix the channels of x in groups, or take that back."""
    width = _width(x.shape[-1])
    r = rotation(width).astype(np.float32)
    return (x.reshape(-1, width) @ (r.T if back else r)).reshape(x.shape)


def _width(channels: int) -> int:
    """Channels of a group: a power of two that divides `channels`."""
    return min(channels & -channels, GROUP)


def _error(x: Array, scheme: Scheme) -> float:
    """Squared error of the better of a static range and one per token."""
    return float(np.square(nearest(x, scheme) - x).sum(dtype=np.float64))
