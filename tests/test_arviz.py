"""ArviZ data of ensembles, on both release lines of ArviZ: below 1.0, and from 1.0 on."""

import contextlib
import subprocess
import sys

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Trace_ELBO, TraceEnum_ELBO, util
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from zoo import CASES, X, Y, chosen, ridge

from numpyro_ensemble import EnsembleMAP, EnsembleVI, to_arviz
from numpyro_ensemble.predict.assembly import makes_inference_data

# most tests have too few draws for az.loo
pytestmark = pytest.mark.filterwarnings("ignore:.*too few for az.loo")

mpl.use("Agg")
NEW = not makes_inference_data()
ADAM = numpyro.optim.Adam(0.05)
GROUPS = np.array([0, 0, 1, 1, 2, 2, 2, 0])


def schools(group, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", 3):
        effect = numpyro.sample("effect", dist.Normal(mu, 1.0))
        numpyro.deterministic("twice", 2.0 * effect)
    weights = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    numpyro.sample("weights", weights, infer={"event_dims": ["feature"]})
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(effect[group], 0.5), obs=y)


def fit_map(model, key, *args, steps=5, size=4, **options):
    runner = EnsembleMAP(model, ADAM, ensemble_size=size, **options)
    return runner, runner.run(key, steps, *args, progress_bar=False)


def fit_vi(model, key, *args, guide=AutoNormal, steps=5, size=4):
    runner = EnsembleVI(model, guide(model), ADAM, Trace_ELBO(), ensemble_size=size)
    return runner, runner.run(key, steps, *args, progress_bar=False)


def groups_of(data):
    return set(data.children) if NEW else set(data.groups())


@pytest.fixture(scope="module")
def vi_data():
    key = jax.random.key(0)
    runner, result = fit_vi(schools, key, GROUPS, Y)
    data = to_arviz(
        runner, result, GROUPS, Y, rng_key=key, num_samples=50, prior=20,
        constant_data={"group_of": GROUPS}, coords={"feature": ["a", "b"]},
    )  # fmt: skip
    return runner, result, data


def test_groups_dims_and_attributes(vi_data):
    runner, result, data = vi_data
    assert groups_of(data) == {
        "posterior", "posterior_predictive", "log_likelihood", "log_prior", "prior",
        "prior_predictive", "observed_data", "constant_data", "sample_stats", "training",
    }  # fmt: skip
    posterior = data["posterior"]
    assert {name: v.dims[2:] for name, v in posterior.data_vars.items()} == {
        "mu": (), "effect": ("group",), "twice": ("group",), "weights": ("feature",),
    }  # fmt: skip
    assert dict(posterior.sizes) == {"chain": 4, "draw": 50, "group": 3, "feature": 2}
    assert list(posterior.coords["feature"].values) == ["a", "b"]
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "row")
    assert data["prior"]["effect"].sizes["draw"] == 20
    assert_array_equal(data["observed_data"]["y"], Y)
    assert_array_equal(data["constant_data"]["group_of"], GROUPS)
    assert_array_equal(data["training"]["loss"], result.losses)
    attrs = data["posterior"].attrs
    assert attrs["inference_library"] == "numpyro_ensemble"
    assert attrs["sampling_time"] == result.seconds > 0
    assert "created_at" in attrs


@pytest.mark.long
def test_dims_are_those_of_arvizs_own_adapter(key):
    mcmc = MCMC(NUTS(schools), num_warmup=2, num_samples=2, progress_bar=False)
    mcmc.run(key, GROUPS, Y)
    theirs = az.from_numpyro(mcmc)
    samples = mcmc.get_samples(group_by_chain=True)
    ours = to_arviz(schools, samples, GROUPS, Y)
    for group in ("posterior", "observed_data"):
        for name, value in theirs[group].data_vars.items():
            assert ours[group][name].dims == value.dims
            assert_allclose(ours[group][name], value)


