"""The state of all chains: by site between iterations, and in rows during an iteration."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.util import is_prng_key

from numpyro_ensemble.mcmc.positions import Coordinates

_OF_SITES = ("z", "z_grad", "r")


class _Fields(NamedTuple):
    i: jax.Array
    z: Any
    z_grad: Any
    potential_energy: jax.Array
    energy: jax.Array
    r: Any
    slice: Any
    num_steps: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    num_divergences: jax.Array
    iterations_since_move: jax.Array
    frozen: jax.Array
    adapt_state: Any
    rng_key: jax.Array
    density_is_current: jax.Array


class ChainsState(_Fields):
    """The state of all chains. Every array has a leading chain axis, so `MCMC` can collect it.

    Attributes:
        i: number of iterations made.
        z: unconstrained values.
        z_grad: gradient of the potential energy.
        potential_energy: negative log density of `z`; `SGMCMC` has an estimate from some rows.
        energy: potential and kinetic energy.
        r: momentum, for kernels that keep it between iterations.
        slice: the slice variable of generalized HMC.
        num_steps: leapfrog steps of this iteration.
        accept_prob: acceptance probability of this iteration.
        mean_accept_prob: mean of `accept_prob` since the start or the end of warm-up.
        diverging: whether a step of this iteration diverged.
        num_divergences: how many steps diverged since the start or the end of warm-up.
        iterations_since_move: for how many iterations each chain has not moved.
        frozen: whether a chain has not moved for 10 iterations, or this iteration's trajectory is
            shorter than a hundredth of the scale.
        adapt_state: the adapted values, such as `step_size`.
        rng_key: one key for each chain.
        density_is_current: whether density and gradient belong to the arguments of `sample`. Every
            run evaluates them again at its beginning.
    """

    __slots__ = ()

    @property
    def energy_var(self) -> Any:
        """The energy errors of a kernel that accepts every step, as `MCMC` collects them."""
        return self.adapt_state.energy_var

    def _replace(self, /, **changes: Any) -> ChainsState:  # type: ignore[override]
        """Replace fields. A new key means a new run, perhaps with other data.

        `MCMC` gives ensemble kernels one key, which is split for the chains here.
        """
        if "rng_key" in changes:
            changes.setdefault("density_is_current", jnp.zeros_like(self.density_is_current))
        if is_prng_key(changes.get("rng_key")):
            changes["rng_key"] = jax.random.split(changes["rng_key"], self.i.shape[0])
        return super()._replace(**changes)


class Resumed(ChainsState):
    """A state from which `MCMC` continues as if the run had not stopped."""

    __slots__ = ()

    def _replace(self, /, **changes: Any) -> ChainsState:  # type: ignore[override]
        """Return the state with its own keys, and ignore the changes of `MCMC`."""
        return ChainsState(*self)


def in_rows(state: ChainsState, coordinates: Coordinates) -> ChainsState:
    """Turn positions, gradients and momenta into arrays `(C, D)`, which all kernels move."""
    return state._replace(**{name: coordinates.rows(getattr(state, name)) for name in _OF_SITES})


def in_sites(state: ChainsState, coordinates: Coordinates) -> ChainsState:
    """Undo `in_rows`: between iterations a state holds values by site, as NumPyro's states do."""
    return state._replace(**{name: coordinates.tree(getattr(state, name)) for name in _OF_SITES})
