"""Batches of each member's own rows: bootstraps, folds, many data sets."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from zoo import X, Y, ridge

from numpyro_ensemble import EnsembleMAP, EnsembleVI

ADAM = numpyro.optim.Adam(0.1)
OWN = np.stack([Y, Y[::-1] + 2.0, Y**2])
WIDTHS = np.array([0.5, 1.0, 3.0])
OPTIONS = {"progress_bar": False}


def regression(width, tables, y):
    """Regress on a width and rows of the member's own, and on shared rows, in plates."""
    slope = numpyro.sample("slope", dist.Normal(0.0, width).expand([2]).to_event(1))
    base = numpyro.sample("base", dist.Normal(0.0, width))
    with numpyro.plate("kinds", 2, dim=-2), numpyro.plate("rows", len(y), dim=-1):
        mean = tables["x"] @ slope + tables["late"]["offset"]
        at = mean[None] + base * jnp.arange(2.0)[:, None]
        numpyro.sample("y", dist.Normal(at, 0.5), obs=y.T)


def tables(offset):
    return {"x": X, "late": {"offset": offset}}


def own_rows():
    """Return two columns of rows for each of three members."""
    return np.stack([OWN, OWN + 1.0], axis=-1)


@pytest.mark.core
@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_member_with_rows_of_its_own_is_a_single_run_on_them(shared, key):
    keys, y = jax.random.split(key, 3), own_rows()
    how = {"batch_size": 3, "shared_batches": shared, **OPTIONS}  # batches of 3, 3 and 2 of 8 rows
    runner = EnsembleMAP(regression, ADAM, ensemble_size=3)
    result = runner.run(key, 7, WIDTHS, tables(Y), y, member_args=["width", "y"], **how)
    single = EnsembleMAP(regression, ADAM, ensemble_size=1)

    def alone(e, rows):
        state = single.init(keys[e : e + 1], WIDTHS[e], tables(Y), rows)
        order = key if shared else keys[e : e + 1]  # the key that orders the batches
        return single.run(
            order,
            7,
            WIDTHS[e],
            tables(Y),
            rows,
            init_state=state,
            batch_args=["tables", "y"],
            **how,
        )

    for e in range(3):
        assert_allclose(result.losses[e], alone(e, y[e]).losses[0], rtol=1e-5)
    assert not np.allclose(result.losses[0], alone(0, y[1]).losses[0], rtol=1e-2)


@pytest.mark.long
def test_batches_of_rows_that_agree_are_those_of_shared_rows(key):
    runner = EnsembleVI(ridge, AutoNormal(ridge), ADAM, Trace_ELBO(), ensemble_size=2)
    how = {"batch_size": 3, **OPTIONS}
    shared = runner.run(key, 5, X, Y, **how)
    own = runner.run(key, 5, np.stack([X, X]), np.stack([Y, Y]), member_args=[0, 1], **how)
    assert_allclose(own.losses, shared.losses, rtol=1e-6)
    other = runner.run(key, 5, np.stack([X, X]), np.stack([Y, Y + 1.0]), member_args=[0, 1], **how)
    assert_allclose(other.losses[0], shared.losses[0], rtol=1e-6)
    assert not np.allclose(other.losses[1], shared.losses[1], rtol=1e-2)


def test_what_batch_args_leave_out_stays_whole(key):
    """Each member has two centres. There are also two members, and two rows in a batch."""

    def model(centres, y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("rows", len(y)):
            nearest = jnp.abs(y[:, None] - centres[None]).argmin(-1)
            numpyro.sample("y", dist.Normal(centres[nearest], scale), obs=y)

    centres = np.array([[0.0, 1.0], [-1.0, 2.0]])
    runner = EnsembleMAP(model, ADAM, ensemble_size=2)
    how = {"batch_size": 2, "member_args": ["centres", "y"], **OPTIONS}
    result = runner.run(key, 3, centres, OWN[:2], batch_args=["y"], **how)
    assert result.finite.all()
    with pytest.raises(ValueError, match=r"\['centres', 'y'\].*'centres': 2, 'y': 8\}.*batch_args"):
        runner.run(key, 3, centres, OWN[:2], **how)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X, OWN[:2]), {}, r"'y' of shape \(2, 8\); its leading length must be ensemble_size=3"),
        ((X, OWN[:, :7]), {}, r"\(of \['y'\].*the second length\), got \{'x': 8, 'y': 7\}; name"),
        ((X, WIDTHS), {"batch_args": ["x", "y"]}, "batch_args names 'y', .* a second axis"),
        ((2.0, WIDTHS), {}, "found no array to batch.*member_args names is cut along its second"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused_by_name(args, options, message, key, compile_count):
    runner, keys = EnsembleMAP(ridge, ADAM, ensemble_size=3), jax.random.split(key, 3)
    with compile_count() as compiled, pytest.raises(ValueError, match=message):
        runner.run(keys, 3, *args, batch_size=4, member_args=["y"], **options, **OPTIONS)
    assert compiled.count == 0, compiled.names


def test_a_model_that_does_not_follow_its_own_rows_is_refused(key):
    def fixed(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 8):
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y[:1])

    runner = EnsembleMAP(fixed, ADAM, ensemble_size=3)
    with pytest.raises(ValueError, match="plate 'rows'.*does not follow the batch"):
        runner.run(key, 3, OWN, batch_size=4, member_args=["y"], **OPTIONS)

    def rescaled(y, size):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.handlers.scale(scale=size / len(y)), numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y)

    runner = EnsembleMAP(rescaled, ADAM, ensemble_size=3)
    with pytest.raises(ValueError, match="scaled by 1 with all rows and by 2 with batch_size=4"):
        runner.run(key, 3, OWN, jnp.array(8.0), batch_size=4, member_args=["y"], **OPTIONS)


@pytest.mark.long
@pytest.mark.parametrize("follows", [True, False])
def test_a_raw_density_must_depend_on_the_members_rows(follows, key):
    def density(level, y):
        seen = y if follows else OWN[0]
        return -((seen - level) ** 2).sum(), -(level**2)

    runner = EnsembleMAP.from_log_joint(
        density, lambda key: jax.random.normal(key), ADAM, ensemble_size=3
    )
    if follows:
        assert runner.run(key, 3, OWN, batch_size=4, member_args=["y"], **OPTIONS).finite.all()
        return
    with pytest.raises(ValueError, match="does not depend on the batched arguments"):
        runner.run(key, 3, OWN, batch_size=4, member_args=["y"], **OPTIONS)
