"""Integer regions: where a runtime keeps activations as integers from one kernel to the next.

A Conv of ONNX Runtime becomes an integer kernel only if its output is quantized too, and exactly once. So the outputs of
quantized Convs are *stored* as integers, and so is whatever joins, pools or moves stored tensors and has an integer
kernel: a residual Add, a Concat, a MaxPool. Everything else around a layer needs its input quantized, nothing more.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Node, Tensor, Variable, outer_reads, tensors_of
from onnxcomp.graph.fold import names_of_shapes
from onnxcomp.graph.sites import LAYER_OPS, PASS_THROUGH_OPS, Site, join
from onnxcomp.numerics.affine import Scheme
from onnxcomp.targets.base import Encoding, Plan, Point, Settings

JOIN_OPS = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "HardSwish"})
"""Operators without weights that have an integer kernel when inputs and output are quantized, or are written as such."""
WIDE = 16
"""Bits of the tensors that 8 bits do not hold."""
_Stored = dict[str, str | None]
"""Stored tensor -> the tensor whose parameters it shares, or None for its own."""


def plan(
    graph: Graph, sites: Sequence[Site], settings: Mapping[str, Settings], encoding: Encoding,
    wide: Mapping[str, Sequence[str]],
) -> Plan:  # fmt: skip
    """Points for `sites`: stored tensors of 8 bits, and the sites' inputs at their own bits; see `Encoding.where`. Stored
    tensors that are `wide` have 16, and so has all that their makers and readers make and read, of layers the ones named there.
    """
    static = {s.name: s for s in sites if settings[s.name].activations in ("static", "auto")}
    tensors, results = tensors_of(graph), {t.name for t in graph.outputs}
    find = {"regions": _find_region, "units": _find_units, "inputs": _find_skips, "layers": lambda *_: ({}, [])}[encoding.where]
    stored, joins = find(graph, static, results) if static else ({}, [])
    if encoding.where == "inputs":
        settings = dict(settings) | {site.name: _of_skip(site, tensors, static, settings) for site in joins}
    points: dict[str, Point] = {}
    storage, wider = encoding.storage(settings.values()), _wider(graph, sites, stored, results, wide)
    for tensor, same_as in stored.items():
        if same_as is None:
            point = _storage_point(tensors[tensor], stored, settings, results, encoding)
            is_wide = tensor in wide or any(node.name in wider for node in tensors[tensor].inputs)
            points[tensor] = replace(point, scheme=replace(point.scheme, bits=WIDE)) if is_wide else point
        else:  # the same values, so the same codes
            points[tensor] = replace(points[same_as], tensor=tensor, highest=float("inf"), same_as=same_as)
    settings = {name: replace(s, activation_bits=WIDE) if name in wider else s for name, s in settings.items()}
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    every = sorted([*sites, *joins], key=lambda site: order[site.name])
    heads, unread = dict[str, Site | None]({site.name: site for site in every}), set(stored)
    for node in graph.nodes:  # in order, so that the first reader of a tensor comes first; it may read inside its bodies
        read = [t.name for t in (*node.inputs, *outer_reads(node, tensors)) if t.name in unread]
        if read:
            heads.setdefault(node.name, None)
            unread.difference_update(read)
    between = _conversions(graph, points, settings, wider, storage) if wider else []
    for name in (name for point in between for name in point.consumers or ()):
        heads.setdefault(name, None)
    made = {site.name: points.get(tail(tensors[site.y], results).name) for site in joins}
    bits = {name: point.scheme.bits for name, point in made.items() if point is not None}
    asked = _input_points(every, settings, points, encoding)
    return Plan(tuple(every), settings, (*points.values(), *asked, *between), heads, bits)


def _wider(
    graph: Graph, sites: Sequence[Site], stored: _Stored, results: set[str], wide: Mapping[str, Sequence[str]]
) -> set[str]:  # fmt: skip
    """The operators that make or read a `wide` tensor, and those that end what they make."""
    sources, found, layers = dict[str, str](), set[str](), {site.name for site in sites if site.kind == "layer"}
    for name, same_as in stored.items():
        sources[name] = name if same_as is None else sources[same_as]
    for node in graph.nodes if wide else ():
        read, made = [t.name for t in _activations(node)], [tail(t, results).name for t in node.outputs]
        asked = [wide[sources[name]] for name in read if sources.get(name) in wide]
        is_asked = bool(asked) if node.name not in layers else any(node.name in names for names in asked)
        open_ends = [t for t in node.inputs if t.dtype == np.float32 and t.name not in stored]
        is_begun = any(maker.name in found for t in open_ends for maker in t.inputs)
        is_move = node.op in PASS_THROUGH_OPS and node.inputs[0].name in stored
        if not is_move and (is_asked or is_begun or any(sources.get(name) in wide for name in made)):
            found.add(node.name)
    return found


def _conversions(
    graph: Graph, stored: Mapping[str, Point], settings: Mapping[str, Settings], wider: Collection[str], storage: Scheme
) -> list[Point]:
    """One point per stored tensor for what is no site and reads it in another width than it is stored in."""
    shared: dict[tuple[str, int], list[str]] = {}
    for node in graph.nodes:
        bits = WIDE if node.name in wider else storage.bits
        if node.name in settings or node.op in PASS_THROUGH_OPS or all(t.dtype != np.float32 for t in node.outputs):
            continue
        for name in dict.fromkeys(t.name for t in _activations(node)):
            if name in stored and stored[name].scheme.bits != bits:
                shared.setdefault((name, bits), []).append(node.name)
    return [
        Point(name, replace(storage, bits=bits), "static", "mse", 99.99, tuple(readers))
        for (name, bits), readers in shared.items()
    ]


def _find_region(graph: Graph, static: Mapping[str, Site], results: set[str]) -> tuple[_Stored, list[Site]]:
    """The stored tensors, and the sites of the operators that join them."""
    stored: _Stored = {}
    joins: list[Site] = []
    for node in graph.nodes:
        if node.name in static and static[node.name].op == "Conv":
            stored[tail(node.outputs[0], results).name] = None
        elif node.op in JOIN_OPS and _activations(node) and all(t.name in stored for t in _activations(node)):
            output, constants = tail(node.outputs[0], results), [t for t in node.inputs if not isinstance(t, Variable)]
            useful = all(is_operand(node, t) for t in constants) and (not constants or _feeds_integers(output, static))
            # What a constant is added to behind a HardSwish would be rounded twice, and the first time for little.
            useful &= node.op != "HardSwish" or not any(is_operand(n, t) for n in output.outputs for t in n.inputs)
            if useful and output.name not in results:
                joins.append(join(node))
                stored[output.name] = None
        elif node.op in PASS_THROUGH_OPS and node.inputs and node.inputs[0].name in stored:
            stored |= {output.name: node.inputs[0].name for output in node.outputs if _feeds_integers(output, static)}
        elif node.op == "HardSigmoid" and node.inputs[0].name in stored:  # a gate: small, and what it multiplies is not
            stored |= {t.name: None for t in node.outputs if t.name not in results and [r.op for r in t.outputs] == ["Mul"]}
    return stored, _drop_unread(graph, stored, joins, static, results)


def _drop_unread(
    graph: Graph, stored: _Stored, joins: Sequence[Site], static: Mapping[str, Site], results: set[str]
) -> list[Site]:
    """The joins but for those whose result float layers read, and no integer kernel: it is taken out of `stored`, for these
    layers are to lose nothing by it.
    """
    tensors, kept = tensors_of(graph), {site.name: site for site in joins}
    ends = {tail(tensors[site.y], results).name: site.name for site in joins}
    for name in [name for name in reversed(stored) if name in ends or stored[name] is not None]:
        readers = tensors[name].outputs
        codes = any(r.name in static or r.name in kept or any(t.name in stored for t in r.outputs) for r in readers)
        if not codes and (stored[name] is not None or any(r.op in LAYER_OPS for r in readers)):
            del stored[name]
            kept.pop(ends.get(name, ""), None)
    return [*kept.values()]


def _find_units(graph: Graph, static: Mapping[str, Site], results: set[str]) -> tuple[_Stored, list[Site]]:
    """Every float tensor, and the sites of what joins them: a unit reads and makes nothing but codes. What is made of shapes
    alone, for what is too, is computed once and stays as it is.
    """
    once = names_of_shapes(graph)
    stored: _Stored = {t.name: None for t in graph.inputs if t.dtype == np.float32}
    joins: list[Site] = []
    for node in graph.nodes:
        if node.op in PASS_THROUGH_OPS and node.inputs[0].name in stored:
            stored |= {output.name: node.inputs[0].name for output in node.outputs}
        else:
            read = [t for t in node.outputs if t.dtype == np.float32 and (t.outputs or t.name in results)]
            for made in (tail(t, results) for t in read):
                behind = {t.name for n in made.outputs for t in n.outputs}
                stored |= {} if made.name in once and once >= behind else {made.name: None}
        is_join = node.op in JOIN_OPS and any(t.name in stored for t in _activations(node))
        joins += [join(node)] if is_join and tail(node.outputs[0], results).name in stored else []
    return stored, joins


def _find_skips(graph: Graph, static: Mapping[str, Site], results: set[str]) -> tuple[_Stored, list[Site]]:
    """The sites are the residual Adds that a quantized Conv is fused with, and each reads what skips it. Stored is what layers
    read and an Add behind mere moves, so that it is made as codes.
    """
    stored, joins = _Stored(), list[Site]()
    order = {t.name: index for index, node in enumerate(graph.nodes) for t in node.outputs}
    for node in (node for node in graph.nodes if node.op == "Add" and len(_activations(node)) == 2):
        made = [t for t in node.inputs if t.inputs and t.inputs[0].name in static and t.inputs[0].op == "Conv"]
        alone = sorted((t for t in made if len(t.outputs) == 1 and t.name not in results), key=lambda t: order[t.name])
        if alone:
            skips = [t for t in node.inputs if t is not alone[-1]]
            joins.append(replace(join(node), inputs=tuple(t.name for t in skips)))
            for moved in (t for t in skips if len(t.outputs) == 1 and t.name not in results):
                source = _before_moves(moved)
                others = [r.name for r in source.outputs if r.name not in static]
                if source is not moved and source.name not in results and len(others) == 1 < len(source.outputs):
                    stored |= {source.name: None, moved.name: source.name}
    return stored, joins


def _before_moves(tensor: Tensor) -> Tensor:
    """What the tensor is but for moves that nothing else reads."""
    node = tensor.inputs[0] if tensor.inputs else None
    is_moved = node is not None and node.op in PASS_THROUGH_OPS and len(tensor.outputs) == 1
    return _before_moves(node.inputs[0]) if node is not None and is_moved else tensor


def _of_skip(
    site: Site, tensors: Mapping[str, Tensor], static: Mapping[str, Site], settings: Mapping[str, Settings]
) -> Settings:
    """The settings of a residual Add's skipped branch: those of a layer that reads it too, else of the Conv beside it."""
    skip, others = tensors[site.x], tensors[site.y].inputs[0].inputs
    readers = [node.name for node in skip.outputs if node.name in static]
    makers = [t.inputs[0].name for t in others if t is not skip and t.inputs]
    return replace(settings[next(iter([*readers, *makers]))], activations="static")


