"""MEADS: generalized HMC whose step size, scale and damping are computed from all chains."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from blackjax.mcmc.ghmc import GHMCState
from jax.sharding import Mesh
from numpyro.infer import init_to_uniform

from numpyro_ensemble.handlers import check_count, warn
from numpyro_ensemble.mcmc.checks import Survey, check_positive
from numpyro_ensemble.mcmc.ghmc import first_momentum
from numpyro_ensemble.mcmc.kernel import ManyChainKernel
from numpyro_ensemble.mcmc.meads_scheme import MEADSAdaptation, Scheme, meads_start, meads_step
from numpyro_ensemble.mcmc.metric import check_metric
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.state import ChainsState

_FEWEST = 4  # chains that a fold needs to estimate its standard deviations at all
_FEW = 16  # with fewer chains in a fold, standard deviations and step size may be far off


class MEADS(ManyChainKernel):
    """Generalized HMC over many chains, adapted by MEADS (Hoffman and Sountsov, 2022).

    For `MCMC(MEADS(model), num_chains=64, chain_method="vectorized", ...)`. Step size,
    metric and damping are computed from positions and gradients of the chains. There is no
    trajectory length, since momentum persists from step to step. By default the kernel finds its
    own start.

    Args:
        model: a NumPyro model whose latents are continuous.
        potential_fn: a potential energy instead of a model; `MCMC.run` needs `init_params` then.
        num_folds: number of folds K, a divisor of the number of chains. Each fold should have 16
            chains or more.
        step_size_multiplier: multiplies the step size, which is computed from the gradients.
        damping_slowdown: how slowly the floor of the damping falls; larger is slower.
        steps_per_draw: steps between two draws; each step costs one gradient.
        metric: "dense" (all correlations), "low_rank" (the 16 strongest directions), a number of
            directions, or "diagonal" (a scale for each latent and fold). "auto" is the first of
            these that the number of chains can estimate.
        start: where chains start: "nuts", "pathfinder", "microcanonical", "init"
            (`init_strategy` alone: MEADS freezes far from the typical set), or a function
            `(rng_key, num_chains, *args, **kwargs)` that returns what `MCMC.run` takes as
            `init_params`.
        init_strategy: a NumPyro initialisation strategy: where the search for the start begins.
        mesh: devices for the chains: a `jax.sharding.Mesh` with an axis "member", or "all".

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_ensemble.mcmc import MEADS
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(MEADS(model), num_warmup=200, num_samples=200, num_chains=64,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(3))
        >>> mcmc.get_samples(group_by_chain=True)["mu"].shape
        (64, 200)
    """

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        num_folds: int = 4,
        step_size_multiplier: float = 0.5,
        damping_slowdown: float = 1.0,
        steps_per_draw: int = 8,
        metric: str | int = "auto",
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
        mesh: Mesh | str | None = None,
    ) -> None:
        super().__init__(model, potential_fn, start=start, init_strategy=init_strategy, mesh=mesh)
        check_count("num_folds", num_folds)
        check_count("steps_per_draw", steps_per_draw)
        check_metric(metric)
        check_positive("step_size_multiplier", step_size_multiplier)
        check_positive("damping_slowdown", damping_slowdown)
        self._scheme = Scheme(num_folds, step_size_multiplier, damping_slowdown, metric)
        self._num_folds = num_folds
        self._steps_per_draw = steps_per_draw

    _adaptation = MEADSAdaptation
    _remedies = (
        "more warm-up (num_warmup=1000 or more) and 64 chains or more; ChEES(model), which mixes "
        "where directions differ in width"
    )

    def _check_chains(self, num_chains: int, num_warmup: int) -> None:
        num_folds = self._scheme.num_folds
        if num_chains % num_folds:
            next_one = num_chains - num_chains % num_folds + num_folds
            raise ValueError(
                f"num_chains={num_chains} is not a multiple of num_folds={num_folds}. Run "
                f"{max(next_one, _FEWEST * num_folds)} chains, or give MEADS another num_folds."
            )
        if num_chains < _FEWEST * num_folds:
            raise ValueError(
                f"num_chains={num_chains} leaves {num_chains // num_folds} chains in each of "
                f"num_folds={num_folds} folds, fewer than {_FEWEST}. Run "
                f"{_FEWEST * num_folds} chains or more, or fewer folds."
            )
        if num_chains < _FEW * num_folds:
            warn(
                f"MEADS adapts from {num_chains // num_folds} chains in each of {num_folds} folds, "
                f"and its chains may freeze: run {_FEW * num_folds} or more, or ChEES, which needs "
                f"fewer."
            )

    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        adaptation = meads_start(
            state.z, -state.potential_energy, -state.z_grad, progress, self._scheme
        )
        momentum, slice_ = jax.vmap(first_momentum)(keys, adaptation.scale)
        return state._replace(r=momentum, slice=slice_, adapt_state=adaptation)

    def _iterate(self, keys: jax.Array, state: ChainsState, log_density: Callable) -> ChainsState:
        drawn = jax.vmap(lambda key: jax.random.split(key, self._steps_per_draw + 1))(keys)
        chains = GHMCState(
            state.z,
            state.r,
            -state.potential_energy,
            -state.z_grad,
            state.slice,
        )
        warming = state.adapt_state.progress.warming
        chains, adaptation, energy, outcome = meads_step(
            drawn[:, 1:].swapaxes(0, 1),
            drawn[0, 0],
            chains,
            state.adapt_state,
            log_density,
            self._scheme,
        )
        steps = jnp.where(warming, 1, self._steps_per_draw)
        return state._replace(
            z=chains.position,
            z_grad=-chains.logdensity_grad,
            potential_energy=-chains.logdensity,
            energy=energy,
            r=chains.momentum,
            slice=chains.slice,
            num_steps=jnp.broadcast_to(steps, state.num_steps.shape).astype(state.num_steps.dtype),
            accept_prob=outcome.accept_prob / steps,
            diverging=outcome.num_divergences > 0,
            num_divergences=outcome.num_divergences,
            adapt_state=adaptation,
        )
