"""Processes through inducing points, for guides and batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike

from numpyro_ensemble.gp.distribution import GaussianProcess
from numpyro_ensemble.gp.draw_paths import check_kernel
from numpyro_ensemble.gp.inducing import as_inducing
from numpyro_ensemble.gp.inputs import EXACT, as_inputs
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.messages import announce, is_subsampled, plates
from numpyro_ensemble.gp.process import Copies, may_be_data, warn_of_copies


class _Inducing(GaussianProcess):
    """A process at inducing points; a plate may make any number of copies of it."""

    def expand(self, batch_shape: tuple[int, ...]) -> dist.Distribution:
        return Copies(self, tuple(batch_shape)) if batch_shape else self


def _check_plates(name: str, copies: tuple[int, ...], num_inputs: int, subsampled: bool) -> None:
    """Warn if there are as many copies as inputs; raise a ValueError in a subsampled plate."""
    if subsampled and may_be_data(copies, num_inputs):
        raise ValueError(
            f"sparse_gp({name!r}) stands inside the plate of its data, which would copy its "
            f"inducing values for each row: call it before the plate, with the inputs of the batch."
        )
    warn_of_copies(copies, num_inputs)


def sparse_gp(
    name: str,
    kernel: Kernel,
    X: ArrayLike,
    Z: ArrayLike,
    whiten: bool = True,
    *,
    mean_fn: Any = None,
    jitter: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sample a process at inducing points; return its mean and variance at inputs given these.

    The only latent is `{name}_u_base`, independent standard normals (`{name}_u` if not whitened).
    Call `sparse_gp` outside the plate of the data, and `ExpectedLikelihood` inside. Then any guide
    and batches of any size optimise the bound of Hensman et al. (2013). In a plate of its own,
    `sparse_gp` samples one independent process for each row of the plate.

    Args:
        name: name of the process.
        kernel: a kernel.
        X: inputs `(N, D)` or `(N,)`, of all data or of a batch.
        Z: inducing points `(M, D)`, fixed or parameters.
        whiten: sample independent normals.
        mean_fn: a number, or a function of the inputs.
        jitter: added to the diagonal of the inducing points' covariance.

    Returns:
        Mean and variance `(*copies, N)`. In a call of `Pathwise`, they are the values of a function
        and 0.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import RBF, ExpectedLikelihood, sparse_gp
        >>> def model(X, y=None, Z=jnp.linspace(0.0, 1.0, 5)):
        ...     m, v = sparse_gp("f", RBF(), X, Z)
        ...     with numpyro.plate("data", len(X)):
        ...         likelihood = ExpectedLikelihood(lambda f: dist.Bernoulli(logits=f), m, v)
        ...         numpyro.sample("y", likelihood, obs=y)
    """
    check_kernel(kernel, jitter)
    X = as_inputs(X)
    kernel.check_inputs(X)
    process = _Inducing(kernel, as_inducing(kernel, X, Z), 0.0, mean_fn, jitter)
    L = process.scale_tril()

    around = plates()
    subsampled = bool(around) and is_subsampled()

    def draw() -> jax.Array:
        _check_plates(name, around, len(X), subsampled)
        normal = dist.Normal(jnp.zeros(len(process.X), L.dtype), 1.0).to_event(1)
        site, fn = (f"{name}_u_base", normal) if whiten else (f"{name}_u", process)
        z = numpyro.sample(site, fn)
        values = jnp.einsum("ij,...j->...i", L, z, precision=EXACT) if whiten else z
        return jnp.broadcast_to(process.mean, values.shape) + values if whiten else values

    message = announce(name, process, X, draw, around)
    values = message["value"]
    if message["answered"]:
        return values, jnp.zeros_like(values)
    copies = values.shape[:-1]
    mean, variance = jax.vmap(lambda u: process.given(L, u, X), out_axes=(0, None))(
        values.reshape(-1, values.shape[-1])
    )
    return mean.reshape(*copies, len(X)), jnp.broadcast_to(variance, (*copies, len(X)))
