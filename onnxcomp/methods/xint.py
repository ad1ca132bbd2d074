"""FP=xINT series expansion: a layer as the sum of low-bit layers, without data and without training.

    W ~ sum_j s_j W_j  (j <= k)        x ~ sum_i D_i  (i <= t)        y = sum_ij D_i (s_j W_j)
    s_{j+1} = s_j / (2^X - 2)          R_1 = x - D_1,  D_{i+1} = Q(R_i) with a step 2^X - 2 times finer

W_j are X-bit digits in -(2^(X-1) - 1) .. 2^(X-1) - 1, with one scale per output channel; D_1 is the layer's own activation
quantizer, shared by every branch. With the paper's divisor 2^X digits would need 2^X + 1 values, and clamping them stops
the convergence; 2^X - 2 and the symmetric range converge by 20 log10(2^X - 2) dB per term (22.9 at 4 bits).

Paper   arXiv:2412.06865 (series of weights and activations, saturation term, tensor, layer and model granularity); the
        step that is measured anew where the term before has clipped is REx's (NeurIPS 2023).
Cost    k t low-bit products on shared codes and one Sum; k times the weight. A layer with float activations (a Conv
        without static ranges) stores k terms, which are added up when the file is loaded: no time at all.
Gate    the relative error of the weight and, with samples, of held-out inputs falls; an exact one gets no further term.
Limits  the Conv of an integer region stores its output in 8 bits: its weight terms become one int8 weight where they fit,
        and its input keeps one term. Layers that share a weight share its first term only. Where tensor granularity does
        not fit into 8 bits, or has several activation terms of static ranges, the product is computed in float.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from onnxcomp.errors import RecipeError, UsageError
from onnxcomp.graph.edit import Constant, Graph, Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.activations import RatioErrors, build_run_time
from onnxcomp.methods.base import Array, Batch, Compensation, Fit, Outcome, Samples
from onnxcomp.methods.bias import HOLD_OUT
from onnxcomp.numerics.affine import SMALLEST_SCALE, QParams, Scheme, from_range
from onnxcomp.numerics.statistics import Extremes

XH = frozenset({"xh"})
FLOAT_DB = 140.0
"""From here on what is left is the rounding of float32."""


@dataclass(frozen=True)
class Terms:
    """A quantized layer in front of its bias methods: what a series starts from."""

    site: Site
    weight: Array
    """The float weight."""
    w: str
    """The tensor of the weight's first term, made of `codes` (int8, the weight's shape) and `scale` [C_out]."""
    codes: Array
    scale: Array
    bits: int
    """Width of the weight's digits."""
    x: str
    """The tensor in front of the activation quantizer."""
    d: str | None = None
    """The quantizer's output, the first activation term; None where activations are float."""
    granularity: str = "float"
    activation_bits: int = 8
    ratio: float = 1.0
    """The clip ratio of a range that is measured at run time."""
    q: QParams | None = None
    """The quantizer, where its range is static."""
    allowed: int | None = None
    """How many weight terms a budget leaves to the layer, see `allocate`."""

    @staticmethod
    def read(graph: Graph, site: Site, weight: Array, allowed: int | None = None) -> Terms:
        """What stands at the site of the compressed `graph`, whose weight is codes already."""
        node = next(node for node in graph.nodes if node.name == site.name)
        x, w = node.inputs[:2]
        bits, (codes, scale) = w.inputs[0].attrs["bits"], (t.values for t in w.inputs[0].inputs)
        if not x.inputs or x.inputs[0].op != "FakeQuantize":
            return Terms(site, weight, w.name, codes, scale, bits, x.name, allowed=allowed)
        source, how = x.inputs[0].inputs, x.inputs[0].attrs
        q = QParams(Scheme(how["bits"]), *(t.values for t in source[1:])) if len(source) == 3 else None
        quantizer = (source[0].name, x.name, how["granularity"], how["bits"], how.get("ratio", 1.0), q)
        return Terms(site, weight, w.name, codes, scale, bits, *quantizer, allowed)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def finer(self) -> float:
        """The step of the second activation term over that of the first, which may have clipped."""
        return max(0.5 / _top(self.activation_bits), 1.0 / self.ratio - 1.0)


