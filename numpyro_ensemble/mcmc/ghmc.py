"""One step of BlackJAX's generalized HMC for all chains, safe for densities that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc import ghmc
from blackjax.mcmc.ghmc import GHMCState
from blackjax.mcmc.metrics import LowRankInverseMassMatrix, default_metric

from numpyro_ensemble.mcmc.target import all_finite, choose


def first_momentum(key: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw one chain's momentum and slice variable."""
    momentum_key, slice_key = jax.random.split(key)
    momentum = jax.random.normal(momentum_key, scale.shape, scale.dtype) / scale
    return momentum, jax.random.uniform(slice_key, (), scale.dtype, -1.0, 1.0)


class Outcome(NamedTuple):
    """Statistics of all chains, summed over the steps: each field is `(C,)`."""

    accept_prob: jax.Array
    num_divergences: jax.Array


def ghmc_step(
    keys: jax.Array,
    chains: GHMCState,
    log_density: Callable,
    step_size: jax.Array,
    scale: Any,
    damping: jax.Array,
    drift: jax.Array,
) -> tuple[GHMCState, Outcome]:
    """Move every chain one step.

    If a chain's proposal has no finite density or gradient, the chain stays, its momentum is
    reversed as after any rejection, and the step counts as a divergence. BlackJAX rejects such a
    proposal too, but multiplies the slice variable by 0 times infinity. The result then depends on
    the compiler.

    Args:
        keys: `(C,)`.
        chains: BlackJAX's state, with a leading chain axis and positions in rows.
        log_density: log density of one chain's row.
        step_size: `(C,)`.
        scale: `(C, d)` standard deviations, or one low-rank metric for all chains.
        damping: `(C,)`.
        drift: `(C,)`.
    """
    low_rank = isinstance(scale, LowRankInverseMassMatrix)
    move = jax.vmap(ghmc.build_kernel(), in_axes=(0, 0, None, 0, None if low_rank else 0, 0, 0))
    new, info = move(keys, chains, log_density, step_size, scale, damping, drift)
    before = (chains.slice + 1.0 + drift) % 2 - 1.0
    stayed = chains._replace(momentum=-info.momentum, slice=before)
    whole = all_finite(new.logdensity, new.logdensity_grad)
    new = choose(whole, new, stayed)
    new = new._replace(slice=jnp.where(jnp.isfinite(new.slice), new.slice, before))
    return new, Outcome(info.acceptance_rate, (info.is_divergent | ~whole).astype(int))


def ghmc_steps(
    keys: jax.Array, num_steps: Any, chains: GHMCState, *parameters: Any
) -> tuple[GHMCState, Outcome]:
    """Make `num_steps` steps, at most as many as there are rows of keys `(S, C)`."""
    if keys.shape[0] == 1:
        return ghmc_step(keys[0], chains, *parameters)

    def body(j: jax.Array, carry: tuple) -> tuple:
        new, so_far = carry
        new, this = ghmc_step(keys[j], new, *parameters)
        return new, Outcome(
            so_far.accept_prob + this.accept_prob,
            so_far.num_divergences + this.num_divergences,
        )

    zeros = jnp.zeros_like(chains.logdensity)
    nothing = Outcome(zeros, jnp.zeros(zeros.shape, int))
    return jax.lax.fori_loop(0, num_steps, body, (chains, nothing))


def kinetic_energy(scale: Any, momentum: Any) -> jax.Array:
    """Return the kinetic energy of each chain."""
    if isinstance(scale, LowRankInverseMassMatrix):
        return jax.vmap(default_metric(scale).kinetic_energy)(momentum)
    return jax.vmap(lambda s, p: default_metric(s**2).kinetic_energy(p))(scale, momentum)
