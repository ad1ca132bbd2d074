"""Cross-layer equalization and smoothing: an equal float model whose activations have channels of like ranges.

    scale    x_c -> s_c x_c in front of and behind ReLUs, maxima and additions: writers' rows times s, readers' columns by s
    norms    x_c -> s_c (x_c - z_c) behind a norm that only layers read: its scale and shift, the readers' weights and biases
    mixing   x -> (x - m) A where nothing but additions lies between 1x1 layers: writers W A, readers A^-1 W

s_c = w_c^(1-a) / r_c^a from the range r_c of the channel's samples (of least squared error at the bits asked) and the norm w_c
of the weights that read it; a by the estimated error of the quantized readers. With K = M^1/2 S M^1/2 = U L U' from the
covariance S of the samples and M = sum W W' of the readers, A = M^1/2 U L^-1/4 R: what the codes of x lose and what the
readers' codes lose weigh the same then, and the rotation R spreads both over all channels. z_c is 0, the mean of the channel
or the middle of its range; where a rotation has mixed the channels behind a norm they are shifted alone.

Paper   Nagel et al. 2019, arXiv:1906.04721, section 4.1, with activations' ranges in place of the writers'. Norms: SmoothQuant,
        arXiv:2211.10438, equation 4; with z: RepQ-ViT, arXiv:2212.08254, section 3.3.
Cost    nothing at run time: an upper Clip becomes a Min per channel, which the quantizer behind it takes in.
Gate    the error of activations and weights must fall on positions that scales and ranges were not fitted on, for a channel
        that is seldom large is clipped by a scale fitted where it is small; the float model stays equal to 90 dB.
Limits  see `graph.channels`. Biases are absorbed where that is exact, behind norms and where mixing shifts; not behind a ReLU.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.graph.channels import Group, columns, divide, find_groups, transform
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph, Node, extract
from onnxcomp.graph.files import ModelProto
from onnxcomp.methods.base import Array
from onnxcomp.methods.rotation import EQUAL_DB, agreement
from onnxcomp.methods.weights import patches
from onnxcomp.numerics.affine import Scheme, weight_qparams
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.rotation import rotation
from onnxcomp.numerics.statistics import Histogram, subsample
from onnxcomp.runtime import Feed, Session, each

_Named = Mapping[str, Array]
"""By the name of a reader, or of a tensor."""
ALPHAS = (0.25, 0.5, 0.75, 1.0)
RATIOS = np.linspace(0.3, 1.0, 8)
"""Of a channel's range and its largest value."""
ROWS = 2048
"""Positions of all samples that are looked at: half to fit on, half to judge by."""
SEEN = 1 << 26
"""Bytes of such positions that are kept at once; the model is run once more for as many others."""
ROUNDED = 0.5
"""What GPTQ leaves of the error of weights rounded to nearest."""
GAIN_DB = 0.1
VALUES = 1 << 16
"""That the range of a candidate is found from."""
MIDDLE = 0.001, 0.999
"""Quantiles between which the range of a channel is looked for."""


@dataclass(frozen=True)
class Choice:
    """A change of one group, and by how much it lowers the error of the readers."""

    gain_db: float
    scale: Array
    mix: Array | None
    shifts: Mapping[str, Array]


def equalize(
    graph: Graph, like: ModelProto, bits: Mapping[str, tuple[int, int]], feeds: Iterable[Feed], *, bounds: bool
) -> tuple[Graph, list[str]]:
    """The graph with the channels of every group equalized that gains by it, and notes. `bits`: of the weights and of the
    activations of each layer to be quantized; `bounds`: whether a Clip may get a bound per channel.

    A copy; the graph itself where nothing gains, or where the result is not equal on the first of `feeds`.
    """
    equal = graph.copy()
    groups = [g for g in find_groups(equal) if all(node.name in bits for node in g.readers) and (bounds or not g.clips)]
    if not groups:
        return graph, []
    feeds = list(feeds)
    found = list[Choice]()
    for some in _parts(groups):
        seen, means = _see(graph, like, some, feeds)
        fit, held = ({k: np.array_split(x, 2)[i] if len(x) > 1 else x for k, x in seen.items()} for i in (0, 1))
        found += each(functools.partial(_best, fit=fit, held=held, means=means, bits=bits), some)
    changed = [(group, choice) for group, choice in zip(groups, found, strict=True) if choice.gain_db > GAIN_DB]
    for group, choice in changed:
        transform(equal, group, choice.scale, choice.mix, choice.shifts)
    agreed = agreement(graph, equal, like, feeds[0])
    if agreed < EQUAL_DB:
        return graph, [f"Nothing is equalized: the equalized model agrees to {agreed:.0f} dB with the float one only."]
    return equal, [f"Groups of channels equalized: {len(changed)} of {len(groups)}; equal to {agreed:.0f} dB in float."]


