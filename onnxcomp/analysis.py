"""Which sites cost the output most when they are quantized: measured at the output, in a bounded number of passes.

One walk quantizes the model. Then every part that loses something, an activation quantizer x -> x + e or a weight with its
bias y -> y + e, becomes x + m e with a number m of its own: all m = 0 are the float model, all m = 1 the compressed one, and in
between lies a smooth function y(m), for the errors e stand still. Two sets of them are recorded: what quantizing does to the
float model's own tensors, and what it does to those that the compressed model computes.

    isolated    |y(m_s = 1/2) - y(m_s = -1/2)|^2 around m = 0, the float model's errors: this part alone, the rest float
    cumulative  what |y - y_0|^2 falls by without the part, half of the others being there, the compressed model's errors

over the outputs of all samples, relative to |y_0|^2. Cumulative shares add up to the damage of all, as far as y is linear;
sites are ranked by them. All parts move at once: in pass k part s has the sign of row k of its column of an orthogonal matrix,
and its own is what correlates with that. Each pass is run with all signs turned round too, which takes out what two parts do
together:

    y(m_k) - y(-m_k) = sum_s sign_ks effect_s        effect_s = sum_k sign_ks (y(m_k) - y(-m_k)) / passes

Parts that are more than columns share these, with other partners and signs in every sample; least squares part them again.

Cost    `PASSES` pairs of passes over the float model for each of the two, on `SAMPLES` samples, whatever the depth.
Limits  isolated effects are those among small errors everywhere, not in an untouched model. Estimates of parts far below the
        largest are noise of either sign. What compensates blocks or inputs is left out of the walk.
"""

import dataclasses
import functools
import glob
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onnxcomp import account, pipeline, recipe as recipes, runtime
from onnxcomp.compress.walk import Walk
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import DOMAIN, Constant, Graph, Node, Tape, Variable, apply, extract, tensors_of
from onnxcomp.graph.selection import compared
from onnxcomp.methods.weights import stored
from onnxcomp.numerics.affine import Scheme
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.report.model import Analysis, Damage
from onnxcomp.targets.lowering import TINY

Array = np.ndarray
PASSES, SAMPLES = 64, 12
"""Pairs of passes at most, and samples."""
TURNS = 3
"""Of least squares, a row counting the less the more is expected of it."""
SUGGESTED = 3
MASK = "onnxcomp/mask"


class Part(NamedTuple):
    """One source of error: the weight of a site, or the quantizer in front of one or more, and the tensor that holds e."""

    is_weight: bool
    sites: tuple[str, ...]
    error: str


