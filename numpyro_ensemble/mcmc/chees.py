"""ChEES: dynamic HMC whose trajectory length, step size and scale come from all chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc.dynamic_hmc import DynamicHMCState
from blackjax.mcmc.metrics import default_metric
from jax.sharding import Mesh
from numpyro.infer import init_to_uniform

from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mcmc.checks import Survey, check_positive
from numpyro_ensemble.mcmc.chees_scheme import (
    ChEESAdaptation,
    Scheme,
    chees_start,
    chees_step,
    first_metric,
)
from numpyro_ensemble.mcmc.counted import counted, largest_eigenvalue
from numpyro_ensemble.mcmc.metric import check_metric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.state import ChainsState
from numpyro_ensemble.mcmc.trajectories import TrajectoryKernel


class ChEES(TrajectoryKernel):
    """Hamiltonian Monte Carlo over many chains, adapted by ChEES (Hoffman et al., 2021).

    For `MCMC(ChEES(model), num_chains=64, chain_method="vectorized", ...)`. Each
    iteration, all chains make trajectories of the same length, a quasi-random fraction of a longest
    one. Gradient ascent adapts the longest length; step size and metric are adapted over all chains
    too. By default the kernel finds its own start.

    Args:
        model: a NumPyro model whose latents are continuous.
        potential_fn: a potential energy instead of a model; `MCMC.run` needs `init_params` then.
        step_size: the first step size, in units of the metric. None takes it from the gradients.
        learning_rate: learning rate of the ascent on the logarithm of the trajectory length.
        target_accept_prob: the acceptance probability that the step size is adapted to, that of
            NUTS by default. 0.651 is best in theory, but reaches thin tails too rarely.
        max_leapfrog_steps: the largest number of leapfrog steps of a trajectory.
        metric: "dense" (all correlations), "low_rank" (the 16 strongest directions), a number of
            directions, or "diagonal" (a scale for each latent). "auto" is the first of these that
            the number of chains can estimate.
        start: where chains start: "nuts", "pathfinder", "microcanonical", "init"
            (`init_strategy` alone), or a function `(rng_key, num_chains, *args, **kwargs)` that
            returns what `MCMC.run` takes as `init_params`.
        init_strategy: a NumPyro initialisation strategy: where the search for the start begins.
        mesh: devices for the chains: a `jax.sharding.Mesh` with an axis "member", or "all".

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_ensemble.mcmc import ChEES
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(ChEES(model), num_warmup=200, num_samples=200, num_chains=32,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(3))
        >>> mcmc.get_samples(group_by_chain=True)["mu"].shape
        (32, 200)
    """

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | None = None,
        learning_rate: float = 0.025,
        target_accept_prob: float = 0.8,
        max_leapfrog_steps: int = 1000,
        metric: str | int = "auto",
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
        mesh: Mesh | str | None = None,
    ) -> None:
        super().__init__(model, potential_fn, start=start, init_strategy=init_strategy, mesh=mesh)
        self._check_options(step_size, target_accept_prob)
        check_positive("learning_rate", learning_rate)
        check_count("max_leapfrog_steps", max_leapfrog_steps)
        check_metric(metric)
        self._step_size = step_size
        self._scheme = Scheme(
            learning_rate, target_accept_prob, metric, max_leapfrog_steps=max_leapfrog_steps
        )

    _adaptation = ChEESAdaptation
    _remedies = (
        "more warm-up (num_warmup=1000 or more); ChEES(model, target_accept_prob=0.95), for a "
        "density with narrow places"
    )

    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        rows, dtype = state.z, state.z.dtype
        counts = counted(-state.potential_energy, rows.shape[1])
        metric = first_metric(rows, counts, self._scheme)
        if self._step_size is None:
            step_size = metric.first_step_size(state.z_grad, counts)
        else:
            step_size = jnp.asarray(self._step_size, dtype)
        middle = rows.mean(axis=0, keepdims=True, where=counts[:, None])
        whitened = metric.whiten(rows - middle)
        # a quarter turn in the widest direction
        length = 0.5 * jnp.pi * jnp.sqrt(largest_eigenvalue(whitened, counts))
        length = jnp.clip(length, step_size, self._scheme.max_leapfrog_steps * step_size)
        adaptation = chees_start(metric, step_size, length.astype(dtype), progress, self._scheme)
        return state._replace(adapt_state=adaptation)

    def _step(
        self, keys: jax.Array, chains: DynamicHMCState, adaptation: Any, log_density: Callable
    ) -> tuple[DynamicHMCState, Any, Any]:
        return chees_step(keys, chains, adaptation, log_density, self._scheme)

    def _energy(self, state: ChainsState, info: Any) -> jax.Array:
        metric = default_metric(state.adapt_state.metric.inverse_mass)
        before = jax.vmap(metric.kinetic_energy)(info.momentum) + state.potential_energy
        return jnp.where(info.is_accepted, info.energy, before)
