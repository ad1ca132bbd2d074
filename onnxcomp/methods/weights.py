"""Weight rounding: symmetric codes per output channel, scale by least squared error.

    nearest   W ~ scale[c] * codes,   codes = round(W / scale) in -2^(b-1) .. 2^(b-1) - 1
    gptq      codes that minimize ||(W - scale codes)' X||^2 over the layer's quantized inputs X: rounded one input at a
              time, the rounding error of each spread over those still to come

Paper   Frantar et al. 2022, arXiv:2210.17323, equations 2 and 3, in the order of the inputs' energy, damped by 1 %.
Cost    one product X'X of the layer's inputs and one Cholesky factorization per layer; nothing at run time.
Gate    an output channel keeps its GPTQ codes where they lower its error on held-out samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import HOLD_OUT, Array, Batch, Fit, Samples
from onnxcomp.numerics.affine import QParams, weight_qparams

ROWS_PER_SAMPLE = 128
DAMPING = 0.01
BLOCK = 64


@dataclass(frozen=True)
class Gram:
    """Of a layer's inputs X, for fitted and for held-out samples: X'X [2, groups, K, K], the sum of its rows [2, groups, K]
    and their number [2].
    """

    products: Array
    sums: Array
    count: Array

    def merge(self, other: Gram) -> Gram:
        """The sum of both."""
        return Gram(self.products + other.products, self.sums + other.sums, self.count + other.count)

    def centred(self) -> Array:
        """X'X of the inputs without their mean, whose error a bias takes up."""
        means = self.sums / np.maximum(self.count, 1)[:, None, None]
        return self.products - self.sums[..., None] * means[..., None, :]


def fit(site: Site, w: Array, bits: int) -> Fit:
    """Codes (int8, the weight's shape) and scale (float32 [C_out]) of the site's weight, rounded to nearest."""
    q = weight_qparams(w, site.weight_axis, bits)
    return {"codes": q.quantize(w), "scale": q.scale.astype(np.float32)}


def fit_gptq(
    site: Site, w: Array, bits: int, samples: Samples, attrs: Mapping[str, Any], fake: Callable[[Array], Array],
    *, centred: bool = False,
) -> Fit:  # fmt: skip
    """The same by GPTQ. `samples` offers the layer's input as `xh`, `fake` quantizes it; `attrs` are the operator's.
    `centred`: a bias compensation follows, so the mean error does not count.
    """
    q = weight_qparams(w, site.weight_axis, bits)
    groups = int(attrs.get("group", 1))
    seen = samples.reduce(lambda batch: _gram(batch, site, groups, w, attrs, fake), frozenset({"xh"}))
    gram = seen.centred() if centred else seen.products
    columns = _columns(w, site, groups)
    scale = q.scale.astype(np.float64).reshape(groups, 1, -1)
    nearest = _columns(q.quantize(w), site, groups).astype(np.float64)
    codes = _gptq(columns, gram[0], scale, q)
    judged = gram[1] if gram[1].any() else gram[0]
    better = _loss(columns - codes * scale, judged) < _loss(columns - nearest * scale, judged)
    codes = np.where(better, codes, nearest)
    stored = np.moveaxis(codes, 2, 1).reshape(w.shape) if site.op == "Conv" else codes[0]
    return {"codes": stored.astype(np.int8), "scale": q.scale.astype(np.float32)}


def build(op: Tape, site: Site, fitted: Fit, bits: int) -> dict[str, str]:
    """Record the dequantization of the stored codes; it replaces the weight."""
    assert site.weight is not None
    codes, scale = op.constant("codes", fitted["codes"]), op.constant("scale", fitted["scale"])
    return {site.weight: op.abstract("Dequantize", codes, scale, bits=bits, axis=site.weight_axis)}


