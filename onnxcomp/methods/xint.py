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
        not fit into 8 bits (7 where products of 8 may saturate), or has several activation terms of static ranges, the
        product is computed in float.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from onnxcomp.errors import RecipeError
from onnxcomp.graph.edit import Constant, Graph, Tape
from onnxcomp.graph.sites import Site, matches
from onnxcomp.methods.activations import build_run_time
from onnxcomp.methods.base import Array, Compensation, Fit, Outcome, Samples, is_held_out
from onnxcomp.numerics.affine import SMALLEST_SCALE, QParams, Scheme, along, from_range

FLOAT_DB = 140.0
"""From here on what is left is the rounding of float32."""


class Digits(NamedTuple):
    """One term of a weight."""

    codes: Array
    """int8, the weight's shape."""
    scale: Array
    """float32 [C_out]."""

    def values(self, axis: int) -> Array:
        """What they stand for, float64."""
        return self.codes * along(self.scale.astype(np.float64), axis, self.codes.ndim)


@dataclass(frozen=True)
class Terms:
    """A quantized layer in front of its bias methods: what a series starts from."""

    site: Site
    weight: Array
    """The float weight."""
    w: str
    """The tensor of the weight's first term."""
    first: Digits
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
    most: int = 127
    """The largest code of several terms in one."""

    @staticmethod
    def read(graph: Graph, site: Site, weight: Array, most: int = 127) -> Terms:
        """What stands at the site of the compressed `graph`, whose weight is codes already."""
        x, w = next(node for node in graph.nodes if node.name == site.name).inputs[:2]
        first, bits = Digits(*(t.values for t in w.inputs[0].inputs)), w.inputs[0].attrs["bits"]
        if not x.inputs or x.inputs[0].op != "FakeQuantize":
            return Terms(site, weight, w.name, first, bits, x.name, most=most)
        (source, *ranges), how = x.inputs[0].inputs, x.inputs[0].attrs
        q = QParams(Scheme(how["bits"]), *(t.values for t in ranges)) if ranges else None
        quantizer = (x.name, how["granularity"], how["bits"], how.get("ratio", 1.0), q)
        return Terms(site, weight, w.name, first, bits, source.name, *quantizer, most)

    def finer(self, term: int) -> float:
        """The step of an activation term, the second or a later one, over that before it. The first may have clipped."""
        return max(0.5 / _top(self.activation_bits), 1.0 / self.ratio - 1.0 if term == 2 else 0.0)


Count = Annotated[int, Field(ge=1, le=8)]
"""How many terms there may be."""


