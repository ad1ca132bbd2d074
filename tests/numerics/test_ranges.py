"""Ranges against exact extremes, exact quantiles, and a brute-force search over the raw values."""

from __future__ import annotations

import re
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.numerics import statistics
from onnxcomp.numerics.affine import QParams, Scheme, from_range
from onnxcomp.numerics.ranges import Lookup, choose, whole_steps
from onnxcomp.numerics.statistics import Histogram
from onnxcomp.recipe import Ranges

METHODS = get_args(Ranges)
ASYMMETRIC = [Scheme(2), Scheme(4), Scheme(4, signed=True)]
SYMMETRIC = [Scheme(2, True, True), Scheme(4, False, True), Scheme(4, True, True), Scheme(8, True, True)]


def values_of(kind: str, size: int = 20_000) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=size)
    match kind:
        case "normal":
            x = normal
        case "shifted":
            x = normal * 2 + 1.5
        case "relu":
            x = np.maximum(normal, 0)
        case "gelu":
            x = normal / (1 + np.exp(-1.7 * normal))
        case "laplace":
            x = rng.laplace(size=size)
        case "negative":
            x = -np.abs(normal)
        case _:
            x = np.concatenate([normal, [40.0, -15.0, 30.0]])
    return x.astype(np.float32)


def true_error(x: NDArray[np.float32], scheme: Scheme, scale: float, zero: int) -> float:
    wide = x.astype(np.float64)
    return float(np.square((np.clip(np.rint(wide / scale) + zero, scheme.qmin, scheme.qmax) - zero) * scale - wide).mean())


def brute_force(x: NDArray[np.float32], scheme: Scheme) -> float:
    """The least error over every zero point that the data allow and 60 scales, refined around the best ten."""
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    widest = float(from_range(lo, hi, scheme).scale)
    if scheme.symmetric:
        zeros = [scheme.midpoint]
    else:
        zeros = [scheme.qmin] if lo == 0 else [scheme.qmax] if hi == 0 else list(range(scheme.qmin, scheme.qmax + 1))
    some = x[:: max(x.size // 3000, 1)]
    tried = [(true_error(some, scheme, s, z), s, z) for z in zeros for s in widest * np.geomspace(0.03, 1.2, 60)]
    best = sorted(tried)[:10]
    return min(true_error(x, scheme, s * f, z) for _, s, z in best for f in np.linspace(0.94, 1.06, 13))


def error_of(x: NDArray[np.float32], q: QParams) -> float:
    return true_error(x, q.scheme, float(q.scale), int(q.zero_point))


@pytest.mark.parametrize("kind", ["normal", "shifted", "relu", "gelu", "laplace", "negative", "outliers"])
@pytest.mark.parametrize("scheme", [*ASYMMETRIC, *SYMMETRIC], ids=str)
def test_mse_is_within_a_twentieth_of_a_decibel_of_brute_force(kind: str, scheme: Scheme) -> None:
    x = values_of(kind)
    q = choose(Histogram.of(x), scheme)
    assert 10 * np.log10(error_of(x, q) / brute_force(x, scheme)) <= 0.05


def test_mse_at_eight_bits_is_within_a_twentieth_of_a_decibel_of_a_search_over_both_ends() -> None:
    x = values_of("shifted")
    found = error_of(x, choose(Histogram.of(x), Scheme()))
    lo, hi, widths = float(x.min()), float(x.max()), np.linspace(0.6, 1.0, 21)
    best = min(error_of(x, from_range(lo * a, hi * b, Scheme())) for a in widths for b in widths)
    assert 10 * np.log10(found / best) <= 0.05


def predicted_error(h: Histogram, q: QParams) -> float:
    """The mean squared error as the search counts it."""
    return float(Lookup(h).squared_error(q.scheme, q.scale.reshape(1), q.zero_point.reshape(1))[0]) / h.counts.sum()


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "outliers"])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(8, True, True), Scheme(4)], ids=str)
def test_the_predicted_error_is_the_error_on_the_values(kind: str, scheme: Scheme) -> None:
    x = values_of(kind)
    h = Histogram.of(x)
    for method in METHODS:
        q = choose(h, scheme, method)
        # A value's error is its distance to the nearest level: it moves no more than the value, here within its bin
        assert abs(np.sqrt(predicted_error(h, q)) - np.sqrt(error_of(x, q))) <= h.width


@pytest.mark.parametrize("scheme", [Scheme(2), Scheme(4), Scheme(4, True, True)], ids=str)
def test_the_values_of_a_bin_count_as_spread_evenly_over_it(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BINS", 16)
    h = Histogram.of(values_of("shifted", 200))
    inside = np.concatenate([h.first + i + (np.arange(n * 500) + 0.5) / (n * 500) for i, n in enumerate(h.counts) if n])
    spread = (inside * h.width).astype(np.float32)
    for method in METHODS:
        q = choose(h, scheme, method)
        # each value stands for at most a 500th of a bin, so nothing is further than half of that from where it belongs
        assert abs(np.sqrt(predicted_error(h, q)) - np.sqrt(error_of(spread, q))) <= h.width / 1000


def test_at_sixteen_bits_mse_takes_the_extremes_for_its_steps_are_finer_than_the_bins() -> None:
    h = Histogram.of(values_of("outliers"))

    found, extremes = choose(h, Scheme(16)), choose(h, Scheme(16), "minmax")

    assert (found.scale, found.zero_point) == (extremes.scale, extremes.zero_point)


def test_mse_clips_a_lone_outlier_a_hundred_times_further_out() -> None:
    x = np.random.default_rng(1).normal(size=300_000).astype(np.float32)
    alone = choose(Histogram.of(x), Scheme(4))
    with_outlier = np.append(x, np.float32(400))
    found = error_of(with_outlier, choose(Histogram.of(with_outlier), Scheme(4)))
    assert 10 * np.log10(found / error_of(with_outlier, alone)) <= 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4), Scheme(4, signed=True)], ids=str)