def _gptq(w: Array, gram: Array, scale: Array, q: QParams) -> Array:
    """Codes [G, K, O] for weights [G, K, O], X'X [G, K, K] and scales [G, 1, O]."""
    energy = np.einsum("gkk->gk", gram)
    order = np.argsort(-energy, axis=1, kind="stable")
    h = np.take_along_axis(np.take_along_axis(gram, order[:, :, None], 1), order[:, None, :], 2)
    diagonal = np.einsum("gkk->gk", h)
    diagonal += np.where(diagonal > 0, 0.0, 1.0) + DAMPING * diagonal.mean(axis=1, keepdims=True)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(h)), 1, 2)
    rest = np.take_along_axis(w.astype(np.float64), order[:, :, None], 1)
    codes = np.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        errors = np.empty((rest.shape[0], stop - start, rest.shape[2]))
        for i in range(start, stop):
            codes[:, i] = np.clip(np.rint(rest[:, i] / scale[:, 0]), q.scheme.qmin, q.scheme.qmax)
            errors[:, i - start] = (rest[:, i] - codes[:, i] * scale[:, 0]) / upper[:, i, i, None]
            rest[:, i + 1 : stop] -= upper[:, i, i + 1 : stop, None] * errors[:, i - start, None]
        rest[:, stop:] -= np.swapaxes(upper[:, start:stop, stop:], 1, 2) @ errors
    back = np.argsort(order, axis=1, kind="stable")
    return np.take_along_axis(codes, back[:, :, None], 1)


def _loss(error: Array, gram: Array) -> Array:
    """Squared output error per output channel [G, 1, O] of a weight error [G, K, O]."""
    return np.einsum("gko,gko->go", gram @ error, error)[:, None]


def _columns(w: Array, site: Site, groups: int) -> Array:
    """The weight as [groups, K, outputs per group]."""
    return w[None] if site.op != "Conv" else np.moveaxis(w.reshape(groups, w.shape[0] // groups, -1), 1, 2)


def _gram(batch: Batch, site: Site, groups: int, w: Array, attrs: Mapping[str, Any], fake: Callable[[Array], Array]) -> Gram:
    size = math.prod(w.shape[1:]) if site.op == "Conv" else w.shape[0]
    total = Gram(np.zeros((2, groups, size, size)), np.zeros((2, groups, size)), np.zeros(2))
    for number, x in zip(batch.indices, batch.read("xh"), strict=False):
        if site.op == "Conv":
            rows = _patches(fake(x), w.shape[2:], attrs).reshape(-1, groups, size).swapaxes(0, 1)
        else:
            rows = fake(x[_spread(x.shape[:-1], ROWS_PER_SAMPLE)])[None]
        part = int(number % HOLD_OUT == HOLD_OUT - 1)
        total.products[part] += rows.swapaxes(1, 2) @ rows
        total.sums[part] += rows.sum(axis=1, dtype=np.float64)
        total.count[part] += rows.shape[1]
    return total


def _spread(shape: tuple[int, ...], limit: int) -> tuple[Array, ...]:
    """Indices of at most about `limit` positions, evenly spread over `shape`."""
    count = math.prod(shape)
    stride = max(count // limit, 1)
    while math.gcd(stride, count) > 1 and stride > 1:
        stride -= 1
    return np.unravel_index(np.arange(0, count, stride), shape)


def _patches(x: Array, kernel: tuple[int, ...], attrs: Mapping[str, Any]) -> Array:
    """What a convolution multiplies its weight with, at some of its positions: [n, C, kernel]."""
    rank = len(kernel)
    pads = attrs.get("pads") or [0] * 2 * rank
    dilations, strides = (attrs.get(name) or [1] * rank for name in ("dilations", "strides"))
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, 2 + rank)))
    windows = windows[
        (slice(None), slice(None), *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    ]
    windows = np.moveaxis(windows, 1, 1 + rank)  # [N, positions, C, kernel]
    return windows[_spread(windows.shape[: 1 + rank], ROWS_PER_SAMPLE)]
