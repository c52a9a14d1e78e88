"""MAMS: adjusted microcanonical trajectories, adapted over all chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc.dynamic_hmc import DynamicHMCState
from jax.sharding import Mesh
from numpyro.infer import init_to_uniform

from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mcmc.checks import Survey, check_positive
from numpyro_ensemble.mcmc.counted import counted
from numpyro_ensemble.mcmc.mams_scheme import (
    MAMSAdaptation,
    Scheme,
    mams_start,
    mams_step,
    time_unit,
)
from numpyro_ensemble.mcmc.metric import SharedMetric, check_metric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.state import ChainsState
from numpyro_ensemble.mcmc.trajectories import TrajectoryKernel


class MAMS(TrajectoryKernel):
    """Adjusted microcanonical sampling over many chains (Robnik et al., 2025).

    For `MCMC(MAMS(model), num_chains=64, chain_method="vectorized", ...)`. A trajectory
    moves at constant speed, and the gradient turns it. Its end is accepted or rejected, so draws
    have no bias. Each iteration, all chains make trajectories of the same length, a quasi-random
    fraction of a longest one. Step size, length and metric are adapted over all chains. By default
    the kernel finds its own start.

    Args:
        model: a NumPyro model whose latents are continuous.
        potential_fn: a potential energy instead of a model; `MCMC.run` needs `init_params` then.
        step_size: the first step size, in coordinates in which the metric is the identity. None
            takes it from the gradients.
        target_accept_prob: the acceptance probability that the step size is adapted to.
        length_factor: multiplies the longest trajectory, which is computed from the chains' spread.
        max_steps: the largest number of leapfrog steps of a trajectory.
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
        >>> from numpyro_ensemble.mcmc import MAMS
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)
        >>> mcmc = MCMC(MAMS(model), num_warmup=200, num_samples=200, num_chains=32,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(3))
        >>> mcmc.get_samples(group_by_chain=True)["mu"].shape
        (32, 200, 2)
    """

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | None = None,
        target_accept_prob: float = 0.8,
        length_factor: float = 1.0,
        max_steps: int = 1000,
        metric: str | int = "auto",
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
        mesh: Mesh | str | None = None,
    ) -> None:
        super().__init__(model, potential_fn, start=start, init_strategy=init_strategy, mesh=mesh)
        self._check_options(step_size, target_accept_prob)
        check_positive("length_factor", length_factor)
        check_count("max_steps", max_steps)
        check_metric(metric)
        self._step_size, self._metric = step_size, metric
        self._scheme = Scheme(target_accept_prob, length_factor, max_steps)

    _adaptation = MAMSAdaptation
    _remedies = (
        "more warm-up (num_warmup=1000 or more); MAMS(model, target_accept_prob=0.95), for a "
        "density with narrow places"
    )

    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        counts = counted(-state.potential_energy, state.z.shape[1])
        metric = SharedMetric.among(state.z, counts, self._metric)
        step_size = time_unit(state.z.shape[1]) * metric.first_step_size(state.z_grad, counts)
        if self._step_size is not None:
            step_size = jnp.asarray(self._step_size, state.z.dtype)
        first = step_size, progress, self._scheme
        return state._replace(adapt_state=mams_start(state.z, counts, metric, *first))

    def _step(
        self, keys: jax.Array, chains: DynamicHMCState, adaptation: Any, log_density: Callable
    ) -> tuple[DynamicHMCState, Any, Any]:
        return mams_step(keys, chains, adaptation, log_density, self._scheme)

    def _speed(self, size: int) -> float:
        return 1.0 / time_unit(size)

    def _energy(self, state: ChainsState, info: Any) -> jax.Array:
        # the speed is constant, so BlackJAX's energies are potential energies
        return jnp.where(info.is_accepted, info.energy, state.potential_energy)
