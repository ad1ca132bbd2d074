"""Each statistic against a direct computation."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.numerics import statistics
from onnxcomp.numerics.statistics import Histogram, spread, subsample

NOT_FINITE = "^" + re.escape(
    "The values to quantize hold NaN or infinity, so they have no range. Check the samples and the model."
)


def samples_of(kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    normal = rng.normal(size=1500)
    match kind:
        case "normal":
            x = normal * 3 + 1
        case "relu":
            x = np.maximum(normal, 0)
        case "negative":
            x = -np.abs(normal) - 2
        case "constant":
            x = np.full(200, -5.3)
        case "zeros":
            x = np.where(normal > 0, 0.0, -0.0)
        case "tiny":
            x = normal * 1e-30
        case "denormal":
            x = normal * 1e-44
        case "huge":
            x = normal * 1e38
        case "far":
            x = 1e6 + normal
        case _:
            x = normal * 10.0 ** rng.uniform(-38, 37, normal.size)
    return x.clip(-3.4e38, 3.4e38).astype(np.float32)


KINDS = ["normal", "relu", "negative", "constant", "zeros", "tiny", "denormal", "huge", "far", "all scales"]


def brute_force(x: NDArray[np.float32], limit: int) -> tuple[list[int], int, int]:
    """Counts, first bin and exponent by exact integer arithmetic, straight from the definition."""
    ratios = [v.as_integer_ratio() for v in x.astype(float).tolist()]
    for exponent in range(-126, 129):
        up, down = (1, 1 << exponent) if exponent >= 0 else (1 << -exponent, 1)
        bins = [
            n * up // (d * down) for n, d in (min(ratios, key=lambda r: r[0] / r[1]), max(ratios, key=lambda r: r[0] / r[1]))
        ]
        if bins[1] - bins[0] < limit and max(abs(n) * up / (d * down) for n, d in ratios) <= 1 << 24:
            every = [n * up // (d * down) for n, d in ratios]
            counts = [0] * (bins[1] - bins[0] + 1)
            for b in every:
                counts[b - bins[0]] += 1
            return counts, bins[0], exponent
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [2, 37, 1 << 10])
def test_a_histogram_is_the_one_of_its_definition(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BINS", limit)
    x = samples_of(kind, np.random.default_rng(0))[:300]
    h = Histogram.of(x)
    counts, first, exponent = brute_force(x, limit)
    assert (h.counts.tolist(), h.first, h.width) == (counts, first, 2.0**exponent)
    assert (h.low, h.high) == (float(x.min()), float(x.max()))
    assert h.counts.sum() == x.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [2, 37, 1 << 10])
def test_the_sum_of_histograms_is_the_histogram_of_all_values(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BINS", limit)
    x = samples_of(kind, np.random.default_rng(0))

    whole, (first, *others) = Histogram.of(x), (Histogram.of(part) for part in np.array_split(x, [0, 3, 3, 40, 900]))
    for other in others:
        first = first + other

    assert first.counts.tolist() == whole.counts.tolist()
    assert (first.first, first.width, first.low, first.high) == (whole.first, whole.width, whole.low, whole.high)


def test_an_empty_histogram_has_no_bins() -> None:
    empty = Histogram.of(np.zeros((0, 3)))

    assert empty.counts.size == 0


def test_zero_is_always_an_edge() -> None:
    h = Histogram.of(np.array([-1e-20, 1.0, -1.0]))
    assert h.counts[: -h.first].sum() == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.array([1.0, bad, 2.0])
    with pytest.raises(DataError, match=NOT_FINITE):
        Histogram.of(x)


@pytest.mark.parametrize("shape", [(197, 192), (64, 56, 56), (768,), (16, 16), (1000, 3), (1,), (5, 0)])
@pytest.mark.parametrize("limit", [1, 7, 1000, 1 << 20])
def test_a_subsample_is_large_enough_and_a_strided_view(shape: tuple[int, ...], limit: int) -> None:
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    kept = subsample(x, limit)
    assert kept.ndim == 1
    assert min(x.size, limit) <= kept.size <= max(4 * limit, 1)
    assert kept.size == x.size or np.shares_memory(kept, x)
    assert np.unique(np.diff(kept)).size <= 1
    if x.size <= limit:
        np.testing.assert_array_equal(kept, x.reshape(-1))


def test_a_subsample_visits_every_channel_alike() -> None:
    x = np.broadcast_to(np.arange(192), (197, 192))  # 192 = 3 * 64: a stride of 9 would see a third of the channels
    counts = np.bincount(subsample(x, 197 * 192 // 9), minlength=192)
    assert counts.max() - counts.min() <= 1


def test_weights_are_squares_of_slopes_and_where_nothing_counts_nothing_is_left() -> None:
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    h = Histogram.of(x)

    found = h.weighted(lambda v: np.where(v > 0, 3 * v, np.where(v > -2, -v, 2)))

    edges = (h.first + np.arange(h.counts.size)) * h.width
    expected = h.counts * np.where(edges >= 0, 9, np.where(edges >= -2, 1, 0))
    assert (found.first * found.width, found.low, found.high, found.width) == (-2, -2, 8, h.width)
    np.testing.assert_allclose(found.counts, expected[edges >= -2], rtol=1e-3)


def test_a_constant_function_changes_no_histogram() -> None:
    for h in (Histogram.of(np.arange(5, dtype=np.float32)), Histogram.of(np.zeros(0, np.float32))):
        assert h.weighted(np.zeros_like) is h


@pytest.mark.parametrize("stride", [2, 3, 9, 37])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_samples_are_first_seen_at_each_place_alike(stride: int, every: int) -> None:
    seen = [spread(1009 * stride - 1, 1008, number) for number in range(0, 64 * stride * every, every)]
    counts = np.bincount([places.start for places in seen], minlength=stride)
    assert {places.step for places in seen} == {stride}
    assert counts.size == stride
    assert np.abs(counts - 64).max() <= 4


def test_a_place_that_is_skipped_in_one_sample_is_seen_in_another() -> None:
    x = np.zeros((197, 768), np.float32)
    x[14, 417] = 200  # in every sample, as a massive activation is
    seen = np.concatenate([subsample(x, 1 << 14, number) for number in range(128)])
    assert np.mean(seen == 200) == pytest.approx(1 / x.size, rel=0.2)