def is_operand(node: Node, tensor: Tensor) -> bool:
    """Whether `tensor` is a constant that `node` adds or multiplies with: it is stored in 8 bits then."""
    return node.op in ("Add", "Mul") and isinstance(tensor, Constant) and tensor.dtype == np.float32


def tail(tensor: Tensor, results: set[str]) -> Tensor:
    """The tensor behind the ReLU or Clip that alone reads `tensor` and that a zero point can absorb; `results` are the
    graph's outputs.
    """
    readers = tensor.outputs
    bounds = clip_bounds(readers[0]) if tensor.name not in results and len(readers) == 1 else (None, None)
    is_absorbed = bounds[0] == 0.0 or (bounds[1] is not None and readers[0].op == "Min")
    return tail(readers[0].outputs[0], results) if is_absorbed else tensor


def clip_bounds(node: Node) -> tuple[float | None, float | None]:
    """The constant bounds of a Relu, a Clip or a Min, of which the least; None for a bound that is absent or no constant, and
    for other operators.
    """
    if node.op == "Relu":
        return 0.0, None
    if node.op == "Min" and len(node.inputs) == 2 and isinstance(node.inputs[1], Constant):
        return None, float(node.inputs[1].values.min())
    given = [float(t.values.reshape(())) if isinstance(t, Constant) else None for t in node.inputs[1:3] if node.op == "Clip"]
    low, high, *_ = *given, None, None
    return low, high


