"""Draws from the fit of one data set, by any kind of fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ensemble._compat import copy_of
from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.fit.ensemble import Ensemble
from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mapping import compiler_options, map_draws
from numpyro_ensemble.vi import EnsembleVI


def draws_of(
    fit: Any, num_draws: int, num_steps: int | None, options: Mapping[str, Any]
) -> Callable[..., dict[str, jax.Array]]:
    """Return a function of a key and a call that fits it and draws `(num_draws, ...)` by site.

    Args:
        fit: an `EnsembleVI`, an `MCMC`, or a function of a key and the model's arguments that
            returns draws by site.
        num_draws: from each fit.
        num_steps: of a variational fit.
        options: of its `run`.

    Raises:
        TypeError: if `fit` is of another kind.
        ValueError: if an option is missing, or does not go with it.
    """
    if isinstance(fit, EnsembleVI):
        if num_steps is None:
            raise ValueError(
                "num_steps is missing: an EnsembleVI needs it, the number of steps of each fit."
            )
        check_count("num_steps", num_steps)
        return _by_guide(fit, num_draws, num_steps, options)
    if isinstance(fit, MCMCKernel):
        raise TypeError(
            f"fit takes an MCMC: MCMC({type(fit).__name__}(model), num_warmup=500, "
            f"num_samples=100, num_chains=..., progress_bar=False)."
        )
    if isinstance(fit, Ensemble):
        raise TypeError(
            "fit is an EnsembleMAP, and a MAP estimate is a point without draws to rank: use "
            "EnsembleVI with an AutoLaplaceApproximation, which draws around the estimate."
        )
    if not isinstance(fit, MCMC) and not callable(fit):
        raise TypeError(f"fit takes an EnsembleVI, an MCMC or a function, got {fit!r}.")
    if num_steps is not None or options:
        given = [*(["num_steps"] if num_steps is not None else []), *options]
        raise ValueError(
            f"{given} are options of variational fits, and fit is a {type(fit).__name__}: leave "
            f"them out."
        )
    if isinstance(fit, MCMC):
        return _by_chains(fit, num_draws)
    return lambda key, args, kwargs: thinned(dict(fit(key, *args, **kwargs)), num_draws)


def _by_guide(runner: EnsembleVI, num_draws: int, num_steps: int, options: Mapping) -> Callable:
    one = copy.copy(runner)
    one.ensemble_size = 1  # the vmap around it maps over data sets

    def draw(key: jax.Array, args: tuple, kwargs: dict) -> dict[str, jax.Array]:
        fit_key, draw_key = jax.random.split(key)
        settings = {"progress_bar": False, **options}
        result = one.run(fit_key, num_steps, *args, **settings, **kwargs)
        return one.sample_posterior(draw_key, result, *args, num_samples=num_draws, **kwargs)

    return draw


def _by_chains(mcmc: MCMC, num_draws: int) -> Callable:
    if mcmc.num_chains > 1 and mcmc.chain_method != "vectorized":
        raise ValueError(
            f'fit has {mcmc.num_chains} chains: write MCMC(..., chain_method="vectorized"), so '
            f"that the chains of all data sets run together."
        )
    if mcmc.num_chains * mcmc.num_samples < num_draws:
        raise ValueError(
            f"num_draws={num_draws}, and fit makes {mcmc.num_chains} x {mcmc.num_samples} draws: "
            f"lower num_draws, or raise num_samples of the MCMC."
        )

    def draw(key: jax.Array, args: tuple, kwargs: dict) -> dict[str, jax.Array]:
        own = copy_of(mcmc)  # so that no tracer stays in the user's MCMC
        own.progress_bar = False
        own.run(key, *args, **kwargs)
        return thinned(own.get_samples(), num_draws)

    return draw


def mapped_fits(one: Callable, given: Any, batch_size: int | None) -> Any:
    """Map a fit over data sets and keys in one program: `batch_size` at once, or all."""
    number = len(jax.tree.leaves(given)[0])
    fits = tracing_alone(lambda given: map_draws(one, given, batch_size or number))
    return jax.tree.map(np.asarray, jax.jit(fits, compiler_options=compiler_options(2))(given))


def thinned(draws: dict[str, Any], number: int) -> dict[str, jax.Array]:
    """Return `number` equally spaced draws."""
    total = {len(value) for value in draws.values()}
    if len(total) != 1 or min(total) < number:
        raise ValueError(f"{number} draws of each site are needed at least, got {sorted(total)}.")
    places = np.linspace(0, total.pop() - 1, number).round().astype(int)
    return {name: jnp.asarray(value)[places] for name, value in draws.items()}
