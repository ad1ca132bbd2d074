"""The transforms that spread outliers over the channels."""

import numpy as np
import pytest

from onnxcomp.numerics.rotation import rotate, rotation

SIZES = (1, 2, 3, 4, 12, 16, 48, 64, 100, 192, 768)
EXACT = 1e-13
"""A few hundred float64 roundings of values up to 1."""


@pytest.mark.parametrize("d", SIZES)
def test_a_rotation_is_its_own_inverse_and_symmetric(d: int):
    r = rotation(d)
    assert np.abs(r @ r - np.eye(d)).max() < EXACT
    assert np.abs(r - r.T).max() < EXACT


@pytest.mark.parametrize("d", SIZES)
def test_it_keeps_a_constant_row(d: int):
    assert np.abs(rotate(np.ones(d)) - 1).max() < EXACT


def test_rotating_is_multiplying_with_the_matrix_along_any_axis():
    x = np.random.default_rng(0).standard_normal((3, 24, 5))
    assert np.abs(rotate(x, axis=1) - np.einsum("acb,cd->adb", x, rotation(24))).max() < EXACT


@pytest.mark.parametrize("d", [4, 16, 64])
def test_one_channel_is_spread_almost_evenly(d: int):
    # evenly would be 1 / sqrt(d) in every channel
    assert np.abs(rotation(d)).max() < 2 / np.sqrt(d)


def test_the_same_bytes_come_out_every_time():
    assert rotation(192).tobytes() == rotation(192).tobytes()