def analyze(
    model: runtime.Model, data: object, recipe: str | Path | Recipe = "auto", *, progress: runtime.Progress = runtime.ignore
) -> Analysis:
    """Rank the sites of `model` by the damage that quantizing them as `recipe` says does at the output, measured on `data`.

    Arguments are those of `onnxcomp.quantize`. Raises the kinds of `onnxcomp.errors`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.find(recipe)
    if data is None or not recipe.samples:
        raise UsageError("Damage is measured on samples. Pass --data, and a recipe with samples above 0.")
    layers = tuple(method for method in recipe.compensate if method.scope == "layer")
    made = pipeline.compress(model, data, dataclasses.replace(recipe, compensate=layers), progress)
    assert made.samples is not None
    walk, samples = made.walk, made.samples
    graph, parts = blend(walk)
    outputs = [t.name for t in compared(walk.reference) if t.dtype == np.float32]
    if not outputs:
        raise ModelError("The model has no output of type float32, so damage cannot be measured there.")
    passes = min(PASSES, 1 << max(len(parts) - 1, 0).bit_length())
    feeds = [samples[i] for i in range(min(SAMPLES, len(samples)))]
    total, alone, shares = _measure(_sessions(graph, walk, parts, outputs), parts, feeds, passes, progress)
    tensors, found, energies = tensors_of(walk.reference), list[Damage](), np.diag(alone)
    for site in walk.plan.sites:
        share = np.array([(site.name in p.sites) / max(len(p.sites), 1) for p in parts])
        own = share * [[p.is_weight == w for p in parts] for w in (True, False)]
        common = own.sum(axis=0) @ (alone - np.diag(energies)) @ own.sum(axis=0)
        figures = map(float, (energies @ own.sum(axis=0) + common, *(own @ energies), *(own @ shares)))
        numbers = 0 if site.weight is None else math.prod(tensors[site.weight].shape)
        found.append(Damage(site.name, site.op, site.kind, account.bits(site, walk), numbers, *figures))
    found.sort(key=lambda row: -row.cumulative)
    worst = [row.name for row in found if row.kind == "layer"][:SUGGESTED]
    title, better = Path(model).name if isinstance(model, str | Path) else "model", _better(worst, recipe.bits)
    return Analysis(title, str(recipe.bits), walk.target.name, len(feeds), 4 * passes + 2, total, tuple(found), better)


def _better(names: Sequence[str], bits: Bits) -> str:
    """A piece of a recipe that quantizes these layers less: at 8 bits, or else with float activations, or else not at all."""
    patterns = [json.dumps(glob.escape(name)) for name in names]
    if bits == Bits(8, None):
        return f"exclude = [{', '.join(patterns)}]\n"
    wide = Bits(8, None if bits.activations is None else 8)
    better = 'activations = "float"' if min(bits.weights, bits.activations or 8) >= 8 else f'bits = "{wide}"'
    return "\n".join(f"[[site]]\nwhere = {pattern}\n{better}\n" for pattern in patterns)


def blend(walk: Walk) -> tuple[Graph, tuple[Part, ...]]:
    """The compressed graph in float operators, with x + m e at every part; m are the numbers of its input `MASK`."""
    graph, taken = walk.compressed.copy(), {site.name for site in walk.plan.sites}
    graph.inputs.append(Variable(MASK, np.dtype(np.float32), ["parts"]))
    parts: list[Part] = []

    def mix(op: Tape, is_weight: bool, sites: Sequence[str], exact: str, rounded: str, replaced: str) -> None:
        error, number = op("Sub", rounded, exact), op("Gather", MASK, op.constant("part", np.array(len(parts))))
        apply(graph, "mix", op, {replaced: op("Add", exact, op("Mul", error, number))})
        parts.append(Part(is_weight, tuple(sites), error))

    for node in [n for n in graph.nodes if n.domain == DOMAIN]:
        y, op = node.outputs[0], Tape(f"{node.name}/mixed")
        if node.op == "Dequantize":
            apply(graph, "mix", op, {y.name: op("Identity", op.constant("w", stored(node)))})
        else:
            behind = graph.nodes[next(i for i, n in enumerate(graph.nodes) if n is node) :]
            readers = [n.name for n in y.outputs if n.name in taken] or [n.name for n in behind if n.name in taken][:1]
            mix(op, False, readers, node.inputs[0].name, _fake(op, node), y.name)
    nodes, exact = {n.name: n for n in graph.nodes}, {n.name: n for n in walk.reference.nodes}
    for site in [s for s in walk.plan.sites if s.weight is not None and s.kind != "stored"]:
        node, op = exact[site.name], Tape(f"{site.name}/mixed")
        pairs = enumerate(itertools.zip_longest(node.inputs, nodes[site.name].inputs[: len(node.inputs)]))
        read = [op.constant(f"exact-{i}", a.values) if isinstance(a, Constant) else b.name for i, (a, b) in pairs]
        y = op(node.op, *read, **node.attrs)
        if site.bias_node is not None:
            bias = next(t for t in exact[site.bias_node].inputs if t.name == site.bias)
            y = op("Add", y, op.constant("exact-bias", bias.values))
        mix(op, True, [site.name], y, site.y, site.y)
    return graph, tuple(parts)


def _fake(op: Tape, node: Node) -> str:
    """What the abstract quantizer makes of its input, in float operators."""
    x, scheme = node.inputs[0].name, Scheme(node.attrs["bits"], bool(node.attrs["signed"]))
    if node.attrs["granularity"] == "static":
        scale, zero = (t.values for t in node.inputs[1:3])
        step, ends = op.constant("step", scale), (scheme.qmin - int(zero), scheme.qmax - int(zero))
    else:
        top, axes = 2 ** (scheme.bits - 1) - 1, [op.constant("axes", np.array([-1]))]
        largest, ends = op("ReduceMax", op("Abs", x), *(axes if node.attrs["granularity"] == "token" else [])), (-top - 1, top)
        factor = op.constant("factor", np.array(node.attrs["ratio"] / top, np.float32))
        step = op("Max", op("Mul", largest, factor), op.constant("tiny", np.array(TINY)))
    least, most = (op.constant(key, np.array(end, np.float32)) for key, end in zip(("least", "most"), ends, strict=True))
    return op("Mul", op("Clip", op("Round", op("Div", x, step)), least, most), step)


Run = Callable[[runtime.Feed, Array], tuple[Array, runtime.Feed]]
"""Takes a feed and m; returns all outputs as one vector, and the errors where they are computed."""


def _sessions(graph: Graph, walk: Walk, parts: Sequence[Part], outputs: Sequence[str]) -> tuple[Run, Run]:
    """What runs the graph with its quantizers, and with the errors given in place of them."""
    errors, inputs = [part.error for part in parts], [t.name for t in graph.inputs]
    recording, injecting = extract(graph, inputs, [*outputs, *errors]), extract(graph, [*inputs, *errors], list(outputs))
    taken = {t.name for t in injecting.inputs}

    def runner(part: Graph) -> Run:
        session = runtime.Session(to_model(part, walk.like))

        def run(feed: runtime.Feed, m: Array) -> tuple[Array, runtime.Feed]:
            found = session.run({**feed, MASK: m.astype(np.float32)})
            y = np.concatenate([found[name].ravel() for name in outputs]).astype(np.float64)
            return np.where(np.isfinite(y), y, 0.0), {**feed, **{name: a for name, a in found.items() if name in taken}}

        return run

    return runner(recording), runner(injecting)


def _measure(
    runs: tuple[Run, Run], parts: Sequence[Part], feeds: Sequence[runtime.Feed], passes: int, progress: runtime.Progress
) -> tuple[float, Array, Array]:
    """The damage of all parts, of each alone with what two of one site have in common beside it, and the share of each."""
    (record, inject), columns, rng = runs, hadamard(passes), np.random.default_rng(0)
    rows: list[tuple[Array, Array, Array]] = []
    signal, total, count = 0.0, 0.0, len(parts)
    products, seen = np.zeros((2, count, count))
    for number, feed in enumerate(feeds):
        progress("analyzing", number, len(feeds))
        (y0, alone), (y1, together) = (record(feed, np.full(count, m)) for m in (0.0, 1.0))
        signal, total = signal + float(y0 @ y0), total + float((y1 - y0) @ (y1 - y0))
        column, sign = rng.permutation(count) % passes, rng.choice([-1.0, 1.0], count)
        signs, member = columns[:, column] * sign / 2, (column == np.arange(passes)[:, None]) * sign
        effects = columns @ np.array([inject(alone, row)[0] - inject(alone, -row)[0] for row in signs]) / passes
        lost = [[np.square(inject(together, 0.5 + m)[0] - y0).sum() for m in (row, -row)] for row in signs]
        shares = columns @ np.subtract(*np.transpose(lost)) / passes
        gram = effects @ effects.T
        rows.append((member, np.diag(gram), shares))
        apart = column[:, None] != column
        products, seen = products + apart * gram[column][:, column] * sign * sign[:, None], seen + apart
    progress("analyzing", len(feeds), len(feeds))
    member, squares, shares = (np.concatenate(found) for found in zip(*rows, strict=True))
    isolated = products / np.maximum(seen, 1)
    np.fill_diagonal(isolated, _solve(np.abs(member), squares))
    return total / signal, isolated * len(feeds) / signal, _solve(member, shares) * len(feeds) / signal


def hadamard(size: int) -> Array:
    """Orthogonal columns of signs, as a symmetric matrix; `size` is a power of two."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    return functools.reduce(np.kron, [two] * (size.bit_length() - 1), np.ones((1, 1)))


def _solve(x: Array, y: Array) -> Array:
    """Least squares in turns; see `TURNS`."""
    weight, found = np.ones(len(x)), np.zeros(x.shape[1])
    for _ in range(TURNS):
        found = np.linalg.lstsq(x * weight[:, None], y * weight)[0]
        expected = np.abs(x) @ np.abs(found)
        weight = 1 / (expected + 0.1 * expected.mean() + 1e-30)
    return found
