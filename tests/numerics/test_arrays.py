"""Words and figures about arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcomp.numerics.arrays import describe, energies, made_up, sqnr_db


@pytest.mark.parametrize(
    ("shape", "text"),
    [(("N", None, 3), "float32[N, ?, 3]"), ((), "float32[]"), (None, "float32 of unknown rank")],
)
def test_a_type_and_shape_in_words(shape: tuple[int | str | None, ...] | None, text: str):
    assert describe(np.dtype(np.float32), shape) == text


def test_what_is_made_up_is_normal_for_floats_and_one_for_the_rest(rng: np.random.Generator):
    expected = np.random.default_rng(0).standard_normal((1, 3)).astype(np.float16)

    found = made_up(np.dtype(np.float16), ("N", 3), np.random.default_rng(0))

    np.testing.assert_array_equal(found, expected, strict=True)
    np.testing.assert_array_equal(made_up(np.dtype(bool), (None, 2), rng), np.ones((1, 2), bool), strict=True)


def test_energies_leave_out_what_is_not_finite_in_the_reference():
    assert energies(np.array([3.0, -np.inf, 4.0]), np.array([3.0, 7.0, 6.0])) == (25.0, 4.0)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (0.0, 0.0, 200.0),
        (1.0, 1e-30, 200.0),
        (0.0, 1.0, -math.inf),
        (1.0, math.inf, -math.inf),
        (1.0, math.nan, -math.inf),
    ],
)
def test_sqnr_is_capped_above_and_minus_infinity_without_signal_or_with_boundless_noise(
    signal: float, noise: float, expected: float
):
    assert sqnr_db(signal, noise) == expected
