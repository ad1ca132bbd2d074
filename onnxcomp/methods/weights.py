"""Weight rounding: symmetric codes per output channel, scale by least squared error.

    nearest   W ~ scale[c] * codes,   codes = round(W / scale) in -2^(b-1) .. 2^(b-1) - 1
    gptq      codes and scale that minimize sum_t r_t ||W' x_t - (scale codes)' xh_t||^2, xh the quantized inputs of the
              layer, x the same before their quantizer, so that the weight also takes up what of its error correlates:

                  H = sum r xh xh' + damping,   V = H^-1 (sum r xh x' W + damping W)      the best float weight
                  codes: V rounded one input at a time, the rounding error of each spread over those still to come;
                  then in turns scale = codes' H V / codes' H codes, and each code the best one while the others stand

              r_t = min(1, mean energy of W' x / energy of W' x_t): a few outlier tokens do not rule over all others.
              Of a Conv x is xh, and r is 1: there both lose, or gain nothing.

Paper   GPTQ: Frantar et al. 2022, arXiv:2210.17323, equations 2 and 3, in the order of the inputs' energy, damped by 5 %.
        The best float weight: ERQ, Zhong et al. 2024, arXiv:2407.06794. Turns: COMQ, Zhang et al. 2024, arXiv:2403.07134.
Cost    products of the layer's inputs and outputs and one Cholesky factorization per layer; nothing at run time.
Gate    an output channel keeps its GPTQ codes and scale where they lower its error on held-out samples.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, Batch, Fit, Samples, is_held_out
from onnxcomp.numerics.affine import SMALLEST_SCALE, QParams, weight_qparams

ROWS_PER_SAMPLE = 256
DAMPING = 0.05
BLOCK = 64
TURNS = 2
"""Of scale and codes, after GPTQ."""
SWEEPS = 2
"""Over all codes, in each turn."""


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
    q, groups = weight_qparams(w, site.weight_axis, bits), int(attrs.get("group", 1))
    columns, codes = (_columns(a, site, groups).astype(np.float64) for a in (w, q.quantize(w)))
    read = functools.partial(_moments, site=site, w=columns, kernel=w.shape[2:], attrs=attrs, fake=fake)
    moments, size = samples.reduce(read), columns.shape[1]
    ones = moments[:, :, size:, size, None]
    judge = int(ones[1].any())
    if centred:
        moments = moments - moments[..., size, None] / np.maximum(ones, 1e-30) * moments[:, :, size:]
    xx, xy = moments[:, :, :size, :size], moments[:, :, :size, size + 1 :]
    scale = q.scale.astype(np.float64).reshape(groups, 1, -1)
    found, step = _gptq(columns, xx[0], xy[0], scale, q)
    better = _loss(found * step, xx[judge], xy[judge]) < _loss(codes * scale, xx[judge], xy[judge])
    codes, scale = np.where(better, found, codes), np.where(better, step, scale)
    stored = np.moveaxis(codes, 2, 1).reshape(w.shape) if site.op == "Conv" else codes[0]
    return {"codes": stored.astype(np.int8), "scale": scale.ravel().astype(np.float32)}


def build(op: Tape, site: Site, fitted: Fit, bits: int) -> dict[str, str]:
    """Record the dequantization of the stored codes; it replaces the weight."""
    assert site.weight is not None
    codes, scale = op.constant("codes", fitted["codes"]), op.constant("scale", fitted["scale"])
    return {site.weight: op.abstract("Dequantize", codes, scale, bits=bits, axis=site.weight_axis)}


def _gptq(w: Array, xx: Array, xy: Array, scale: Array, q: QParams) -> tuple[Array, Array]:
    """Codes [G, K, O] and scales [G, 1, O] for weights [G, K, O], moments [G, K, K] and [G, K, O] and the nearest's scales."""
    energy = np.einsum("gkk->gk", xx)[..., None]
    damping = np.where(energy > 0, 0.0, 1.0) + DAMPING * energy.mean(axis=1, keepdims=True)
    order = np.argsort(-energy, axis=1, kind="stable")
    h = np.take_along_axis(xx + damping * np.eye(xx.shape[1]), order, 1)
    h = np.take_along_axis(h, np.swapaxes(order, 1, 2), 2)
    inverse = np.linalg.inv(h)
    best = inverse @ np.take_along_axis(xy + damping * w, order, 1)
    upper = np.swapaxes(np.linalg.cholesky(inverse), 1, 2)
    codes, rest = np.empty_like(best), best.copy()
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        errors = np.empty((rest.shape[0], stop - start, rest.shape[2]))
        for i in range(start, stop):
            codes[:, i] = np.clip(np.rint(rest[:, i] / scale[:, 0]), q.scheme.qmin, q.scheme.qmax)
            errors[:, i - start] = (rest[:, i] - codes[:, i] * scale[:, 0]) / upper[:, i, i, None]
            rest[:, i + 1 : stop] -= upper[:, i, i + 1 : stop, None] * errors[:, i - start, None]
        rest[:, stop:] -= np.swapaxes(upper[:, start:stop, stop:], 1, 2) @ errors
    target = h @ best
    for _ in range(TURNS):
        product = h @ codes
        up, down = ((codes * a).sum(axis=1, keepdims=True) for a in (target, product))
        refit = np.maximum(np.where((up > 0) & (down > 0), up / np.where(down > 0, down, 1.0), scale), SMALLEST_SCALE)
        scale = refit.astype(np.float32).astype(np.float64)
        _descend(codes, target - product * scale, h, scale, q)
    return np.take_along_axis(codes, np.argsort(order, axis=1, kind="stable"), 1), scale