@final
@dataclass(frozen=True)
class XInt(Compensation):
    """FP=xINT: weights in k terms, activations in t, data-free by default."""

    weight_terms: Count = 2
    """Terms of a weight, k; with a tolerance or a budget at most so many."""
    activation_terms: Count = 1
    """Terms of an activation, t; with a tolerance at most so many."""
    granularity: Literal["tensor", "layer", "model"] = "layer"
    """`layer`: one low-bit product per pair of terms. `tensor`: terms are added up first and one product is computed.
    `model`: as `layer`, with k and t the same everywhere, so that every weight term is a low-bit model of its own."""
    saturation: NonNegativeInt = 0
    """Input channels, at most, whose values beyond a static range go through a small float product."""
    tolerance: NonNegativeFloat = 0.0
    """The fewest terms with which a weight, and an input, is reproduced to so many dB; 0 takes all terms."""
    budget: NonNegativeFloat = 0.0
    """Mean number of weight terms, per number stored, that layers share by residual times size; 0 sets no bound."""
    scope: ClassVar[str] = "terms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.budget < 1:
            raise RecipeError("budget must be 0 or at least 1.")
        if (self.tolerance > 0) + (self.budget > 0) + (self.granularity == "model") > 1:
            raise RecipeError("tolerance, budget and granularity = 'model' each decide the number of terms. Give one of them.")
        if self.granularity == "tensor" and self.saturation:
            raise RecipeError("saturation is a branch of its own, and granularity = 'tensor' has none. Use 'layer'.")

    def fit(self, place: Terms, samples: Samples | None) -> Outcome:
        uniform, most = self.granularity == "model", self.weight_terms
        while place.site.op == "Conv" and place.d is not None and not uniform and _largest(place.bits, most) > place.most:
            most -= 1  # the region's kernel takes one int8 weight
        digits, left = expand(place.weight, place.site.weight_axis, place.bits, most, place.first)
        later, channels, (before, *left_x) = self._fit_input(place, samples)
        k, t = (len(e) if uniform else self._enough(e) for e in (left, left_x))
        if k == t == 1 and not len(channels):
            return Outcome(None, "one term is enough, or all that fits")
        gain = 10.0 * math.log10(max(left[0] + before, 1e-30) / max(left[k - 1] + left_x[t - 1], 1e-30))
        if gain <= 0 and self.keep == "if-better" and not uniform:
            return Outcome(None, "held-out inputs do not improve", gain)
        fit: dict[str, Array] = {"terms": np.array([k, t])}
        for j, (codes, scale) in enumerate(digits[1:k], 2):
            fit |= {f"codes-{j}": codes, f"scale-{j}": scale}
        for i, q in enumerate(later[: t - 1], 2):
            fit |= {f"scale-x{i}": q.scale, f"zero_point-x{i}": q.zero_point}
        reason = f"{k} weight and {t} activation terms"
        if len(channels) and place.q is not None:
            low, high = np.sum([_reach(q) for q in (place.q, *later[: t - 1])], axis=0).astype(np.float32)
            fit |= {"channels": channels, "low": low, "high": high, "rows": place.weight[channels]}
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
        later, channels, q = list[QParams](), np.zeros(0, np.int64), place.q
        if place.d is None:
            return later, channels, [0.0, 0.0]
        if samples is None:
            left = [(2.0 * _top(bits)) ** (-2 * i) for i in range(1, terms + 1)]
            return later, channels, [left[0], *left]
        if q is not None and self.saturation and place.site.op != "Conv":
            energy = _reduce(samples, lambda _, x: _beyond(q, x))
            channels = np.sort(np.argsort(-energy, kind="stable")[: min(self.saturation, np.count_nonzero(energy))])

        def ends(_: int, x: Array) -> tuple[float, ...]:
            rest = _left(place, later, 1, channels, x)[-1]
            return rest.min(initial=0.0), rest.max(initial=0.0)

        while q is not None and len(later) < terms - 1:
            found = _reduce(samples, ends)
            later.append(from_range(min(found), max(found), Scheme(bits)))

        def errors(number: int, x: Array) -> Array:
            """Of fitted and of held-out inputs: their energy, and that of what is left of them."""
            parts = [x, *_left(place, [], 1, channels[:0], x), *_left(place, later, terms, channels, x)]
            rows = np.zeros((2, len(parts)))
            rows[int(is_held_out(number))] = [np.square(e, dtype=np.float64).sum() for e in parts]
            return rows

        fitted, held_out = _reduce(samples, errors)
        energy, *left = held_out if held_out[0] > 0 else fitted
        return later, channels, [e / max(energy, 1e-30) for e in left]

    def build(self, op: Tape, place: Terms, fit: Fit) -> dict[str, str]:
        """What replaces the operator's output, or, for this operator alone, its weight `w` and its input `d`."""
        k, t = (int(n) for n in fit["terms"])
        if place.d is None or place.site.op == "Conv" or self.granularity == "tensor":
            new = {} if k == 1 else {place.w: self._one_weight(op, place, fit, k)}
            if place.d is not None and t > 1:
                largest = _largest(place.activation_bits, t)
                if place.q is None and largest <= 127:  # one quantizer with the last term's step
                    new[place.d] = build_run_time(op, place.x, Scheme(8), place.granularity, 127 / largest)
                else:
                    new[place.d] = op("Sum", *_inputs(op, place, place.d, fit, t))
            return new
        ws, ds = _weights(op, place, fit, k), _inputs(op, place, place.d, fit, t)
        products = [place.site.raw, *(op("MatMul", d, w) for d in ds for w in ws if (d, w) != (place.d, place.w))]
        if "channels" in fit:
            x = op("Gather", place.x, op.constant("channels", fit["channels"]), axis=-1)
            inside = op("Clip", x, op.constant("low", fit["low"]), op.constant("high", fit["high"]))
            products.append(op("MatMul", op("Sub", x, inside), op.constant("rows", fit["rows"])))
        return {place.site.raw: op("Sum", *products)}

    def _one_weight(self, op: Tape, place: Terms, fit: Fit, k: int) -> str:
        """All terms as one tensor: of int8 codes where they fit, unless each must stay a term of its own."""
        merged = self.granularity == "tensor" or (self.granularity == "layer" and place.d is not None)
        if not merged or _largest(place.bits, k) > place.most:
            return op("Sum", *_weights(op, place, fit, k))
        axis, scale = place.site.weight_axis, fit[f"scale-{k}"]
        codes = np.rint(total(place, fit) / along(scale.astype(np.float64), axis, place.weight.ndim)).astype(np.int8)
        return op.abstract("Dequantize", op.constant("codes", codes), op.constant("scale", scale), bits=8, axis=axis)


