"""Trajectories of equal length for all chains: a quasi-random part of the longest length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.mcmc import dynamic_hmc
from blackjax.mcmc.dynamic_hmc import DynamicHMCState

from numpyro_ensemble.mcmc.checks import check_fraction, check_positive
from numpyro_ensemble.mcmc.kernel import ManyChainKernel
from numpyro_ensemble.mcmc.state import ChainsState
from numpyro_ensemble.mcmc.target import all_finite, choose, shared

# The step size follows the harmonic mean over chains. One chain that accepts nothing makes it 0.
LEAST_ACCEPTED = 0.1  # with this floor one such chain of 64 lowers the mean by an eighth at most
_BITS = 30  # bits of the Halton sequence; more bits than a run needs do not change its numbers
_ALIKE = DynamicHMCState(0, 0, 0, None)  # chains make the same number of steps


def halton(index: jax.Array) -> jax.Array:
    """Return element `index` of the Halton sequence, a number between 0 and 1."""
    return dynamic_hmc.halton_sequence(index, _BITS)


def leapfrogs(index: jax.Array, most: jax.Array) -> jax.Array:
    """Return the number of steps, `most` or fewer, of the trajectory with this index."""
    return jnp.ceil(halton(index) * most).astype(int)


def make_trajectories(
    dynamics: Callable,
    adapt: Callable,
    keys: jax.Array,
    chains: DynamicHMCState,
    adaptation: Any,
    log_density: Callable,
) -> tuple[DynamicHMCState, Any, Any]:
    """Make one iteration of all chains, and in warm-up one step of their scheme.

    A trajectory that ends without a finite density is a divergence.

    Args:
        dynamics: a function of one chain's key and state, the log density, the step size, the
            metric and the largest number of steps. It returns the chain's new state and BlackJAX's
            information about the trajectory.
        adapt: a function of the chains before and after, BlackJAX's information and the adaptation.
            It returns the next adaptation.
        keys: `(C,)`.
        chains: BlackJAX's state, with a leading chain axis but for `random_generator_arg`, and
            positions in rows.
        adaptation: the state of the scheme.
        log_density: log density of one chain's row.

    Returns:
        Chains, adaptation, and BlackJAX's information about the iteration.
    """
    step_size, length = shared((adaptation.step_size, adaptation.trajectory_length))
    given = step_size, adaptation.metric.inverse_mass, length / step_size
    move = jax.vmap(dynamics, in_axes=(0, _ALIKE, None, None, None, None), out_axes=(_ALIKE, 0))
    new, info = move(keys, chains, log_density, *given)
    whole = all_finite(new.logdensity, new.logdensity_grad)
    new = DynamicHMCState(*choose(whole, new[:3], chains[:3]), new.random_generator_arg)
    info = info._replace(
        is_divergent=info.is_divergent | ~whole, is_accepted=info.is_accepted & whole
    )
    adaptation = adaptation._replace(place=adaptation.place + 1)
    adaptation = jax.lax.cond(
        adaptation.progress.warming,
        lambda a: adapt(chains, new, info, a),
        lambda a: a,
        adaptation,
    )
    return new, adaptation, info


class TrajectoryKernel(ManyChainKernel):
    """A kernel whose chains all make trajectories of the same length.

    A subclass defines its scheme, one iteration of it, and the energy of its chains.
    """

    def _check_options(self, step_size: float | None, target_accept_prob: float) -> None:
        if step_size is not None:
            check_positive("step_size", step_size)
        if check_fraction("target_accept_prob", target_accept_prob) in (0.0, 1.0):
            raise ValueError(f"target_accept_prob lies between 0 and 1, got {target_accept_prob}.")

    def _check_chains(self, num_chains: int, num_warmup: int) -> None:
        if num_chains < 4:
            raise ValueError(
                f"num_chains={num_chains} is too few for {type(self).__name__}, which adapts over "
                f"all chains. Run 4 chains or more: 64, say."
            )

    def _iterate(self, keys: jax.Array, state: ChainsState, log_density: Callable) -> ChainsState:
        adaptation = state.adapt_state
        place = adaptation.place[0]
        chains = DynamicHMCState(state.z, -state.potential_energy, -state.z_grad, place)
        chains, new, info = self._step(keys, chains, adaptation, log_density)
        return state._replace(
            z=chains.position,
            z_grad=-chains.logdensity_grad,
            potential_energy=-chains.logdensity,
            energy=self._energy(state, info),
            num_steps=info.num_integration_steps.astype(state.num_steps.dtype),
            accept_prob=info.acceptance_rate,
            diverging=info.is_divergent,
            num_divergences=info.is_divergent.astype(state.num_divergences.dtype),
            adapt_state=new,
        )

    # For subclasses -----------------------------------------------------------------------

    @abstractmethod
    def _step(
        self, keys: jax.Array, chains: DynamicHMCState, adaptation: Any, log_density: Callable
    ) -> tuple[DynamicHMCState, Any, Any]:
        """Return chains, adaptation and BlackJAX's information after one iteration."""

    @abstractmethod
    def _energy(self, state: ChainsState, info: Any) -> jax.Array:
        """Return the energies of the chains after a trajectory from a state."""