@pytest.mark.promotes_ranks
def test_densities_are_numpyros(vi_data, key):
    _, _, data = vi_data
    flat = {
        name: data["posterior"][name].values.reshape(200, *data["posterior"][name].shape[2:])
        for name in ("mu", "effect", "weights")
    }
    theirs = util.log_likelihood(schools, flat, GROUPS, Y)["y"].reshape(4, 50, 8)
    assert_allclose(data["log_likelihood"]["y"], theirs, rtol=1e-6)
    densities = [
        util.log_density(schools, (GROUPS, Y), {}, {k: v[i] for k, v in flat.items()})[0]
        for i in (0, 73, 199)
    ]
    lp = data["sample_stats"]["lp"].values.ravel()
    assert_allclose(lp[[0, 73, 199]], densities, rtol=1e-6)
    assert_array_equal(data["sample_stats"]["log_p"], data["sample_stats"]["lp"])


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "guide", [AutoNormal, pytest.param(AutoMultivariateNormal, marks=pytest.mark.long)]
)
def test_the_log_density_of_the_guide(guide, key):
    """The guide of a positive latent is log-normal: its density includes the Jacobian."""

    def model(y):
        scale = numpyro.sample("scale", dist.Exponential(1.0))
        numpyro.sample("y", dist.Normal(0.0, scale).expand([8]).to_event(1), obs=y)

    runner, result = fit_vi(model, key, Y, guide=guide)
    data = to_arviz(runner, result, Y, num_samples=20)
    draws = data["posterior"]["scale"].values
    for e in range(4):
        params = result.member(e).params
        names = ("scale_auto_loc", "scale_auto_scale")
        if guide is AutoMultivariateNormal:
            loc, spread = params["auto_loc"][0], params["auto_scale_tril"][0, 0]
        else:
            loc, spread = (params[name] for name in names)
        expected = dist.LogNormal(loc, spread).log_prob(draws[e])
        assert_allclose(data["sample_stats"]["log_q"][e], expected, rtol=1e-5)


def test_a_guide_without_a_density(key):
    runner, result = fit_vi(ridge, key, X, Y, guide=AutoLaplaceApproximation)
    with jax.numpy_rank_promotion("allow"):
        data = to_arviz(runner, result, X, Y, num_samples=3)
    assert set(data["sample_stats"].data_vars) == {"lp"}


def test_map_members_are_chains(key):
    runner, result = fit_map(schools, key, GROUPS, Y)
    data = to_arviz(runner, result, GROUPS, Y)
    assert dict(data["posterior"].sizes) == {"chain": 4, "draw": 1, "group": 3, "feature": 2}
    assert_allclose(data["posterior"]["effect"][:, 0], result.params["effect"], rtol=1e-6)
    assert_allclose(data["posterior"]["twice"][:, 0], 2 * result.params["effect"], rtol=1e-6)
    more = to_arviz(runner, result, GROUPS, Y, num_samples=30, posterior_predictive=True)
    assert more["posterior_predictive"]["y"].shape == (4, 30, 8)
    assert np.ptp(more["posterior"]["mu"].values, axis=1).max() == 0
    assert more["posterior_predictive"]["y"].values.std(axis=1).min() > 0.2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # warnings of ArviZ and pandas
def test_arviz_takes_them_from_here(vi_data, key, tmp_path):
    runner, result, data = vi_data
    assert "mu" in az.summary(data, var_names=["mu"]).index
    assert np.isfinite(az.rhat(data)["mu"])
    loo = az.loo(data)
    assert np.isfinite(loo.elpd if NEW else loo.elpd_loo)
    flat, fitted = fit_vi(schools, jax.random.key(3), GROUPS, Y, guide=AutoMultivariateNormal)
    with jax.numpy_rank_promotion("allow"):
        other = to_arviz(flat, fitted, GROUPS, Y, num_samples=50)
    assert len(az.compare({"mean field": data, "full rank": other})) == 2
    (az.plot_trace_dist if NEW else az.plot_trace)(data, var_names=["mu"])
    az.plot_forest(data, var_names=["effect"])
    data.to_netcdf(tmp_path / "fit.nc")
    back = (az.from_netcdf)(tmp_path / "fit.nc")
    assert_allclose(back["posterior"]["effect"], data["posterior"]["effect"])
    assert_allclose(back["training"]["loss"], data["training"]["loss"])


