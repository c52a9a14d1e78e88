"""Functions in Zarr stores equal those of the call, for any cuts of its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from gp_truth import inputs
from numpy.testing import assert_allclose, assert_array_equal
from numpyro.handlers import reparam
from zarr.storage import MemoryStore

from numpyro_ensemble.gp import RBF, Envelope, GaussianProcess, Pathwise, WhitenReparam
from numpyro_ensemble.gp.checks import digest, digest_in_parts
from numpyro_ensemble.gp.path_blocks import Functions
from numpyro_ensemble.gp.repeats import counted_before
from numpyro_ensemble.streaming.store import BlockStore

X = inputs(12, 1, width=5.0)
Y = np.sin(X[:, 0])
GRID = np.linspace(0.0, 6.0, 17)[:, None]
NEW = np.concatenate([GRID, GRID[3:7], GRID[3:7]])  # repeated inputs have their own noise
KEY = jax.random.key(5)
SAMPLES = {"width": np.array([[0.8, 1.0, 1.3]]), "noise": np.full((1, 3), 0.01)}


def board(X, y=None):
    """Two copies of a noisy process, whose mean closes over a latent."""
    noise = numpyro.sample("noise", dist.LogNormal(-3.0, 0.5))
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2 * width)
    gp = GaussianProcess(RBF(1.0, width), X, noise, lambda X: width * X[:, 0])
    with numpyro.plate("unit", 2):
        numpyro.sample("scope/y", gp, obs=y, infer={"event_dims": ["row"]})


@pytest.fixture(scope="module")
def pathwise():
    return Pathwise(
        board, SAMPLES, X, np.stack([Y, -Y]), batch_ndims=2, num_paths=3, num_bases=2,
        num_features=64, batch_size=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def in_memory(pathwise):
    values = pathwise(KEY, NEW)
    return {n: np.asarray(v).reshape(1, 3, 3, *v.shape[1:]) for n, v in values.items()}


def write(pathwise, store, *args, **options):
    return pathwise.to_zarr(store, KEY, *args, progress_bar=False, **options)


def by_rows(pathwise, store, *args, **options):
    return write(pathwise, store, *args, **{"row_args": ["X"], "row_batch_size": 6, **options})


@pytest.mark.parametrize("cut", [pytest.param(write, marks=pytest.mark.long), by_rows])
def test_the_numbers_are_those_of_the_call(cut, pathwise, in_memory, tmp_path):
    data = cut(pathwise, tmp_path, NEW)
    assert data["scope.y"].dims == data["scope.y_f"].dims == (
        "chain", "draw", "path", "unit", "row",
    )  # fmt: skip
    assert data["twice"].dims == ("chain", "draw", "path")
    for name, value in in_memory.items():
        assert_allclose(data[name.replace("/", ".")], value, rtol=1e-10, atol=1e-10)
    assert data.attrs["blocks"] == (2 if cut is write else 10)


def test_functions_are_drawn_once_for_all_rows(pathwise, monkeypatch):
    count, drawn = [], Functions._drawn
    monkeypatch.setattr(Functions, "_drawn", lambda *a: (count.append(1), drawn(*a))[1])
    by_rows(pathwise, MemoryStore(), NEW)
    assert len(count) == 2


def test_it_goes_on(pathwise, in_memory, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    advance, count = BlockStore.advance, []

    def stop(self):
        count.append(1)
        if len(count) == 7:
            raise StoppedError
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "advance", stop)
        with pytest.raises(StoppedError):
            by_rows(pathwise, tmp_path, NEW)
    assert xr.open_zarr(tmp_path, consolidated=False).attrs["blocks_written"] == 6
    data = by_rows(pathwise, tmp_path, NEW)
    for name, value in in_memory.items():
        assert_allclose(data[name.replace("/", ".")], value, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="holds all of this call"):
        by_rows(pathwise, tmp_path, NEW)
    with pytest.raises(ValueError, match="of another call, setting 'rng_key' was"):
        pathwise.to_zarr(
            tmp_path, jax.random.key(6), NEW, row_args=["X"], row_batch_size=6, progress_bar=False
        )


def counted(X, y=None):
    """Counts on top of a latent process, and a number that belongs to no row."""
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    f = numpyro.sample("f", GaussianProcess(RBF(1.0, width), X))
    numpyro.sample("late", dist.Normal(width, 1.0), obs=None if y is None else 0.3)
    with numpyro.plate("row", len(X)):
        numpyro.sample("y", dist.Poisson(20.0 * jnp.exp(0.1 * f)), obs=y)


@pytest.mark.long
@pytest.mark.parametrize("whitened", [False, True])
def test_what_is_drawn_on_top_is_drawn_for_each_block(whitened):
    model, samples = counted, {"width": np.array([0.9, 1.1]), "f": np.stack([Y, 0.5 * Y])}
    if whitened:
        model = reparam(counted, config={"f": WhitenReparam()})
        samples = {"width": samples["width"], "f_base": np.stack([Y, 0.5 * Y])}
    data_y = np.arange(12)
    pathwise = Pathwise(model, samples, X, data_y, num_features=32)
    called = pathwise(KEY, NEW)
    data = by_rows(pathwise, MemoryStore(), NEW)
    assert_allclose(data["f"][0], called["f"], rtol=1e-8)
    assert_allclose(data["late"][0], called["late"], rtol=1e-8)  # one number in all blocks
    y = data["y"].values[0]
    assert data["y"].dims == ("chain", "draw", "row")
    assert (y[:, :6] != y[:, 6:12]).any()
    rate = 20 * np.exp(0.1 * data["f"].values[0])
    assert abs(((y - rate) / np.sqrt(rate)).mean()) < 4 / np.sqrt(y.size)


@pytest.mark.long
def test_sites_of_all_rows_are_refused():
    def total(X, y=None):
        f = numpyro.sample("f", GaussianProcess(RBF(), X))
        numpyro.deterministic("total", f.sum())

    pathwise = Pathwise(total, {"f": Y[None]}, X, num_features=32)
    with pytest.raises(ValueError, match=r"\['total'\] depend on all rows"):
        by_rows(pathwise, MemoryStore(), NEW)
    assert_array_equal(write(pathwise, MemoryStore(), NEW)["total"][0], pathwise(KEY, NEW)["total"])


@pytest.mark.long
def test_processes_of_inputs_that_are_centred_are_refused():
    def centred(X, y=None):
        X = X - X.mean(0, keepdims=True)
        numpyro.sample("f", GaussianProcess(RBF(), X, 0.1), obs=y)

    pathwise = Pathwise(centred, {"q": np.zeros(2)}, X, Y, num_features=32)
    with pytest.raises(ValueError, match=r"\['f', 'f_f'\] depend on all rows"):
        by_rows(pathwise, MemoryStore(), NEW)


def test_kernels_that_close_over_latents_are_refused():
    def model(X, y=None):
        power = numpyro.sample("power", dist.LogNormal(0.0, 0.1))
        kernel = Envelope(lambda X: jnp.abs(X[:, 0]) ** power) * RBF()
        numpyro.sample("y", GaussianProcess(kernel, X, 0.1), obs=y)

    pathwise = Pathwise(model, {"power": np.ones(2)}, X, Y, num_features=32)
    with pytest.raises(TypeError, match="closes over latents or parameters"):
        by_rows(pathwise, MemoryStore(), NEW)


def test_digests_in_parts_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("numpyro_ensemble.gp.checks._PART", 8)
    arrays = [np.random.default_rng(0).normal(size=(7, 5)), np.arange(9), np.array([True, False])]
    assert digest_in_parts(arrays) == int(digest([jnp.asarray(x) for x in arrays]))


def test_repeated_inputs_are_counted():
    parts = [np.array([[0.0], [1.0], [0.0]]), np.array([[-0.0], [1.0]]), np.array([[0.0]])]
    counts = counted_before(parts, 3)
    assert [c.tolist() for c in counts] == [[0, 0, 0], [2, 1, 1], [3, 3, 3]]