@final
@dataclass(frozen=True)
class XInt(Compensation):
    """FP=xINT: weights in k terms, activations in t, data-free by default."""

    weight_terms: int = 2
    """Terms of a weight, k; with a tolerance or a budget at most so many."""
    activation_terms: int = 1
    """Terms of an activation, t; with a tolerance at most so many."""
    granularity: str = "layer"
    """`layer`: one low-bit product per pair of terms. `tensor`: terms are added up first and one product is computed.
    `model`: as `layer`, with k and t the same everywhere, so that every weight term is a low-bit model of its own."""
    saturation: int = 0
    """Input channels, at most, whose values beyond a static range go through a small float product."""
    tolerance: float = 0.0
    """The fewest terms with which a weight, and an input, is reproduced to so many dB; 0 takes all terms."""
    budget: float = 0.0
    """Mean number of weight terms, per number stored, that layers share by residual times size; 0 sets no bound."""
    reads: ClassVar[frozenset[str]] = frozenset({"xh"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("tensor", "layer", "model"):
            raise RecipeError(f"granularity = '{self.granularity}' is unknown. Use 'tensor', 'layer' or 'model'.")
        if not (1 <= self.weight_terms <= 8 and 1 <= self.activation_terms <= 8):
            raise RecipeError("weight_terms and activation_terms must lie in 1..8.")
        if self.saturation < 0 or self.tolerance < 0 or not (self.budget == 0 or self.budget >= 1):
            raise RecipeError("saturation and tolerance must not be negative, and budget must be 0 or at least 1.")
        if (self.tolerance > 0) + (self.budget > 0) + (self.granularity == "model") > 1:
            raise RecipeError("tolerance, budget and granularity = 'model' each decide the number of terms. Give one of them.")
        if self.granularity == "tensor" and self.saturation:
            raise RecipeError("saturation is a branch of its own, and granularity = 'tensor' has none. Use 'layer'.")

    @property
    def scope(self) -> str:
        return "terms"

    def fit(self, place: Terms, samples: Samples | None) -> Outcome:
        uniform, most = self.granularity == "model", min(place.allowed or self.weight_terms, self.weight_terms)
        while place.site.op == "Conv" and place.d is not None and not uniform and _largest(place.bits, most) > 127:
            most -= 1  # the region's kernel takes one int8 weight
        later, left = expand(place.weight, place.codes, place.scale, place.site.weight_axis, place.bits, most)
        inputs, channels, (before, *left_x) = self._fit_input(place, samples)
        k, t = (len(e) if uniform else self._enough(e) for e in (left, left_x))
        if k == t == 1 and not len(channels):
            return Outcome(None, "one term is enough, or all that fits")
        gain = 10.0 * math.log10(max(left[0] + before, 1e-30) / max(left[k - 1] + left_x[t - 1], 1e-30))
        if gain <= 0 and self.keep == "if-better" and not uniform:
            return Outcome(None, "held-out inputs do not improve", gain)
        fit: dict[str, Array] = {"terms": np.array([k, t])}
        for j, (codes, scale) in enumerate(later[: k - 1], 2):
            fit |= {f"codes-{j}": codes, f"scale-{j}": scale}
        for i, q in enumerate(inputs[: t - 1], 2):
            fit |= {f"scale-x{i}": q.scale, f"zero_point-x{i}": q.zero_point}
        reason = f"{k} weight and {t} activation terms"
        if len(channels) and place.q is not None:
            ends = np.sum([_reach(q) for q in (place.q, *inputs[: t - 1])], axis=0).astype(np.float32)
            fit |= {"channels": channels, "low": ends[0], "high": ends[1], "rows": place.weight[channels]}
            reason += f", {len(channels)} channels beyond the range"
        return Outcome(fit, reason, gain)

    def _enough(self, left: Sequence[float]) -> int:
        """The fewest terms that leave no more than the tolerance, or than float32 does."""
        limit = 10 ** (-(self.tolerance or FLOAT_DB) / 10)
        return next((n for n, e in enumerate(left, 1) if e <= limit), len(left))

    def _fit_input(self, place: Terms, samples: Samples | None) -> tuple[list[QParams], Array, list[float]]:
        """The quantizers of static terms from the second on; the saturated channels, those with the most energy beyond the
        range; and the relative error of one term alone and, with saturated channels served, of 1, 2, .. terms.
        """
        terms, bits = 1 if place.site.op == "Conv" else self.activation_terms, place.activation_bits
        later, channels = list[QParams](), np.zeros(0, np.int64)
        if place.d is None:
            return later, channels, [0.0, 0.0]
        if samples is None:
            left = [(2.0 * _top(bits)) ** (-2 * i) for i in range(1, terms + 1)]
            return later, channels, [left[0], *left]
        if place.q is not None and place.site.op != "Conv":
            energy = samples.reduce(lambda batch: _beyond(batch, place), XH).errors
            channels = np.sort(np.argsort(-energy, kind="stable")[: min(self.saturation, np.count_nonzero(energy))])
            while len(later) < terms - 1:
                found = samples.reduce(lambda batch: _extremes(batch, place, later, channels), XH)
                later.append(from_range(found.min, found.max, Scheme(bits)))
        fitted, held_out = samples.reduce(lambda batch: _errors(batch, place, later, terms, channels), XH).errors
        energy, *left = held_out if held_out[0] > 0 else fitted
        return later, channels, [e / max(energy, 1e-30) for e in left]

    def build(self, op: Tape, place: Terms, fit: Fit) -> dict[str, str]:
        """What replaces the operator's output, or, for this operator alone, its weight `w` and its input `d`."""
        k, t = (int(n) for n in fit["terms"])
        if place.d is None or place.site.op == "Conv" or self.granularity == "tensor":
            new = {} if k == 1 else {place.w: self._one_weight(op, place, fit, k)}
            if place.d is not None and t > 1:
                new[place.d] = self._one_input(op, place, fit, t)
            return new
        assert place.d is not None
        ws, ds = _weights(op, place, fit, k), _inputs(op, place, fit, t)
        products = [place.site.raw, *(op("MatMul", d, w) for d in ds for w in ws if (d, w) != (place.d, place.w))]
        if "channels" in fit:
            x = op("Gather", place.x, op.constant("channels", fit["channels"]), axis=-1)
            inside = op("Clip", x, op.constant("low", fit["low"]), op.constant("high", fit["high"]))
            products.append(op("MatMul", op("Sub", x, inside), op.constant("rows", fit["rows"])))
        return {place.site.raw: op("Sum", *products)}

    def _one_weight(self, op: Tape, place: Terms, fit: Fit, k: int) -> str:
        """All terms as one tensor: of int8 codes where they fit, unless each must stay a term of its own."""
        axis, scale = place.site.weight_axis, fit[f"scale-{k}"]
        if self.granularity == "tensor" or (self.granularity == "layer" and place.d is not None):
            codes = np.rint(total(place, fit) / _values(np.ones(()), scale, axis, place.codes.ndim))
            if np.abs(codes).max() <= 127:
                stored = op.constant("codes", codes.astype(np.int8)), op.constant("scale", scale)
                return op.abstract("Dequantize", *stored, bits=8, axis=axis)
        return op("Sum", *_weights(op, place, fit, k))

    def _one_input(self, op: Tape, place: Terms, fit: Fit, t: int) -> str:
        """All terms as one tensor: one quantizer with the last term's step where it needs no more than 8 bits."""
        largest = _largest(place.activation_bits, t)
        if place.q is None and largest <= 127:
            return build_run_time(op, place.x, Scheme(8), place.granularity, 127 / largest)
        return op("Sum", *_inputs(op, place, fit, t))


def first_term(w: Array, axis: int, bits: int) -> Fit:
    """Codes (int8, the shape of `w`) and scale (float32, by index of `axis`) of a first term, which clips nothing."""
    top, rows = _top(bits), np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    scale = np.maximum(np.abs(rows).max(axis=1).astype(np.float64) / top, SMALLEST_SCALE).astype(np.float32)
    return {"codes": np.rint(w / _values(np.ones(()), scale, axis, w.ndim)).astype(np.int8), "scale": scale}


def expand(
    w: Array, codes: Array, scale: Array, axis: int, bits: int, terms: int
) -> tuple[list[tuple[Array, Array]], list[float]]:
    """Codes and scale of the terms from the second on, and the relative energy that 1, 2, .. terms leave of `w`."""
    top = _top(bits)
    rest = w - _values(codes, scale, axis)
    energy = max(float(np.square(w, dtype=np.float64).sum()), 1e-30)
    later, left = [], [float(np.square(rest).sum()) / energy]
    while len(left) < terms:
        largest = np.abs(np.moveaxis(rest, axis, 0).reshape(w.shape[axis], -1)).max(axis=1)
        # Half a step, up to rounding, unless the term before has clipped.
        scale = np.where(largest > 0.501 * scale, largest / top, scale / (2.0 * top)).astype(np.float32)
        codes = np.rint(rest / _values(np.ones(()), scale, axis, w.ndim)).clip(-top, top).astype(np.int8)
        rest = rest - _values(codes, scale, axis)
        later.append((codes, scale))
        left.append(float(np.square(rest).sum()) / energy)
    return later, left


def total(place: Terms, fit: Fit) -> Array:
    """The weight that all terms stand for, float64."""
    terms = [(place.codes, place.scale), *((fit[f"codes-{j}"], fit[f"scale-{j}"]) for j in range(2, int(fit["terms"][0]) + 1))]
    return np.sum([_values(codes, scale, place.site.weight_axis) for codes, scale in terms], axis=0)


def allocate(left: Mapping[str, Sequence[float]], sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Terms per layer, so that the mean over all numbers stored does not exceed `budget`: one each, then one more where
    residual times size is largest. `left`: the relative energy that 1, 2, .. terms leave; `sizes`: numbers per term.
    """
    terms, room = dict.fromkeys(left, 1), (budget - 1.0) * sum(sizes[name] for name in left)
    while True:
        open_ = [name for name in left if terms[name] < len(left[name]) and sizes[name] <= room and left[name][terms[name] - 1]]
        if not open_:
            return terms
        chosen = max(open_, key=lambda name: left[name][terms[name] - 1] * sizes[name])
        terms[chosen], room = terms[chosen] + 1, room - sizes[chosen]


def split(graph: Graph, sites: Sequence[Site], weight_terms: int, term: int) -> Graph:
    """The low-bit model of one weight term, 1 .. `weight_terms`: `graph`, which stays as it is, with nothing else of every
    series. Biases are in the first; fed with the same inputs, a layer's outputs in all of them add up to its own.

    `graph` is the compressed one before it is lowered, of granularity `model` and with no other compensation. Raises
    UsageError for another term.
    """
    if not 1 <= term <= weight_terms:
        raise UsageError(f"There is no term {term}: the series has {weight_terms}.")
    part = graph.copy()
    nodes = {node.name: node for node in part.nodes}
    for site in sites:
        sums = [n for n in part.nodes if n.op == "Sum" and n.name.startswith(f"{site.name}/xint/")]
        for series in sums:
            of_layers = len(series.inputs) // weight_terms * weight_terms
            kept = list(series.inputs[:of_layers])[term - 1 :: weight_terms]
            series.inputs = kept if term > 1 else [*kept, *list(series.inputs)[of_layers:]]
            layer = kept[0].inputs[0]
            if layer.op == "MatMul" and term > 1:
                nodes[site.name].name, layer.name = layer.name, site.name
        home = nodes[site.bias_node] if site.bias_node is not None else nodes[site.name]
        for index, bias in enumerate(home.inputs):
            if sums and term > 1 and isinstance(bias, Constant):
                home.inputs[index] = Constant(f"{bias.name}/none", np.zeros_like(bias.values))
    return part.cleanup()


def _top(bits: int) -> int:
    """The largest digit."""
    return 2 ** (bits - 1) - 1


def _largest(bits: int, terms: int) -> int:
    """The largest value, which is the largest first digit, in steps of the last term."""
    return _top(bits) * (2 * _top(bits)) ** (terms - 1)


def _values(codes: Array, scale: Array, axis: int, ndim: int | None = None) -> Array:
    """Codes times their channel's scale, float64; [1, .., C, .., 1] for a code without axes."""
    shape = [1] * (codes.ndim if ndim is None else ndim)
    shape[axis] = -1
    return codes * scale.astype(np.float64).reshape(shape)


def _reach(q: QParams) -> Array:
    """The smallest and the largest value that a quantizer of one tensor has a code for."""
    return (np.array([q.scheme.qmin, q.scheme.qmax]) - float(q.zero_point)) * float(q.scale)


def _left(place: Terms, later: Sequence[QParams], terms: int, channels: Array, x: Array) -> list[Array]:
    """What is left of x [.., C] after 1, 2, .. terms, without what the saturated channels have beyond the first's range.
    Static terms are those that have a quantizer; of ranges measured at run time there are `terms`.
    """
    if place.q is not None:
        if len(channels):
            x = x.copy()
            x[..., channels] = x[..., channels].clip(*_reach(place.q))
        found = [x - place.q.fake(x)]
        for q in later:
            found.append(found[-1] - q.fake(found[-1]))
        return found
    top, axis = _top(place.activation_bits), -1 if place.granularity == "token" else None
    step = np.maximum(np.abs(x).max(axis=axis, keepdims=True).astype(np.float64) * (place.ratio / top), 1e-12)
    found = [x.astype(np.float64)]
    for i in range(terms):
        found.append(found[-1] - np.clip(np.rint(found[-1] / step), -top - 1, top) * step)
        step = step * (place.finer if i == 0 else 0.5 / top)
    return found[1:]


def _beyond(batch: Batch, place: Terms) -> RatioErrors:
    """The energy of every channel beyond the first term's range."""
    assert place.q is not None
    over = [x.astype(np.float64) - np.clip(x, *_reach(place.q)) for x in batch.read("xh")]
    return RatioErrors(np.sum([np.square(e).reshape(-1, e.shape[-1]).sum(axis=0) for e in over], axis=0))


def _extremes(batch: Batch, place: Terms, later: Sequence[QParams], channels: Array) -> Extremes:
    """Of what is left so far."""
    parts = [Extremes.of(_left(place, later, 1, channels, x)[-1]) for x in batch.read("xh")]
    return functools.reduce(Extremes.merge, parts)


def _errors(batch: Batch, place: Terms, later: Sequence[QParams], terms: int, channels: Array) -> RatioErrors:
    """Energies of fitted and of held-out inputs [2, 2 + terms]: their own, what one term leaves without saturated channels,
    and what 1, 2, .. terms leave with them.
    """
    rows = np.zeros((2, 2 + terms))
    for number, x in zip(batch.indices, batch.read("xh"), strict=False):
        parts = [x, *_left(place, [], 1, channels[:0], x), *_left(place, later, terms, channels, x)]
        rows[int(number % HOLD_OUT == HOLD_OUT - 1)] += [np.square(e, dtype=np.float64).sum() for e in parts]
    return RatioErrors(rows)


def _weights(op: Tape, place: Terms, fit: Fit, k: int) -> list[str]:
    """The tensors of all weight terms."""
    stored = [[op.constant(key, fit[key]) for key in (f"codes-{j}", f"scale-{j}")] for j in range(2, k + 1)]
    return [place.w, *(op.abstract("Dequantize", *s, bits=place.bits, axis=place.site.weight_axis) for s in stored)]


def _inputs(op: Tape, place: Terms, fit: Fit, t: int) -> list[str]:
    """The tensors of all activation terms; each but the first quantizes what the one before has left of `x`."""
    assert place.d is not None
    found, bits = [place.d], place.activation_bits
    for i in range(2, t + 1):
        ranges = [op.constant(key, fit[key]) for key in (f"scale-x{i}", f"zero_point-x{i}") if key in fit]
        finer = place.finer if i == 2 else 0.5 / _top(bits)
        options = {"bits": bits, "signed": 0, "granularity": "residual", "finer": finer}
        found.append(op.abstract("FakeQuantize", place.x, found[-1], *ranges, **options))
    return found


METHOD = XInt
