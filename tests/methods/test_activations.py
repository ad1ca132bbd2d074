"""Activation quantizers: which scale they get from which values, and the nodes they are recorded as."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.graph.edit import DOMAIN, Tape
from onnxcomp.methods import activations
from onnxcomp.methods.activations import RATIOS, VALUES_PER_SAMPLE
from onnxcomp.numerics.affine import QParams, Scheme, from_range
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram

Array = np.ndarray
U8, U4 = Scheme(8), Scheme(4)


def cut(x: Array, batch: int = 1) -> Cut:
    """Samples [N, ...] of the tensor `xh`, `batch` at a time."""
    starts = range(0, len(x), batch)
    parts = [x[start : start + batch].astype(np.float32) for start in starts]
    batches = [LiveBatch(tuple(range(s, s + len(p))), {"h": p}) for s, p in zip(starts, parts, strict=True)]
    return Cut(batches, {"xh": "h"})


def same(q: QParams, other: QParams) -> bool:
    return (q.scale.tobytes(), q.zero_point.tobytes(), q.scheme) == (
        other.scale.tobytes(),
        other.zero_point.tobytes(),
        other.scheme,
    )


# --- static ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [U8, U4, Scheme(8, symmetric=True)])
def test_minmax_spans_the_smallest_and_largest_value_of_all_samples(scheme: Scheme):
    x = np.array([[1, 2], [-3, 0], [5, 0.5]])

    found = activations.fit_static(cut(x), scheme, "minmax", 99.99)

    assert same(found, from_range(-3.0, 5.0, scheme))


def test_minmax_looks_at_every_value(rng: np.random.Generator):
    x = rng.uniform(0, 1, size=(1, 4 * VALUES_PER_SAMPLE))
    x[0, 1] = 100  # every fourth value and those beside it are not all looked at otherwise

    assert activations.fit_static(cut(x), U8, "minmax", 99.99).scale == np.float32(100 / 255)


def test_a_large_value_at_one_place_of_every_sample_counts_as_often_as_it_occurs(rng: np.random.Generator):
    """At such places a vision transformer has values forty times larger than anywhere else, of which its output depends."""
    x = rng.normal(size=(64, 8 * VALUES_PER_SAMPLE)).clip(-5, 5)
    x[:, 1] = 400

    q = activations.fit_static(cut(x), U8, "mse", 99.99)

    assert q.fake(np.float32([400])) > 300


@pytest.mark.parametrize("ranges", ["mse", "percentile"])
def test_other_ranges_are_chosen_from_the_histogram_of_all_samples(rng: np.random.Generator, ranges: str):
    x = rng.normal(size=(6, 500))

    found = activations.fit_static(cut(x), U4, ranges, 98.0)

    assert same(found, choose(Histogram.of(x), U4, ranges, 98.0))


def test_a_sample_of_many_values_is_thinned_evenly(rng: np.random.Generator):
    few = rng.normal(size=(1, VALUES_PER_SAMPLE))

    found = activations.fit_static(cut(np.repeat(few, 4, axis=1)), U4, "mse", 99.99)

    thinned = np.repeat(few, 4, axis=1)[:, ::3]  # the largest stride up to 4 that divides no power of two
    assert same(found, choose(Histogram.of(thinned), U4))


@pytest.mark.parametrize("ranges", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("batch", [2, 5, 12])
def test_the_batch_size_changes_no_bit_of_a_static_range(rng: np.random.Generator, ranges: str, batch: int):
    x = rng.normal(size=(12, 7, 5))

    one, many = (activations.fit_static(cut(x, size), U8, ranges, 99.0) for size in (1, batch))

    assert same(one, many)


def test_no_code_stands_for_more_than_the_highest_value():
    x = np.array([[0.0, 12.0]])

    found = activations.fit_static(cut(x), U8, "minmax", 99.99, highest=6.0)

    assert found.zero_point == 0
    assert found.scale == np.float32(6 / 255)


def test_a_range_below_the_highest_value_is_left_alone():
    x = np.array([[0.0, 3.0]])

    assert activations.fit_static(cut(x), U8, "minmax", 99.99, highest=6.0).scale == np.float32(3 / 255)


def test_the_highest_value_counts_from_the_zero_point_up():
    x = np.array([[-6.0, 9.0]])  # scale 1, zero point 6 at four bits

    found = activations.fit_static(cut(x), U4, "minmax", 99.99, highest=4.5)

    assert (int(found.zero_point), float(found.scale)) == (6, 4.5 / 9)


# --- per token -------------------------------------------------------------------------------------------------------


def ratio_errors(rows: Array, bits: int) -> list[float]:
    """The squared error of each clip ratio, told by the formula."""
    top = 2 ** (bits - 1) - 1
    scales = [ratio * np.abs(rows).max(axis=1, keepdims=True) / top for ratio in RATIOS]
    return [float(np.square(np.clip(np.rint(rows / s), -top - 1, top) * s - rows).sum()) for s in scales]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_clip_ratio_is_the_one_of_least_squared_error(rng: np.random.Generator, bits: int):
    x = rng.normal(size=(4, 10, 32)).astype(np.float32).astype(np.float64)

    found = activations.fit_ratio(cut(x), Scheme(bits))

    assert found == RATIOS[int(np.argmin(ratio_errors(x.reshape(-1, 32), bits)))]


def test_values_on_the_grid_are_not_clipped():
    assert activations.fit_ratio(cut(np.array([[[7.0, -3.0, 1.0], [14.0, 2.0, -4.0]]])), U4) == 1.0


def test_tokens_of_zeros_have_no_error():
    assert activations.fit_ratio(cut(np.zeros((2, 3, 4))), U4) == 1.0


def test_a_range_per_token_gains_what_its_squared_error_is_lower():
    """Steps: static 1, per token 7 / 7 = 1 and 0.7 / 7 = 0.1. A step of 1 misses the second token by 0.3, 0.3 and 0.4."""
    x = np.array([[[0.0, 7.0, 7.0], [0.7, 0.3, -0.4]]])
    q = QParams(U4, np.float32(1).reshape(()), np.uint8(8).reshape(()))

    found = activations.token_gain(cut(x), q)

    rows = x.astype(np.float32)
    scale = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(7)
    static = np.square(q.fake(rows) - rows).sum(dtype=np.float64)
    token = np.square(np.rint(rows / scale) * scale - rows).sum(dtype=np.float64)
    assert static == pytest.approx(0.3**2 + 0.3**2 + 0.4**2, abs=4 * 2.0**-24)  # four float32 roundings of numbers below 1
    assert found == 10 * math.log10(max(static, 1e-30) / max(token, 1e-30))


def test_no_error_either_way_is_no_gain():
    q = QParams(U4, np.float32(1).reshape(()), np.uint8(8).reshape(()))

    assert activations.token_gain(cut(np.array([[[7.0, 3.0]]])), q) == 0.0


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_a_static_quantizer_is_recorded_with_its_parameters():
    tape, q = Tape("h/quantized"), from_range(0.0, 3.75, U4)

    name = activations.build_static(tape, "h", q)

    (node,) = tape.nodes
    assert (node.op, node.domain, node.name) == ("FakeQuantize", DOMAIN, name)
    assert node.inputs == ("h", "h/quantized.scale", "h/quantized.zero_point")
    assert node.attrs == {"bits": 4, "signed": 0, "granularity": "static"}
    assert (tape.constants["h/quantized.scale"], tape.constants["h/quantized.zero_point"]) == (0.25, 0)


def test_a_shared_quantizer_stores_nothing():
    tape = Tape("p/quantized")

    activations.build_shared(tape, "p", "h.scale", "h.zero_point", U8)

    (node,) = tape.nodes
    assert node.inputs == ("p", "h.scale", "h.zero_point")
    assert node.attrs == {"bits": 8, "signed": 0, "granularity": "static"}
    assert tape.constants == {}


@pytest.mark.parametrize("granularity", ["dynamic", "token"])
def test_a_range_at_run_time_stores_its_ratio_only(granularity: str):
    tape = Tape("h/quantized")

    activations.build_run_time(tape, "h", U4, granularity, 0.9)

    (node,) = tape.nodes
    assert node.inputs == ("h",)
    assert node.attrs == {"bits": 4, "signed": 0, "granularity": granularity, "ratio": 0.9}
    assert tape.constants == {}
