"""MEADS: generalized HMC whose step size, scale and damping come from the other chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.meads_adaptation import maximum_eigenvalue
from blackjax.mcmc.ghmc import GHMCState
from numpyro.infer import init_to_uniform

from numpyro_ensemble.mcmc.checks import Survey, check_count, check_positive
from numpyro_ensemble.mcmc.ghmc import Outcome, first_momentum, ghmc_steps
from numpyro_ensemble.mcmc.kernel import ChainsState, ManyChainKernel
from numpyro_ensemble.mcmc.low_rank import LowRank
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import choose, flat, per_chain

_FEWEST = 4  # chains in a fold, for its standard deviations to mean something


class MEADSAdaptation(NamedTuple):
    """What MEADS adapts, for each chain.

    Attributes:
        step_size: `(C,)`.
        scale: `(C, d)`, standard deviations of the unconstrained coordinates.
        damping: `(C,)`, alpha, the part of the momentum that each step renews.
        drift: `(C,)`, delta, how far each step moves the slice variable.
        slot: `(C,)`, each chain's place in the folds: places are shuffled, and chains stay.
        progress: how far warm-up has come.
        low_rank: the low-rank metric and what it is made of, or None.
    """

    step_size: jax.Array
    scale: jax.Array
    damping: jax.Array
    drift: jax.Array
    slot: jax.Array
    progress: Progress
    low_rank: LowRank | None = None


class Scheme(NamedTuple):
    """The constants of Algorithm 3 of Hoffman and Sountsov (2022), and of its low-rank metric."""

    num_folds: int = 4
    step_size_multiplier: float = 0.5
    damping_slowdown: float = 1.0
    rank: int | None = None
    window_fraction: float = 0.5


def meads_start(z: Any, grad: Any, progress: Progress, scheme: Scheme) -> MEADSAdaptation:
    """Return the adaptation of chains that have not moved yet."""
    rows = flat(z)
    num_chains, size = rows.shape
    none = jnp.zeros(num_chains, rows.dtype)
    low_rank = None
    if scheme.rank is not None:
        low_rank = LowRank.start(num_chains, size, scheme.rank, rows.dtype)
    slot = jnp.arange(num_chains)
    empty = MEADSAdaptation(none, rows, none, none, slot, progress, None)
    return _adapt(rows, flat(grad), empty, scheme)._replace(low_rank=low_rank)


def meads_step(
    keys: jax.Array,
    shuffle_key: jax.Array,
    chains: GHMCState,
    adaptation: MEADSAdaptation,
    log_density: Callable,
    scheme: Scheme,
) -> tuple[GHMCState, MEADSAdaptation, Outcome]:
    """Make one iteration: one step of Algorithm 3 in warm-up, else one step for each row of keys.

    Args:
        keys: `(S, C)`.
        shuffle_key: for the folds.
        chains: BlackJAX's state, with a leading chain axis.
        adaptation: the state of the scheme.
        log_density: of one chain's position.
        scheme: its constants.
    """
    warming = adaptation.progress.warming
    adaptation = jax.lax.cond(
        warming,
        lambda a: _adapt(flat(chains.position), flat(chains.logdensity_grad), a, scheme),
        lambda a: a,
        adaptation,
    )
    new, outcome = ghmc_steps(
        keys[:, adaptation.slot],
        jnp.where(warming, 1, keys.shape[0]),
        chains,
        log_density,
        adaptation.step_size,
        adaptation.scale if adaptation.low_rank is None else adaptation.low_rank.metric,
        adaptation.damping,
        adaptation.drift,
    )
    # line 4: all folds but k = t mod K move
    resting = adaptation.progress.iteration % scheme.num_folds == _fold(adaptation, scheme)
    if scheme.num_folds > 1:
        new = choose(warming & resting, chains, new)
    adaptation = jax.lax.cond(
        warming,
        lambda a: _end_step(shuffle_key, flat(new.position), a, scheme),
        lambda a: a,
        adaptation,
    )
    return new, adaptation, outcome


def _fold(adaptation: MEADSAdaptation, scheme: Scheme) -> jax.Array:
    return adaptation.slot // (adaptation.slot.shape[0] // scheme.num_folds)


def _inverse(permutation: jax.Array) -> jax.Array:
    places = jnp.arange(permutation.shape[0])
    return places.at[permutation].set(places)


def _adapt(
    rows: jax.Array, slopes: jax.Array, adaptation: MEADSAdaptation, scheme: Scheme
) -> MEADSAdaptation:
    """Set each fold's parameters: scale and step size from its left neighbour, damping its own."""
    order = _inverse(adaptation.slot)
    shape = (scheme.num_folds, -1, rows.shape[1])
    folds, gradients = rows[order].reshape(shape), slopes[order].reshape(shape)
    scales = folds.std(axis=1)
    # lines 7 and 8: the step size, no more than 1, from the scaled gradients
    largest = jax.vmap(maximum_eigenvalue)(gradients * scales[:, None])
    step_sizes = jnp.minimum(scheme.step_size_multiplier / jnp.sqrt(largest), 1.0)
    step_sizes, lent_scales = jnp.roll(step_sizes, 1), jnp.roll(scales, 1, axis=0)
    low_rank, whitened = adaptation.low_rank, folds / scales[:, None]
    if low_rank is not None:
        low_rank = low_rank.observe(rows, adaptation.progress, scheme.window_fraction)
        whitened = low_rank.whiten(folds)
    # line 9: the damping, no less than the floor that falls with time
    centred = whitened - whitened.mean(axis=1, keepdims=True)
    floor = scheme.damping_slowdown / ((adaptation.progress.iteration[0] + 1) * step_sizes)
    gamma = jnp.maximum(1.0 / jnp.sqrt(jax.vmap(maximum_eigenvalue)(centred)), floor)
    alpha = 1.0 - jnp.exp(-2.0 * step_sizes * gamma)
    fold = _fold(adaptation, scheme)
    return adaptation._replace(
        step_size=step_sizes[fold],
        scale=lent_scales[fold],
        damping=alpha[fold],
        drift=alpha[fold] / 2,
        low_rank=low_rank,
    )


