"""Arrays of posterior functions, and the values of these functions at inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.gp.features import Features
from numpyro_ensemble.gp.inputs import EXACT
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.solvers import by_rows
from numpyro_ensemble.mapping import pick

PER_PATH = ("number", "alpha", "rhs", "residuals", "ok")  # fields with an entry for each path


@dataclass(frozen=True, eq=False)
class PathArrays:
    """The arrays of posterior functions, which `Paths` describes.

    The functions are `mean(x) + prior(x) + kernel(x, points) @ alpha`.
    """

    kernel: Kernel
    mean_fn: Any
    points: jax.Array
    features: Features
    weights: jax.Array
    order: jax.Array
    number: jax.Array
    alpha: jax.Array
    rhs: jax.Array
    diagonal: jax.Array
    noise: jax.Array
    jitter: jax.Array
    observed: jax.Array | None
    residuals: jax.Array
    ok: jax.Array
    seed: jax.Array
    solver: str = field(metadata={"static": True})
    tolerance: jax.Array | None = None
    part: bool = field(default=False, metadata={"static": True})
    latent: bool = field(default=False, metadata={"static": True})
    copies: int = field(default=1, metadata={"static": True})
    keeps_jitter: bool = field(default=False, metadata={"static": True})
    whitened: jax.Array | None = None

    @property
    def num_paths(self) -> int:
        """Number of functions, of all draws together."""
        return int(np.prod(self.alpha.shape[:-1]))

    @property
    def num_draws(self) -> int | None:
        """Number of draws of the hyperparameters, None without an axis of draws."""
        return self.alpha.shape[0] if self.alpha.ndim == 3 else None

    def _at(self, X: jax.Array) -> jax.Array:
        def rows(X: jax.Array) -> jax.Array:
            cross = self.kernel.matrix(X, self.points)
            return self._prior(X) + jnp.matmul(cross, self.alpha.T, precision=EXACT)

        values = by_rows(rows, X, max(len(self.points), self._columns))
        return values.T + self.kernel.mean_at(self.mean_fn, X)[None, :]

    @property
    def _columns(self) -> int:
        """Columns of all bases together."""
        return self.weights.shape[-3] * self.weights.shape[-1]

    def _prior_at(self, X: jax.Array) -> jax.Array:
        """Evaluate the prior functions in blocks of rows, `(N, P)`."""
        return by_rows(self._prior, X, self._columns)

    def _prior(self, X: jax.Array) -> jax.Array:
        def one(pair: tuple[Features, jax.Array]) -> jax.Array:
            return pair[0].weighted(X, pair[1])

        # XLA's program for all bases at once takes three times as long on CPUs
        bases = (self.features, self.weights)
        each = jax.lax.platform_dependent(
            bases, cpu=lambda bases: jax.lax.map(one, bases), default=jax.vmap(one)
        )
        return jax.lax.collapse(each.swapaxes(0, 1), 1, 3)[:, self.order]


@jax.jit
def evaluated(paths: PathArrays, X: jax.Array) -> jax.Array:
    """Evaluate the functions of all draws, `(num_paths, N)`."""
    if paths.num_draws is None:
        return paths._at(X)
    if paths.num_draws == 1:
        return pick(paths, 0)._at(X)
    each = jax.lax.map(lambda each: each._at(X), paths)
    return each.reshape(paths.num_paths, len(X))
