"""Matched moments: the formula, the gate, and a whole network whose channels get back what they have in the float model."""

from __future__ import annotations

import numpy as np
from equality import parse

from onnxcomp import quantize
from onnxcomp.calibrate.samples import LiveBatch
from onnxcomp.methods.moments import MOST, fit, moments, sums
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.runtime import Session

RNG = np.random.default_rng(0)


def of(y: np.ndarray) -> np.ndarray:
    return moments(sums(LiveBatch(tuple(range(len(y))), {"y": y}), "y"))


def test_moments_are_those_of_fitted_and_of_held_out_samples():
    y = RNG.normal(size=(8, 3, 4, 4))

    found = of(y)

    for part, chosen in zip(found, ([0, 1, 2, 4, 5, 6], [3, 7]), strict=True):
        # sums of some hundred float64 numbers
        np.testing.assert_allclose(part[0], y[chosen].mean(axis=(0, 2, 3)), atol=1e-12, rtol=0)
        np.testing.assert_allclose(part[1], y[chosen].std(axis=(0, 2, 3)), atol=1e-12, rtol=0)


def test_without_held_out_samples_those_that_are_fitted_decide():
    found = of(RNG.normal(size=(2, 3, 4, 4)))

    np.testing.assert_array_equal(found[0], found[1])


def test_factor_and_shift_bring_back_mean_and_deviation():
    y = RNG.normal(size=(8, 3, 4, 4))
    wanted = of(y)

    outcome = fit(wanted, of(0.9 * y + 0.2))

    assert outcome.fit is not None
    # the inverse of 0.9 y + 0.2 is y / 0.9 - 0.2 / 0.9
    np.testing.assert_allclose(outcome.fit["gain"], 1 / 0.9, atol=1e-12, rtol=0)
    np.testing.assert_allclose(outcome.fit["shift"], -0.2 / 0.9, atol=1e-12, rtol=0)
    assert outcome.reason == "the float model's mean and deviation per channel"


def test_no_channel_is_scaled_by_more_than_a_quarter():
    y = RNG.normal(size=(8, 3, 4, 4))

    outcome = fit(of(y), of(0.1 * y))

    assert outcome.fit is not None
    np.testing.assert_array_equal(outcome.fit["gain"], MOST)


def test_held_out_samples_that_do_not_come_closer_decline():
    y, other = RNG.normal(size=(2, 8, 3, 4, 4))
    other[[3, 7]] = y[[3, 7]]

    outcome = fit(of(y), of(other))

    assert outcome.fit is None
    assert outcome.reason == "held-out samples do not come closer"


def test_a_deep_network_of_few_bits_keeps_its_moments():
    layers = {f"w{i}": RNG.normal(size=(8, 8, 3, 3)) / 6 for i in range(4)} | {"v": RNG.normal(size=(8, 3, 3, 3)) / 4}
    body = "r0 = Relu(c0) " + " ".join(f"c{i + 1} = Conv(r{i}, w{i}) r{i + 1} = Relu(c{i + 1})" for i in range(3))
    body += " y = Conv(r3, w3)"
    text = f"g (float[N,3,16,16] x) => (float[N,8,H,W] y) {{ c0 = Conv(x, v) {body} }}"
    model = parse(text, {k: v.astype(np.float32) for k, v in layers.items()})
    feeds = [{"x": RNG.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(16)]

    def distance(matched: str) -> float:
        recipe = Recipe(bits=Bits(3, 3), equalization="none", moments=matched)  # type: ignore[arg-type]
        result = quantize(model, feeds, recipe)
        assert any(d.method == "moments" and d.adopted for d in result.report.decisions) == (matched == "auto")
        found, want = (
            np.concatenate([Session(m.SerializeToString()).run(feed)["y"] for feed in feeds]) for m in (result.model, model)
        )
        return float(np.abs(found.std(axis=(0, 2, 3)) / want.std(axis=(0, 2, 3)) - 1).mean())

    assert distance("auto") < distance("none") / 2
