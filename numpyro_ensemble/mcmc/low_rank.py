"""A low-rank metric from the pooled positions of all chains, as BlackJAX's MEADS has it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.metric_buffers import MomentBlock, cgl_update_batch
from blackjax.adaptation.metric_estimators import sample_covariance_eigh_low_rank
from blackjax.mcmc.metrics import LowRankInverseMassMatrix

from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import per_chain, shared

_DIRECTIONS = 16  # at most: on the item response problem 16 do better than 160
_DIMENSIONS_PER_CHAIN = 8
_RENEWALS = 20  # of the metric in all of warm-up, at even distances
_POOLED_SIZE = 100  # with so many times as many coordinates, fewer positions are pooled
_FLOOR = 1e-6  # of eigenvalues: those of chains that lie in a plane are 0, or less by rounding


def default_rank(num_chains: int, size: int) -> int:
    """Return the number of directions that so many chains can learn in so many dimensions.

    One dimension has no directions. Of more than 8 for each chain (1,000 for 64 chains), the
    directions that are found are noise, and cost a third of the run.
    """
    return min(size, _DIRECTIONS) if 1 < size <= _DIMENSIONS_PER_CHAIN * num_chains else 0


class LowRank(NamedTuple):
    """A metric `diag(sigma) (I + U (diag(lam) - I) U^T) diag(sigma)`, and what it is made of.

    Attributes:
        sigma: `(C, d)`, the same for all chains, as the next two.
        directions: `(C, d, k)`.
        eigenvalues: `(C, k)`.
        number: `(C,)`, the number of positions pooled.
        pooled: `(C, ...)`, mean and second moments `(d + d * d)` of these, cut into C pieces.
    """

    sigma: jax.Array
    directions: jax.Array
    eigenvalues: jax.Array
    number: jax.Array
    pooled: jax.Array

    @classmethod
    def start(cls, num_chains: int, size: int, rank: int, dtype: jnp.dtype) -> LowRank:
        """Return the identity; a rank above the dimension or what C chains tell is cut."""
        rank = min(rank, num_chains - 1, size)
        metric = (jnp.ones(size, dtype), jnp.eye(size, rank, dtype=dtype), jnp.ones(rank, dtype))
        pooled = jnp.zeros((num_chains, -(-size * (size + 1) // num_chains)), dtype)
        sigma, directions, eigenvalues = per_chain(metric, num_chains)
        return cls(sigma, directions, eigenvalues, jnp.zeros(num_chains, dtype), pooled)

    @property
    def metric(self) -> LowRankInverseMassMatrix:
        """What BlackJAX takes."""
        return LowRankInverseMassMatrix(*shared(self[:3]))

    def observe(
        self, rows: jax.Array, progress: Progress, window_fraction: float, plain: bool
    ) -> LowRank:
        """Pool positions `(C, d)`, if it is late enough in warm-up, and renew the metric.

        Without `plain`, which is as BlackJAX has it, that is done now and then: the eigenvectors of
        1,000 coordinates take longer than many steps, and a metric that stays lets the step size
        settle.
        """
        iteration, total, size = progress.iteration[0], progress.total, rows.shape[1]
        inside = iteration >= jnp.floor(window_fraction * total)
        pooling = renewing = inside
        if not plain:
            pooling = inside & (iteration % max(1, size // _POOLED_SIZE) == 0)
            renewing = inside & (iteration % jnp.maximum(total // _RENEWALS, 1) == 0)
        block = self._block()
        with jax.numpy_rank_promotion("allow"):
            block = jax.lax.cond(pooling, lambda b: cgl_update_batch(b, rows), lambda b: b, block)
        return self._renewed(block, rows, inside, renewing)

    def settle(self, rows: jax.Array) -> LowRank:
        """Return the metric that draws are made with."""
        return self._renewed(self._block(), rows, jnp.asarray(True), jnp.asarray(True))

    def whiten(self, positions: jax.Array, plain: bool) -> jax.Array:
        """Return positions `(..., d)` in the coordinates in which the metric is the identity.

        With `plain`, as BlackJAX has it: there sigma divides last, which is right only where it is
        the same for all coordinates. Elsewhere the damping is far too low, and energies stay.
        """
        sigma, directions, eigenvalues = self.metric
        sigma = jnp.broadcast_to(sigma, positions.shape)
        shrink = (directions * (eigenvalues**-0.5 - 1.0)[None, :]) @ directions.T
        if plain:
            return (positions + positions @ shrink) / sigma
        scaled = positions / sigma
        return scaled + scaled @ shrink

    def _block(self) -> MomentBlock:
        size = self.sigma.shape[1]
        moments = self.pooled.ravel()[: size * (size + 1)]
        return MomentBlock(self.number[0], moments[:size], moments[size:].reshape(size, size))

    def scale_gradients(self, gradients: jax.Array) -> jax.Array:
        """Return gradients `(..., d)` in the coordinates in which the metric is the identity."""
        sigma, directions, eigenvalues = self.metric
        scaled = gradients * jnp.broadcast_to(sigma, gradients.shape)
        stretch = directions * (eigenvalues**0.5 - 1.0)[None, :]
        return scaled + scaled @ (stretch @ directions.T)

    def _renewed(
        self, block: MomentBlock, rows: jax.Array, inside: jax.Array, renewing: jax.Array
    ) -> LowRank:
        """Make the metric from what is pooled, or without directions while that is too little."""
        num_chains, size = rows.shape
        rank = self.eigenvalues.shape[1]

        def diagonal() -> LowRankInverseMassMatrix:
            sigma = rows.std(axis=0)
            sigma = jnp.where(sigma > 0.0, sigma, 1.0)
            eye = jnp.eye(size, rank, dtype=rows.dtype)
            return LowRankInverseMassMatrix(sigma, eye, jnp.ones(rank, rows.dtype))

        with jax.numpy_rank_promotion("allow"):  # BlackJAX does, whatever the user's setting
            enough = inside & (block.count >= 2 * size)
            sigma, directions, eigenvalues = jax.lax.switch(
                enough.astype(int) + (enough & renewing),
                [
                    diagonal,
                    lambda: self.metric,
                    lambda: sample_covariance_eigh_low_rank(block.m2, block.count, rank),
                ],
            )
        metric = (sigma, directions, jnp.maximum(eigenvalues, _FLOOR))
        moments = jnp.concatenate([block.mean, block.m2.ravel()])
        padding = self.pooled.size - moments.size
        pooled = jnp.pad(moments, (0, padding)).reshape(self.pooled.shape)
        number = per_chain(block.count, num_chains).astype(self.number.dtype)
        sigma, directions, eigenvalues = per_chain(metric, num_chains)
        return LowRank(sigma, directions, eigenvalues, number, pooled)
