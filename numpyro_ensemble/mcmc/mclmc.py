"""MCLMC: microcanonical Langevin dynamics without a correction, over many chains."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.integrators import IntegratorState
from blackjax.util import generate_unit_vector
from jax.sharding import Mesh
from numpyro.infer import init_to_uniform

from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.mcmc.checks import Survey, check_positive
from numpyro_ensemble.mcmc.kernel import ManyChainKernel
from numpyro_ensemble.mcmc.mams_scheme import time_unit
from numpyro_ensemble.mcmc.mclmc_scheme import MCLMCAdaptation, Scheme, mclmc_start, mclmc_step
from numpyro_ensemble.mcmc.metric import check_metric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.state import ChainsState

_FEWEST = 4  # chains, if they are adapted together
_FEWEST_STEPS = 30  # iterations of warm-up, if each chain is adapted alone
_REMEDIES_ALONE = (
    "more warm-up (num_warmup=1000 or more); more steps_per_draw; R-hat of predictions, where "
    "latents can trade places, as the weights of a network"
)


class MCLMC(ManyChainKernel):
    """Microcanonical Langevin dynamics over many chains (Robnik et al., 2023).

    For `MCMC(MCLMC(model), num_chains=64, chain_method="vectorized", ...)`. A chain moves
    at constant speed, the gradient turns it, and it forgets its direction slowly. Every step is
    accepted, so draws have a bias, which `desired_energy_var` controls through the step size. A run
    ends with a warning if the mean of `energy_var` is more than 1.5 times `desired_energy_var`.
    `MAMS` has no such bias. By default the kernel finds its own start.

    Args:
        model: a NumPyro model whose latents are continuous, of two dimensions or more.
        potential_fn: a potential energy instead of a model; `MCMC.run` needs `init_params` then.
        desired_energy_var: the variance of a step's energy change, for each dimension, that the
            step size is adapted to. The bias is about proportional to its third root. The extra
            field `energy_var` holds the mean square of the energy changes of each draw's steps.
            With a pair, warm-up goes from the first value (large, if chains start far from the
            mass) to the second, and draws are made with the second.
        adapt: "all" adapts over all chains at once; "each" adapts every chain alone, for chains
            that stay in different modes, such as those of members (`starts.from_ensemble`). The
            check at the run's end then judges each chain alone.
        length_factor: multiplies the distance in which a chain forgets its direction.
        steps_per_draw: steps between two draws; each step costs one gradient.
        metric: with adapt="all": "dense" (all correlations), "low_rank" (the 16 strongest
            directions), a number of directions, or "diagonal" (a scale for each latent). "auto" is
            the first of these that the number of chains can estimate.
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
        >>> from numpyro_ensemble.mcmc import MCLMC
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)
        >>> mcmc = MCMC(MCLMC(model), num_warmup=200, num_samples=200, num_chains=32,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(3))
        >>> mcmc.get_extra_fields(group_by_chain=True)["energy_var"].shape
        (32, 200)
    """

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        desired_energy_var: float | tuple[float, float] = 5e-4,
        adapt: str = "all",
        length_factor: float = 1.0,
        steps_per_draw: int = 8,
        metric: str | int = "auto",
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
        mesh: Mesh | str | None = None,
    ) -> None:
        super().__init__(model, potential_fn, start=start, init_strategy=init_strategy, mesh=mesh)
        first, last = _pair(desired_energy_var)
        check_positive("length_factor", length_factor)
        check_count("steps_per_draw", steps_per_draw)
        if adapt not in ("all", "each"):
            raise ValueError(f"adapt takes 'all' or 'each', got {adapt!r}.")
        check_metric(metric)
        if adapt == "each" and metric not in ("auto", "diagonal"):
            raise ValueError(f"adapt='each' has a diagonal metric alone, got metric={metric!r}.")
        self._scheme = Scheme(last, length_factor, adapt == "each", metric, first)
        self._steps_per_draw = steps_per_draw
        if adapt == "each":
            self._adapts_alone, self._remedies = True, _REMEDIES_ALONE

    _adaptation = MCLMCAdaptation
    _remedies = (
        "more warm-up (num_warmup=1000 or more); more steps_per_draw; MAMS(model), which rejects "
        "steps that are too long"
    )

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The fields that `MCMC` collects by default."""
        return (*super().default_fields, "energy_var")

    def get_diagnostics_str(self, state: ChainsState) -> str:
        """Return step size, energy error and divergences over all chains, for the progress bar."""
        adapted = state.adapt_state
        step_size = float(np.mean(np.asarray(adapted.step_size)))
        error = float(np.mean(np.asarray(adapted.error)))
        diverged = int(np.sum(np.asarray(state.num_divergences)))
        return (
            f"{int(np.max(np.asarray(state.num_steps)))} steps of size {step_size:.2e}. energy "
            f"var={error:.1e}, {diverged} divergences in {state.i.shape[0]} chains"
        )

    def _check_chains(self, num_chains: int, num_warmup: int) -> None:
        if self._scheme.each and num_warmup < _FEWEST_STEPS:
            raise ValueError(
                f"num_warmup={num_warmup} is too short for adapt='each', by which a chain finds "
                f"its step size and scale alone. Give {_FEWEST_STEPS} or more: 500, say."
            )
        if num_chains < _FEWEST and not self._scheme.each:
            raise ValueError(
                f"num_chains={num_chains} is too few for MCLMC(model, adapt='all'), which adapts "
                f"over all chains. Run {_FEWEST} chains or more: 64, say; or give adapt='each'."
            )

    def _alone(self) -> str:
        if not self._scheme.each:
            return super()._alone()
        return (
            "MCLMC(model, adapt='each') was given one chain alone, by num_chains=1 or another "
            'chain_method. It needs two chains or more, and chain_method="vectorized".'
        )

    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        size = state.z.shape[1]
        if size < 2:
            raise ValueError(
                "MCLMC needs two latent values or more: at constant speed one alone can neither "
                "turn nor slow down. Use MAMS, MEADS or ChEES."
            )
        known = state.z, -state.potential_energy, state.z_grad
        adapted = mclmc_start(*known, progress, self._scheme)
        return state._replace(r=jax.vmap(generate_unit_vector)(keys, state.z), adapt_state=adapted)

    def _iterate(self, keys: jax.Array, state: ChainsState, log_density: Callable) -> ChainsState:
        drawn = jax.vmap(lambda key: jax.random.split(key, self._steps_per_draw))(keys)
        chains = IntegratorState(state.z, state.r, -state.potential_energy, -state.z_grad)
        steps = jnp.where(state.adapt_state.progress.warming, 1, self._steps_per_draw)
        chains, adapted, outcome = mclmc_step(
            drawn.swapaxes(0, 1), chains, state.adapt_state, log_density, self._scheme
        )
        return state._replace(
            z=chains.position,
            z_grad=-chains.logdensity_grad,
            potential_energy=-chains.logdensity,
            energy=-chains.logdensity,  # the speed is constant
            r=chains.momentum,
            num_steps=jnp.broadcast_to(steps, state.num_steps.shape).astype(state.num_steps.dtype),
            accept_prob=(1.0 - outcome.num_divergences / steps).astype(state.accept_prob.dtype),
            diverging=outcome.num_divergences > 0,
            num_divergences=outcome.num_divergences,
            adapt_state=adapted,
        )

    def _speed(self, size: int) -> float:
        return 1.0 / time_unit(size)


def _pair(desired: float | tuple[float, float]) -> tuple[float | None, float]:
    """Return the desired energy variances at the first iteration (None: the same) and the last.

    Raises:
        TypeError, ValueError: for anything but one or two positive numbers.
    """
    if not isinstance(desired, tuple | list):
        check_positive("desired_energy_var", desired)
        return None, desired
    if len(desired) != 2:
        raise ValueError(
            f"desired_energy_var takes one number, or two: those that warm-up begins and ends "
            f"with. It got {desired!r}."
        )
    for value in desired:
        check_positive("desired_energy_var", value)
    return desired[0], desired[1]
