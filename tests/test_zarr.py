"""Predictions in Zarr stores: cut by draws and rows, continued, and refused if cuts are wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import killed_store
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from zarr.storage import MemoryStore, ZipStore

from numpyro_ensemble import EnsemblePredictive, EnsembleVI
from numpyro_ensemble.gp import RBF, GaussianProcess
from numpyro_ensemble.streaming.store import BlockStore

N, MEMBERS, DRAWS = 23, 2, 5
X = np.random.default_rng(0).normal(size=(N, 2))
KEY = jax.random.key(3)
SAMPLES = {
    "w": jax.random.normal(jax.random.key(1), (MEMBERS, DRAWS, 2)),
    "a": 1.0 + jax.random.uniform(jax.random.key(2), (MEMBERS, DRAWS)),
}


def counts(x, y=None):
    """A model with a scalar below a vector, a drawn latent, and counts of two outputs a row."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.HalfNormal(1.0))
    numpyro.deterministic("twice", 2.0 * a)
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x), dim=-2):
        mu = numpyro.deterministic("scope/mu", jnp.expand_dims(x @ w + b, -1))
        with numpyro.plate("out", 2, dim=-1):
            z = numpyro.sample("z", dist.Normal(jnp.broadcast_to(mu, (len(x), 2)), a))
            numpyro.sample("y", dist.Poisson(jnp.exp(0.1 * z)), obs=y)
    numpyro.sample("late", dist.Bernoulli(0.5).expand([len(x)]).to_event(1))


@pytest.fixture(scope="module")
def predictive():
    """Predictions whose blocks have two draws."""
    return EnsemblePredictive(counts, SAMPLES, batch_ndims=2, batch_size=2)


@pytest.fixture(scope="module")
def in_memory(predictive):
    return predictive(KEY, X)


def write(predictive, store, *args, key=KEY, **options):
    return predictive.to_zarr(store, key, *args, progress_bar=False, **options)


def by_rows(predictive, store, *args, **options):
    return write(predictive, store, *args, **{"row_args": ["x"], "row_batch_size": 5, **options})


# The numbers ----------------------------------------------------------------------------------


def test_cut_by_draws_the_numbers_are_those_of_the_call(predictive, in_memory, tmp_path):
    data = write(predictive, tmp_path / "store", X)
    # of 2, 2 and 1 draws of each member
    assert data.attrs["blocks"] == data.attrs["blocks_written"] == 6
    for name, value in in_memory.items():
        assert_array_equal(data[name.replace("/", ".")], value)
    assert data["y"].dtype == in_memory["y"].dtype and data["late"].dtype == in_memory["late"].dtype
    assert data["y"].dims == ("chain", "draw", "rows", "out")
    assert data["scope.mu"].dims[:3] == ("chain", "draw", "rows")
    assert data["late"].dims == ("chain", "draw", "late_dim_0")
    assert data["twice"].dims == ("chain", "draw")
    for dim in ("chain", "draw", "rows"):
        assert_array_equal(data[dim], np.arange(data.sizes[dim]))


@pytest.mark.long
def test_cut_by_rows_only_what_rows_draw_is_drawn_anew(predictive, in_memory, tmp_path):
    coords = {"rows": np.arange(N) * 2, "out": ["left", "right"]}
    data = by_rows(predictive, str(tmp_path / "store"), X, coords=coords, dims={"late": ["rows"]})
    for name in ("twice", "scope/mu", "b"):
        assert_allclose(data[name.replace("/", ".")], in_memory[name], rtol=1e-12)
    assert dict(data.sizes) == {"chain": 2, "draw": 5, "rows": N, "out": 2, "scope.mu_dim_1": 1}
    assert list(data["out"].values) == ["left", "right"]
    assert_array_equal(data["rows"], coords["rows"])
    assert data["y"].encoding["chunks"] == (1, 2, 5, 2)
    noise = ((data["z"] - data["scope.mu"][..., 0]) / SAMPLES["a"][..., None, None]).values
    first, second = noise[:, :, :5].ravel(), noise[:, :, 5:10].ravel()
    assert np.unique(noise).size == noise.size  # one key for all blocks would repeat the noise
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    again = by_rows(predictive, tmp_path / "again", jnp.asarray(X), dims={"late": ["rows"]})
    assert_array_equal(again["z"].values, data["z"].values)
    assert "rows" not in again.coords  # readers would hold them in memory
    other = by_rows(predictive, tmp_path / "other", X, row_batch_size=6)
    assert np.abs(other["z"].values - data["z"].values).max() > 0.1


