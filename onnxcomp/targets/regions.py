"""Integer regions: where a runtime keeps activations as integers from one kernel to the next.

A Conv of ONNX Runtime becomes an integer kernel only if its output is quantized too, and exactly once. So the outputs of
quantized Convs are *stored* as integers, and so is whatever joins, pools or moves stored tensors and has an integer
kernel: a residual Add, a Concat, a MaxPool. Everything else around a layer needs its input quantized, nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Node, Tensor, Variable
from onnxcomp.graph.sites import PASS_THROUGH_OPS, Site, join
from onnxcomp.numerics.affine import Scheme
from onnxcomp.targets.base import Plan, Point, Settings

JOIN_OPS = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"})
"""Operators without weights that have an integer kernel when inputs and output are quantized."""
STORAGE = Scheme(bits=8)


@dataclass
class _Region:
    stored: dict[str, str | None]
    """Stored tensor -> the tensor whose parameters it shares, or None for its own."""
    joins: list[Site]


def plan_with_regions(graph: Graph, sites: Sequence[Site], settings: Mapping[str, Settings]) -> Plan:
    """Points for `sites`: stored tensors of 8 bits, and the sites' inputs at their own bits."""
    static = {s.name: s for s in sites if settings[s.name].activations in ("static", "auto")}
    tensors = graph.tensors()
    results = {t.name for t in graph.outputs}
    region = _find_region(graph, static, results)
    points: list[Point] = []
    direct: dict[str, Point] = {}
    for tensor, same_as in region.stored.items():
        source = direct[same_as] if same_as is not None else None
        point = _storage_point(tensors[tensor], region, settings, results, source)
        direct[tensor] = point
        points.append(point)
    points += _input_points(graph, sites, settings, direct)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    every = sorted([*sites, *region.joins], key=lambda site: order[site.name])
    heads: dict[str, Site | None] = {site.name: site for site in every}
    for tensor in region.stored:
        if tensors[tensor].outputs:
            heads.setdefault(min(tensors[tensor].outputs, key=lambda node: order[node.name]).name, None)
    return Plan(tuple(every), dict(settings), tuple(points), heads)


def _find_region(graph: Graph, static: Mapping[str, Site], results: set[str]) -> _Region:
    region = _Region({}, [])
    for node in graph.nodes:
        if node.name in static and static[node.name].op == "Conv":
            _store(region, tail(node.outputs[0], results), None)
        elif node.op in JOIN_OPS and _activations(node) and all(t.name in region.stored for t in _activations(node)):
            output, constants = tail(node.outputs[0], results), [t for t in node.inputs if not isinstance(t, Variable)]
            useful = all(is_operand(node, t) for t in constants) and (not constants or _feeds_integers(output, static, region))
            if useful and output.name not in results:
                region.joins.append(join(node))
                _store(region, output, None)
        elif node.op in PASS_THROUGH_OPS and node.inputs and node.inputs[0].name in region.stored:
            for output in node.outputs:
                if _feeds_integers(output, static, region):
                    _store(region, output, node.inputs[0].name)
    return region


def _store(region: _Region, tensor: Tensor, same_as: str | None) -> None:
    region.stored[tensor.name] = same_as


def is_operand(node: Node, tensor: Tensor) -> bool:
    """Whether `tensor` is a constant that `node` adds or multiplies with: it is stored in 8 bits then."""
    return node.op in ("Add", "Mul") and isinstance(tensor, Constant) and tensor.dtype == np.float32


def tail(tensor: Tensor, results: set[str]) -> Tensor:
    """The tensor behind the ReLU or Clip that alone reads `tensor` and that a zero point can absorb; `results` are the
    graph's outputs.
    """
    readers = tensor.outputs
    if (
        tensor.name not in results
        and len(readers) == 1
        and readers[0].op in ("Relu", "Clip")
        and lower_bound(readers[0]) == 0.0
    ):
        return readers[0].outputs[0]
    return tensor


def lower_bound(node: Node) -> float | None:
    """The constant lower bound of a Relu or Clip; None where there is none."""
    if node.op == "Relu":
        return 0.0
    return clip_bounds(node)[0]


