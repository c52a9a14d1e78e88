"""The progress of warm-up: part of the state, so that another `MCMC` can continue it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Progress(NamedTuple):
    """The progress of warm-up.

    Attributes:
        iteration: `(C,)`, iterations of warm-up made.
        remaining: `(C,)`, iterations of warm-up still to make.
    """

    iteration: jax.Array
    remaining: jax.Array

    @classmethod
    def start(cls, num_warmup: int, num_chains: int) -> Progress:
        """Return the progress at the start of a run."""
        zeros = jnp.zeros(num_chains, int)
        return cls(zeros, zeros + num_warmup)

    @property
    def warming(self) -> jax.Array:
        """Whether the next iteration is one of warm-up."""
        return self.remaining[0] > 0

    @property
    def ending(self) -> jax.Array:
        """Whether the next iteration is the last one of warm-up."""
        return self.remaining[0] == 1

    @property
    def total(self) -> jax.Array:
        """The number of iterations of warm-up."""
        return self.iteration[0] + self.remaining[0]

    def next(self) -> Progress:
        """Return the progress after one iteration of warm-up."""
        return Progress(self.iteration + 1, self.remaining - 1)
