"""Which sites cost the output most when they are quantized: measured at the output, in a bounded number of passes.

One walk quantizes the model. Then every part that loses something, an activation quantizer x -> x + e or a weight with its
bias y -> y + e, becomes x + m e with a number m of its own: all m = 0 are the float model, all m = 1 the compressed one, and in
between lies a smooth function y(m), for the errors e stand still. Two sets of them are recorded: what quantizing does to the
float model's own tensors, and what it does to those that the compressed model computes. With g_s = dy/dm_s

    isolated    sum |g_s|^2 at m = 0, errors of the float model's tensors: this part alone, everything else float
    cumulative  sum 2 (y - y_0).g_s at m = 1/2, errors of the compressed model's: its share of |y_1 - y_0|^2, to second order

over the outputs of all samples, relative to |y_0|^2. All g_s are read from the same passes: m is moved by random signs,
dy_k = sum_s sign_ks g_s, and what correlates with a part's sign is its own:

    dy_k.dy_l ~ sum_s sign_ks sign_ls |g_s|^2        2 (y - y_0).dy_k ~ sum_s sign_ks cumulative_s        by least squares

Cost    `PASSES` passes over the float model for each of the two, on `SAMPLES` samples, whatever the depth.
Limits  first order: an error that saturates what follows counts as if it went on growing. Estimates of parts far below the
        largest are noise of either sign. What compensates blocks or inputs is left out of the walk.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp import account, pipeline, runtime
from onnxcomp import recipe as recipes
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import DOMAIN, Graph, Node, Tape, Variable, apply, extract
from onnxcomp.graph.sites import Site
from onnxcomp.numerics.affine import Scheme
from onnxcomp.report.model import Analysis, Damage
from onnxcomp.targets.lowering import TINY

if TYPE_CHECKING:
    from onnxcomp.compress.walk import Walk
    from onnxcomp.recipe import Recipe

Array = np.ndarray
PASSES, SAMPLES = 64, 16
SUGGESTED = 3
TURNS = 3
STEP = 0.125
"""By how much m is moved: small, since y(m) is smooth."""
MASK = "onnxcomp/mask"


@dataclass(frozen=True)
class Part:
    """One source of error: the weight of a site, or the quantizer in front of one or more."""

    kind: str
    """`weights` or `activations`."""
    sites: tuple[str, ...]
    error: str
    """The tensor that holds e."""


def analyze(
    model: object, data: object, recipe: str | Path | Recipe = "auto", *, progress: runtime.Progress = runtime.ignore
) -> Analysis:
    """Rank the sites of `model` by the damage that quantizing them as `recipe` says does at the output, measured on `data`.

    Arguments are those of `onnxcomp.quantize`. Raises the kinds of `onnxcomp.errors`.
    """
    recipe = recipe if isinstance(recipe, recipes.Recipe) else recipes.find(recipe)
    if data is None or not recipe.samples:
        raise UsageError("Damage is measured on samples. Pass --data, and a recipe with samples above 0.")
    layers = tuple(method for method in recipe.compensate if method.scope == "layer")
    made = pipeline.compress(model, data, dataclasses.replace(recipe, compensate=layers), progress)
    assert made.samples is not None
    walk, feeds = made.walk, [made.samples[i] for i in range(min(SAMPLES, len(made.samples)))]
    graph, parts = blend(walk)
    outputs = [t.name for t in walk.reference.outputs if t.dtype == np.float32]
    if not outputs:
        raise ModelError("The model has no output of type float32, so damage cannot be measured there.")
    pairs = [
        (i, j) for j, w in enumerate(parts) if w.kind == "weights" for i, a in enumerate(parts[:j]) if w.sites[0] in a.sites
    ]
    passes = min(PASSES, 1 << max(len(parts) - 1, 0).bit_length())
    signal, total, isolated, both, cumulative = _measure(graph, walk, parts, pairs, outputs, feeds, passes, progress)
    rows = {site.name: np.zeros(5) for site in walk.plan.sites}
    for part, alone, share in zip(parts, isolated / signal, cumulative / signal, strict=True):
        for name in part.sites:
            columns = [0, 1, 3] if part.kind == "weights" else [0, 2, 4]
            rows[name][columns] += np.array([alone, alone, share]) / len(part.sites)
    for (i, j), product in zip(pairs, both / signal, strict=True):
        rows[parts[j].sites[0]][0] += 2 * product / len(parts[i].sites)
    sizes = {name: math.prod(tensor.shape or ()) for name, tensor in walk.reference.tensors().items()}
    found = [
        Damage(s.name, s.op, s.kind, account.bits(s, walk), sizes.get(s.weight or "", 0), *map(float, rows[s.name]))
        for s in walk.plan.sites
    ]
    found.sort(key=lambda row: -row.damage)
    worst = [row.name for row in found if row.kind == "layer"][:SUGGESTED]
    suggestion = "\n".join(f'[[site]]\nwhere = {json.dumps(glob.escape(name))}\nbits = "w8a8"\n' for name in worst)
    path = account.path_of(model)
    title = "model" if path is None else path.name
    return Analysis(
        title, str(recipe.bits), walk.target.name, len(feeds), 2 * passes + 3, total / signal, tuple(found), suggestion
    )


def blend(walk: Walk) -> tuple[Graph, tuple[Part, ...]]:
    """The compressed graph in float operators, with x + m e at every part; m are the numbers of its input `MASK`."""
    graph, parts, taken = walk.compressed.copy(), [], {site.name for site in walk.plan.sites}
    graph.inputs.append(Variable(MASK, np.dtype(np.float32), ["parts"]))

    def mix(tape: Tape, kind: str, sites: Sequence[str], exact: str, rounded: str, replaced: str) -> None:
        error = tape("Sub", rounded, exact)
        number = tape("Gather", MASK, tape.constant("part", np.array(len(parts))))
        apply(graph, "mix", tape, {replaced: tape("Add", exact, tape("Mul", error, number))})
        parts.append(Part(kind, tuple(sites), error))

    for node in [n for n in graph.nodes if n.domain == DOMAIN and n.op == "Dequantize"]:
        codes, scale, tape = node.inputs[0].values, node.inputs[1].values, Tape(f"{node.name}/float")
        shape = [-1 if axis == node.attrs["axis"] else 1 for axis in range(codes.ndim)]
        w = tape.constant("w", codes.astype(np.float32) * scale.reshape(shape))
        apply(graph, "mix", tape, {node.outputs[0].name: tape("Identity", w)})
    for node in [n for n in graph.nodes if n.domain == DOMAIN and n.op == "FakeQuantize"]:
        y, tape = node.outputs[0], Tape(f"{node.name}/mixed")
        readers = [n.name for n in y.outputs if n.name in taken] or _next_sites(y, taken)
        mix(tape, "activations", readers, node.inputs[0].name, _fake(tape, node), y.name)
    nodes, floats = {n.name: n for n in graph.nodes}, {n.name: n for n in walk.reference.nodes}
    for site in [s for s in walk.plan.sites if s.kind == "layer"]:
        tape = Tape(f"{site.name}/mixed")
        exact = _float(tape, site, floats, nodes[site.name].inputs[0].name)
        mix(tape, "weights", [site.name], exact, site.y, site.y)
    return graph, tuple(parts)


def _next_sites(tensor: Variable, taken: set[str]) -> list[str]:
    """The first sites behind a tensor that none reads itself."""
    front, seen = [tensor], set()
    while front:
        readers = [n for t in front for n in t.outputs if id(n) not in seen]
        found = [n.name for n in readers if n.name in taken]
        if found:
            return found
        seen |= {id(n) for n in readers}
        front = [t for n in readers for t in n.outputs]
    return []


def _fake(op: Tape, node: Node) -> str:
    """What the abstract quantizer makes of its input, in float operators."""
    x, scheme = node.inputs[0].name, Scheme(node.attrs["bits"], bool(node.attrs["signed"]))
    if node.attrs["granularity"] == "static":
        scale, zero = (t.values for t in node.inputs[1:3])
        step, least, most = op.constant("step", np.float32(scale)), scheme.qmin - int(zero), scheme.qmax - int(zero)
    else:
        most, axes = 2 ** (scheme.bits - 1) - 1, [op.constant("axes", np.array([-1]))]
        largest = op("ReduceMax", op("Abs", x), *(axes if node.attrs["granularity"] == "token" else []))
        factor, least = op.constant("factor", np.float32(node.attrs["ratio"] / most)), -most - 1
        step = op("Max", op("Mul", largest, factor), op.constant("tiny", TINY))
    ends = [op.constant(key, np.float32(end)) for key, end in (("least", least), ("most", most))]
    return op("Mul", op("Clip", op("Round", op("Div", x, step)), *ends), step)


def _float(op: Tape, site: Site, nodes: Mapping[str, Node], x: str) -> str:
    """The float layer on `x`."""
    node = nodes[site.name]
    constants = [op.constant(f"float-{i}", t.values) for i, t in enumerate(node.inputs[1:])]
    y = op(node.op, x, *constants, **node.attrs)
    if site.bias_node is None:
        return y
    bias = next(t for t in nodes[site.bias_node].inputs if t.name == site.bias)
    return op("Add", y, op.constant("float-bias", bias.values))


def _measure(
    graph: Graph, walk: Walk, parts: Sequence[Part], pairs: Sequence[tuple[int, int]], outputs: Sequence[str],
    feeds: Sequence[Mapping[str, Array]], passes: int, progress: runtime.Progress,
) -> tuple[float, float, Array, Array, Array]:  # fmt: skip
    """|y_0|^2, |y_1 - y_0|^2, and what every part does to the outputs, isolated and cumulative, over all samples."""
    errors, inputs = [part.error for part in parts], [t.name for t in graph.inputs]
    record = runtime.Session(files.to_bytes(to_model(extract(graph, inputs, [*outputs, *errors]), walk.like)))
    inject = runtime.Session(files.to_bytes(to_model(extract(graph, [*inputs, *errors], list(outputs)), walk.like)))
    taken, rng = {name for name, _ in inject.inputs}, np.random.default_rng(0)
    columns = hadamard(passes)
    rows: list[tuple[Array, Array, Array]] = []
    signal, total, both = 0.0, 0.0, np.zeros((2, len(pairs)))
    first, second = np.array(pairs, int).reshape(-1, 2).T

    def run(session: runtime.Session, feed: Mapping[str, Array], m: Array) -> tuple[Array, dict[str, Array]]:
        found = session.run(feed | {MASK: m.astype(np.float32)})
        y = np.concatenate([found[name].ravel() for name in outputs]).astype(np.float64)
        return np.where(np.isfinite(y), y, 0.0), {name: a for name, a in found.items() if name in taken}

    for number, feed in enumerate(feeds):
        progress("analyzing", number, len(feeds))
        (y0, alone), (y1, together) = (run(record, feed, np.full(len(parts), m)) for m in (0.0, 1.0))
        signal, total = signal + y0 @ y0, total + (y1 - y0) @ (y1 - y0)
        middle = run(inject, feed | together, np.full(len(parts), 0.5))[0]
        column, sign = rng.permutation(len(parts)) % len(columns), rng.choice([-1.0, 1.0], len(parts))
        signs, member = columns[:, column] * sign, (column == np.arange(len(columns))[:, None]) * sign
        isolated = columns.T @ [run(inject, feed | alone, STEP * row)[0] - y0 for row in signs] / (STEP * len(columns))
        cumulative = columns.T @ [run(inject, feed | together, 0.5 + STEP * row)[0] - middle for row in signs]
        rows.append((member, np.square(isolated).sum(axis=1), cumulative @ (middle - y0) * 2 / (STEP * len(columns))))
        apart = column[first] != column[second]
        product = (isolated[column[first]] * isolated[column[second]]).sum(axis=1) * sign[first] * sign[second]
        both += np.where(apart, [product, np.ones(len(pairs))], 0.0)
    progress("analyzing", len(feeds), len(feeds))
    member, squares, shares = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    isolated, cumulative = (len(feeds) * _solve(x, y) for x, y in ((np.abs(member), squares), (member, shares)))
    return signal, total, isolated, len(feeds) * both[0] / np.maximum(both[1], 1), cumulative


def hadamard(size: int) -> Array:
    """Orthogonal columns of signs; `size` is a power of two."""
    found = np.ones((1, 1))
    while len(found) < size:
        found = np.block([[found, found], [found, -found]])
    return found


def _solve(x: Array, y: Array) -> Array:
    """Least squares, a row counting the less the more is expected of it."""
    found = np.linalg.lstsq(x, y)[0]
    for _ in range(TURNS):
        expected = np.abs(x) @ np.abs(found)
        weight = 1 / (expected + 0.1 * expected.mean() + 1e-30)
        found = np.linalg.lstsq(x * weight[:, None], y * weight)[0]
    return found