def _parts(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in a few parts, whose positions take about `SEEN` bytes each."""
    sizes = [4 * ROWS * group.width * sum(columns(node).shape[3] for node in group.readers) for group in groups]
    part = np.cumsum(sizes) // SEEN
    return [[group for group, own in zip(groups, part, strict=True) if own == number] for number in np.unique(part)]


def _see(
    graph: Graph, like: ModelProto, groups: Sequence[Group], feeds: Sequence[Feed]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """By the name of each reader, what its weight is multiplied with at some positions [n, C, kernel]; and by the name of each
    tensor that a linear group shifts, the mean of its channels.
    """
    readers = {node.name: node for group in groups for node in group.readers}
    means = {name for group in groups if group.linear for name in group.shifted}
    names = list(dict.fromkeys([*(node.inputs[0].name for node in readers.values()), *sorted(means)]))
    part = extract(graph, [t.name for t in graph.inputs], names)
    session = Session(to_model(part, like))
    rows: dict[str, list[Array]] = {name: [] for name in readers}
    sums: dict[str, Array] = {name: np.zeros(1) for name in means}
    for feed in feeds:
        live = session.run({t.name: feed[t.name] for t in part.inputs})
        for name, node in readers.items():
            x, limit = live[node.inputs[0].name], max(ROWS // len(feeds), 1)
            x = patches(x, node.inputs[1].shape[2:], node.attrs, limit) if node.op == "Conv" else x.reshape(-1, x.shape[-1])
            rows[name].append(x.reshape(*x.shape[:2], -1)[:: max(len(x) // limit, 1)].copy())
        for name in means:
            sums[name] = sums[name] + live[name].mean(axis=(0, *range(2, live[name].ndim)), dtype=np.float64) / len(feeds)
    return {name: np.concatenate(rows.pop(name)) for name in readers}, sums


def _best(group: Group, fit: _Named, held: _Named, means: _Named, bits: Mapping[str, tuple[int, int]]) -> Choice:
    """What lowers the error of the group's readers on the positions `held` most, of what the positions `fit` suggest."""
    ones, none, error = np.ones(group.width), dict[str, Array](), functools.partial(_error, group, fit, held, bits)
    before, centres = error(ones, None, none), _centres(group, fit, means)
    shifts = min(centres, key=lambda z: error(ones, None, z)) if len(centres) > 1 else centres[0]
    parts = (fit[node.name] - shifts.get(node.inputs[0].name, np.zeros(1))[:, None] for node in group.readers)
    x = np.concatenate([_spread(part) for part in parts])
    if group.linear:
        tried = [(ones, _mixing(group, x))]
    elif group.factor is None:
        tried = [(scale, None) for scale in _scales(group, x, bits)]
    else:
        is_mixed = (group.writers[0].inputs[group.factor].values == 1).all()
        tried = [(scale, None) for scale in [ones, *([] if is_mixed else _scales(group, x, bits))]]
    least, index = min((error(scale, mix, shifts), i) for i, (scale, mix) in enumerate(tried))
    gain = 10 * np.log10(before / max(least, 1e-30))
    return Choice(gain, tried[index][0], tried[index][1], shifts)


def _centres(group: Group, seen: Mapping[str, Array], means: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The shifts to be tried, by the names of tensors."""
    if group.linear:
        return [{name: means[name] for name in group.shifted}]
    if group.factor is None or group.writers[0].op != "LayerNormalization":
        return [{}]
    y, x = group.writers[0].outputs[0].name, _spread(seen[group.readers[0].name])
    return [{}, {y: x.mean(axis=0)}, {y: np.quantile(x, MIDDLE, axis=0).mean(axis=0)}]


def _spread(x: Array) -> Array:
    """Values by channel: [n, C] of [n, C, kernel], where the middle of the kernel lies."""
    return np.ascontiguousarray(x[:, :, x.shape[2] // 2])


def _scales(group: Group, x: Array, bits: Mapping[str, tuple[int, int]]) -> list[Array]:
    """The scales to be tried: for every a, or for a = 1 where each channel has weights of its own."""
    levels = 2 ** min(bits[node.name][1] for node in group.readers)
    w = np.sqrt(sum(np.square(_inputs(node)).sum(axis=1) for node in group.readers))
    r = _reach(x, levels - 1 if (x >= 0).all() else (levels - 1) / 2)
    r = np.maximum(r, max(0.05 * np.median(r), 0.001 * r.max(), 1e-30))  # most channels may be dead
    alphas = ALPHAS if any(columns(node).shape[2] > 1 for node in group.readers) else ALPHAS[-1:]
    found = [(w + 1e-30) ** (1 - a) / r**a for a in alphas]
    return [s / np.exp(np.log(s).mean()) for s in found]


def _reach(x: Array, levels: float) -> Array:
    """The end of each channel's range of least squared error [C], in so many steps."""
    top = np.abs(x).max(axis=0)
    best, error, lowest = top.copy(), np.full(len(top), np.inf), 0 if (x >= 0).all() else -levels
    for ratio in RATIOS:
        step = np.maximum(top * ratio / levels, 1e-30).astype(np.float32)
        found = np.square(np.clip(np.rint(x / step), lowest, levels) * step - x).sum(axis=0)
        best, error = np.where(found < error, top * ratio, best), np.minimum(found, error)
    return best


def _inputs(node: Node) -> Array:
    """The weight of a reader by its input channels [C, outputs x kernel]."""
    w = columns(node)
    return np.moveaxis(w, 2, 1).reshape(w.shape[0] * w.shape[2], -1)


def _error(
    group: Group, fit: _Named, held: _Named, bits: Mapping[str, tuple[int, int]], scale: Array, mix: Array | None,
    shifts: _Named,
) -> float:  # fmt: skip
    """The squared error of the readers' outputs on the positions `held`, summed up, that is not the same everywhere: of the
    activations as it is, in a range from `fit`; of the weights as moments foretell it.
    """
    total = 0.0
    bound = min((float(clip.inputs[2].values) * float(scale.min()) for clip in group.clips), default=np.inf)
    for node in group.readers:
        weight_bits, width = bits[node.name]
        shift = shifts.get(node.inputs[0].name, np.zeros(1)).astype(np.float32)[:, None]
        seen, x = (
            (x - shift) * scale.astype(np.float32)[:, None] if mix is None else mix.T.astype(np.float32) @ (x - shift)
            for x in (fit[node.name], held[node.name])
        )
        q = choose(Histogram.of(subsample(seen, VALUES)), Scheme(width))
        lost, w = np.minimum(q.fake(x), bound) - x, divide(columns(node), scale, mix)
        flat = w.reshape(w.shape[0] * w.shape[1], -1)
        rounded = weight_qparams(flat, 0, weight_bits).fake(flat).reshape(w.shape)
        kernels = w.reshape(*w.shape[:2], -1).swapaxes(1, 2).astype(np.float32)
        lost = lost.reshape(len(lost), len(w), -1).swapaxes(0, 1) @ kernels
        energy = np.square(x).mean(axis=0, dtype=np.float64).reshape(len(w), 1, *w.shape[2:])
        total += float(lost.var(axis=1, dtype=np.float64).sum() + ROUNDED * (energy * np.square(rounded - w)).sum())
    return total


def _mixing(group: Group, x: Array) -> Array:
    """A [C, C] of the centred samples x and the weights that read them."""
    found = []
    for moments in (x.T.astype(np.float64) @ x, sum(w @ w.T for w in map(_inputs, group.readers))):
        found.append(moments + np.eye(group.width) * 1e-3 * np.trace(moments) / group.width)
    values, vectors = np.linalg.eigh(found[1])
    root = (vectors * np.sqrt(values)) @ vectors.T
    values, vectors = np.linalg.eigh(root @ found[0] @ root)
    mix = root @ vectors * np.maximum(values, values.max() * 1e-6) ** -0.25 @ rotation(group.width)
    return mix / np.sqrt(np.square(mix).sum() / group.width)
