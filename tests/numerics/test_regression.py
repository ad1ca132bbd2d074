"""Ridge regression from sums, in groups, and at low rank."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.numerics.regression import Regression, products, rows, split, times

Array = np.ndarray
EXACT = 1e-9
"""float64 sums of some hundred products of order 1, solved with a condition number below 100, lose no more."""


def regression(u: Array, v: Array, groups: int = 1, ridge: float = 0.0) -> Regression:
    return Regression.of(*products(u, [v], groups), ridge)


def test_what_is_linear_is_found_with_its_bias(rng: np.random.Generator):
    u, w, b = rng.normal(size=(50, 4)) + 3, rng.normal(size=(4, 3)), rng.normal(size=3)

    found = regression(u, u @ w + b)

    np.testing.assert_allclose(found.weight[0], w, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found.bias(found.weight)[0, 0], b, rtol=0, atol=EXACT)


def test_groups_are_regressions_of_their_own(rng: np.random.Generator):
    u, v = rng.normal(size=(50, 6)), rng.normal(size=(50, 4))

    both = regression(u, v, groups=2, ridge=0.1)

    for group, found in enumerate(both.weight):
        alone = regression(u[:, 3 * group : 3 * group + 3], v[:, 2 * group : 2 * group + 2], ridge=0.1)
        np.testing.assert_allclose(found, alone.weight[0], rtol=0, atol=EXACT)


def test_the_ridge_is_in_units_of_the_mean_variance():
    """Variance 1 and covariance 1: W = 1 / (1 + ridge); the bias is not shrunk."""
    u = np.array([[-1.0], [1.0]])

    found = regression(u, u + 5, ridge=0.25)

    assert found.weight[0, 0, 0] == pytest.approx(0.8, abs=EXACT)
    assert found.bias(found.weight)[0, 0, 0] == pytest.approx(5.0, abs=EXACT)


def test_a_column_that_never_varies_gets_no_weight(rng: np.random.Generator):
    u = rng.normal(size=(20, 2))
    u[:, 1] = 0.0

    assert regression(u, u[:, :1]).weight[0, 1, 0] == 0.0


def test_parts_count_as_what_they_make_together(rng: np.random.Generator):
    u, v = rng.normal(size=(30, 4)), rng.normal(size=(30, 2))

    some, others = products(u[:7], [v[:7]], 2), products(u[7:], [v[7:]], 2)
    parts = Regression.of(*map(np.add, some, others), ridge=0.1)

    whole = regression(u, v, groups=2, ridge=0.1)
    np.testing.assert_allclose(parts.weight, whole.weight, rtol=0, atol=EXACT)
    np.testing.assert_allclose(parts.bias(parts.weight), whole.bias(whole.weight), rtol=0, atol=EXACT)


def test_the_factors_make_w(rng: np.random.Generator):
    found = regression(rng.normal(size=(60, 6)), rng.normal(size=(60, 4)), groups=2)

    left, right = found.factors(np.ones(4))

    np.testing.assert_allclose(left @ right, found.weight, rtol=0, atol=EXACT)


def test_no_other_w_of_its_rank_is_nearer_in_what_it_predicts(rng: np.random.Generator):
    """By Eckart and Young: the squared error is the sum of the squared singular values of U W that are left out."""
    u = rng.normal(size=(80, 5)) * [10, 1, 1, 1, 0.1]
    found = regression(u, rng.normal(size=(80, 4)))
    centred = u - u.mean(axis=0)

    left, right = found.factors(np.ones(4))

    error = np.square(centred @ (found.weight[0] - left[0, :, :2] @ right[0, :2])).sum()
    values = np.linalg.svd(centred @ found.weight[0], compute_uv=False)
    assert error == pytest.approx(np.square(values[2:]).sum(), rel=1e-6)  # the factor of the covariance holds TINY as well


def test_a_unit_says_what_a_column_counts(rng: np.random.Generator):
    u = rng.normal(size=(80, 3))
    found = regression(u, rng.normal(size=(80, 2)))

    left, right = found.factors(np.array([1.0, 1e6]))

    # With the second column alone that counts, the product of rank 1 has that column whole.
    np.testing.assert_allclose((left[0, :, :1] @ right[0, :1])[:, 1], found.weight[0, :, 1], rtol=0, atol=1e-6)


def test_times_multiplies_group_by_group(rng: np.random.Generator):
    x, w = rng.normal(size=(5, 6)), rng.normal(size=(2, 3, 2))

    found = times(x, rows(w))

    np.testing.assert_allclose(found, np.concatenate([x[:, :3] @ w[0], x[:, 3:] @ w[1]], axis=1), rtol=0, atol=EXACT)
    assert rows(w).shape == (4, 3)
    assert split(x, 2)[1].tolist() == x[:, 3:].tolist()