def _activations(node: Node) -> list[Tensor]:
    return [t for t in node.inputs if isinstance(t, Variable) and not t.is_empty()]


def _feeds_integers(tensor: Tensor, static: Mapping[str, Site]) -> bool:
    """Whether an integer kernel reads `tensor`, at once or behind further moves of the same values."""
    return any(
        node.name in static
        or node.op in JOIN_OPS
        or (node.op in PASS_THROUGH_OPS and any(_feeds_integers(t, static) for t in node.outputs))
        for node in tensor.outputs
    )


def _storage_point(
    tensor: Tensor, stored: _Stored, settings: Mapping[str, Settings], results: set[str], encoding: Encoding
) -> Point:
    """The quantizer of a stored tensor: its readers' own where they are layers that agree, else 8 bits."""
    readers, storage = _readers(tensor, stored, settings, results), encoding.storage(settings.values())
    maker = tensor.inputs[0] if tensor.inputs else None
    highest = clip_bounds(maker)[1] if maker is not None else None
    point = Point(tensor.name, storage, "static", "mse", 99.99, None, float("inf") if highest is None else highest)
    if encoding.where == "regions" and any(reader.op == "HardSwish" for reader in tensor.outputs):
        point = replace(point, divides=3.0)
    first = next((reader for reader in readers if reader is not None), None)
    if first is None:
        return point
    scheme = encoding.scheme(first) if set(readers) == {first} else storage
    return replace(point, scheme=scheme, ranges=first.ranges, percentile=first.percentile)


