"""Random features: finitely many columns whose products approximate a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.gp.inputs import EXACT, as_inputs
from numpyro_ensemble.gp.kernels import Constant, Kernel
from numpyro_ensemble.gp.kernels.base import values_of
from numpyro_ensemble.gp.spectra import sobol
from numpyro_ensemble.gp.waves import sine_cosine
from numpyro_ensemble.handlers import check_count, one_key, warn

_FEWEST = 16  # warn if a product with other columns has fewer frequencies


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Block:
    """Features of one product of kernels: sines and cosines, times the columns of other factors.

    Attributes:
        spectral: the factors with a spectral density; their phases are added.
        frequencies: `(M, D)` for each spectral factor.
        amplitudes: `(M,)`, or None without spectral factors.
        finite: the factors with finitely many features.
    """

    spectral: tuple[Kernel, ...]
    frequencies: tuple[jax.Array, ...]
    amplitudes: jax.Array | None
    finite: tuple[Kernel, ...]

    def __call__(self, X: jax.Array) -> jax.Array:
        """Evaluate the columns at a matrix of inputs."""
        columns = jnp.ones((len(X), 1), X.dtype)
        if self.amplitudes is not None:
            waves = [self.amplitudes[None, :] * wave for wave in self._waves(X)]
            columns = jnp.concatenate(waves, axis=1)
        for factor in self.finite:
            more = factor.columns(X)
            columns = (columns[:, :, None] * more[:, None, :]).reshape(
                len(X), columns.shape[1] * more.shape[1]
            )
        return columns

    def _waves(self, X: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines `(N, M)`."""
        phase = sum(
            jnp.matmul(factor.inputs(X), w.T, precision=EXACT)
            for factor, w in zip(self.spectral, self.frequencies, strict=True)
        )
        sine, cosine = sine_cosine(phase)
        return cosine, sine

    def weighted(self, X: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the columns times weights `(Q, F)`, as `(N, Q)`, without a copy of the waves."""
        if self.amplitudes is None or self.finite:
            return jnp.matmul(self(X), weights.T, precision=EXACT)
        scaled = (weights * jnp.tile(self.amplitudes, 2)[None, :]).T
        (cosine, sine), (upper, lower) = self._waves(X), jnp.split(scaled, 2)
        times = partial(jnp.matmul, precision=EXACT)
        return times(cosine, upper) + times(sine, lower)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Features:
    """Features of a kernel: one block of columns for each of its terms.

    Attributes:
        blocks: blocks of columns, as functions of the inputs.
        observe: returns the observed quantity of a function at inputs: its values, or its slopes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, draw_features
        >>> features = draw_features(jax.random.key(0), RBF(), 4096, jnp.zeros((1, 2)))
        >>> X = jnp.array([[0.0, 0.0], [1.0, 0.0]])
        >>> columns = features(X)
        >>> print(columns.shape, bool(jnp.abs(columns @ columns.T - RBF()(X)).max() < 0.1))
        (2, 4096) True
    """

    blocks: tuple[Block, ...]
    observe: Callable = field(default=values_of, metadata={"static": True})

    def __call__(self, X: ArrayLike) -> jax.Array:
        """Return the columns `(N, F)` at inputs; `phi(X1) @ phi(X2).T` approximates the kernel."""
        X = as_inputs(X)
        return jnp.concatenate([self.observe(block, X) for block in self.blocks], axis=1)

    def weighted(self, X: jax.Array, weights: jax.Array) -> jax.Array:
        """Evaluate functions with weights `(Q, F)` on the columns at inputs `(N, D)`: `(N, Q)`."""
        ends = np.cumsum(self.sizes(X.shape[1]))
        each = list(zip(self.blocks, jnp.split(weights, ends[:-1], axis=1), strict=True))

        def whole(X: jax.Array) -> jax.Array:
            return sum((block.weighted(X, part) for block, part in each), jnp.zeros((), X.dtype))

        return self.observe(whole, X)

    def sizes(self, dim: int) -> list[int]:
        """Return the number of columns of each block."""
        x = jax.ShapeDtypeStruct((1, dim), jnp.result_type(float))
        seen = [jax.eval_shape(partial(self.observe, block), x) for block in self.blocks]
        return [columns.shape[1] for columns in seen]


def check_num_features(num_features: int) -> int:
    """Return a number of columns, which must be even: a sine and a cosine for each frequency.

    Raises:
        ValueError: if the number is odd, or below 2.
    """
    if num_features != 0:
        check_count("num_features", num_features)
    if num_features % 2 or num_features == 0:
        raise ValueError(
            f"num_features counts columns, a sine and a cosine for each frequency: it must be even "
            f"and at least 2, got {num_features}."
        )
    return num_features


def draw_features(rng_key: jax.Array, kernel: Kernel, num_features: int, X: ArrayLike) -> Features:
    """Draw random features of a kernel.

    Kernels with finitely many features (Linear, Constant, Cosine) use exactly these features. The
    other terms of a sum share the remaining columns equally.

    Args:
        rng_key: one key.
        kernel: a kernel.
        num_features: number of columns: even, a sine and a cosine for each frequency.
        X: inputs, of which only the number of columns and the dtype matter.

    Raises:
        ValueError: if `num_features` is odd or below 2.
        NotImplementedError: for a kernel without a spectral density or a feature map.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, draw_features
        >>> X = jnp.linspace(0.0, 1.0, 5)
        >>> features = draw_features(jax.random.key(0), RBF(), 64, X)
        >>> bool(abs(features(X) @ features(X).T - RBF()(X)).max() < 0.05)
        True
    """
    check_num_features(num_features)
    X = as_inputs(X)
    kernel.check_inputs(X)
    values, X = kernel.of_values(X[:1])
    plans = [_Plan(term, X) for term in values.terms()]
    fixed = sum(plan.fixed or 0 for plan in plans)
    sharing = sum(plan.fixed is None for plan in plans)
    share = max(2, (num_features - fixed) // max(sharing, 1))
    keys = jax.random.split(one_key(rng_key), len(plans))
    blocks = tuple(plan.draw(key, share) for key, plan in zip(keys, plans, strict=True))
    return Features(blocks, kernel.observe)


class _Plan:
    """Plan of one term's features: its spectral and finite factors, and its number of columns."""

    def __init__(self, term: Kernel, X: jax.Array) -> None:
        self.spectral = tuple(f for f in term.factors() if f.is_spectral)
        others = tuple(f for f in term.factors() if not f.is_spectral)
        # a constant factor scales the amplitudes of the waves, without columns of its own
        self.constants = tuple(f for f in others if self.spectral and isinstance(f, Constant))
        self.finite = tuple(f for f in others if f not in self.constants)
        self.dtype = X.dtype
        self.dims = [jax.eval_shape(f.inputs, X).shape[1] for f in self.spectral]
        self.tensor = 1  # number of columns of all finite factors multiplied
        for factor in self.finite:
            self.tensor *= jax.eval_shape(factor.columns, X).shape[1]

    def _series(self, number: int) -> Any:
        if len(self.spectral) != 1:
            return None
        return self.spectral[0].series(number, self.dims[0])

    @property
    def fixed(self) -> int | None:
        """Number of columns, if the kernels determine it."""
        if not self.spectral:
            return self.tensor
        few = jax.eval_shape(lambda: self._series(2))
        if few is None or len(few.weights) == 2:
            return None
        return 2 * len(few.weights) * self.tensor

    def draw(self, rng_key: jax.Array, columns: int) -> Block:
        """Draw frequencies for a number of columns; a finite series uses all of its frequencies."""
        if not self.spectral:
            return Block((), (), None, self.finite)
        number = max(1, columns // self.tensor // 2)
        if number < _FEWEST and self.tensor > 1:
            warn(
                f"a product with {self.tensor} columns beside its frequencies has only {number} of "
                f"these: {2 * _FEWEST * self.tensor} columns or more are needed (num_features)."
            )
        series = self._series(number)
        if series is not None:
            frequencies, weights = [series.frequencies], series.weights
        else:
            frequencies, weights = self._random(rng_key, number)
        variance = jnp.asarray(1.0, self.dtype)
        for factor in (*self.spectral, *self.constants):
            variance = variance * factor.scale()
        amplitudes = jnp.sqrt(variance * weights.astype(self.dtype) / len(weights))
        waves = tuple(w.astype(self.dtype) for w in frequencies)
        return Block(self.spectral, waves, amplitudes, self.finite)

    def _random(self, rng_key: jax.Array, number: int) -> tuple[list[jax.Array], jax.Array]:
        """Draw the frequencies and components of each factor independently; multiply weights."""
        pairs = list(zip(self.spectral, self.dims, strict=True))
        counts = [factor.num_uniforms(dim) for factor, dim in pairs]
        uniforms = sobol(rng_key, number, sum(counts), self.dtype)
        frequencies, weights, start = [], jnp.ones(number, self.dtype), 0
        for (factor, dim), count in zip(pairs, counts, strict=True):
            w, squared = factor.spectrum(uniforms[:, start : start + count], dim)
            frequencies.append(w)
            weights = weights * squared
            start += count
        return frequencies, weights