def test_predictions_for_other_data(vi_data):
    runner, result, _ = vi_data
    values = np.arange(4 * 5 * 3.0).reshape(20, 3)
    data = to_arviz(
        runner, result, GROUPS, Y, num_samples=5, predictions={"y_new": values},
        posterior_predictive=False, log_likelihood=False,
    )  # fmt: skip
    assert_array_equal(data["predictions"]["y_new"], values.reshape(4, 5, 3))
    assert groups_of(data).isdisjoint({"posterior_predictive", "log_likelihood", "prior"})
    with pytest.raises(
        ValueError, match=r"predictions\['y_new'\] has shape.*axes must be \(4, 5\)"
    ):
        to_arviz(runner, result, GROUPS, Y, num_samples=5, predictions={"y_new": values[:7]})


@pytest.mark.long
@pytest.mark.parametrize(
    "name", chosen(["subsampled", "partly_observed", "batch_norm", "random_eqx_net"])
)
@pytest.mark.promotes_ranks
@pytest.mark.filterwarnings("ignore:All 2 members start")
def test_every_kind_of_model(name, key):
    case = CASES[name]
    runner = EnsembleMAP(case.model, ADAM, ensemble_size=2)
    result = runner.run(key, 2, *case.args, **case.kwargs, progress_bar=False)
    batch = "subsamples .* one batch" if name == "subsampled" else None
    with pytest.warns(UserWarning, match=batch) if batch else contextlib.nullcontext():
        data = to_arviz(runner, result, *case.args, num_samples=2, prior=3, **case.kwargs)
    assert {"posterior", "observed_data", "log_likelihood", "posterior_predictive"} <= groups_of(
        data
    )
    for group in ("posterior", "log_likelihood", "posterior_predictive", "sample_stats"):
        for value in data[group].data_vars.values():
            assert value.shape[:2] == (2, 2)
            assert np.isfinite(value).all()


def test_masked_observations_count_nothing(key):
    def model(y, seen):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", len(y)), numpyro.handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    seen = np.arange(8) % 2 == 0
    runner, result = fit_map(model, key, Y, seen)
    terms = to_arviz(runner, result, Y, seen)["log_likelihood"]["y"].values
    assert (terms[..., ~seen] == 0).all() and (terms[..., seen] != 0).all()


def test_factors_improper_priors_and_no_data(key):
    def model(y):
        mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("extra", -((mu - 1.0) ** 2))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    runner, result = fit_map(model, key, Y)
    with pytest.warns(UserWarning) as caught:
        data = to_arviz(runner, result, Y, prior=True)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "log_likelihood leaves out the factors ['extra']" in messages
    assert "prior draws are left out: the prior of ['mu'] is improper" in messages
    assert set(data["log_likelihood"].data_vars) == {"y"}
    assert "prior" not in groups_of(data)

    def free():
        numpyro.sample("mu", dist.Normal(0.0, 1.0))

    runner, result = fit_map(free, key)
    assert groups_of(to_arviz(runner, result)) == {
        "posterior", "log_prior", "sample_stats", "training",
    }  # fmt: skip


def test_failed_members_are_left_out(key):
    runner = EnsembleMAP(ridge, ADAM, ensemble_size=3)
    starts = {"w": np.array([[0.0, 0.0], [np.nan, 0.0], [1.0, 0.0]])}
    with pytest.warns(UserWarning, match="start where the loss is not finite: 1"):
        result = runner.run(key, 3, X, Y, init_params=starts, progress_bar=False)
    with pytest.warns(UserWarning, match="1 of 3 members are not finite: 1. They are left out"):
        data = to_arviz(runner, result, X, Y)
    assert list(data["posterior"].coords["chain"].values) == [0, 2]
    assert list(data["training"].coords["chain"].values) == [0, 2]
    with pytest.raises(ValueError, match="1 of 3 members are not finite"):
        to_arviz(runner, result, X, Y, on_failed="raise")


