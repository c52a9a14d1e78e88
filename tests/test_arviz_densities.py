"""Log densities of draws, which ArviZ's sensitivity and corrected leave-one-out use."""

import warnings

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.infer import HMC, MCMC, NUTS, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.reparam import ExplicitReparam, LocScaleReparam
from scipy import stats

from numpyro_ensemble import EnsembleVI, to_arviz
from numpyro_ensemble.mcmc import MEADS
from numpyro_ensemble.predict.assembly import makes_inference_data

pytestmark = pytest.mark.filterwarnings("ignore:.*too few for az.loo")
mpl.use("Agg")
NEW = not makes_inference_data()
RNG = np.random.default_rng(1)
ROWS = 18
X = RNG.normal(size=(ROWS, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
SHOP = np.arange(ROWS) % 3
COUNTS = RNG.poisson(3.0, size=(ROWS, 2))


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("b", dist.StudentT(4.0, 0.0, 1.0))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def by_shop(shop, y):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("shop", 3, dim=-2), numpyro.plate("kind", 2):
        level = numpyro.sample("level", dist.Gamma(2.0, tau))
    with numpyro.plate("row", len(y), dim=-2), numpyro.plate("kind", 2):
        numpyro.sample("sold", dist.Poisson(level[shop]), obs=y)


def shares(y):
    with numpyro.plate("kind", 2):
        p = numpyro.sample("share", dist.Dirichlet(jnp.array([2.0, 1.0, 3.0])))
    n = numpyro.sample("n", dist.Poisson(2.0))  # a latent integer, given by the samples
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(p.sum() + n, 1.0), obs=y)


W, B = RNG.normal(size=(2, 3, 2)), RNG.normal(size=(2, 3))
TAU, LEVEL = 0.5 + RNG.random((2, 3)), 1.0 + RNG.random((2, 3, 3, 2))
SHARE, N = RNG.dirichlet([1, 1, 1], size=(2, 3, 2)), RNG.poisson(2.0, (2, 3))
MODELS = {
    "regression": (
        regression, {"w": W, "b": B}, (X, X[:, 0]),
        {"w": stats.norm(0, 2).logpdf(W).sum(-1), "b": stats.t(4).logpdf(B)},
    ),
    "hierarchical counts": (
        by_shop, {"tau": TAU, "level": LEVEL}, (SHOP, COUNTS),
        {
            "tau": stats.halfnorm.logpdf(TAU),
            "level": stats.gamma(2.0, scale=1 / TAU[..., None, None]).logpdf(LEVEL),
        },
    ),
    "a simplex and an integer": (
        shares, {"share": SHARE, "n": N}, (X[:, 1],),
        {
            "share": np.apply_along_axis(stats.dirichlet([2, 1, 3]).logpdf, -1, SHARE),
            "n": stats.poisson(2.0).logpmf(N),
        },
    ),
}  # fmt: skip


@pytest.mark.promotes_ranks
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n == "regression")) for n in MODELS]
)
def test_log_priors_are_those_of_scipy_and_complete_the_density(name):
    model, samples, args, expected = MODELS[name]
    data = to_arviz(model, samples, *args)
    assert set(data["log_prior"].data_vars) == set(expected)
    total = 0.0
    for group in ("log_prior", "log_likelihood"):
        for site, values in data[group].data_vars.items():
            total = total + values.values.reshape(2, 3, -1).sum(-1)
            if group == "log_prior":
                assert_allclose(values, expected[site], rtol=1e-6)
                assert values.dims == data["posterior"][site].dims[: values.ndim]
    assert_allclose(total, data["sample_stats"]["lp"], rtol=1e-6)
    without = to_arviz(model, samples, *args, log_prior=False)
    assert "log_prior" not in (without.children if NEW else without.groups())


@pytest.mark.promotes_ranks
def test_unconstrained_latents_are_of_numpyros_transforms():
    model, samples, args, _ = MODELS["a simplex and an integer"]
    data = to_arviz(model, samples, *args, unconstrained=True)
    group = data["unconstrained_posterior"]
    expected = dist.transforms.StickBreakingTransform().inv(SHARE)
    assert_allclose(group["share"], expected, rtol=1e-6)
    assert group["share"].dims[:3] == ("chain", "draw", "kind") and group["share"].shape[3] == 2
    assert_allclose(group["n"], N)


@pytest.mark.long
@pytest.mark.parametrize("kernel", [HMC, NUTS, MEADS])
def test_a_run_of_chains_has_all_groups(kernel):
    number = 64 if kernel is MEADS else 2
    mcmc = MCMC(
        kernel(by_shop), num_warmup=50, num_samples=30, num_chains=number, thinning=2,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="an MCMC without draws: call its run first"):
        to_arviz(mcmc)
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The chains of MEADS|More chains|Found chain dimension")
        mcmc.run(jax.random.key(0), SHOP, y=COUNTS, extra_fields=("accept_prob", "num_steps"))
        data = to_arviz(mcmc, unconstrained=True)
        theirs = az.from_numpyro(mcmc)
        again = to_arviz(by_shop, mcmc, SHOP, y=COUNTS)
    groups = set(data.children if NEW else data.groups())
    assert groups >= {"posterior", "log_prior", "log_likelihood", "posterior_predictive"}
    assert_allclose(data["posterior"]["level"], theirs["posterior"]["level"])
    assert_allclose(data["log_prior"]["tau"], again["log_prior"]["tau"])
    stats = data["sample_stats"]
    assert {"lp", "acceptance_rate", "n_steps"} <= set(stats.data_vars)
    total = stats["lp"].values
    for group in ("log_prior", "log_likelihood"):
        for values in data[group].data_vars.values():
            total = total - values.values.reshape(*total.shape, -1).sum(-1)
    assert_allclose(total, 0.0, atol=1e-4 * np.abs(stats["lp"]).max())
    attrs = data["posterior"].attrs
    assert (attrs["kernel"], attrs["num_warmup"], attrs["thinning"]) == (kernel.__name__, 50, 2)
    with pytest.raises(TypeError, match=r"to_arviz\(model, mcmc, \*args\)"):
        to_arviz(mcmc, None, SHOP)


