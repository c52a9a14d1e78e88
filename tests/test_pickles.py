"""Runners and results that are copied, pickled, and continued in another process."""

import copy
import pickle
import subprocess
import sys

import cloudpickle
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import (
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

from numpyro_ensemble import EnsembleMAP, EnsemblePredictive, EnsembleVI

TOP = np.float32(2.0)
Y = np.array([0.3, 0.9, 1.4])


def model(top, y=None):
    """A model with sites in no alphabetical order and a support that depends on an argument."""
    w = numpyro.sample("w", dist.Uniform(0.0, top))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Normal(w + b.sum(), a), obs=y)


def fitted(guide, key, of=model):
    adam = numpyro.optim.Adam(0.05)
    if guide is None:
        runner = EnsembleMAP(of, adam, ensemble_size=2)
    else:
        runner = EnsembleVI(of, guide(of), adam, Trace_ELBO(), ensemble_size=2)
    return runner, runner.run(key, 3, TOP, y=Y, progress_bar=False)


def answers(runner, result, key):
    """Return what a runner's methods answer about a result."""
    state = result.state
    found = {
        "params": runner.get_params(state),
        "loss": runner.evaluate(state, TOP, y=Y),
        "step": runner.update(state, TOP, y=Y)[1],
        "run": runner.run(key, 2, TOP, y=Y, init_state=state, progress_bar=False).losses,
        "best": result.best().params,
    }
    if isinstance(runner, EnsembleVI):
        found["draws"] = runner.sample_posterior(key, result, TOP, num_samples=2)
        predictive = EnsemblePredictive(runner.model, result, guide=runner.guide, num_samples=2)
        found["y"] = predictive(key, TOP)["y"]
    return found


def agree(first, second, **near):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert_allclose(a, b, **{"rtol": 0.0, **near})


GUIDES = {
    "VI": AutoMultivariateNormal,
    "MAP": None,
    "AutoNormal": AutoNormal,
    "Laplace": AutoLaplaceApproximation,
}


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "MAP" else pytest.mark.long) for n in GUIDES]
)
def test_copies_and_pickles_give_the_same_numbers(name, key):
    runner, result = fitted(GUIDES[name], key)
    expected = answers(runner, result, key)
    pair = (runner, result)
    if name != "VI":  # the quick run has cloudpickle in the next test
        agree(answers(copy.copy(runner), copy.copy(result), key), expected)
        agree(answers(*cloudpickle.loads(cloudpickle.dumps(pair)), key), expected)
    agree(answers(*copy.deepcopy(pair), key), expected)
    agree(answers(runner, pickle.loads(pickle.dumps(result)), key), expected)
    with pytest.raises((AttributeError, pickle.PicklingError), match="adam|Laplace"):
        pickle.dumps(runner)  # NumPyro's optimisers are closures


@pytest.mark.promotes_ranks
@pytest.mark.parametrize("name", ["MAP", pytest.param("VI", marks=pytest.mark.long)])
def test_closures_go_through_cloudpickle(name, key):
    spread = np.float64(1.0)

    def closure(top, y=None):
        assert spread == 1.0
        model(top, y)

    pair = fitted(GUIDES[name], key, closure)
    agree(answers(*cloudpickle.loads(cloudpickle.dumps(pair)), key), answers(*pair, key))


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_another_process_goes_on(tmp_path, key):
    pair = fitted(AutoMultivariateNormal, key)
    (tmp_path / "pair").write_bytes(cloudpickle.dumps((pair, np.asarray(jax.random.key_data(key)))))
    script = f"""
import pickle, sys
import jax
jax.config.update("jax_enable_x64", {jax.config.jax_enable_x64})
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import numpy as np
import test_pickles
(runner, result), key = pickle.load(open({str(tmp_path / "pair")!r}, "rb"))
found = test_pickles.answers(runner, result, jax.random.wrap_key_data(key))
pickle.dump(jax.tree.map(np.asarray, found), open({str(tmp_path / "found")!r}, "wb"))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    agree(pickle.loads((tmp_path / "found").read_bytes()), answers(*pair, key), rtol=1e-6)
