"""An argument that takes one key also takes an integer, which stands for its key."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_array_equal
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI, ensemble_init, to_arviz
from numpyro_ensemble.gp import RBF, choose_inducing, draw_features, draw_paths
from numpyro_ensemble.mcmc import starts

X = np.arange(4.0)


def model(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(slope * x + bias, 1.0), obs=y)


ADAM = numpyro.optim.Adam(0.1)
MAP = EnsembleMAP(model, ADAM, ensemble_size=2)
VI = EnsembleVI(model, AutoNormal(model), ADAM, Trace_ELBO(), ensemble_size=2)
QUIET = {"progress_bar": False}

CALLS = {
    "ensemble_init": lambda key, _: ensemble_init(
        jax.random.normal, optax.adam(0.1), ensemble_size=2, rng_key=key
    ),
    "seed": lambda key, _: ensemble_init(
        jax.random.normal, optax.adam(0.1), ensemble_size=2, seed=key
    ),
    "init": lambda key, _: MAP.init(key, X, X).optim_state,
    "run": lambda key, _: MAP.run(key, 3, X, X, batch_size=2, **QUIET).losses,
    "sample_posterior": lambda key, fit: VI.sample_posterior(key, fit, X, X),
    "EnsemblePredictive": lambda key, fit: EnsemblePredictive(
        model, fit, guide=VI.guide, num_samples=2
    )(key, X),
    "to_arviz": lambda key, fit: np.asarray(
        to_arviz(VI, fit, X, y=X, rng_key=key, num_samples=2, log_likelihood=False)["posterior"][
            "slope"
        ]
    ),
    "draw_paths": lambda key, _: draw_paths(key, RBF(), X, X, num_paths=2, num_features=16)(X),
    "draw_features": lambda key, _: draw_features(key, RBF(), 16, X)(X),
    "choose_inducing": lambda key, _: choose_inducing(key, X, 2),
    "starts": lambda key, fit: starts.from_ensemble(key, VI, fit, X, X, num_chains=4),
}


QUICK = {"ensemble_init", "run", "sample_posterior", "choose_inducing"}


@pytest.fixture(scope="module")
def fit():
    return VI.run(jax.random.key(7), 3, X, X, **QUIET)


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in CALLS]
)
def test_an_integer_stands_for_its_key(name, fit):
    call = CALLS[name]
    for a, b in zip(
        jax.tree.leaves(call(3, fit)), jax.tree.leaves(call(jax.random.key(3), fit)), strict=True
    ):
        assert_array_equal(a, b)


def test_one_of_two_names(key):
    for names in ({}, {"rng_key": 0, "seed": 0}):
        with pytest.raises(TypeError, match="rng_key, or its other name seed; got (neither|both)"):
            ensemble_init(jax.random.normal, optax.adam(0.1), ensemble_size=2, **names)
    with pytest.raises(ValueError, match="seed takes one key or ensemble_size=2 keys"):
        ensemble_init(jax.random.normal, optax.adam(0.1), ensemble_size=2, seed=jnp.ones(3))