@pytest.mark.long
def test_a_store_of_zarrs_and_a_row_in_all(predictive, in_memory):
    store = MemoryStore()
    data = by_rows(predictive, store, X, row_batch_size=100)
    assert data.attrs["blocks"] == 6
    assert_allclose(xr.open_zarr(store)["b"], in_memory["b"])
    one = by_rows(predictive, MemoryStore(), X[:1])
    assert_array_equal(one["y"], predictive(KEY, X[:1])["y"])


def linear(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.deterministic("mu", x @ w)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)


@pytest.mark.long
def test_mixtures_and_priors():
    weighted = EnsemblePredictive(
        linear, {"w": SAMPLES["w"]}, batch_ndims=2, weights=[3.0, 1.0], batch_size=4
    )
    data = write(weighted, MemoryStore(), X)
    assert_allclose(data["mu"][0], weighted(KEY, X)["mu"], rtol=1e-12)
    assert_allclose(by_rows(weighted, MemoryStore(), X)["mu"], data["mu"], rtol=1e-12)
    prior = EnsemblePredictive(linear, num_samples=6, batch_size=4)
    called = prior(KEY, X)
    data = by_rows(prior, MemoryStore(), X)
    assert data["w"].shape == (1, 6, 2)
    assert_array_equal(data["w"][0], called["w"])  # all blocks of rows have the same draws
    assert_allclose(data["mu"][0], called["mu"])


@pytest.mark.long
def test_single_members_and_those_that_are_left():
    single = EnsemblePredictive(linear, {"w": SAMPLES["w"][0, 0]}, batch_ndims=0, num_samples=3)
    assert_array_equal(write(single, MemoryStore(), X)["y"][0], single(KEY, X)["y"])
    with pytest.warns(UserWarning, match="1 of 2 members are not finite"):
        lost = EnsemblePredictive(
            linear, {"w": SAMPLES["w"].at[0, 0, 0].set(np.nan)}, batch_ndims=2
        )
    assert list(write(lost, MemoryStore(), X)["chain"].values) == [1]


def local(x, y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(x)):
        own = numpyro.sample("own", dist.Normal(0.0, scale))
        numpyro.deterministic("mean", own + x[:, 0])
        numpyro.sample("y", dist.Normal(own + x[:, 0], 1.0), obs=y)


def test_latents_of_single_rows_are_cut_with_them():
    samples = {"scale": jnp.ones(3), "own": jax.random.normal(KEY, (3, N))}
    data = by_rows(EnsemblePredictive(local, samples), MemoryStore(), X)
    assert_allclose(data["mean"][:, 0], np.asarray(samples["own"]) + X[:, 0])
    few = EnsemblePredictive(local, {"scale": jnp.ones(3), "own": jnp.ones((3, 8))})
    with pytest.raises(ValueError, match=r"'own' has one value for each row, .* shape \(8,\)"):
        by_rows(few, MemoryStore(), X)


@pytest.mark.long
def test_latents_of_single_rows_are_drawn_by_guides():
    runner = EnsembleVI(
        local, AutoNormal(local), numpyro.optim.Adam(0.1), Trace_ELBO(), ensemble_size=2
    )
    result = runner.run(KEY, 2, X, X[:, 0], progress_bar=False)
    drawn = EnsemblePredictive(
        local, result, guide=runner.guide, num_samples=3, return_sites=["own", "mean"],
        group_by_member=True, batch_size=2,
    )  # fmt: skip
    called = drawn(KEY, X)
    for data in (by_rows(drawn, MemoryStore(), X), write(drawn, MemoryStore(), X)):
        for name in ("own", "mean"):
            assert_allclose(data[name], called[name], rtol=1e-12)


def walk(x, y=None):
    """A random walk in time, with all rows side by side."""

    def step(level, _):
        with numpyro.plate("rows", len(x)):
            level = numpyro.sample("level", dist.Normal(level, 1.0))
        return level, level

    scan(step, x[:, 0], None, length=3)


def test_what_is_drawn_in_a_scan_over_time_is_drawn_for_each_block():
    data = by_rows(EnsemblePredictive(walk, num_samples=2), MemoryStore(), X)["level"]
    assert data.dims == ("chain", "draw", "level_dim_0", "rows")
    noise = np.diff(data.values, axis=2)
    assert np.unique(noise).size == noise.size