def test_data_that_are_nowhere_negative_start_at_the_first_code(method: str, scheme: Scheme) -> None:
    for x in (values_of("relu"), values_of("relu") + 3):
        assert choose(Histogram.of(x), scheme, method).zero_point == scheme.qmin


@pytest.mark.parametrize("method", METHODS)
def test_data_that_are_nowhere_positive_end_at_the_last_code(method: str) -> None:
    assert choose(Histogram.of(values_of("negative")), Scheme(4), method).zero_point == 15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, True), Scheme(8, True, True), Scheme(4, False, True)], ids=str)
def test_a_dead_tensor_stays_zero(method: str, scheme: Scheme) -> None:
    q = choose(Histogram.of(np.zeros(10)), scheme, method)
    assert q.scale > 0
    assert not q.fake(np.zeros(10, np.float32)).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [5.0, -0.3, 1e30])
def test_a_constant_is_kept_to_the_width_of_its_bin(method: str, value: float) -> None:
    x = np.full(10, value, np.float32)
    h = Histogram.of(x)
    q = choose(h, Scheme(4), method)
    # 15 float32 steps make up the value: the rounding of the scale counts up to 15 times, beside the bin's own width
    assert np.abs(q.fake(x) - x).max() <= h.width + np.abs(x[0]) * 15 * 2.0**-23


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**90])
@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_data_by_a_power_of_two_scales_the_step(factor: float, method: str) -> None:
    x = values_of("shifted")
    plain, scaled = (choose(Histogram.of(y), Scheme(4), method) for y in (x, x * np.float32(factor)))
    assert scaled.scale == plain.scale * np.float32(factor)
    assert scaled.zero_point == plain.zero_point


def test_minmax_takes_the_exact_extremes() -> None:
    x = values_of("shifted")
    q, expected = choose(Histogram.of(x), Scheme(), "minmax"), from_range(x.min(), x.max(), Scheme())
    assert (q.scale, q.zero_point) == (expected.scale, expected.zero_point)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99, 100.0])
def test_percentile_cuts_both_tails(percentile: float) -> None:
    x = values_of("shifted")
    h = Histogram.of(x)
    q = choose(h, Scheme(), "percentile", percentile)
    ordered = np.sort(x)
    cut = (1 - percentile / 100) * x.size
    # the quantile lies between its two neighbours among the values, give or take a bin
    lo = ordered[int(np.floor(cut)) - (cut > 0)], ordered[int(np.ceil(cut))]
    hi = ordered[-1 - int(np.ceil(cut))], ordered[-1 - int(np.floor(cut)) + (cut >= 1)]
    span = float(q.scale) * 255
    assert hi[0] - lo[1] - 2 * h.width <= span <= hi[1] - lo[0] + 2 * h.width


def test_percentile_is_linear_within_a_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BINS", 16)
    h = Histogram.of(np.arange(-32.0, 32.0))  # 4 values in each of 16 bins of width 4
    assert h.counts.tolist() == [4] * 16
    q, expected = choose(h, Scheme(), "percentile", 65.625), from_range(-10, 10, Scheme())  # 22 of 64 off either end
    assert (q.scale, q.zero_point) == (expected.scale, expected.zero_point)


def test_percentile_of_a_hundred_is_minmax() -> None:
    h = Histogram.of(values_of("outliers"))
    q, expected = choose(h, Scheme(4), "percentile", 100), choose(h, Scheme(4), "minmax")
    assert (q.scale, q.zero_point) == (expected.scale, expected.zero_point)


def test_a_symmetric_scheme_keeps_its_zero_point_under_every_method() -> None:
    h = Histogram.of(values_of("shifted"))
    for method in METHODS:
        assert choose(h, Scheme(4, True, True), method).zero_point == 0
        assert choose(h, Scheme(4, False, True), method).zero_point == 8


def test_a_histogram_of_nothing_is_refused() -> None:
    text = "A tensor to be quantized had no value in any sample, so it has no range. Check the samples."
    with pytest.raises(DataError, match=f"^{re.escape(text)}$"):
        choose(Histogram.of(np.zeros(0)), Scheme())


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, signed=True), Scheme(8, False, True)])
@pytest.mark.parametrize(("low", "high"), [(-3.0, 20.0), (-0.5, 12.0), (-0.5, 1.0), (-40.0, 90.0), (0.0, 600.0)])
def test_a_value_is_a_whole_number_of_steps_and_lies_among_the_codes(scheme: Scheme, low: float, high: float):
    h = Histogram.of(np.random.default_rng(0).uniform(low, high, 10_000).astype(np.float32))

    best = choose(h, scheme)
    found = whole_steps(h, best, 3.0)

    steps = 3.0 / float(found.scale)
    if not 1 <= 3.0 / float(best.scale) <= 128:
        assert found is best
        return
    assert steps == pytest.approx(round(steps), abs=1e-4)
    assert 1 <= round(steps) <= int(found.zero_point) - scheme.qmin
    if scheme.symmetric:
        assert found.zero_point == scheme.midpoint
    errors = Lookup(h).squared_error(scheme, *(np.array([a]) for a in (found.scale, found.zero_point)))
    least = Lookup(h).squared_error(scheme, *(np.array([a]) for a in (best.scale, best.zero_point)))
    assert errors[0] <= 8 * least[0]
