"""Inducing points, also for inputs with columns of whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gp_truth import inputs
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.handlers import seed

from numpyro_ensemble.gp import (
    RBF,
    Categorical,
    CollapsedSparseGP,
    Derivatives,
    GaussianProcess,
    choose_inducing,
    multi_output,
    numbered_inputs,
    sparse_gp,
)

KEY = jax.random.key(3)
OUTPUTS = numbered_inputs(inputs(24, 2), inputs(12, 2, seed=1), inputs(3, 2, seed=2))
SHARED = multi_output(RBF(), np.ones((3, 1)), np.ones(3))


def test_inducing_points_are_chosen():
    X = np.repeat(inputs(40, 2), 2, axis=0)
    greedy = choose_inducing(None, X, 10, kernel=RBF(1.0, 0.5))
    assert len(np.unique(np.asarray(greedy), axis=0)) == 10
    random = X[np.random.default_rng(0).choice(80, 10, replace=False)]
    left = lambda Z: CollapsedSparseGP(RBF(1.0, 0.5), X, Z, 0.1).log_prob(np.zeros(80))  # noqa: E731
    assert left(greedy) > left(random)
    means = choose_inducing(jax.random.key(1), X, 10)
    assert means.shape == (10, 2) and np.isfinite(means).all()
    with pytest.raises(ValueError, match="num_points=41, and there are 40 distinct"):
        choose_inducing(jax.random.key(1), X, 41)
    for wrong in (lambda: choose_inducing(None, X, 10), lambda: choose_inducing(X, 10, 3)):
        with pytest.raises(ValueError, match="takes one key first"):
            wrong()


def test_greedy_inducing_points_are_distinct_when_no_variance_is_left():
    points = choose_inducing(None, np.linspace(0.0, 1.0, 50), 30, kernel=RBF(1.0, 2.0))
    assert len(np.unique(np.asarray(points))) == 30


def test_numbers_are_not_averaged():
    """Outputs of 24, 12 and 3 rows have their shares of 13 points, and at least one."""
    Z = np.asarray(choose_inducing(KEY, OUTPUTS, 13, numbered=-1))
    assert np.bincount(Z[:, 2].astype(int)).tolist() == [8, 4, 1]
    assert set(Z[:, 2]) == {0.0, 1.0, 2.0}  # whole numbers, exactly
    for number in range(3):
        X = np.asarray(OUTPUTS)[np.asarray(OUTPUTS)[:, 2] == number, :2]
        near = Z[Z[:, 2] == number, :2]
        assert (near.min(axis=0) >= X.min(axis=0)).all() and (near <= X.max(axis=0)).all()
    assert_allclose(near[0], X.mean(axis=0))  # a single centre is the mean
    assert len(np.unique(Z, axis=0)) == 13
    assert_array_equal(Z, choose_inducing(KEY, OUTPUTS, 13, numbered=2))
    whole = np.asarray(choose_inducing(KEY, OUTPUTS, 39, numbered=-1))
    assert_allclose(whole[np.lexsort(whole.T)], OUTPUTS[jnp.lexsort(OUTPUTS.T)])
    CollapsedSparseGP(SHARED, OUTPUTS, Z, 0.1)
    averaged = choose_inducing(KEY, OUTPUTS, 13)
    with pytest.raises(ValueError, match=r"Z: Coregion.*, 0 to 2; got 0\.\d+ in row .*numbered="):
        CollapsedSparseGP(SHARED, OUTPUTS, averaged, 0.1)
    with pytest.raises(ValueError, match=r"Z: Coregion.*numbered="), seed(rng_seed=0):
        sparse_gp("f", SHARED, OUTPUTS, averaged)


def test_several_columns_of_numbers():
    """Of four kinds of rows, one has fewer distinct places than its share of points."""
    kinds = np.array([[0, 1], [1, 0], [0, 0], [1, 1]])[np.r_[np.arange(30) % 3, 3, 3, 3, 3]]
    places = np.r_[np.linspace(0.0, 1.0, 30), np.full(4, 0.25)]
    X = np.column_stack([kinds[:, 0], places, kinds[:, 1]])
    Z = np.asarray(choose_inducing(KEY, X, 12, numbered=(0, -1)))
    assert_allclose(Z[(Z[:, 0] == 1) & (Z[:, 2] == 1)], [[1.0, 0.25, 1.0]])
    counts = np.unique(Z[:, ::2], axis=0, return_counts=True)[1]
    assert sorted(counts) == [1, 3, 4, 4]
    kernel = RBF(active_dims=1) * Categorical(2, active_dims=0) * Categorical(2)
    rows = np.asarray(choose_inducing(None, X, 12, kernel=kernel))
    assert {tuple(row) for row in rows} <= {tuple(row) for row in X}


@pytest.mark.core
def test_the_choice_among_values_and_slopes_does_not_follow_units():
    """A slope with 10,000 times the variance of a value is not chosen more often."""
    places = np.linspace(0.0, 3.0, 12)

    def chosen(unit):
        X = numbered_inputs(unit * places, unit * places[::2])
        Z = choose_inducing(None, X, 7, kernel=Derivatives(RBF(1.0, unit)))
        return np.asarray(Z) / np.array([unit, 1.0])

    assert set(chosen(1.0)[:, 1]) == {0.0, 1.0}
    for unit in (0.01, 100.0):
        assert_allclose(chosen(unit), chosen(1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: choose_inducing(KEY, OUTPUTS, 2, numbered=-1),
            r"num_points=2, and columns \(2,\) hold 3 different numbers.* at least one point",
        ),
        (lambda: choose_inducing(KEY, OUTPUTS, 5, numbered=3), r"numbered=\(3,\), and the inputs"),
        (
            lambda: choose_inducing(KEY, OUTPUTS, 5, numbered=0),
            r"numbered names columns of whole numbers; column 0 has .* in row 0",
        ),
        (lambda: choose_inducing(KEY, OUTPUTS, 5, numbered=(0, 1, 2)), "leaves no column"),
        (
            lambda: choose_inducing(None, OUTPUTS, 5, kernel=SHARED, numbered=-1),
            "numbered is for k-means",
        ),
        (
            lambda: choose_inducing(None, OUTPUTS + 1.0, 5, kernel=SHARED),
            "0 to 2; got 3.0 in row 36",
        ),
    ],
)
def test_numbers_that_no_points_can_be_chosen_among(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inducing_points_of_other_columns_are_refused():
    with pytest.raises(ValueError, match="X has 3 columns, and Z has 2"):
        CollapsedSparseGP(SHARED, OUTPUTS, OUTPUTS[:, :2], 0.1)
    with pytest.raises(TypeError, match="kernel takes a kernel"):
        choose_inducing(None, OUTPUTS, 5, kernel=RBF)
    assert GaussianProcess(SHARED, choose_inducing(None, OUTPUTS, 5, kernel=SHARED))
