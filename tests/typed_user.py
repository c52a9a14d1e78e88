"""A user's file, which `mypy --strict` accepts: see test_typing.py. It is checked, not run."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import numpyro  # type: ignore[import-untyped]
import numpyro.distributions as dist  # type: ignore[import-untyped]
import optax  # type: ignore[import-untyped]
from numpyro.infer import MCMC, Trace_ELBO  # type: ignore[import-untyped]
from numpyro.infer.autoguide import (  # type: ignore[import-untyped]
    AutoLaplaceApproximation,
    AutoNormal,
)

from numpyro_ensemble import (
    EarlyStopping,
    EnsembleMAP,
    EnsemblePredictive,
    EnsembleResult,
    EnsembleState,
    EnsembleVI,
    LaplaceMixture,
    Modes,
    Pathfinder,
    PathfinderResult,
    Repulsion,
    ensemble_init,
    ensemble_map,
    ensemble_step,
    laplace,
    log_joint,
    mcmc,
    modes,
    reweight,
    scoring,
    to_arviz,
)
from numpyro_ensemble.calibration import Calibration, sbc
from numpyro_ensemble.gp import (
    RBF,
    GaussianProcess,
    JointMoments,
    Kernel,
    Matern52,
    Moments,
    Optimum,
    Paths,
    Pathwise,
    draw_paths,
    minimise,
)
from numpyro_ensemble.scoring import Comparison, CrossValidation, Khat

KEY = jax.random.key(0)
X = jnp.linspace(0.0, 1.0, 10)
DRAWS = dict[str, jax.Array]


def model(x: jax.Array, y: jax.Array | None = None) -> None:
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)


def gp_model(x: jax.Array, y: jax.Array | None = None) -> None:
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", GaussianProcess(RBF(1.0, scale), x, 0.1), obs=y)


def fits() -> None:
    runner = EnsembleMAP(model, ensemble_size=4, repulsion=Repulsion(method="wgd"))
    stopping = EarlyStopping(patience=3)
    result = runner.run(KEY, 100, X, X, progress_bar=False, early_stopping=stopping)
    assert_type(result, EnsembleResult)
    assert_type(result.params, dict[str, Any])
    assert_type(result.losses, jax.Array)
    assert_type(result.finite, jax.Array)
    assert_type(EnsembleResult.load("folder"), EnsembleResult)
    state = runner.init(KEY, X, X)
    state, losses = runner.update(state, X, X)
    assert_type(losses, jax.Array)
    assert_type(runner.evaluate(state, X, X), jax.Array)
    guide = AutoLaplaceApproximation(model)
    vi = EnsembleVI(model, guide, optax.adam(1e-2), Trace_ELBO(), ensemble_size=4, kl_weight=0.5)
    fitted = vi.run(KEY, 100, X, X, init_params={"slope": np.zeros(4)})
    assert_type(vi.sample_posterior(KEY, fitted, num_samples=3), DRAWS)
    assert_type(modes(vi, fitted, X, X), Modes)
    assert_type(laplace(vi, KEY, fitted, X, X), LaplaceMixture)
    assert_type(Pathfinder(model).run(KEY, X, X), PathfinderResult)


def raw_densities() -> None:
    def start(key: jax.Array) -> DRAWS:
        return {"w": jax.random.normal(key, (3,))}

    def density(params: DRAWS, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return -((params["w"] - y.mean()) ** 2).sum(), jnp.zeros(())

    adam = optax.adam(1e-2)
    params, losses = ensemble_map(
        density, start, ensemble_size=3, num_steps=10, data=X, rng_key=KEY
    )
    assert_type(losses, jax.Array)
    raw = EnsembleMAP.from_log_joint(density, start, adam, ensemble_size=3)
    assert_type(raw, EnsembleMAP)
    state = ensemble_init(start, adam, ensemble_size=3, seed=0)
    step = ensemble_step(state, X, log_joint=density, optimizer=adam)
    assert_type(step, tuple[EnsembleState, jax.Array])
    joint = log_joint(reweight(model, prior=0.5))
    assert_type(joint({"slope": jnp.ones(())}, X, X), tuple[jax.Array, jax.Array])


def predictions(vi: EnsembleVI, fitted: EnsembleResult) -> None:
    predictive = EnsemblePredictive(model, params=fitted.params, guide=vi.guide, num_samples=10)
    draws = predictive(KEY, X)
    assert_type(draws, DRAWS)
    data = to_arviz(vi, fitted, X, X, rng_key=KEY, num_samples=100)
    assert_type(scoring.nll(data), jax.Array)
    assert_type(scoring.crps(draws["y"], X), jax.Array)
    assert_type(scoring.coverage(draws["y"], X, [0.5, 0.9]), jax.Array)
    assert_type(scoring.khat(data), Khat)
    assert_type(scoring.compare({"one": data, "other": data}), Comparison)
    folds = scoring.cross_validate(model, vi, X, X, rng_key=KEY, folds=5, num_steps=10)
    assert_type(folds, CrossValidation)
    assert_type(sbc(model, vi, X, X, rng_key=KEY, num_datasets=20), Calibration)


def chains() -> None:
    for kernel in (
        mcmc.MEADS(model),
        mcmc.ChEES(model, metric="dense"),
        mcmc.MAMS(model),
        mcmc.MCLMC(model, adapt="each"),
        mcmc.SGMCMC(model, control_variates=False),
    ):
        MCMC(kernel, num_warmup=10, num_samples=10, num_chains=64, chain_method="vectorized")
    assert_type(mcmc.starts.from_nuts(KEY, model, 64, X, X), DRAWS)
    assert_type(mcmc.starts.from_pathfinder(KEY, model, 64, X, X), DRAWS)
    runner = EnsembleVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    result = runner.run(KEY, 10, X, X)
    assert_type(mcmc.starts.from_ensemble(KEY, runner, result, X, X), DRAWS)


def functions() -> None:
    kernel = 2.0 * RBF(1.0, 0.3) + Matern52(1.0, jnp.asarray(0.2)) * RBF(1.0, 1.0)
    assert_type(kernel, Kernel)
    assert_type(kernel(X), jax.Array)
    paths = draw_paths(KEY, kernel, X, X, noise=0.1, num_paths=8)
    assert_type(paths, Paths)
    assert_type(paths(X), jax.Array)
    assert_type(minimise(KEY, paths, [(0.0, 1.0)]), Optimum)
    pathwise = Pathwise(gp_model, {"scale": jnp.ones(4)}, X, X, num_paths=2)
    assert_type(pathwise(KEY, X), DRAWS)
    assert_type(pathwise.draw(KEY), dict[str, Paths])
    assert_type(pathwise.moments(X), dict[str, Moments | JointMoments])
    assert_type(pathwise.quantiles([0.1, 0.9], X), DRAWS)
