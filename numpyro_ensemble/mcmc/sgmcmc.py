"""SGMCMC: stochastic gradients of a model's subsampled plates, over many chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.util import generate_gaussian_noise
from numpyro.infer import init_to_uniform

from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mcmc.checks import Survey, check_positive
from numpyro_ensemble.mcmc.kernel import ManyChainKernel
from numpyro_ensemble.mcmc.metric import check_metric
from numpyro_ensemble.mcmc.minibatches import BatchSize, MinibatchTarget, check_batch_size
from numpyro_ensemble.mcmc.positions import Coordinates
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.sgmcmc_scheme import (
    Scheme,
    SGMCMCAdaptation,
    Walkers,
    recentred,
    sgmcmc_start,
    sgmcmc_step,
)
from numpyro_ensemble.mcmc.state import ChainsState

_FEWEST = 4  # chains, which are adapted together


class SGMCMC(ManyChainKernel):
    """Langevin dynamics on stochastic gradients, with a thermostat (SGNHT; Ding et al., 2014).

    For `MCMC(SGMCMC(model), num_chains=64, chain_method="vectorized", ...)`. The model's data are
    in a subsampled plate, `numpyro.plate("data", N, subsample_size=100)`. Each step of each chain
    draws its own rows. No step is rejected, so draws have a bias, which falls with the step size.
    By default the kernel finds its own start on 1,000 rows, and then moves all chains together to
    the mode of all rows.

    Args:
        model: a NumPyro model whose latents are continuous, and outside of subsampled plates.
        batch_size: number of rows of a step: None for the `subsample_size` of the model's plates,
            one number for all plates that have a `subsample_size`, or a dict of numbers by the
            names of plates.
        step_size: the largest step, in units of the scale of the steepest direction, at most 1.
            Steps are shorter if the gradient is noisy.
        control_variates: subtract from each gradient that of the same rows at the chains' centre,
            and add that of all rows at the centre. The latter is computed a few times in warm-up
            and once a run. Each step then computes two gradients.
        steps_per_draw: steps between two draws, and between two adaptations in warm-up.
        metric: "dense" (all correlations), "low_rank" (the 16 strongest directions), a number of
            directions, or "diagonal" (a scale for each latent). "auto" is the first of these that
            the number of chains can estimate.
        start: where chains start: "nuts", "pathfinder", "microcanonical", "init"
            (`init_strategy` alone), or a function `(rng_key, num_chains, *args, **kwargs)` that
            returns what `MCMC.run` takes as `init_params`.
        init_strategy: a NumPyro initialisation strategy: where the search for the start begins.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_ensemble.mcmc import SGMCMC
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y), subsample_size=10):
        ...         batch = numpyro.subsample(y, event_dim=0)
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=batch)
        >>> mcmc = MCMC(SGMCMC(model), num_warmup=100, num_samples=100, num_chains=32,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(1000), extra_fields=("adapt_state.xi",))
        >>> mcmc.get_samples(group_by_chain=True)["mu"].shape
        (32, 100)
    """

    def __init__(
        self,
        model: Callable,
        *,
        batch_size: BatchSize = None,
        step_size: float = 0.25,
        control_variates: bool = True,
        steps_per_draw: int = 8,
        metric: str | int = "auto",
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
    ) -> None:
        super().__init__(model, start=start, init_strategy=init_strategy)
        check_batch_size(batch_size)
        check_positive("step_size", step_size)
        if step_size > 1.0:
            raise ValueError(
                f"step_size takes 1 at most, where steps are unstable; got {step_size}."
            )
        if not isinstance(control_variates, bool):
            raise TypeError(f"control_variates takes True or False, got {control_variates!r}.")
        check_count("steps_per_draw", steps_per_draw)
        check_metric(metric)
        self._rows = MinibatchTarget(model, batch_size, init_strategy)
        self._target = self._rows
        self._scheme = Scheme(step_size, control_variates, metric)
        self._steps_per_draw = steps_per_draw

    _adaptation = SGMCMCAdaptation
    _remedies = (
        "more warm-up (num_warmup=1000 or more); a larger batch_size; more steps_per_draw, or "
        "thinning; MCLMC(model) with all rows"
    )

    def _find_start(self, key: jax.Array, num_chains: int, args: tuple, kwargs: dict) -> Any:
        z = super()._find_start(key, num_chains, args, kwargs)
        if callable(self._start):
            return z
        return self._target.run("recentred", self._recentred, (z,), args, kwargs)

    def _recentred(self, call: tuple[tuple, dict], z: Any) -> Any:
        coordinates = self._target.coordinates(z, *call)
        density = self._followed(*call, coordinates)
        return coordinates.tree(recentred(coordinates.rows(z), density, self._scheme))

    def get_potential_fn(
        self, model_args: tuple = (), model_kwargs: dict | None = None
    ) -> Callable[[Any], jax.Array]:
        """Return the potential energy of all rows, over one chain's unconstrained values."""
        density = self._rows.density_of_rows(model_args, model_kwargs or {})
        return lambda z: -density(z, None)

    def get_diagnostics_str(self, state: ChainsState) -> str:
        """Return step size, noise and divergences over all chains, for the progress bar."""
        adapted = state.adapt_state
        step_size = float(np.mean(np.asarray(adapted.step_size)))
        noise = float(np.mean(np.asarray(adapted.noise)))
        friction = float(np.mean(np.asarray(adapted.xi)))
        return (
            f"{self._steps_per_draw} steps of size {step_size:.2e}. gradient noise={noise:.1e}, "
            f"xi={friction:.2f}, {int(np.sum(np.asarray(state.num_divergences)))} divergences in "
            f"{state.i.shape[0]} chains"
        )

    def _check_chains(self, num_chains: int, num_warmup: int) -> None:
        if num_chains < _FEWEST:
            raise ValueError(
                f"num_chains={num_chains} is too few for SGMCMC, which adapts over all chains. Run "
                f"{_FEWEST} chains or more: 64, say."
            )

    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        adapted = sgmcmc_start(state.z, -state.potential_energy, progress, self._scheme)
        momentum = jax.vmap(generate_gaussian_noise)(keys, state.z)
        return state._replace(r=momentum, adapt_state=adapted)

    def _followed(self, args: tuple, kwargs: dict, coordinates: Coordinates) -> Callable:
        density = self._rows.density_of_rows(args, kwargs)
        return lambda row, key: density(coordinates.tree(row), key)

    def _refreshed(self, state: ChainsState, log_density: Callable) -> ChainsState:
        # each step draws new rows, so only the centre's gradient can belong to other data
        adapted = state.adapt_state
        adapted = adapted._replace(stale=jnp.ones_like(adapted.stale))
        return state._replace(
            adapt_state=adapted, density_is_current=jnp.ones_like(state.density_is_current)
        )

    def _iterate(self, keys: jax.Array, state: ChainsState, log_density: Callable) -> ChainsState:
        drawn = jax.vmap(lambda key: jax.random.split(key, self._steps_per_draw + 1))(keys)
        chains = Walkers(state.z, state.r, -state.potential_energy)
        chains, adapted, lost = sgmcmc_step(
            drawn.swapaxes(0, 1), chains, state.adapt_state, log_density, self._scheme
        )
        steps = jnp.full_like(state.num_steps, self._steps_per_draw)
        return state._replace(
            z=chains.position,
            potential_energy=-chains.log_density,
            energy=0.5 * (chains.momentum**2).sum(axis=1) - chains.log_density,
            r=chains.momentum,
            num_steps=steps,
            accept_prob=(1.0 - lost / self._steps_per_draw).astype(state.accept_prob.dtype),
            diverging=lost > 0,
            num_divergences=lost,
            adapt_state=adapted,
        )
