"""A metric that all chains share, estimated from all positions: dense, low-rank or diagonal.

A kernel keeps a `SharedMetric` in its adaptation, calls `observe` in each iteration of warm-up, and
gives `inverse_mass` to BlackJAX's steps, which take it for HMC and for microcanonical dynamics.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.metric_buffers import MomentBlock, cgl_update_batch
from blackjax.adaptation.metric_estimators import sample_covariance_eigh_low_rank
from blackjax.mcmc.metrics import LowRankInverseMassMatrix

from numpyro_ensemble.mcmc.counted import largest_eigenvalue, with_stand_ins
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.target import per_chain, shared

METRICS = ("auto", "dense", "low_rank", "diagonal")
_DIRECTIONS = 16  # of a low-rank metric: on the item response problem 16 do better than 160
_DENSE, _LOW_RANK = 100, 1000  # "auto" is dense or low-rank for at most so many dimensions
_DIMENSIONS_PER_CHAIN = 8  # with more, directions are noise, and cost a third of the run
_FORGETTING = 3.0  # decay of early positions: the metric comes from the last third of warm-up
_RENEWALS = 20  # estimates of the directions, evenly spread over warm-up; a few more at its start
_POOLED_SIZE = 100  # positions of D coordinates are pooled in every (D // 100)-th iteration
_ITERATIONS_PER_DRAW = 10.0  # positions of a chain that count as one draw
_FLOOR = 1e-9  # of eigenvalues: they are 0 for chains in a plane, or negative by rounding


def check_metric(metric: str | int) -> None:
    """Raise if a metric is neither one of the names nor a number of directions."""
    named = isinstance(metric, str) and metric in METRICS
    if not named and (isinstance(metric, bool | str) or not isinstance(metric, int) or metric < 1):
        names = ", ".join(map(repr, METRICS))
        raise ValueError(
            f"metric takes one of {names}, or a number of directions of a low-rank metric, 1 or "
            f"above; got {metric!r}."
        )


def num_directions(metric: str | int, num_chains: int, size: int) -> int:
    """Return how many directions a metric has in `size` dimensions.

    A diagonal metric has none, and a dense metric has all. In one dimension every metric is
    diagonal. "auto" is dense if there are at most as many dimensions as chains, and at most 100.
    Otherwise it is low-rank for at most 8 dimensions a chain, and at most 1,000; else diagonal.
    """
    if metric == "auto":
        within = size <= min(_DIMENSIONS_PER_CHAIN * num_chains, _LOW_RANK)
        metric = "low_rank" if within else "diagonal"
        metric = "dense" if size <= min(num_chains, _DENSE) else metric
    if metric == "diagonal" or size == 1:
        return 0
    if metric == "dense":
        return size
    return min(_DIRECTIONS if metric == "low_rank" else int(metric), size)


class SharedMetric(NamedTuple):
    """A metric `diag(sigma) (I + U (diag(lam) - I) U^T) diag(sigma)`, and its moments.

    The k columns of U are directions. A diagonal metric has none, and a dense metric has d.

    Attributes:
        sigma: `(C, d)`, the same for all chains.
        directions: `(C, ...)`, `U` of shape `(d, k)`, cut into C pieces.
        eigenvalues: `(C, k)`, `lam`, the same for all chains.
        number: `(C,)`, the effective number of pooled positions: early ones count less.
        pooled: `(C, ...)`, the mean and the second moments of pooled positions, cut into C pieces:
            `d + d * d` numbers, or `d + d` without directions.
    """

    sigma: jax.Array
    directions: jax.Array
    eigenvalues: jax.Array
    number: jax.Array
    pooled: jax.Array

    @classmethod
    def identity(cls, num_chains: int, size: int, rank: int, dtype: jnp.dtype) -> SharedMetric:
        """Return the identity, with room for `rank` directions."""
        sigma, eigenvalues = per_chain((jnp.ones(size, dtype), jnp.ones(rank, dtype)), num_chains)
        directions = _cut(jnp.eye(size, rank, dtype=dtype), num_chains)
        moments = jnp.zeros(size + size * (size if rank else 1), dtype)
        number = jnp.zeros(num_chains, dtype)
        return cls(sigma, directions, eigenvalues, number, _cut(moments, num_chains))

    @classmethod
    def start(cls, rows: jax.Array, rank: int) -> SharedMetric:
        """Return the metric of chains that have not moved, from positions `(C, d)`."""
        empty = cls.identity(rows.shape[0], rows.shape[1], rank, rows.dtype)
        block = empty._pool(empty._block(), rows, jnp.zeros((), rows.dtype))
        return empty._with(block, empty._estimate(block, 1))

    @classmethod
    def among(cls, rows: jax.Array, counts: jax.Array, metric: str | int) -> SharedMetric:
        """Return the metric called `metric` from the first positions of the chains that count."""
        return cls.start(with_stand_ins(rows, counts), num_directions(metric, *rows.shape))

    @property
    def inverse_mass(self) -> LowRankInverseMassMatrix:
        """The value that BlackJAX's steps take as `inverse_mass_matrix`."""
        sigma, eigenvalues = shared((self.sigma, self.eigenvalues))
        shape = sigma.size, eigenvalues.size
        return LowRankInverseMassMatrix(sigma, _joined(self.directions, shape), eigenvalues)

    def observe(self, rows: jax.Array, progress: Progress) -> SharedMetric:
        """Pool positions `(C, d)` of an iteration of warm-up, and renew the metric now and then.

        Early positions are forgotten: after t iterations, those of iteration s have the weight
        `(s / t)**3`. The directions are renewed only now and then, since in many dimensions their
        computation takes longer than many steps, and the step size settles while the metric stays.
        """
        rank, size = self.eigenvalues.shape[1], rows.shape[1]
        iteration, every = progress.iteration[0], max(1, size // _POOLED_SIZE) if rank else 1
        turn = (iteration // every).astype(rows.dtype)
        block = jax.lax.cond(
            iteration % every == 0,
            lambda b: self._pool(b, rows, turn / (turn + _FORGETTING)),
            lambda b: b,
            self._block(),
        )
        renewing = iteration % jnp.maximum(progress.total // _RENEWALS, 1) == 0
        renewing |= (iteration & (iteration - 1)) == 0  # 0, 1, 2, 4, 8, ...
        renew = lambda: self._estimate(block, every)  # noqa: E731
        metric = jax.lax.cond(renewing, renew, lambda: self.inverse_mass) if rank else renew()
        return self._with(block, metric)

    def observe_as_blackjax(
        self, rows: jax.Array, progress: Progress, window_fraction: float
    ) -> SharedMetric:
        """Pool positions as BlackJAX's MEADS does, without forgetting and without shrinkage.

        It begins after a part of warm-up, and has no directions while there are too few positions.
        """
        size, rank = rows.shape[1], self.eigenvalues.shape[1]
        inside = progress.iteration[0] >= jnp.floor(window_fraction * progress.total)
        pool = lambda b: self._pool(b, rows, jnp.ones((), rows.dtype))  # noqa: E731
        block = jax.lax.cond(inside, pool, lambda b: b, self._block())

        def diagonal() -> LowRankInverseMassMatrix:
            eye = jnp.eye(size, rank, dtype=rows.dtype)
            return LowRankInverseMassMatrix(rows.std(axis=0), eye, jnp.ones(rank, rows.dtype))

        with jax.numpy_rank_promotion("allow"):  # BlackJAX needs it, whatever the user's setting
            metric = jax.lax.cond(
                inside & (block.count >= 2 * size),
                lambda: sample_covariance_eigh_low_rank(block.m2, block.count, rank),
                diagonal,
            )
        return self._with(block, metric)

    def whiten(self, positions: jax.Array) -> jax.Array:
        """Return positions `(..., d)` in the coordinates in which the metric is the identity.

        Subtract the positions' mean before the call, since large numbers would be rounded.
        """
        sigma, directions, eigenvalues = self.inverse_mass
        scaled = positions / jnp.broadcast_to(sigma, positions.shape)
        return _stretched(scaled, directions, eigenvalues**-0.5)

    def colour(self, positions: jax.Array) -> jax.Array:
        """Undo `whiten`."""
        sigma, directions, eigenvalues = self.inverse_mass
        stretched = _stretched(positions, directions, eigenvalues**0.5)
        return stretched * jnp.broadcast_to(sigma, positions.shape)

    def whiten_as_blackjax(self, positions: jax.Array) -> jax.Array:
        """Whiten as BlackJAX's MEADS does, which divides by sigma last.

        This is right only if sigma is the same for all coordinates. Otherwise the damping is far
        too low, and energies hardly change.
        """
        sigma, directions, eigenvalues = self.inverse_mass
        turned = _stretched(positions, directions, eigenvalues**-0.5)
        return turned / jnp.broadcast_to(sigma, positions.shape)

    def whiten_gradients(self, gradients: jax.Array) -> jax.Array:
        """Return gradients or momenta `(..., d)` in the coordinates of `whiten`."""
        sigma, directions, eigenvalues = self.inverse_mass
        scaled = gradients * jnp.broadcast_to(sigma, gradients.shape)
        return _stretched(scaled, directions, eigenvalues**0.5)

    def first_step_size(self, gradients: jax.Array, counts: jax.Array) -> jax.Array:
        """Return the step size for HMC, from the gradients `(C, d)` of the chains that count."""
        steepest = largest_eigenvalue(self.whiten_gradients(gradients), counts)
        return jnp.minimum(0.5 / jnp.sqrt(steepest), 1.0)

    def _block(self) -> MomentBlock:
        size = self.sigma.shape[1]
        shape = (size, size) if self.eigenvalues.shape[1] else (size,)
        moments = _joined(self.pooled, (size + math.prod(shape),))
        return MomentBlock(self.number[0], moments[:size], moments[size:].reshape(shape))

    def _pool(self, block: MomentBlock, rows: jax.Array, kept: jax.Array) -> MomentBlock:
        """Return the moments after adding positions; earlier ones are multiplied by `kept`."""
        block = block._replace(count=kept * block.count, m2=kept * block.m2)
        with jax.numpy_rank_promotion("allow"):
            return cgl_update_batch(block, rows)

    def _estimate(self, block: MomentBlock, every: int) -> LowRankInverseMassMatrix:
        """Return the metric of the pooled positions, which come from every `every`-th iteration."""
        (num_chains, size), rank = self.sigma.shape, self.eigenvalues.shape[1]
        if not rank:
            sigma = jnp.sqrt(block.m2 / jnp.maximum(block.count, 1.0))
            sigma, directions = jnp.where(sigma > 0.0, sigma, 1.0), jnp.zeros((size, 0))
            return LowRankInverseMassMatrix(sigma, directions, jnp.ones(0))
        with jax.numpy_rank_promotion("allow"):
            all_of_them = sample_covariance_eigh_low_rank(block.m2, block.count, size)
        sigma, directions, eigenvalues = all_of_them
        later = jnp.maximum(block.count - num_chains, 0.0)
        draws = num_chains + later * min(1.0, every / _ITERATIONS_PER_DRAW)
        # directions that are not among the k share the mean of their eigenvalues
        rest = jnp.sort(eigenvalues)[: size - rank].mean() if rank < size else 1.0
        rest = jnp.maximum(rest, _floor(sigma.dtype))
        eigenvalues = shrunk_eigenvalues(eigenvalues / rest, size / draws)
        chosen = jnp.argsort(-jnp.abs(jnp.log(eigenvalues)))[:rank]
        return LowRankInverseMassMatrix(
            sigma * jnp.sqrt(rest), directions[:, chosen], eigenvalues[chosen]
        )

    def _with(self, block: MomentBlock, metric: LowRankInverseMassMatrix) -> SharedMetric:
        num_chains, dtype = self.number.size, self.sigma.dtype
        moments = jnp.concatenate([block.mean, block.m2.ravel()])
        lam = jnp.maximum(metric.lam, _floor(dtype))
        new = SharedMetric(
            per_chain(metric.sigma, num_chains),
            _cut(metric.U, num_chains),
            per_chain(lam, num_chains),
            per_chain(block.count, num_chains),
            _cut(moments, num_chains),
        )
        return jax.tree.map(lambda x: x.astype(dtype), new)


def shrunk_eigenvalues(eigenvalues: jax.Array, ratio: jax.Array) -> jax.Array:
    """Estimate a correlation matrix's eigenvalues from those of a sample.

    Eigenvalues that noise alone would give become 1: those in the band of Marchenko and Pastur. The
    others are corrected. If most eigenvalues are 1 and one is l, the sample has
    `l + ratio * l / (l - 1)` (Donoho, Gavish and Johnstone, 2018, on spiked models).

    Args:
        eigenvalues: eigenvalues of the sample's correlation matrix.
        ratio: number of dimensions over number of draws.
    """
    sampled = jnp.maximum(eigenvalues, _floor(eigenvalues.dtype))
    centre = sampled + 1.0 - ratio
    larger = 0.5 * (centre + jnp.sqrt(jnp.maximum(centre**2 - 4.0 * sampled, 0.0)))
    low = jnp.where(ratio < 1.0, (1.0 - jnp.sqrt(ratio)) ** 2, 0.0)
    small, large = sampled < low, sampled > (1.0 + jnp.sqrt(ratio)) ** 2
    return jnp.where(large, larger, jnp.where(small, sampled / larger, 1.0))


def _floor(dtype: jnp.dtype) -> float:
    return max(_FLOOR, 8.0 * float(jnp.finfo(dtype).eps))


def _stretched(rows: jax.Array, directions: jax.Array, factors: jax.Array) -> jax.Array:
    """Stretch rows `(..., d)` by a factor along each direction."""
    along = (rows @ directions) * jnp.broadcast_to(factors - 1.0, (*rows.shape[:-1], factors.size))
    return rows + along @ directions.T


def _cut(values: jax.Array, num_chains: int) -> jax.Array:
    """Cut values into one piece for each chain, so that no chain holds a copy of all values."""
    length = -(-values.size // num_chains)
    padding = length * num_chains - values.size
    return jnp.pad(values.ravel(), (0, padding)).reshape(num_chains, length)


def _joined(pieces: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_cut`."""
    return pieces.ravel()[: math.prod(shape)].reshape(shape)
