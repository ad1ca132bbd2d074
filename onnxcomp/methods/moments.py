"""Matched moments: every channel of a layer gets back the mean and the spread that it has in the float model.

    y' = a y + b        a = std f / std y,   b = mean f - a mean y        f: the layer's output in the float model

Layers of few bits lose a part of their signal to clipping and rounding, and the next ones work on what is left: the loss adds
up, though every layer by itself is fitted to what it sees. Two numbers per channel bring it back where it arises.

Source  re-estimated BatchNormalization; of means alone Nagel et al. 2019, arXiv:1906.04721, section 4.2.
Cost    nothing: a goes into the scales of the weight, b into the bias.
Gate    held-out samples must come closer in both moments; a lies between 4/5 and 5/4.
Limits  networks whose layers are Convs and Gemms, activations below 8 bits: with LayerNormalization the local target is better.
"""

import numpy as np

from onnxcomp.methods.base import Array, Batch, Outcome, is_held_out

MOST = 1.25
"""The largest factor a channel is scaled by; its inverse the smallest."""
PARTS = (1.0, 0.5)
"""Of the way that are tried: few samples tell little of a channel."""


def sums(batch: Batch, name: str) -> Array:
    """Of the read [N, C, ..], by channel: its sum, that of its squares, and how many they are, over fitted and over held-out
    samples, float64 [2, 3, C].
    """
    found = np.zeros((2, 3, batch.read(name)[0].shape[1]))
    for number, y in zip(batch.indices, batch.read(name), strict=False):
        rows = np.moveaxis(y, 1, 0).reshape(y.shape[1], -1).astype(np.float64)
        found[int(is_held_out(number))] += [rows.sum(axis=1), np.square(rows).sum(axis=1), np.full(len(rows), rows.shape[1])]
    return found


def moments(total: Array) -> Array:
    """Mean and deviation of fitted and held-out samples [2, 2, C] from their `sums`; the same twice where none are held out."""
    total = total if total[1, 2].any() else total[[0, 0]]
    mean = total[:, 0] / total[:, 2]
    return np.stack([mean, np.sqrt(np.maximum(total[:, 1] / total[:, 2] - np.square(mean), 0.0))], axis=1)


def fit(wanted: Array, found: Array) -> Outcome:
    """The factor and the shift [C] that give a layer of moments `found` those that are `wanted`."""
    (mean, spread), (target, width) = found[0], wanted[0]
    factor = np.where((spread > 0) & (width > 0), width / np.maximum(spread, 1e-30), 1.0).clip(1 / MOST, MOST)
    before = least = _distance(wanted[1], found[1])
    best = None
    for part in PARTS:
        gain = factor**part
        shift = mean + part * (target - mean) - gain * mean
        left = _distance(wanted[1], np.stack([gain * found[1, 0] + shift, gain * found[1, 1]]))
        best, least = ({"gain": gain, "shift": shift}, left) if left < least else (best, least)
    near = "the float model's mean and deviation per channel" if best else "held-out samples do not come closer"
    return Outcome(best, near, float(10 * np.log10(max(before, 1e-30) / max(least, 1e-30))))


def _distance(wanted: Array, found: Array) -> float:
    """How far means and deviations [2, C] are apart, in deviations."""
    return float((np.square(found - wanted).sum(axis=0) / np.maximum(np.square(wanted[1]), 1e-30)).mean())
