"""Processes and plates that take rows at random: functions of all data, or an error."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.handlers import reparam, scope

from numpyro_ensemble.gp import (
    RBF,
    CollapsedSparseGP,
    ExpectedLikelihood,
    GaussianProcess,
    Pathwise,
    WhitenReparam,
    sparse_gp,
)

X = np.linspace(0.0, 3.0, 12)  # a NumPy array, which a traced index cannot index
Y = np.sin(2.0 * X)
TASKS = np.stack([Y, -Y, 0.5 * Y, Y**2, np.cos(X)])
Z = X[::3]
WIDTHS = {"width": np.array([0.8, 1.2])}
SMALL = {"num_features": 64}


def kernel():
    return RBF(1.0, numpyro.sample("width", dist.LogNormal(0.0, 0.5)))


def rows_of(y, rows):
    return None if y is None else y[rows]


def in_its_plate(X, y=None, batch=4):
    k = kernel()
    with numpyro.plate("rows", len(X), subsample_size=batch) as rows:
        f = numpyro.sample("f", GaussianProcess(k, X[rows][:3]))
        numpyro.sample("b", dist.Normal(f, 0.1).to_event(1), obs=rows_of(y, rows)[:, None])


def observed_in_its_plate(X, y=None, batch=4):
    k = kernel()
    with numpyro.plate("rows", len(X), subsample_size=batch) as rows:
        numpyro.sample("c", GaussianProcess(k, X[rows], 0.1), obs=rows_of(y, rows))


def of_a_batch(X, y=None, batch=4):
    with numpyro.plate("rows", len(X), subsample_size=batch) as rows:
        pass
    numpyro.sample("c", GaussianProcess(kernel(), X[rows], 0.1), obs=rows_of(y, rows))


def collapsed(X, y=None, batch=4):
    with numpyro.plate("rows", len(X), subsample_size=batch) as rows:
        pass
    numpyro.sample("c", CollapsedSparseGP(kernel(), X[rows], Z, 0.1), obs=rows_of(y, rows))


def latent_of_a_batch(X, y=None, batch=4):
    plate = numpyro.plate("rows", len(X), subsample_size=batch)
    with plate as rows:
        pass
    f = numpyro.sample("f", GaussianProcess(kernel(), X[rows]))
    with plate:
        numpyro.sample("b", dist.Normal(f, 0.1), obs=rows_of(y, rows))


def some_tasks(X, y=None, batch=2):
    k = kernel()
    with numpyro.plate("task", 5, subsample_size=batch) as tasks:
        numpyro.sample("c", GaussianProcess(k, X, 0.1), obs=rows_of(y, tasks))


def latents_of_some_tasks(X, y=None, batch=2):
    k = kernel()
    with numpyro.plate("task", 5, subsample_size=batch) as tasks:
        f = numpyro.sample("f", GaussianProcess(k, X))
        numpyro.sample("b", dist.Normal(f, 0.1).to_event(1), obs=rows_of(y, tasks))


def inducing_of_some_tasks(X, y=None, batch=2):
    k = kernel()
    with numpyro.plate("task", 5, subsample_size=batch) as tasks:
        m, _ = sparse_gp("f", k, X, Z)
        numpyro.sample("b", dist.Normal(m, 0.1).to_event(1), obs=rows_of(y, tasks))


def zeros(*shape):
    return np.zeros((2, *shape))


FOLLOWING = {
    "a latent process in the plate of its data": (in_its_plate, {"f": zeros(4, 3)}, Y, "rows"),
    "of a batch": (of_a_batch, {}, Y, "rows"),
    "of a batch, scoped": (scope(of_a_batch, "s"), {}, Y, "rows"),
    "collapsed": (collapsed, {}, Y, "rows"),
    "a latent process of a batch": (latent_of_a_batch, {"f": zeros(4)}, Y, "rows"),
    "some tasks": (some_tasks, {}, TASKS, "task"),
    "latents of some tasks": (latents_of_some_tasks, {"f": zeros(2, 12)}, TASKS, "task"),
    "whitened": (
        reparam(latents_of_some_tasks, config={"f": WhitenReparam()}),
        {"f_base": zeros(2, 12)},
        TASKS,
        "task",
    ),
    "inducing": (inducing_of_some_tasks, {"f_u_base": zeros(2, 4)}, TASKS, "task"),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_processes_that_follow_random_rows_are_refused(name):
    model, more, y, plate = FOLLOWING[name]
    samples = {f"s/{k}" if "scoped" in name else k: v for k, v in (WIDTHS | more).items()}
    number = r"4 of 12" if plate == "rows" else r"2 of 5"
    message = f"the Gaussian process '.+' follows the rows that the plate '.*{plate}' takes at "
    message += f"random, {number}: .*subsample_size=None"
    with pytest.raises(ValueError, match=message):
        Pathwise(model, samples, X, y, **SMALL)


def test_a_process_observed_in_the_plate_of_its_data_is_refused():
    for batch in (4, None):
        with (
            pytest.warns(UserWarning, match="copies of a Gaussian process at as many inputs"),
            pytest.raises(
                ValueError, match=r"'c': .* copies of .*sample the process outside the plate of the"
            ),
        ):
            Pathwise(observed_in_its_plate, WIDTHS, X, Y, batch, **SMALL)


def batches(X, y=None, batch=4):
    """The inducing values are outside the plate that draws a batch of rows."""
    level = numpyro.param("level", 0.0)
    plate = numpyro.plate("rows", len(X), subsample_size=batch)
    with plate as rows:
        pass
    m, v = sparse_gp("f", kernel(), X[rows], Z)
    with plate:
        likelihood = ExpectedLikelihood(lambda f: dist.Normal(f, 0.1), m + level, v)
        numpyro.sample("b", likelihood, obs=rows_of(y, rows))


def batches_of_tasks(X, y=None, batch=2):
    """All tasks have functions, in a plate without subsampling; a batch of tasks is observed."""
    k = kernel()
    with numpyro.plate("task", 5) as every:
        f = numpyro.sample("f", GaussianProcess(k, X))
    with numpyro.plate("some", 5, subsample_size=batch) as tasks:
        numpyro.sample("b", dist.Normal(f[every][tasks], 0.1).to_event(1), obs=rows_of(y, tasks))


def a_batch_of_ones_own(X, y=None):
    """The data are a batch of 30 tasks that the user, not the plate, has drawn."""
    k = kernel()
    with numpyro.plate("task", 30, subsample_size=5):
        numpyro.sample("c", GaussianProcess(k, X, 0.1), obs=y)


@pytest.mark.long
def test_batches_that_processes_do_not_follow_change_nothing():
    new = np.linspace(0.1, 2.9, 4)
    u = np.random.default_rng(0).normal(size=(2, 4))
    of_batch, of_all = (
        Pathwise(batches, WIDTHS | {"f_u_base": u}, X, Y, b, params={"level": 0.5}, **SMALL)
        for b in (4, None)
    )
    moments = of_batch.moments(new, batch=None)["f"]
    assert_allclose(moments, of_all.moments(new, batch=None)["f"])
    assert moments.mean.shape == (4,)
    samples = WIDTHS | {"f": np.stack([TASKS, TASKS])}
    tasks = Pathwise(batches_of_tasks, samples, X, TASKS, **SMALL).moments(X[:3])["f"]
    assert_allclose(tasks.mean, TASKS[:, :3], atol=1e-3)
    ours = Pathwise(a_batch_of_ones_own, WIDTHS, X, jnp.asarray(TASKS), **SMALL)
    each = [
        np.mean([GaussianProcess(RBF(1.0, w), X, 0.1).predict(y, new)[0] for w in (0.8, 1.2)], 0)
        for y in TASKS
    ]
    assert_allclose(ours.moments(new)["c_f"].mean, each, rtol=1e-6, atol=1e-8)


def test_arrays_of_any_kind_are_functions_of_all_data():
    """A batch of a jax.Array was once taken for all data without an error."""
    with pytest.raises(ValueError, match="follows the rows"):
        Pathwise(of_a_batch, WIDTHS, jnp.asarray(X), jnp.asarray(Y), **SMALL)
    whole = Pathwise(of_a_batch, WIDTHS, X, Y, None, **SMALL).moments(X, batch=None)["c_f"]
    far = np.mean([GaussianProcess(RBF(1.0, w), X, 0.1).predict(Y, X)[0] for w in (0.8, 1.2)], 0)
    assert_allclose(whole.mean, far, rtol=1e-6)
