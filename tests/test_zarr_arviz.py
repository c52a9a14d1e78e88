"""ArviZ data in Zarr stores: the groups of `to_arviz`, written block by block."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from zarr.storage import MemoryStore

from numpyro_ensemble import EnsembleVI, to_arviz
from numpyro_ensemble.gp import RBF, GaussianProcess
from numpyro_ensemble.predict.assembly import makes_inference_data
from numpyro_ensemble.streaming.store import BlockStore

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*too few for az.loo", "ignore:log_likelihood leaves out the factors"
)
N = 17
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, 2)), RNG.normal(size=N)
SEEN = RNG.random(N) < 0.7
KEY = jax.random.key(2)
SAMPLES = {
    "w": RNG.normal(size=(2, 3, 2)),
    "scale": 1.0 + RNG.random((2, 3)),
    "own": RNG.normal(size=(2, 3, N)),
}


def local(x, seen, y=None):
    """A model with latents of rows, a mask, a scale, factors with and without rows, and `level`."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.factor("a", -(scale**2))
    numpyro.sample("level", dist.Normal(scale, 1.0), obs=0.3)
    with numpyro.plate("rows", len(x)), handlers.scale(scale=2.0):
        own = numpyro.sample("own", dist.Normal(0.0, scale))
        numpyro.factor("terms", -0.1 * own**2)
        mean = numpyro.deterministic("mean", x @ w + own)
        with handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def in_store(store=None, model=local, samples=None, args=(X, SEEN, Y), **options):
    store = MemoryStore() if store is None else store
    return to_arviz(
        model, SAMPLES if samples is None else samples, *args, rng_key=KEY, store=store,
        progress_bar=False, **options,
    )  # fmt: skip


def by_rows(store=None, **options):
    return in_store(store, **{"row_args": ["x", "seen", "y"], "row_batch_size": 5, **options})


def groups_of(data):
    return set(data.groups()) if makes_inference_data() else set(data.children)


@pytest.fixture(scope="module")
def in_memory():
    with pytest.warns(UserWarning, match="too few for az.loo"):
        return to_arviz(local, SAMPLES, X, SEEN, Y, rng_key=KEY)


def agree(data, expected, but=()):
    assert groups_of(data) == groups_of(expected)
    for group in groups_of(expected):
        for name, variable in expected[group].data_vars.items():
            if (group, name) not in but:
                assert data[group][name].dims == variable.dims
                assert_allclose(data[group][name], variable, rtol=1e-9, atol=1e-9)
        assert set(data[group].data_vars) == set(expected[group].data_vars)
        assert expected[group].attrs.keys() <= data[group].attrs.keys()


@pytest.mark.long
def test_groups_are_those_in_memory(in_memory, tmp_path):
    agree(in_store(tmp_path), in_memory)
    stored = xr.open_datatree(tmp_path, engine="zarr")
    assert set(stored.children) == groups_of(in_memory)
    lazy = in_store()["log_likelihood"]["y"].variable
    assert not isinstance(lazy._data, np.ndarray)


@pytest.mark.long
def test_cut_by_rows_as_well(in_memory, tmp_path):
    data = by_rows(tmp_path, coords={"rows": np.arange(N) + 5})
    agree(data, in_memory, but={("posterior_predictive", "y")})
    noise = data["posterior_predictive"]["y"].values - data["posterior"]["mean"].values
    assert np.unique(noise).size == noise.size
    assert abs(noise.std() / 0.5 - 1) < 4 / np.sqrt(2 * noise.size)
    assert_array_equal(data["log_likelihood"]["rows"], np.arange(N) + 5)
    assert np.isnan(data["observed_data"]["y"]).sum() == (~SEEN).sum()


@pytest.mark.long
@pytest.mark.parametrize("place", [3, "end"])
def test_a_call_that_was_stopped_goes_on(place, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    count, advance, finish = [], BlockStore.advance, BlockStore.finish

    def stop(self):
        count.append(1)
        if len(count) == place + 1:
            raise StoppedError
        advance(self)

    def stop_at_end(self):
        raise StoppedError

    with monkeypatch.context() as patch:
        if place == "end":
            patch.setattr(BlockStore, "finish", stop_at_end)
        else:
            patch.setattr(BlockStore, "advance", stop)
        with pytest.raises(StoppedError):
            by_rows(tmp_path)
    assert BlockStore.finish is finish
    agree(by_rows(tmp_path), by_rows())
    with pytest.raises(ValueError, match="the store exists: .* holds all of this call"):
        by_rows(tmp_path)
    with pytest.raises(ValueError, match="of another call, argument 'y' was"):
        by_rows(tmp_path, args=(X, SEEN, Y + 1))


def line(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mean = numpyro.deterministic("scope/mean", x @ w)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def test_a_variational_fit():
    runner = EnsembleVI(
        line, AutoNormal(line), numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=2
    )
    result = runner.run(KEY, 2, X, Y, progress_bar=False)
    options = {"num_samples": 40, "rng_key": KEY, "constant_data": {"x": X}}
    expected = to_arviz(runner, result, X, Y, **options)
    data = to_arviz(
        runner, result, X, Y, **options, store=MemoryStore(), row_args=["x", "y"], row_batch_size=6,
        progress_bar=False,
    )  # fmt: skip
    agree(data, expected, but={("posterior_predictive", "y")})
    summaries = (az.summary(d, var_names=["w"], kind="stats") for d in (data, expected))
    assert_array_equal(*summaries)


def summed(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def process(x, y=None):
    w = numpyro.sample("w", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", GaussianProcess(RBF(w[0]), x, 0.1), obs=y)


def scaled_by_number(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0 / len(x)).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def penalised(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.factor("penalty", -((x @ w) ** 2).sum())
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (summed, "the log density of 'y' is one number for all rows"),
        (process, r"'y' \(GaussianProcess\) is one event of all rows"),
        (scaled_by_number, r"\['w'\] depend on all rows"),
        (penalised, r"\['penalty'\] depend on all rows"),
    ],
)
def test_rows_that_depend_on_each_other_are_refused(model, said, tmp_path):
    options = {"model": model, "samples": {"w": 1 + RNG.random((2, 3, 2))}, "args": (X, Y)}
    with pytest.raises(ValueError, match=f"{said}.*leave row_args out|{said}.*Leave row_args out"):
        by_rows(tmp_path / "store", **options, row_args=["x", "y"])
    assert not (tmp_path / "store").exists()
    data = in_store(**options)
    assert data["log_likelihood"]["y"].sizes["draw"] == 3


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="pass store="):
        to_arviz(local, SAMPLES, X, SEEN, Y, row_args=["x"])
    with pytest.raises(ValueError, match="prior= does not go with store="):
        in_store(prior=True)
    with pytest.raises(ValueError, match="If other arguments have rows too, name them"):
        by_rows(row_args=["x"])
    short = {**SAMPLES, "own": jnp.ones((2, 3, 5))}
    with pytest.raises(ValueError, match=r"samples of 'own' have shape \(5,\)"):
        by_rows(samples=short)