def first_term(w: Array, axis: int, bits: int) -> Digits:
    """The first term of `w`, which clips nothing. `axis`: that of the output channels."""
    return _next_term(w, np.full(w.shape[axis], 2.0 * _top(bits) * SMALLEST_SCALE), axis, bits)


def expand(w: Array, axis: int, bits: int, terms: int, first: Digits | None = None) -> tuple[list[Digits], list[float]]:
    """So many terms of `w`, with the `first` where that is given, and the relative energy that 1, 2, .. of them leave."""
    found = [first or first_term(w, axis, bits)]
    left = [w - found[0].values(axis)]
    for _ in range(1, terms):
        found.append(_next_term(left[-1], found[-1].scale, axis, bits))
        left.append(left[-1] - found[-1].values(axis))
    energy = max(float(np.square(w, dtype=np.float64).sum()), 1e-30)
    return found, [float(np.square(rest).sum()) / energy for rest in left]


def _next_term(rest: Array, before: Array, axis: int, bits: int) -> Digits:
    """One more term of what is left; `before` is the scale of the last."""
    top, largest = _top(bits), np.abs(np.moveaxis(rest, axis, 0).reshape(rest.shape[axis], -1)).max(axis=1)
    # Half a step, up to rounding, unless the term before has clipped.
    scale = np.where(largest > 0.501 * before, largest / top, before / (2.0 * top)).astype(np.float32)
    return Digits(np.rint(rest / along(scale.astype(np.float64), axis, rest.ndim)).clip(-top, top).astype(np.int8), scale)


def total(place: Terms, fit: Fit) -> Array:
    """The weight that all terms stand for, float64."""
    later = (Digits(fit[f"codes-{j}"], fit[f"scale-{j}"]) for j in range(2, int(fit["terms"][0]) + 1))
    return np.sum([digits.values(place.site.weight_axis) for digits in (place.first, *later)], axis=0)