def clip_bounds(node: Node) -> tuple[float | None, float | None]:
    """The constant bounds of a Clip; None for a bound that is absent or no constant."""
    bounds: list[float | None] = [None, None]
    for index, tensor in enumerate(node.inputs[1:3]):
        if isinstance(tensor, Constant):
            bounds[index] = float(np.asarray(tensor.values).reshape(()))
    return bounds[0], bounds[1]


def _activations(node: Node) -> list[Tensor]:
    return [t for t in node.inputs if isinstance(t, Variable) and not t.is_empty()]


def _feeds_integers(tensor: Tensor, static: Mapping[str, Site], region: _Region) -> bool:
    """Whether an integer kernel reads `tensor`, at once or behind further moves of the same values."""
    return any(
        node.name in static
        or node.op in JOIN_OPS
        or (node.op in PASS_THROUGH_OPS and any(_feeds_integers(t, static, region) for t in node.outputs))
        for node in tensor.outputs
    )


def _storage_point(
    tensor: Tensor, region: _Region, settings: Mapping[str, Settings], results: set[str], source: Point | None
) -> Point:
    """The quantizer of a stored tensor: its source's where it holds the same values, else its readers' own where they are
    layers that agree, else 8 bits.
    """
    if source is not None:
        return replace(source, tensor=tensor.name, highest=float("inf"), same_as=source.tensor)
    readers = _readers(tensor, region, settings, results)
    point = Point(tensor.name, STORAGE, "static", "mse", 99.99, None, _upper_bound(tensor))
    layers = [reader for reader in readers if reader is not None]
    if not layers:
        return point
    first = layers[0]
    point = replace(point, ranges=first.ranges, percentile=first.percentile)
    agree = len(layers) == len(readers) and all(
        replace(r, weight_bits=0, rounding="") == replace(first, weight_bits=0, rounding="") for r in layers
    )
    return replace(point, scheme=activation_scheme(first)) if agree else point


def _readers(tensor: Tensor, region: _Region, settings: Mapping[str, Settings], results: set[str]) -> list[Settings | None]:
    """The settings of the layers that read `tensor` or what only moves its values; None for any other reader."""
    found: list[Settings | None] = [None] if tensor.name in results else []
    for node in tensor.outputs:
        moved = [t for t in node.outputs if region.stored.get(t.name) == tensor.name]
        if node.op in PASS_THROUGH_OPS and len(moved) == len(node.outputs):
            found += [reader for t in moved for reader in _readers(t, region, settings, results)]
        else:
            wanted = settings.get(node.name)
            found.append(wanted if wanted is not None and wanted.activations in ("static", "auto") else None)
    return found


def _upper_bound(tensor: Tensor) -> float:
    """The bound of the Clip that makes `tensor`, infinity where there is none."""
    maker = tensor.inputs[0] if tensor.inputs else None
    bound = clip_bounds(maker)[1] if maker is not None and maker.op == "Clip" else None
    return float("inf") if bound is None else bound


def _input_points(
    graph: Graph, sites: Sequence[Site], settings: Mapping[str, Settings], direct: Mapping[str, Point]
) -> list[Point]:
    """One point per tensor and scheme, shared by all the sites that read the tensor in the same way."""
    shared: dict[tuple[str, Settings], list[str]] = {}
    for site in sites:
        wanted = settings[site.name]
        if wanted.activations == "float":
            continue
        for tensor in dict.fromkeys(site.inputs):
            stored = direct.get(tensor)
            if stored is not None and stored.scheme == activation_scheme(wanted) and wanted.activations in ("static", "auto"):
                continue
            key = (tensor, replace(wanted, weight_bits=0, rounding=""))
            shared.setdefault(key, []).append(site.name)
    return [
        Point(tensor, activation_scheme(wanted), wanted.activations, wanted.ranges, wanted.percentile, tuple(readers))
        for (tensor, wanted), readers in shared.items()
    ]


def activation_scheme(wanted: Settings) -> Scheme:
    """The scheme of a site's activations: unsigned codes; symmetric ones have their zero in the middle."""
    return Scheme(wanted.activation_bits, signed=False, symmetric=wanted.symmetric)