def _descend(codes: Array, left: Array, h: Array, scale: Array, q: QParams) -> None:
    """Give each code in turn, in place, the value of least error while the others stand; `left`: H (V - scale codes)."""
    for start in list(range(0, h.shape[1], BLOCK)) * SWEEPS:
        block = slice(start, min(start + BLOCK, h.shape[1]))
        before = codes[:, block].copy()
        near, local = h[:, block, block], left[:, block].copy()
        for i in range(near.shape[1]):
            wanted = codes[:, start + i] + local[:, i] / (near[:, i, i, None] * scale[:, 0])
            new = np.clip(np.rint(wanted), q.scheme.qmin, q.scheme.qmax)
            local -= near[:, :, i, None] * ((new - codes[:, start + i]) * scale[:, 0])[:, None]
            codes[:, start + i] = new
        left -= h[:, :, block] @ ((codes[:, block] - before) * scale)


def _loss(values: Array, xx: Array, xy: Array) -> Array:
    """Squared output error per output channel [G, 1, O] of a weight [G, K, O], less that of the weight zero."""
    return ((xx @ values - 2.0 * xy) * values).sum(axis=1, keepdims=True)


def _columns(w: Array, site: Site, groups: int) -> Array:
    """The weight as [groups, K, outputs per group]."""
    return w[None] if site.op != "Conv" else np.moveaxis(w.reshape(groups, w.shape[0] // groups, -1), 1, 2)


def _moments(
    batch: Batch, site: Site, w: Array, kernel: tuple[int, ...], attrs: Mapping[str, Any], fake: Callable[[Array], Array]
) -> Array:
    """Sums over the layer's quantized inputs xh and the outputs y that its weight is to give, weighted per token, for fitted
    and for held-out samples: [xh, 1]' [xh, 1, y], float64 [2, groups, K + 1, K + 1 + O].
    """
    groups, size, outputs = w.shape
    sums = np.zeros((2, groups, size + 1, size + 1 + outputs))
    for number, sample in zip(batch.indices, batch.read("xh"), strict=False):
        x = _rows(fake(sample), site, groups, kernel, attrs)
        y = (x if site.op == "Conv" else _rows(sample, site, groups, kernel, attrs)) @ w
        energy = np.square(y).sum(axis=(0, 2)) if site.op != "Conv" else np.ones(y.shape[1])
        root = np.sqrt(np.minimum(1.0, energy.mean() / np.maximum(energy, 1e-30)))[:, None]
        rows = np.concatenate([x, np.ones((groups, len(root), 1)), y], axis=2) * root
        sums[int(is_held_out(number))] += np.swapaxes(rows[..., : size + 1], 1, 2) @ rows
    return sums


def _rows(x: Array, site: Site, groups: int, kernel: tuple[int, ...], attrs: Mapping[str, Any]) -> Array:
    """What the weight is multiplied with, at some tokens of a sample: float64 [groups, n, K]."""
    if site.op != "Conv":
        return x[_spread(x.shape[:-1], ROWS_PER_SAMPLE)][None].astype(np.float64)
    found = patches(x, kernel, attrs)
    return found.reshape(len(found), groups, -1).swapaxes(0, 1).astype(np.float64)


def _spread(shape: tuple[int, ...], limit: int) -> tuple[Array, ...]:
    """Indices of at most about `limit` positions, evenly spread over `shape`."""
    count = math.prod(shape)
    stride = max(count // limit, 1)
    while math.gcd(stride, count) > 1 and stride > 1:
        stride -= 1
    return np.unravel_index(np.arange(0, count, stride), shape)


def patches(x: Array, kernel: tuple[int, ...], attrs: Mapping[str, Any], limit: int = ROWS_PER_SAMPLE) -> Array:
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
    return windows[_spread(windows.shape[: 1 + rank], limit)]