def allocate(left: Mapping[str, Sequence[float]], sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Terms per layer, so that the mean over all numbers stored does not exceed `budget`: one each, then one more where
    residual times size is largest. `left`: the relative energy that 1, 2, .. terms leave; `sizes`: numbers per term.
    """
    terms, room = dict.fromkeys(left, 1), (budget - 1.0) * sum(sizes[name] for name in left)
    wanted = [(e * sizes[name], name) for name, energies in left.items() for e in energies[:-1] if e]
    for _, name in sorted(wanted, key=lambda pair: -pair[0]):
        if sizes[name] <= room:
            terms[name], room = terms[name] + 1, room - sizes[name]
    return terms


def share_out(
    methods: Sequence[Compensation], layers: Sequence[Site], bits: Mapping[str, int], weight: Callable[[Site], Array]
) -> dict[str, XInt]:
    """The method that adds residual terms to each layer, with as many of the weight as a budget leaves it; where that is one,
    none. `bits`: of each layer's weight; `weight`: a layer's float one.
    """
    found: dict[str, XInt] = {}
    for method in (m for m in methods if isinstance(m, XInt)):
        sites = [site for site in layers if matches(method.where, site)]
        terms = {site.name: method.weight_terms for site in sites}
        if method.budget:
            ws = {site.name: (weight(site), site.weight_axis, bits[site.name]) for site in sites}
            left = {name: expand(*w, method.weight_terms)[1] for name, w in ws.items()}
            terms = allocate(left, {name: w[0].size for name, w in ws.items()}, method.budget)
        found |= {name: replace(method, weight_terms=n) for name, n in terms.items() if n > 1 or not method.budget}
    return found


def split(graph: Graph, sites: Sequence[Site], weight_terms: int) -> list[Graph]:
    """The low-bit models of all weight terms: `graph`, which stays as it is, with nothing else of every series. Biases are
    in the first; fed with the same inputs, a layer's outputs in all of them add up to its own.

    `graph` is the compressed one before it is lowered, of granularity `model` and with no other compensation.
    """
    parts = [graph.copy() for _ in range(weight_terms)]
    for term, part in enumerate(parts):
        nodes = {node.name: node for node in part.nodes}
        for site in sites:
            series = next((n for n in part.nodes if n.op == "Sum" and n.name.startswith(f"{site.name}/xint/")), None)
            if series is None:
                continue
            # Weight terms alternate; a branch for saturation, if any, is last and comes with the first.
            series.inputs = list(series.inputs)[term::weight_terms]
            layer, home = series.inputs[0].inputs[0], nodes[site.bias_node or site.name]
            if layer.op == "MatMul":
                nodes[site.name].name, layer.name = layer.name, site.name
            for index, bias in enumerate(home.inputs):
                if term > 0 and isinstance(bias, Constant):
                    home.inputs[index] = Constant(f"{bias.name}/none", np.zeros_like(bias.values))
        part.cleanup()
    return parts


def _top(bits: int) -> int:
    """The largest digit."""
    return 2 ** (bits - 1) - 1


def _largest(bits: int, terms: int) -> int:
    """The largest value, which is the largest first digit, in steps of the last term."""
    return _top(bits) * (2 * _top(bits)) ** (terms - 1)


def _reach(q: QParams) -> Array:
    """The smallest and the largest value that a quantizer of one tensor has a code for."""
    return (np.array([q.scheme.qmin, q.scheme.qmax]) - float(q.zero_point)) * float(q.scale)


def _reduce(samples: Samples, fn: Callable[[int, Array], Any]) -> Any:
    """What `fn` makes of the number and the input of each sample, added up."""
    return samples.reduce(lambda batch: functools.reduce(operator.add, map(fn, batch.indices, batch.read("xh"))))


def _beyond(q: QParams, x: Array) -> Array:
    """The energy of every channel of x [.., C] beyond the quantizer's range."""
    over = x.astype(np.float64) - np.clip(x, *_reach(q))
    return np.square(over).reshape(-1, x.shape[-1]).sum(axis=0)


def _left(place: Terms, later: Sequence[QParams], terms: int, channels: Array, x: Array) -> list[Array]:
    """What is left of x [.., C] after 1, 2, .. terms, without what the saturated channels have beyond the first's range.
    Static terms are those that have a quantizer; of ranges measured at run time there are `terms`.
    """
    if place.q is not None:
        x = x.copy()
        x[..., channels] = x[..., channels].clip(*_reach(place.q))
        quantizers = [q.fake for q in (place.q, *later)]
    else:
        top, axis = _top(place.activation_bits), -1 if place.granularity == "token" else None
        x = x.astype(np.float64)
        step = np.maximum(np.abs(x).max(axis=axis, keepdims=True) * (place.ratio / top), 1e-12)
        steps = itertools.accumulate((place.finer(i) for i in range(2, terms + 1)), operator.mul, initial=step)
        quantizers = [lambda rest, s=s: np.clip(np.rint(rest / s), -top - 1, top) * s for s in steps]
    return list(itertools.accumulate(quantizers, lambda rest, fake: rest - fake(rest), initial=x))[1:]


def _weights(op: Tape, place: Terms, fit: Fit, k: int) -> list[str]:
    """The tensors of all weight terms."""
    stored = [[op.constant(key, fit[key]) for key in (f"codes-{j}", f"scale-{j}")] for j in range(2, k + 1)]
    return [place.w, *(op.abstract("Dequantize", *s, bits=place.bits, axis=place.site.weight_axis) for s in stored)]


def _inputs(op: Tape, place: Terms, d: str, fit: Fit, t: int) -> list[str]:
    """The tensors of all activation terms; each but the first, `d`, quantizes what the one before has left of `x`."""
    found = [d]
    for i in range(2, t + 1):
        ranges = [op.constant(key, fit[key]) for key in (f"scale-x{i}", f"zero_point-x{i}") if key in fit]
        options = {"bits": place.activation_bits, "signed": 0, "granularity": "residual", "finer": place.finer(i)}
        found.append(op.abstract("FakeQuantize", place.x, found[-1], *ranges, **options))
    return found


METHOD = XInt