def looks(x, y=None):
    """A model that looks at the values of an argument."""
    shift = 1.0 if np.asarray(x).dtype.kind == "f" and bool(x[0, 0] > -9.0) else 0.0
    numpyro.deterministic("mu", x[:, 0] + shift)


def test_a_model_that_looks_at_values():
    data = by_rows(EnsemblePredictive(looks, num_samples=2), MemoryStore(), X)
    assert_allclose(data["mu"][0, 0], X[:, 0] + 1.0)


# Continuation --------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, number, in_part=False):
    """Make writing stop after some blocks, optionally in the middle of the next block."""
    count, advance, write = 0, BlockStore.advance, BlockStore.write

    def counted(self):
        nonlocal count
        if count == number:
            raise StoppedError
        count += 1
        advance(self)

    def writing(self, path, region, values):
        if count == number and in_part and path == "z":
            write(self, path, region, np.zeros_like(values))
            raise StoppedError
        write(self, path, region, values)

    monkeypatch.setattr(BlockStore, "advance", counted)
    monkeypatch.setattr(BlockStore, "write", writing)


@pytest.mark.parametrize("number", [4, *(pytest.param(n, marks=pytest.mark.long) for n in (0, 29))])
def test_a_call_that_was_stopped_goes_on(predictive, tmp_path, monkeypatch, number):
    whole = by_rows(predictive, MemoryStore(), X)
    with monkeypatch.context() as patch:
        stop_after(patch, number, in_part=True)
        with pytest.raises(StoppedError):
            by_rows(predictive, tmp_path, X)
    left = xr.open_zarr(tmp_path, consolidated=False)
    assert left.attrs["blocks_written"] == number
    (tmp_path / "zarr.0.partial").touch()
    count = []
    advance = BlockStore.advance
    monkeypatch.setattr(BlockStore, "advance", lambda self: (count.append(1), advance(self)))
    data = by_rows(predictive, tmp_path, X)
    assert len(count) == whole.attrs["blocks"] - number
    xr.testing.assert_identical(data.load(), whole.load())
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(ValueError, match="the store exists: .* holds all of this call"):
        by_rows(predictive, tmp_path, X)


@pytest.fixture(scope="module")
def stopped(predictive, tmp_path_factory):
    """Return a store whose writing has stopped after four blocks."""
    store = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(StoppedError):
            by_rows(predictive, store, X)
    return store


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"args": (X + 1,)}, "argument 'x' was float64"),
        ({"row_batch_size": 6}, "block 'row_batch_size' was 5, and is 6"),
        ({"key": jax.random.key(4)}, "setting 'rng_key' was uint32"),
        ({"coords": {"rows": np.arange(N)}}, "coordinate 'rows' was not there"),
        ({"samples": {**SAMPLES, "a": SAMPLES["a"] + 1.0}}, "sample 'a' was float64"),
        pytest.param(
            {"model": lambda x: counts(X + 1.0 + x)},
            "whose 'scope.mu' has other numbers",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_store_of_another_call_is_refused(stopped, changed, said):
    options = {"args": (X,), **changed}
    model, samples = options.pop("model", counts), options.pop("samples", SAMPLES)
    if model is not counts:

        def model(x, y=None):
            counts(x + 1.0, y)

    other = EnsemblePredictive(model, samples, batch_ndims=2, batch_size=2)
    with pytest.raises(ValueError, match=f"the store exists: .*{said}"):
        by_rows(other, stopped, *options.pop("args"), **options)
    assert xr.open_zarr(stopped, consolidated=False).attrs["blocks_written"] == 4


def test_other_contents_are_refused(predictive, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="the store exists: .* was not written by this package"):
        write(predictive, tmp_path, X)
    xr.Dataset({"y": ("rows", X[:, 0])}).to_zarr(tmp_path / "a", consolidated=False, zarr_format=3)
    with pytest.raises(ValueError, match="the store exists: .* was not written by this package"):
        write(predictive, tmp_path / "a", X)
    assert_array_equal(xr.open_zarr(tmp_path / "a", consolidated=False)["y"], X[:, 0])


def test_one_call_at_a_time(predictive, tmp_path, monkeypatch):
    said, advance = [], BlockStore.advance

    def another(self):
        if not said:
            said.append(None)
            with pytest.raises(ValueError, match=f"another call writes {tmp_path}"):
                BlockStore(tmp_path, {}, 1)
        advance(self)

    monkeypatch.setattr(BlockStore, "advance", another)
    write(predictive, tmp_path, X)
    assert said


def test_stores_that_cannot_be_written(predictive, tmp_path):
    with pytest.raises(ValueError, match="opened read-only"):
        write(predictive, MemoryStore(read_only=True), X)
    with pytest.raises(ValueError, match="cannot overwrite values"):
        write(predictive, ZipStore(tmp_path / "store.zip", mode="w"), X)


def test_times_are_coordinates(predictive):
    days = np.datetime64("2026-01-01") + np.arange(N)
    data = write(predictive, MemoryStore(), X, coords={"rows": days})
    assert_array_equal(data["rows"], days)


def test_without_zarr(predictive, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"pip install 'numpyro_ensemble\[zarr\]'"):
        write(predictive, "nowhere", X)


# Refused calls -------------------------------------------------------------------------------


def gaussian_process(x, y=None):
    numpyro.sample("f", GaussianProcess(RBF(), x, noise=0.1))


def joint_event(x, y=None):
    numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(len(x)), jnp.eye(len(x))))