@pytest.mark.promotes_ranks
def test_bad_input(vi_data, key):
    case = CASES["local_latents"]
    local, fitted = fit_map(case.model, key, *case.args)
    with pytest.raises(ValueError, match="samples of 'z' have shape.*a model without subsampling"):
        to_arviz(local, fitted, *case.args)
    runner, result, _ = vi_data
    with pytest.raises(TypeError, match="result takes what run returned, got dict"):
        to_arviz(runner, {}, GROUPS, Y)
    with pytest.raises(TypeError, match="inference takes a runner or a model, got 3"):
        to_arviz(3, {})
    with pytest.raises(ValueError, match=r"samples must have the same leading axes \(E, S\)"):
        to_arviz(ridge, {"w": np.ones((2, 3, 2)), "v": np.ones((2, 4))}, X, Y)
    for option, value in (("num_samples", 0), ("prior", -3)):
        with pytest.raises(ValueError, match=f"{option} must be at least 1"):
            to_arviz(runner, result, GROUPS, Y, **{option: value})
    with pytest.raises(ValueError, match="rng_key takes one key"):
        to_arviz(runner, result, GROUPS, Y, rng_key=0.0)
    mapped, fitted = fit_map(ridge, key, X, Y)
    other = EnsembleMAP(schools, ADAM, ensemble_size=4)
    with pytest.raises(ValueError, match=r"of another model: this one has no \['w'\]"):
        to_arviz(other, fitted, GROUPS, Y)


@pytest.mark.long
def test_keywords_of_the_runner_are_the_models(key):
    def model(y, scale=1.0):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(mu, scale), obs=y)

    guide = AutoNormal(model)
    runner = EnsembleVI(model, guide, ADAM, Trace_ELBO(), ensemble_size=2, scale=50.0)
    result = runner.run(key, 2, Y, progress_bar=False)
    data = to_arviz(runner, result, Y, num_samples=20)
    mu = data["posterior"]["mu"].values[..., None]
    assert_allclose(data["log_likelihood"]["y"], dist.Normal(mu, 50.0).log_prob(Y), rtol=1e-6)
    assert data["posterior_predictive"]["y"].values.std() > 20


@pytest.mark.long
def test_samples_of_another_model_are_refused(key):
    def other(group, y):
        numpyro.sample("b", dist.Normal(100.0, 1.0))
        schools(group, y)

    runner, result = fit_map(schools, key, GROUPS, Y)
    more = EnsembleMAP(other, ADAM, ensemble_size=4)
    for args in ((more, result, GROUPS, Y), (ridge, {"wew": np.ones((2, 3, 2))}, X, Y)):
        with pytest.raises(ValueError, match=r"they lack the sites \['[bw]'\]"):
            to_arviz(*args)
    with pytest.raises(ValueError, match=r"\['wew'\], which this model lacks"):
        to_arviz(ridge, {"wew": np.ones((2, 3, 2))}, X, Y)
    vi, fitted = fit_vi(schools, key, GROUPS, Y)
    others, _ = fit_vi(ridge, key, X, Y)
    with pytest.raises(ValueError, match="the result is of another model than this runner's"):
        to_arviz(others, fitted, X, Y)
    unused = EnsembleVI(ridge, AutoNormal(ridge), ADAM, Trace_ELBO(), ensemble_size=4)
    with pytest.raises(ValueError, match="the result is of another model than this runner's"):
        to_arviz(unused, fitted, X, Y)
    with pytest.raises(ValueError, match=r"\['y'\] were observed in the fit.*pass the data"):
        free = EnsembleMAP(line, ADAM, ensemble_size=2)
        to_arviz(free, free.run(key, 2, 3.0, progress_bar=False))
    with pytest.raises(TypeError, match="this is one of a raw density"):
        raw = EnsembleMAP.from_log_joint(_density, lambda key: {"w": jax.random.normal(key)}, ADAM)
        to_arviz(raw, raw.run(key, 2, progress_bar=False))


def line(y=None):
    numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def _density(params):
    return -(params["w"] ** 2).sum(), jnp.zeros(())


