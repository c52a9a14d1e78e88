"""Base class of the processes, which are distributions, and independent copies of them."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.stats import norm
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_ensemble.gp.draw_paths import check_kernel
from numpyro_ensemble.gp.inputs import as_inputs, check_values, diagonal
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.means import as_mean
from numpyro_ensemble.handlers import warn


def may_be_data(copies: tuple[int, ...], num_inputs: int) -> bool:
    """Return whether a process may have been sampled in the plate of its data, by mistake."""
    return bool(copies) and copies[-1] == num_inputs > 1


def warn_of_copies(copies: tuple[int, ...], num_inputs: int) -> None:
    """Warn if a process may have been sampled in the plate of its data."""
    if may_be_data(copies, num_inputs):
        warn(
            f"{copies[-1]} copies of a Gaussian process at as many inputs: if the plate is that of "
            f"its data, sample the process outside of it."
        )


class Process(dist.Distribution):
    """Base class of processes: a kernel, inputs, and the noise and mean at these inputs."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    observed: jax.Array | None = None  # which values are observed; None for all

    def __init__(
        self,
        kernel: Kernel,
        X: ArrayLike,
        noise: ArrayLike,
        mean_fn: Any,
        jitter: ArrayLike | None,
        validate_args: bool | None,
    ) -> None:
        check_kernel(kernel, jitter)
        self.kernel, self.X = kernel, as_inputs(X)
        kernel.check_inputs(self.X)
        diagonal("noise", noise, self.X)
        self.noise, self.mean_fn, self.jitter = noise, as_mean(mean_fn), jitter
        super().__init__((), (len(self.X),), validate_args=validate_args)

    @property
    def variances(self) -> jax.Array:
        """Variance of the noise for each input."""
        return diagonal("noise", self.noise, self.X)

    @property
    def mean(self) -> jax.Array:
        """Mean `(N,)`."""
        return self.kernel.mean_at(self.mean_fn, self.X)

    def expand(self, batch_shape: tuple[int, ...]) -> dist.Distribution:
        """Return independent copies, as a plate makes them."""
        warn_of_copies(batch_shape, len(self.X))
        return Copies(self, tuple(batch_shape)) if batch_shape else self

    def where(self, mask: Any) -> Process:
        """Leave observations out.

        Raises:
            ValueError: if the density has no term for each observation.
        """
        raise ValueError(
            f"{type(self).__name__} takes no mask of its observations: leave rows out of X and y."
        )

    def tempered(self, weight: Any) -> Process:
        """Return the process with a weight on its likelihood, which is normal around the function.

        The noise variance is divided by the weight. With a weight of 0 it is the largest float, so
        that observations have almost no influence.
        """
        largest = jnp.finfo(self.variances.dtype).max
        divided = self.variances / jnp.where(weight > 0, weight, 1.0)
        process = copy.copy(self)
        process.noise = jnp.where(weight > 0, jnp.minimum(divided, largest), largest)
        return process

    def _checked(self, value: ArrayLike) -> jax.Array:
        if jnp.shape(value)[-1:] != (len(self.X),):
            raise ValueError(
                f"a Gaussian process at {len(self.X)} inputs has values (..., {len(self.X)}), got "
                f"{jnp.shape(value)}."
            )
        if self.observed is None:
            check_values("the value of a Gaussian process", value)
        return jnp.asarray(value)

    def _new_inputs(self, X_new: ArrayLike) -> jax.Array:
        X_new = as_inputs(X_new, "X_new")
        self.kernel.check_inputs(X_new)
        if X_new.shape[1] != self.X.shape[1]:
            raise ValueError(f"X_new has {X_new.shape[1]} columns, and X has {self.X.shape[1]}.")
        return X_new

    def leave_one_out(self, values: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Return mean and variance of each value given all others, each `(N,)`, noise included."""
        raise NotImplementedError(f"{type(self).__name__} has no leave-one-out moments.")

    def pointwise_log_prob(self, values: ArrayLike) -> jax.Array:
        """Return the log density of each value given all others, `(N,)`; 0 if it is unobserved.

        These are the terms of leave-one-out cross-validation for one draw of the hyperparameters
        (Bürkner, Gabry and Vehtari, 2021).
        """
        mean, variance = self.leave_one_out(values)
        terms = norm.logpdf(jnp.asarray(values), mean, jnp.sqrt(variance))
        return terms if self.observed is None else jnp.where(self.observed, terms, 0.0)


def check_copies(copies: tuple[int, ...], events: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless there are values for each copy of a process."""
    if copies and shape[-len(copies) - 1 : -1] != copies:
        raise ValueError(
            f"{copies} copies of a Gaussian process take values {(*copies, *events)}, got {shape}. "
            f"The values at all inputs are one event: sample the process outside the plate of the "
            f"data, and inside a plate only for independent copies."
        )


class Copies(dist.ExpandedDistribution):
    """Independent copies of a process, each of which has values of its own."""

    def expand(self, batch_shape: tuple[int, ...]) -> dist.Distribution:
        """Return more copies, as one more plate makes them."""
        copies = Copies(self, tuple(batch_shape))
        # the plate whose axis is the last one may come after others
        return copies if self.batch_shape[-1] > 1 else self.base_dist.expand(copies.batch_shape)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """Return the log density of each copy's values.

        Raises:
            ValueError: if there are values for one copy only, which would count for every copy.
        """
        check_copies(self.batch_shape, self.event_shape, jnp.shape(value))
        return super().log_prob(value, intermediates)

    def mask(self, mask: Any) -> dist.Distribution:
        """Mask observations by `(N,)`, or copies."""
        if jnp.shape(mask) == self.event_shape:
            return self.base_dist.mask(mask).expand(self.batch_shape)
        return super().mask(mask)
