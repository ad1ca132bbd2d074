"""Weight rounding: symmetric codes per output channel, or block of its inputs, scale by least squared error.

    nearest   W ~ scale[c] * codes,   codes = round(W / scale) in -2^(b-1) .. 2^(b-1) - 1
    blocks    W ~ scale[k // block, c] * (codes - zero[k // block, c])                  zero = 0 where symmetric
    gptq      codes and scale that minimize sum_t r_t ||W' x_t - (scale codes)' xh_t||^2, xh the quantized inputs of the
              layer, x the same before their quantizer, so that the weight also takes up what of its error correlates:

                  H = sum r xh xh' + damping,   V = H^-1 (sum r xh x' W + damping W)      the best float weight
                  codes: V rounded one input at a time, the rounding error of each spread over those still to come;
                  then in turns scale = codes' H V / codes' H codes, and each code the best one while the others stand

              r_t = min(1, mean energy of W' x / energy of W' x_t): a few outlier tokens do not rule over all others.
              Of a Conv x is xh, and r is 1: there both lose, or gain nothing. Of blocks each scale in turn is the best
              one while those of the others stand.

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

from onnxcomp.graph.edit import Node, Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, Batch, Fit, Samples, is_held_out
from onnxcomp.numerics import saturation
from onnxcomp.numerics.affine import SMALLEST_SCALE, QParams, Scheme, along, weight_qparams
from onnxcomp.numerics.statistics import Highest, spread

ROWS_PER_SAMPLE, ROWS, EACH = 256, 1 << 13, 32
"""Tokens that are looked at: of a sample at most, of all at least, and per input of a MatMul."""
ROUNDING = 4e-6
"""What sums of squares in float32 may be off by, of their mean and for each input: all that is left of inputs that hardly vary,
centred.
"""
DAMPING = 0.05
BLOCK = 64
TURNS = 2
"""Of scale and codes, after GPTQ."""
SWEEPS = 2
"""Over all codes, in each turn."""


def fit(site: Site, w: Array, bits: int, block: int = 0, *, zero_points: bool = False) -> Fit:
    """Codes (int8, the weight's shape) and scale (float32 [C_out]) of the site's weight, rounded to nearest. In blocks of its
    inputs there is a scale, and a `zero_point` (int8) where asked for, per block: the weight's shape, shorter along its inputs.
    """
    if not block:
        q = weight_qparams(w, site.weight_axis, bits)
        return {"codes": q.quantize(w), "scale": q.scale.astype(np.float32)}
    axis = 1 - site.weight_axis
    by_input = np.moveaxis(w, axis, 0)
    size, channels = by_input.shape
    count = -(-size // block)
    padded = np.concatenate([by_input, np.zeros((count * block - size, channels), np.float32)])
    rows = padded.reshape(count, block, channels).swapaxes(1, 2).reshape(count * channels, block)
    q = weight_qparams(rows, 0, bits, symmetric=not zero_points)
    codes = q.quantize(rows).reshape(count, channels, block).swapaxes(1, 2).reshape(-1, channels)[:size]
    found = {"codes": codes, "scale": q.scale.reshape(count, channels)}
    if zero_points:
        found["zero_point"] = q.zero_point.reshape(count, channels)
    return {key: np.ascontiguousarray(np.moveaxis(values, 0, axis)) for key, values in found.items()}


def fit_gptq(
    site: Site, w: Array, bits: int, samples: Samples, attrs: Mapping[str, Any], fake: Callable[[Array], Array],
    block: int = 0, *, zero_points: bool = False, centred: bool = False,
) -> Fit:  # fmt: skip
    """The same by GPTQ. `samples` offers the layer's input as `xh`, `fake` quantizes it; `attrs` are the operator's.
    `centred`: a bias compensation follows, so the mean error does not count.
    """
    nearest, groups = fit(site, w, bits, block, zero_points=zero_points), int(attrs.get("group", 1))
    columns, codes = (_columns(a, site, groups).astype(np.float64) for a in (w, nearest["codes"]))
    size, outputs = columns.shape[1:]
    # What the weight is to give is summed as outputs, or as inputs where these are fewer: their product with W comes later.
    gram = columns[0] @ columns[0].T if outputs > size and site.op != "Conv" else None
    limit = ROWS_PER_SAMPLE if site.op == "Conv" else min(max(ROWS, EACH * size) // samples.count + 1, ROWS_PER_SAMPLE)
    read = functools.partial(_moments, site=site, w=columns, gram=gram, kernel=w.shape[2:], attrs=attrs, fake=fake, limit=limit)
    moments = samples.reduce(read).astype(np.float64)
    ones = moments[:, :, size:, size, None]
    judge = int(ones[1].any())
    least = ROUNDING * np.einsum("gkk->g", moments[0, :, :size, :size])[:, None, None] * centred
    if centred:
        moments = moments - moments[..., size, None] / np.maximum(ones, 1e-30) * moments[:, :, size:]
    xx, xy = moments[:, :, :size, :size], moments[:, :, :size, size + 1 :]
    if site.op == "Conv" or gram is not None:
        xy = (xx if site.op == "Conv" else xy) @ columns
    blocks = np.arange(size) // (block or size)  # of each input
    scale = nearest["scale"].astype(np.float64).reshape(groups, blocks[-1] + 1, -1)[:, blocks]
    zero = nearest["zero_point"].astype(np.float64)[None, blocks] if zero_points else np.zeros((1, 1, 1))
    codes -= zero
    scheme = Scheme(bits, signed=True)
    try:
        found, step = _gptq(columns, xx[0], xy[0], scale, blocks, (scheme.qmin - zero, scheme.qmax - zero), least)
    except np.linalg.LinAlgError:  # they are rounding errors after all
        found, step = codes, scale
    better = _loss(found * step, xx[judge], xy[judge]) < _loss(codes * scale, xx[judge], xy[judge])
    codes, scale = np.where(better, found, codes) + zero, np.where(better, step, scale)[:, :: block or size]
    stored = np.moveaxis(codes, 2, 1).reshape(w.shape) if site.op == "Conv" else codes[0]
    return dict(nearest) | {"codes": stored.astype(np.int8), "scale": scale.reshape(nearest["scale"].shape).astype(np.float32)}


def hold(site: Site, w: Array, fitted: Fit, quantize: Node, groups: int, samples: Samples | None) -> tuple[Fit, str]:
    """The 8-bit codes, or others near them, for the weight w, of which no two products leave 16 bits; see
    `numerics.saturation`. Why some are others; empty where none is. `quantize` quantizes the layer's input, which `samples`
    offer as `xh`; where its range is not static, or without them, that is whatever its codes can be.
    """
    codes, is_conv, static = fitted["codes"], site.op == "Conv", quantize.attrs["granularity"] == "static"
    channels, bits = groups * codes.shape[1] if is_conv else len(codes), quantize.attrs["bits"]
    top = np.full(channels, 2**bits - 1)
    pairs = saturation.reach(top[None])
    if samples is not None and static and not saturation.is_exact(codes, groups):
        q = QParams(Scheme(bits), *(t.values for t in quantize.inputs[1:3]))
        padding, axis = q.zero_point if is_conv else 0, 1 if is_conv else -1

        def highest(batch: Batch) -> Highest:
            rows = (np.moveaxis(x, axis, -1).reshape(-1, channels) for x in batch.read("xh"))
            return Highest(np.max([a.max(axis=0) for a in rows], axis=0))

        top = np.maximum(q.quantize(samples.reduce(highest).values), padding)
        pairs, asked = saturation.reach(top[None]), saturation.crowded(codes, top, groups)
        some = np.flatnonzero(np.repeat(asked, 2)[:channels])

        def reached(batch: Batch) -> Highest:
            rows = (np.moveaxis(x.take(some, axis), axis, -1).reshape(-1, len(some)) for x in batch.read("xh"))
            return Highest(np.max([saturation.reach(q.quantize(a)) for a in rows], axis=0))

        if some.size:
            around = saturation.reach(np.full((1, len(some)), padding))
            pairs[asked] = np.maximum(samples.reduce(reached).values, around)
    held, scale = saturation.hold(w, codes, fitted["scale"], top, pairs, groups)
    reason = "sums of two products of 8-bit codes may leave 16 bits, so some of the weight's were changed"
    return {"codes": held, "scale": scale}, "" if np.array_equal(held, codes) else reason


def build(op: Tape, site: Site, fitted: Fit, bits: int, block: int = 0, *, is_float: bool = False) -> dict[str, str]:
    """Record the dequantization of the stored codes; it replaces the weight. `is_float`: of an operator that computes in float,
    even where it reads codes.
    """
    assert site.weight is not None
    stored = [op.constant(key, fitted[key]) for key in ("codes", "scale", "zero_point") if key in fitted]
    how = {"axis": 1 - site.weight_axis, "block": block} if block else {"axis": site.weight_axis}
    return {site.weight: op.abstract("Dequantize", *stored, bits=bits, **how, **({"float": 1} if is_float else {}))}


def stored(node: Node) -> Array:
    """The float32 weight that an abstract Dequantize makes of its codes."""
    codes, *ranges = (t.values.astype(np.float32) for t in node.inputs)
    axis, block = node.attrs["axis"], node.attrs.get("block")
    if block:
        ranges = [np.repeat(a, block, axis).take(range(codes.shape[axis]), axis) for a in ranges]
    else:
        ranges = [along(a, axis, codes.ndim) for a in ranges]
    scale, zero = (*ranges, 0.0)[:2]
    return (codes - zero) * scale


def _gptq(
    w: Array, xx: Array, xy: Array, scale: Array, blocks: Array, ends: tuple[Array, Array], least: Array | float = 0.0
) -> tuple[Array, Array]:
    """Codes and scales [G, K, O] for weights [G, K, O], moments [G, K, K] and [G, K, O], the nearest's scales [G, K, O], the
    block [K] of each input, the ends of the codes' range, which are arrays that go with them, and the least damping [G, 1, 1].
    """
    energy = np.einsum("gkk->gk", xx)[..., None]
    damping = np.where(energy > 0, 0.0, 1.0) + np.maximum(DAMPING * energy.mean(axis=1, keepdims=True), least)
    order = np.argsort(-energy, axis=1, kind="stable")
    h = np.take_along_axis(xx + damping * np.eye(xx.shape[1]), order, 1)
    h = np.take_along_axis(h, np.swapaxes(order, 1, 2), 2)
    inverse = np.linalg.inv(h)
    best = inverse @ np.take_along_axis(xy + damping * w, order, 1)
    scale = np.take_along_axis(scale, order, 1)
    low, high = (np.take_along_axis(np.broadcast_to(end, w.shape), order, 1) for end in ends)
    lower = np.linalg.cholesky(inverse)
    codes, rest = np.empty_like(best), best.copy()
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        errors = np.empty((rest.shape[0], stop - start, rest.shape[2]))
        for i in range(start, stop):
            now = rest[:, i] - _times(lower[:, i, start:i], errors)
            codes[:, i] = _clipped(now / scale[:, i], low[:, i], high[:, i])
            errors[:, i - start] = (now - codes[:, i] * scale[:, i]) / lower[:, i, i, None]
        rest[:, stop:] -= lower[:, stop:, start:stop] @ errors
    left, number = h @ (best - codes * scale), blocks[order[0, :, 0]]
    members = [np.flatnonzero(number == b) for b in range(blocks[-1] + 1)] if blocks[-1] else [slice(None)]
    for _ in range(TURNS):
        for mine in members:
            some, was = codes[:, mine], scale[:, mine][:, :1]
            product = h[:, :, mine] @ some
            up, down = ((some * a[:, mine]).sum(axis=1, keepdims=True) for a in (left + product * was, product))
            refit = np.maximum(np.where((up > 0) & (down > 0), up / np.where(down > 0, down, 1.0), was), SMALLEST_SCALE)
            refit = refit.astype(np.float32).astype(np.float64)
            left += product * (was - refit)
            scale[:, mine] = refit
        _descend(codes, left, h, scale, (low, high))
    back = np.argsort(order, axis=1, kind="stable")
    return np.take_along_axis(codes, back, 1), np.take_along_axis(scale, back, 1)


def _descend(codes: Array, left: Array, h: Array, scale: Array, ends: tuple[Array, Array]) -> None:
    """Give each code in turn, in place, the value of least error while the others stand; `left`: H (V - scale codes)."""
    rate = 1.0 / (np.einsum("gkk->gk", h)[..., None] * scale)
    for start in list(range(0, h.shape[1], BLOCK)) * SWEEPS:
        block = slice(start, min(start + BLOCK, h.shape[1]))
        near, moved = h[:, block, block], np.empty_like(codes[:, block])
        for i in range(near.shape[1]):
            at = start + i
            wanted = codes[:, at] + (left[:, at] - _times(near[:, i, :i], moved)) * rate[:, at]
            new = _clipped(wanted, ends[0][:, at], ends[1][:, at])
            moved[:, i] = (new - codes[:, at]) * scale[:, at]
            codes[:, at] = new
        left -= h[:, :, block] @ moved


def _times(row: Array, rows: Array) -> Array:
    """The sum [G, O] of the first of `rows` [G, .., O], each times its number in `row` [G, n]."""
    return (row[:, None] @ rows[:, : row.shape[1]])[:, 0]


def _clipped(a: Array, low: Array, high: Array) -> Array:
    """The nearest whole numbers from `low` to `high`, in place."""
    return np.minimum(np.maximum(np.rint(a, out=a), low, out=a), high, out=a)


def _loss(values: Array, xx: Array, xy: Array) -> Array:
    """Squared output error per output channel [G, 1, O] of a weight [G, K, O], less that of the weight zero."""
    return ((xx @ values - 2.0 * xy) * values).sum(axis=1, keepdims=True)


def _columns(w: Array, site: Site, groups: int) -> Array:
    """The weight as [groups, K, outputs per group]."""
    return w[None] if site.op != "Conv" else np.moveaxis(w.reshape(groups, w.shape[0] // groups, -1), 1, 2)


def _moments(
    batch: Batch, site: Site, w: Array, gram: Array | None, kernel: tuple[int, ...], attrs: Mapping[str, Any],
    fake: Callable[[Array], Array], limit: int,
) -> Array:  # fmt: skip
    """Sums over the layer's quantized inputs xh and its target t, weighted per token, for fitted and for held-out samples:
    [xh, 1]' [xh, 1, t], float32 [2, groups, K + 1, ..]. t is the output W' x, the input x where
    `gram`, W W', is given, and left out for a Conv, whose x is xh.
    """
    groups, size, outputs = w.shape
    targets, w = 0 if site.op == "Conv" else outputs if gram is None else size, w.astype(np.float32)
    seen: tuple[list[tuple[Array, Array]], ...] = ([], [])
    for number, sample in zip(batch.indices, batch.read("xh"), strict=False):
        if site.op == "Conv":
            x = patches(fake(sample), kernel, attrs, limit, number)
            x = x.reshape(len(x), groups, -1).swapaxes(0, 1)
            root, target = np.ones((x.shape[1], 1), np.float32), np.zeros((*x.shape[:2], 0), np.float32)
        else:
            rows = (a.reshape(-1, size) for a in (fake(sample), sample))
            x, raw = (a[spread(len(a), limit, number)][None] for a in rows)
            target = raw @ w if gram is None else raw
            energy = np.einsum("gtk,gtk->t", target, target if gram is None else raw @ gram.astype(np.float32))
            root = np.sqrt(np.minimum(1.0, energy.mean() / np.maximum(energy, 1e-30)))[:, None]
        ones = np.ones((groups, len(root), 1), np.float32)
        seen[int(is_held_out(number))].append((np.concatenate([x, ones], axis=2) * root, target * root))
    sums = np.zeros((2, groups, size + 1, size + 1 + targets), np.float32)
    for found, parts in zip(sums, seen, strict=True):
        if parts:
            left, right = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
            turned = np.swapaxes(left, 1, 2)
            found[..., : size + 1], found[..., size + 1 :] = turned @ left, turned @ right
    return sums


def patches(
    x: Array, kernel: tuple[int, ...], attrs: Mapping[str, Any], limit: int = ROWS_PER_SAMPLE, number: int = 0
) -> Array:  # fmt: skip
    """What a convolution multiplies its weight with, at some positions of sample `number`: [n, C, kernel]."""
    rank = len(kernel)
    pads = attrs.get("pads") or [0] * 2 * rank
    dilations, strides = (attrs.get(name) or [1] * rank for name in ("dilations", "strides"))
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, 2 + rank)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations)))]
    windows = np.moveaxis(windows, 1, 1 + rank)  # [N, positions, C, kernel]
    count = math.prod(windows.shape[: 1 + rank])
    return windows[np.unravel_index(np.arange(*spread(count, limit, number).indices(count)), windows.shape[: 1 + rank])]