def test_members_with_data_of_their_own_are_refused(key):
    runner = EnsembleMAP(schools, ADAM, ensemble_size=2)
    both = np.stack([Y, Y + 1.0])
    result = runner.run(key, 2, GROUPS, both, member_args="y", progress_bar=False)
    with pytest.raises(ValueError, match=r"its own data, member_args=\['y'\]"):
        to_arviz(runner, result, GROUPS, both)


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_latents_that_were_summed_out_are_left_out(key):
    def mixture(y):
        mu = numpyro.sample("mu", dist.Normal(jnp.array([-2.0, 2.0]), 0.1).to_event(1))
        with numpyro.plate("row", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(mu[z.astype(int)], 0.3), obs=y)

    guide = AutoNormal(handlers.block(mixture, hide=["z"]))
    runner = EnsembleVI(mixture, guide, ADAM, TraceEnum_ELBO(), ensemble_size=2)
    result = runner.run(key, 2, Y, progress_bar=False)
    with pytest.warns(UserWarning, match=r"\['z'\] are discrete and were summed out"):
        data = to_arviz(runner, result, Y, num_samples=200)
    assert set(data["posterior"].data_vars) == {"mu"}
    assert groups_of(data).isdisjoint({"log_likelihood", "sample_stats"})
    assert data["posterior_predictive"]["y"].shape == (2, 200, 8)


def test_plates_name_their_own_axes(key):
    def model():
        with numpyro.plate("a", 3, dim=-1), numpyro.plate("c", 2, dim=-3):
            e = numpyro.sample("e", dist.Normal(0.0, 1.0))
            numpyro.deterministic("total", e.sum())
            numpyro.deterministic("twice", 2.0 * e)

    runner, result = fit_map(model, key)
    data = to_arviz(runner, result)["posterior"]
    assert data["e"].dims[2:] == ("c", "e_dim_1", "a")
    assert data["twice"].dims[2:] == ("c", "twice_dim_1", "a")
    assert data["total"].dims[2:] == ()


@pytest.mark.filterwarnings("ignore:.*")  # warnings of ArviZ
def test_names_of_scopes_survive_a_file(key, tmp_path):
    def model(y):
        with numpyro.handlers.scope(prefix="part"):
            mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    runner, result = fit_map(model, key, Y)
    data = to_arviz(runner, result, Y)
    data.to_netcdf(tmp_path / "fit.nc")
    back = az.from_netcdf(tmp_path / "fit.nc")
    assert_allclose(back["posterior"]["part.mu"][:, 0], result.params["part/mu"])


@pytest.mark.long
@pytest.mark.promotes_ranks
def test_draws_follow_supports_that_depend_on_latents(key):
    def model(y):
        low = numpyro.sample("low", dist.Normal(0.0, 1.0))
        numpyro.sample("u", dist.Uniform(low, low + 1.0))
        numpyro.sample("y", dist.Normal(low, 1.0).expand([8]).to_event(1), obs=y)

    runner, result = fit_vi(model, key, Y)
    data = to_arviz(runner, result, Y, num_samples=100)
    inside = data["posterior"]["u"] - data["posterior"]["low"]
    assert 0.0 <= inside.min() and inside.max() <= 1.0
    assert set(data["sample_stats"].data_vars) == {"lp"}
    assert np.isfinite(data["sample_stats"]["lp"]).all()


def test_draws_without_a_density_are_reported():
    samples = {"w": np.full((2, 20, 2), 1e200)}
    with pytest.warns(UserWarning, match="40 of 40 draws have no finite log density.*0, 1"):
        to_arviz(ridge, samples, X, Y, posterior_predictive=False)


@pytest.mark.long
def test_importing_arviz_first_breaks_nothing():
    script = """
import arviz
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from numpyro_ensemble import EnsembleMAP, to_arviz
def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=4)
result = runner.run(jax.random.key(0), 3, jnp.ones(3), progress_bar=False)
assert to_arviz(runner, result, jnp.ones(3)).posterior["mu"].shape == (4, 1)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_model_that_only_its_draws_can_bear(key):
    def model(y):
        z = numpyro.sample("z", dist.Normal(5.0, 0.1))
        numpyro.sample("y", dist.Normal(jnp.log(z - 3.0), 1.0), obs=y)  # NaN at default starts

    runner = EnsembleMAP(model, ADAM, ensemble_size=4)
    init_params = {"z": jnp.linspace(4.5, 5.5, 4)}
    result = runner.run(key, 5, 0.5, init_params=init_params, progress_bar=False)
    data = to_arviz(runner, result, 0.5, on_failed="raise")
    assert data["posterior"]["z"].shape == (4, 1)
    assert np.isfinite(data["posterior_predictive"]["y"]).all()