def _end_step(
    key: jax.Array, rows: jax.Array, adaptation: MEADSAdaptation, scheme: Scheme
) -> MEADSAdaptation:
    """Shuffle the folds every K steps, and settle the parameters after the last one."""
    progress, num_chains = adaptation.progress, rows.shape[0]
    slot = adaptation.slot
    if scheme.num_folds > 1:
        moved = _inverse(jax.random.permutation(key, num_chains))[slot]
        slot = jnp.where((progress.iteration[0] + 1) % scheme.num_folds == 0, moved, slot)

    def settle(a: MEADSAdaptation) -> MEADSAdaptation:
        mean = [per_chain(x.mean(axis=0), num_chains) for x in a[:4]]
        low_rank = None if a.low_rank is None else a.low_rank.settle(rows)
        return a._replace(
            step_size=mean[0], scale=mean[1], damping=mean[2], drift=mean[3], low_rank=low_rank
        )

    settled = jax.lax.cond(progress.ending, settle, lambda a: a, adaptation)
    return settled._replace(slot=slot, progress=progress.next())


class MEADS(ManyChainKernel):
    """Generalized HMC over many chains, adapted by MEADS (Hoffman and Sountsov, 2022).

    For `MCMC(MEADS(model), num_chains=64, chain_method="vectorized", ...)`. Every chain takes its
    step size, scale and damping from other chains; no trajectory length is needed, since momentum
    persists from step to step. The kernel finds its start alone.

    Args:
        model: a NumPyro model whose latents are continuous.
        potential_fn: a potential energy instead of a model; `MCMC.run` needs `init_params` then.
        num_folds: number of folds K, a divisor of the number of chains.
        step_size_multiplier: of the step size that the gradients suggest.
        damping_slowdown: how slowly the floor of the damping falls; larger is slower.
        steps_per_draw: steps between two draws; a draw costs so many gradients.
        low_rank_rank: number of directions of a low-rank metric shared by all chains, for strong
            correlations; None is a diagonal scale for each fold.
        low_rank_window_fraction: the part of warm-up after which its positions are pooled.
        start: where chains start: "nuts", "pathfinder", "init" (`init_strategy` alone: MEADS
            freezes far from the typical set), or a function `(rng_key, num_chains, *args,
            **kwargs)` that returns what `MCMC.run` takes as `init_params`.
        init_strategy: a NumPyro initialisation strategy, from which the start is looked for.

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
        >>> mcmc = MCMC(MEADS(model), num_warmup=200, num_samples=200, num_chains=32,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(3))
        >>> print(mcmc.get_samples()["mu"].mean().round(1))
        0.8
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
        low_rank_rank: int | None = None,
        low_rank_window_fraction: float = 0.5,
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
    ) -> None:
        super().__init__(model, potential_fn, start=start, init_strategy=init_strategy)
        check_count("num_folds", num_folds)
        check_count("steps_per_draw", steps_per_draw)
        check_count("low_rank_rank", 1 if low_rank_rank is None else low_rank_rank)
        check_positive("step_size_multiplier", step_size_multiplier)
        check_positive("damping_slowdown", damping_slowdown)
        window = low_rank_window_fraction
        if not 0.0 <= window <= 1.0:
            raise ValueError(f"low_rank_window_fraction takes 0 to 1, got {window}.")
        self._scheme = Scheme(
            num_folds, step_size_multiplier, damping_slowdown, low_rank_rank, window
        )
        self._num_folds = num_folds
        self._steps_per_draw = steps_per_draw

    def _check_chains(self, num_chains: int) -> None:
        num_folds = self._scheme.num_folds
        if num_chains % num_folds:
            lower = num_chains - num_chains % num_folds
            raise ValueError(
                f"num_chains={num_chains} is not a multiple of num_folds={num_folds}. Run "
                f"{lower + num_folds} chains, or give MEADS another num_folds."
            )
        if num_chains < _FEWEST * num_folds:
            raise ValueError(
                f"num_chains={num_chains} leaves {num_chains // num_folds} chains in each of "
                f"num_folds={num_folds} folds, fewer than {_FEWEST}. Run "
                f"{_FEWEST * num_folds} chains or more (64, say), or fewer folds."
            )

    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        grad = jax.tree.map(jnp.negative, state.z_grad)
        adaptation = meads_start(state.z, grad, progress, self._scheme)
        momentum, slice_ = jax.vmap(first_momentum)(keys, state.z, adaptation.scale)
        return state._replace(r=momentum, slice=slice_, adapt_state=adaptation)

    def _iterate(self, keys: jax.Array, state: ChainsState, log_density: Callable) -> ChainsState:
        drawn = jax.vmap(lambda key: jax.random.split(key, self._steps_per_draw + 1))(keys)
        chains = GHMCState(
            state.z,
            state.r,
            -state.potential_energy,
            jax.tree.map(jnp.negative, state.z_grad),
            state.slice,
        )
        warming = state.adapt_state.progress.warming
        chains, adaptation, outcome = meads_step(
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
            z_grad=jax.tree.map(jnp.negative, chains.logdensity_grad),
            potential_energy=-chains.logdensity,
            energy=outcome.energy,
            r=chains.momentum,
            slice=chains.slice,
            num_steps=jnp.broadcast_to(steps, state.num_steps.shape).astype(state.num_steps.dtype),
            accept_prob=outcome.accept_prob / steps,
            diverging=outcome.num_divergences > 0,
            num_divergences=outcome.num_divergences,
            adapt_state=adaptation,
        )