def test_the_prior_is_of_what_is_sampled():
    """In a reparameterised model, `log_prior` has the sites that are sampled instead."""

    def turning(y):
        z = numpyro.sample("z", dist.Normal(0.0, 3.0))
        s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(z, s), obs=y)

    config = {
        "z": LocScaleReparam(0.0), "s": ExplicitReparam(dist.transforms.ExpTransform().inv),
    }  # fmt: skip
    model = handlers.reparam(turning, config=config)
    samples = {name: np.full((1, 4), 0.3) for name in ("z_decentered", "s_base")}
    with jax.numpy_rank_promotion("allow"):
        data = to_arviz(model, samples, X[:, 0], posterior_predictive=False)
    assert set(data["log_prior"].data_vars) == set(samples)
    assert_allclose(data["log_prior"]["s_base"], stats.norm.logpdf(0.3), rtol=1e-6)
    assert_allclose(data["log_prior"]["z_decentered"], stats.norm.logpdf(0.3), rtol=1e-6)


def conjugate(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


OUTCOME = X @ np.array([1.0, -1.0]) + 0.3 * RNG.normal(size=ROWS)


def left_out():
    """Return the exact log predictive density of each observation, given the others."""
    terms = []
    for i in range(ROWS):
        x, y = np.delete(X, i, 0), np.delete(OUTCOME, i)
        covariance = np.linalg.inv(np.eye(2) + x.T @ x / 0.09)
        mean = covariance @ x.T @ y / 0.09
        sd = np.sqrt(0.09 + X[i] @ covariance @ X[i])
        terms.append(stats.norm(X[i] @ mean, sd).logpdf(OUTCOME[i]))
    return np.array(terms)


@pytest.fixture(scope="module")
def mean_field():
    optim = numpyro.optim.Adam(0.02)
    runner = EnsembleVI(conjugate, AutoNormal(conjugate), optim, Trace_ELBO(8), ensemble_size=4)
    result = runner.run(jax.random.key(0), 600, X, OUTCOME, progress_bar=False)
    return to_arviz(runner, result, X, OUTCOME, num_samples=1000)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:arviz", "ignore:.*:FutureWarning")
def test_sensitivity_to_the_prior(mean_field):
    """ArviZ computes finite sensitivities to the prior from the group `log_prior`."""
    data = mean_field
    assert set(data["log_prior"].data_vars) == {"w"}
    if NEW:
        table = az.psense(data, group="prior")["w"]
    else:
        table = az.psens(data, component="prior")["w"]
    assert np.isfinite(np.asarray(table)).all()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.skipif(not NEW, reason="ArviZ below 1.0 has no corrected leave-one-out")
def test_corrected_leave_one_out_is_that_of_refits(mean_field):
    """A mean-field posterior is too narrow; importance weights correct its scores."""
    data, exact = mean_field, left_out()
    log_p = data["sample_stats"]["log_p"]
    plain = np.abs(np.asarray(az.loo(data, pointwise=True).elpd_i) - exact)
    for name in ("log_q", "log_q_mixture"):
        log_q = data["sample_stats"][name]
        corrected = az.loo_approximate_posterior(data, log_p, log_q, pointwise=True)
        assert abs(corrected.elpd - exact.sum()) < corrected.se / 2
        assert 2 * np.abs(np.asarray(corrected.elpd_i) - exact).mean() < plain.mean()
    one = data.sel(chain=[2])
    log_p, log_q = (one["sample_stats"][name] for name in ("log_p", "log_q"))
    corrected = az.loo_approximate_posterior(one, log_p, log_q, pointwise=True)
    assert abs(corrected.elpd - exact.sum()) < corrected.se / 2


CHECKS = ["plot_ppc_dist", "plot_ppc_pit", "plot_loo_pit"] if NEW else ["plot_ppc", "plot_loo_pit"]


@pytest.mark.filterwarnings("ignore")  # warnings of ArviZ and pandas
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n != "plot_loo_pit")) for n in CHECKS]
)
def test_arviz_draws_predictive_checks(mean_field, name):
    data = mean_field
    drawn = getattr(az, name)(data, **({} if NEW else {"y": "y"} if "loo" in name else {}))
    if NEW:
        axes = [ax for ax in np.ravel(drawn.viz["figure"].item().axes)]
    else:
        axes = list(np.ravel(drawn))
    lines = [line for ax in axes for line in ax.get_lines()]
    curves = [np.asarray(line.get_ydata(), float) for line in lines]
    assert any(len(curve) > 5 and np.isfinite(curve).all() for curve in curves)


def test_draws_are_inputs_of_the_program():
    """If draws were constants of the program, XLA would slowly evaluate densities in compiling."""
    draws = {"w": RNG.normal(size=(2, 2000, 2)), "b": RNG.normal(size=(2, 2000))}  # 96 kB
    option = "jax_captured_constants_warn_bytes"
    before = getattr(jax.config, option)
    jax.config.update(option, 80_000)  # the indices of members and draws are 64 kB
    try:
        to_arviz(regression, draws, X, X[:, 0], posterior_predictive=False)  # warnings are errors
    finally:
        jax.config.update(option, before)