def chain_of_rows(x, y=None):
    def step(level, row):
        level = numpyro.sample("level", dist.Normal(level + row[0], 1.0))
        return level, level

    scan(step, 0.0, x)


def gram(x, y=None):
    numpyro.deterministic("gram", x @ x.T)


def total(x, y=None):
    numpyro.deterministic("total", x.sum())


def centred(x, y=None):
    x = x - x.mean(0, keepdims=True)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)


def by_number(x, y=None):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(0.0, 1.0 / len(x)), obs=y)


def cumulative(x, y=None):
    with numpyro.plate("rows", len(x)):
        own = numpyro.sample("own", dist.Normal(0.0, 1.0))
    numpyro.deterministic("sum", lax.cumsum(own))


def a_mean_of_latents(x, y=None):
    with numpyro.plate("rows", len(x)):
        own = numpyro.sample("own", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(own.mean(), 1.0))


def named_rows(x, y=None):
    for i in range(len(x)):
        numpyro.sample(f"y_{i}", dist.Normal(x[i, 0], 1.0))


def some_rows(x, y=None):
    with numpyro.plate("rows", 16, subsample_size=4):
        numpyro.sample("y", dist.Normal(0.0, 1.0))
    numpyro.deterministic("mu", x[:, 0])


def parameters(x, y=None):
    own = numpyro.param("own", jnp.zeros(len(x)))
    numpyro.deterministic("mu", own + x[:, 0])


def own_numbers(x, y=None):
    numpyro.deterministic("mu", x[:, 0] + jax.random.normal(numpyro.prng_key(), (len(x),)))


def level_of_a_scan(x, y=None):
    def step(level, _):
        return numpyro.sample("level", dist.Normal(level, 1.0)), None

    level, _ = scan(step, 0.0, None, length=2)
    numpyro.deterministic("mu", x[:, 0] + level)


def of_all_data(x, y=None):
    with numpyro.plate("rows", N):
        numpyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (gaussian_process, r"'f' \(GaussianProcess\) is one event of all rows"),
        (joint_event, r"'f' \(MultivariateNormal\) is one event of all rows"),
        (chain_of_rows, "'level' is drawn in a scan over the rows"),
        (gram, r"'gram' has shape \(8, 8\) with 8 rows and \(16, 16\) with 16"),
        (total, "'total'.* depend on all rows"),
        (centred, "'y'.* depend on all rows"),
        (by_number, "'y'.* depend on all rows"),
        (cumulative, "'sum'.* depend on all rows"),
        (a_mean_of_latents, "'y'.* depend on all rows"),
        (named_rows, r"the sites \['y_10', .* depend on the number of rows"),
        (some_rows, "the plate 'rows' draws some of its rows"),
        (parameters, "the parameter 'own' has values for single rows"),
        (own_numbers, "random numbers with numpyro.prng_key"),
        (level_of_a_scan, "'level' is drawn within a scan and has no rows"),
        (of_all_data, "the model cannot be called with 16 or fewer of the 23 rows"),
    ],
)
def test_models_whose_rows_depend_on_each_other_are_refused(model, said, tmp_path):
    predictive = EnsemblePredictive(model, num_samples=2)
    with pytest.raises(ValueError, match=f"(?s){said}.*eave row_args out"):
        by_rows(predictive, tmp_path / "store", X)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("model", [centred, cumulative])
