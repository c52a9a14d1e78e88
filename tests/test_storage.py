"""Results on disk: a loaded result equals the saved one, and works like it."""

import json
import zipfile

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import optimistix
import pytest
from numpy.testing import assert_array_equal
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_ensemble import (
    EarlyStopping,
    EnsembleMAP,
    EnsemblePredictive,
    EnsembleResult,
    EnsembleVI,
    storage,
    to_arviz,
)

Y = np.random.default_rng(0).normal(size=11)


def model(y=None, size=11):
    """A scalar below a matrix, names in no order, and a support that depends on another latent."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2, 3]).to_event(2))
    a = numpyro.sample("a", dist.HalfNormal(1))
    numpyro.deterministic("twice", 2 * a)
    with numpyro.plate("rows", size):
        numpyro.sample("y", dist.Normal(w.sum(), a), obs=y)


def vi(optim=None):
    guide = AutoMultivariateNormal(model)
    return EnsembleVI(model, guide, optim or optax.adam(0.05), Trace_ELBO(), ensemble_size=3)


def quiet(runner, *args, **options):
    return runner.run(jax.random.key(0), 30, *args, progress_bar=False, **options)


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        assert_array_equal(a, b)


@pytest.fixture(scope="module")
def fitted():
    return quiet(vi(), Y, early_stopping=EarlyStopping(2, window=5))


def test_what_comes_back_is_what_was_saved(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    back = EnsembleResult.load(tmp_path / "fit")
    assert type(back) is EnsembleResult
    same(back.params, fitted.params)
    same(back.losses, fitted.losses)
    same(jax.tree.leaves(back.state[:3]), jax.tree.leaves(fitted.state[:3]))
    for name in ("stopped", "completed_steps", "seconds"):
        assert_array_equal(getattr(back, name), getattr(fitted, name))
    assert_array_equal(back.finite, fitted.finite)
    assert_array_equal(back.ranking(), fitted.ranking())
    same(back.best().params, fitted.best().params)
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]  # no temporary file is left
    again = tmp_path / "again"
    back.save(again)
    same(EnsembleResult.load(again).state[:3], back.state[:3])


def test_numpy_reads_it_without_the_model(fitted, tmp_path):
    fitted.save(tmp_path / "fit.npz")
    with np.load(tmp_path / "fit.npz") as arrays:
        assert_array_equal(arrays["params/auto_loc"], fitted.params["auto_loc"])
        told = json.loads(bytes(arrays["numpyro_ensemble"]))
    assert told["kind"] == "EnsembleResult"
    assert {"numpyro", "jax", "optax", "numpyro_ensemble"} <= told["versions"].keys()


@pytest.mark.long
def test_a_new_process_uses_it(fitted, tmp_path):
    """A loaded result is used by runners and guides that were never called."""
    fitted.save(tmp_path / "fit")
    back = EnsembleResult.load(tmp_path / "fit")
    key = jax.random.key(1)
    used = vi()
    draws = vi().sample_posterior(key, back, Y, num_samples=2)
    same(draws, used.sample_posterior(key, fitted, Y, num_samples=2))
    more, other = (quiet(r, Y, init_state=f.state) for r, f in ((vi(), back), (used, fitted)))
    same(more.params, other.params)
    same(more.losses, other.losses)
    runner = vi()
    stepped, losses = runner.update(back.state, Y)
    assert_array_equal(losses, used.update(fitted.state, Y)[1])
    same(runner.get_params(stepped), more._replace(params=runner.get_params(stepped)).params)
    data = to_arviz(vi(), back, Y, rng_key=2)
    expected = to_arviz(used, fitted, Y, rng_key=2)
    assert_array_equal(data.posterior["w"], expected.posterior["w"])
    assert az.summary(data, var_names=["twice"]).shape[0] == 1


@pytest.mark.filterwarnings("ignore:.*have not met the criterion")
@pytest.mark.parametrize(
    "solver",
    [optimistix.LBFGS(1e-8, 1e-8), pytest.param(numpyro.optim.Adam(0.1), marks=pytest.mark.long)],
)
def test_modes_come_back(solver, tmp_path):
    runner = EnsembleMAP(model, solver, ensemble_size=3)
    result = quiet(runner, Y)
    result.save(tmp_path / "fit")
    back = EnsembleResult.load(tmp_path / "fit")
    assert_array_equal(back.gradient_norm, result.gradient_norm)
    assert (back.converged is None) == (result.converged is None)
    assert_array_equal(back.ranking(), result.ranking())
    same(back.params, result.params)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*have not met the criterion")
@pytest.mark.parametrize("solver", [optimistix.LBFGS(1e-8, 1e-8), numpyro.optim.Adam(0.1)])
def test_modes_that_came_back_go_on(solver, tmp_path):
    runner = EnsembleMAP(model, solver, ensemble_size=3)
    result = quiet(runner, Y)
    result.save(tmp_path / "fit")
    back = EnsembleResult.load(tmp_path / "fit")
    key = jax.random.key(3)
    predicted = EnsemblePredictive(model, back)(key)["y"]
    assert_array_equal(predicted, EnsemblePredictive(model, result)(key)["y"])
    same(quiet(runner, Y, init_state=back.state).params,
         quiet(runner, Y, init_state=result.state).params)  # fmt: skip


def test_raw_densities_and_other_dtypes(tmp_path):
    runner = EnsembleMAP.from_log_joint(
        lambda p, y: (-((y - p["b"][0]["a"]) ** 2).sum(), -(p["b"][1] ** 2).sum()),
        lambda key: {"b": [{"a": jax.random.normal(key)}, jnp.zeros(2, jnp.bfloat16)]},
        optax.sgd(0.01),
        ensemble_size=2,
    )
    result = quiet(runner, Y)
    result.save(tmp_path / "fit")
    back = EnsembleResult.load(tmp_path / "fit")
    assert jax.tree.structure(back.params) == jax.tree.structure(result.params)
    same(back.params, result.params)


def test_a_state_of_another_fit_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    state = EnsembleResult.load(tmp_path / "fit").state
    with pytest.raises(ValueError, match="of another model, guide or optimiser: .* lacks"):
        quiet(vi(optax.sgd(0.1, momentum=0.9)), Y, init_state=state)
    with pytest.raises(ValueError, match="of another ensemble size"):
        runner = vi()
        runner.ensemble_size = 4
        quiet(runner, Y, init_state=state)


def test_bad_files(fitted, tmp_path):
    path = tmp_path / "fit"
    fitted.save(path)
    whole = path.read_bytes()
    for number in (100, len(whole) // 2, len(whole) - 10):  # the file is cut short
        path.write_bytes(whole[:number])
        with pytest.raises(ValueError, match="fit is damaged, or no file that save wrote"):
            EnsembleResult.load(path)
    place = whole.index(np.asarray(fitted.params["auto_loc"]).tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="damaged"):  # one bit is flipped
        EnsembleResult.load(path)
    path.write_text("no archive")
    with pytest.raises(ValueError, match="no file that save wrote"):
        EnsembleResult.load(path)
    np.savez(path.with_suffix(".npz"), a=np.zeros(2))
    with pytest.raises(ValueError, match="no file that save wrote"):
        EnsembleResult.load(path.with_suffix(".npz"))
    with pytest.raises(FileNotFoundError):
        EnsembleResult.load(tmp_path / "nothing")
    storage.write(path, "other", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="holds a other, not a EnsembleResult"):
        EnsembleResult.load(path)
    assert storage.read(path, "other")["a"].shape == (2,)


def test_a_later_format_is_refused(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FORMAT", 99)
    fitted.save(tmp_path / "fit")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of format 99, written by numpyro_ensemble"):
        EnsembleResult.load(tmp_path / "fit")


def test_nothing_in_a_file_is_run(tmp_path):
    """A file whose arrays are pickles raises an error, for any description in it."""
    evil = np.array([print], dtype=object)
    header = {"format": 1, "kind": "EnsembleResult", "content": {"params": {"array": "params"}}}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(tmp_path / "evil.npz", numpyro_ensemble=text, params=evil)
    assert zipfile.is_zipfile(tmp_path / "evil.npz")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        EnsembleResult.load(tmp_path / "evil.npz")


def test_what_is_no_array_is_not_saved(fitted, tmp_path):
    odd = fitted._replace(params={"w": {"f": print}})
    with pytest.raises(TypeError, match="params/w/f holds a builtin_function_or_method"):
        odd.save(tmp_path / "fit")
    assert not list(tmp_path.iterdir())