def _readers(tensor: Tensor, stored: _Stored, settings: Mapping[str, Settings], results: set[str]) -> list[Settings | None]:
    """How the layers that read `tensor`, or what only moves its values, want it; None for any other reader."""
    found: list[Settings | None] = [None] if tensor.name in results else []
    for node in tensor.outputs:
        moved = [t for t in node.outputs if stored.get(t.name) == tensor.name]
        if node.op in PASS_THROUGH_OPS and len(moved) == len(node.outputs):
            found += [reader for t in moved for reader in _readers(t, stored, settings, results)]
        else:
            wanted = settings.get(node.name)
            found.append(_of_input(wanted) if wanted is not None and wanted.activations in ("static", "auto") else None)
    return found


def _of_input(wanted: Settings) -> Settings:
    """The settings without those of weight and output: layers that agree in these can share a quantizer."""
    return replace(wanted, weight_bits=0, rounding="", mixed=None, methods=None)


def _input_points(
    sites: Sequence[Site], settings: Mapping[str, Settings], stored: Mapping[str, Point], encoding: Encoding
) -> list[Point]:
    """One point per tensor and scheme, shared by all the sites that read the tensor in the same way."""
    shared: dict[tuple[str, Settings], list[str]] = {}
    for site in (site for site in sites if site.name in settings):
        wanted = settings[site.name]
        is_static, scheme = wanted.activations in ("static", "auto"), encoding.scheme(wanted)
        for tensor in dict.fromkeys(site.inputs if wanted.activations != "float" else ()):
            if not (is_static and tensor in stored and stored[tensor].scheme == scheme):
                shared.setdefault((tensor, _of_input(wanted)), []).append(site.name)
    return [
        Point(tensor, encoding.scheme(wanted), wanted.activations, wanted.ranges, wanted.percentile, tuple(readers))
        for (tensor, wanted), readers in shared.items()
    ]