def test_and_can_be_cut_by_draws(model):
    predictive = EnsemblePredictive(model, num_samples=3, batch_size=2)
    data = write(predictive, MemoryStore(), X)
    for name, value in predictive(KEY, X).items():
        assert_array_equal(data[name][0], value)


def amortised(x, y=None):
    numpyro.sample("w", dist.Normal(x[:, 0].mean(), 1.0).expand([2]).to_event(1))


def test_guides_of_the_rows_are_refused():
    def of_rows(x, y=None):
        numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("own", dist.Normal(x[:, 0], 0.1))

    predictive = EnsemblePredictive(linear, guide=amortised, num_samples=2)
    with pytest.raises(ValueError, match="'w of the guide'.* depend on all rows"):
        by_rows(predictive, MemoryStore(), X)
    predictive = EnsemblePredictive(local, guide=of_rows, num_samples=2)
    with pytest.raises(ValueError, match="'own' has one value for each row"):
        by_rows(predictive, MemoryStore(), X)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"row_args": None}, "row_batch_size needs row_args"),
        ({"row_args": ["z"]}, r"row_args names 'z'; the model was called with \['x'\]"),
        ({"row_args": []}, "row_args takes names of arguments with the same number of rows"),
        ({"dims": {"q": ["rows"]}}, "dims names 'q', which is none of"),
        ({"dims": {"mu": ["a", "b"]}}, r"dims names \['a', 'b'\] for 'mu'"),
        ({"dims": {"mu": ["w_dim_0"]}, "return_w": True}, "'w_dim_0' has length"),
        ({"coords": {"q": [1]}}, r"coords names \['q'\]"),
        ({"coords": {"rows": [1]}}, r"coords gives values of shape \(1,\) for 'rows'"),
        ({"row_batch_sise": 4}, "Did you mean row_batch_size"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said, tmp_path):
    sites = ["w", "mu", "y"] if options.pop("return_w", False) else None
    predictive = EnsemblePredictive(linear, {"w": jnp.ones((2, 2))}, return_sites=sites)
    with pytest.raises((ValueError, TypeError), match=said):
        by_rows(predictive, tmp_path / "store", X, **options)


def test_arguments_of_unequal_lengths():
    def model(x, z):
        numpyro.deterministic("mu", x[:, 0] + z)

    predictive = EnsemblePredictive(model, num_samples=2)
    with pytest.raises(ValueError, match=r"the same number of rows .*'x': 23, 'z': 5"):
        write(predictive, MemoryStore(), X, np.ones(5), row_args=["x", "z"])
    data = write(predictive, MemoryStore(), X, z=np.ones(N), row_args=(0, "z"), row_batch_size=7)
    assert_allclose(data["mu"][0, 1], X[:, 0] + 1)
    with pytest.raises(ValueError, match="cannot be called with 16 or fewer of the 23 rows"):
        write(predictive, MemoryStore(), X, np.ones(N), row_args=["x"])
    discrete = EnsemblePredictive(model, num_samples=2, infer_discrete=True)
    with pytest.raises(
        ValueError, match="infer_discrete=True draws discrete latents given all rows"
    ):
        write(discrete, MemoryStore(), X, np.ones(N), row_args=["x", "z"])


# Killed processes ----------------------------------------------------------------------------


def blocks_in(folder):
    try:
        return json.loads((folder / "zarr.json").read_text())["attributes"]["blocks_written"]
    except FileNotFoundError:
        return 0


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_is_killed_again_and_again(tmp_path):
    """However often a call was killed, its numbers are those of an uninterrupted call."""
    script = Path(killed_store.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    folder, rng, seen = tmp_path / "store", random.Random(1), [0]
    while seen[-1] < 300:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(folder)], env=environment
        )
        enough, begin = seen[-1] + 50, time.monotonic()
        while blocks_in(folder) < enough:
            assert process.poll() is None and time.monotonic() < begin + 300
            time.sleep(0.01)
        time.sleep(rng.random() / 50)
        process.kill()
        process.wait(timeout=60)
        seen.append(blocks_in(folder))
    data = killed_store.write(folder)
    whole = killed_store.write(MemoryStore())
    xr.testing.assert_identical(data.load(), whole.load())
    assert len(seen) > 4
