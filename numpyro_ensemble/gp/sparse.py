"""Processes through inducing points, for guides and batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.util import is_prng_key

from numpyro_ensemble.gp.distribution import Copies, GaussianProcess, warn_of_copies
from numpyro_ensemble.gp.inputs import EXACT, as_inputs
from numpyro_ensemble.gp.kernels import Kernel
from numpyro_ensemble.gp.messages import announce, is_subsampled, plates
from numpyro_ensemble.gp.solvers import pivoted_cholesky
from numpyro_ensemble.handlers import check_count, key_of


class _Inducing(GaussianProcess):
    """A process at inducing points, of which a plate may have as many copies as it likes."""

    def expand(self, batch_shape: tuple[int, ...]) -> dist.Distribution:
        return Copies(self, tuple(batch_shape)) if batch_shape else self


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
    """Sample a process at inducing points, and return its moments at inputs given these values.

    Its only latent is `{name}_u_base`, independent standard normals (`{name}_u` if not whitened).
    Call it outside the plate of the data, and `ExpectedLikelihood` inside, so that ordinary guides
    and batches optimise the bound of Hensman et al. (2013). Inside a plate of its own it samples as
    many independent processes, which a model may mix.

    Args:
        name: of the process.
        kernel: a kernel.
        X: inputs `(N, D)`, those of a batch say.
        Z: inducing points `(M, D)`, fixed or parameters.
        whiten: sample independent normals.
        mean_fn: a number, or a function of the inputs.
        jitter: what is added to the inducing points' diagonal.

    Returns:
        Mean and variance `(*copies, N)`; functions and 0 where `Pathwise` predicts.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import RBF, ExpectedLikelihood, sparse_gp
        >>> def model(X, y=None, Z=jnp.linspace(0.0, 1.0, 5)):
        ...     m, v = sparse_gp("f", RBF(), X, Z)
        ...     with numpyro.plate("data", len(X)):
        ...         likelihood = ExpectedLikelihood(lambda f: dist.Bernoulli(logits=f), m, v)
        ...         numpyro.sample("y", likelihood, obs=y)
    """
    X, process = as_inputs(X), _Inducing(kernel, Z, 0.0, mean_fn, jitter)
    if X.shape[1] != process.X.shape[1]:
        raise ValueError(f"X has {X.shape[1]} columns, and Z has {process.X.shape[1]}.")
    kernel.check_inputs(X)
    L = process.scale_tril()

    around = plates()
    if around and around[-1] == len(X) > 1 and is_subsampled():
        raise ValueError(
            f"sparse_gp({name!r}) stands inside the plate of its data, which would copy its "
            f"inducing values for each row: call it before the plate, with the inputs of the batch."
        )

    def draw() -> jax.Array:
        normal = dist.Normal(jnp.zeros(len(process.X), L.dtype), 1.0).to_event(1)
        site, fn = (f"{name}_u_base", normal) if whiten else (f"{name}_u", process)
        z = numpyro.sample(site, fn)
        warn_of_copies(z.shape[:-1], len(X))
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


def choose_inducing(
    rng_key: jax.Array | None,
    X: ArrayLike,
    num_points: int,
    *,
    kernel: Kernel | None = None,
) -> jax.Array:
    """Choose inducing points `(num_points, D)`.

    With a kernel, the inputs where most of its variance is left, one after the other (Burt et al.,
    2020); without, the centres that k-means finds.

    Args:
        rng_key: one key, of the start of k-means; None with a kernel, whose choice is not random.
        X: inputs `(N, D)` or `(N,)`.
        num_points: how many points to choose.
        kernel: a kernel.

    Raises:
        ValueError: if there are more points than distinct inputs, or no key for k-means.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, choose_inducing
        >>> choose_inducing(None, jnp.linspace(0.0, 1.0, 50), 5, kernel=RBF(lengthscale=0.2)).shape
        (5, 1)
    """
    rng_key = key_of(rng_key)
    if not (is_prng_key(rng_key) or (rng_key is None and kernel is not None)):
        raise ValueError(
            f"choose_inducing(rng_key, X, num_points) takes one key first, jax.random.key(0) say, "
            f"or None with a kernel; got {rng_key!r}."
        )
    check_count("num_points", num_points)
    X = as_inputs(X)
    distinct = len(np.unique(np.asarray(X), axis=0))
    if num_points > distinct:
        raise ValueError(f"num_points={num_points}, and there are {distinct} distinct inputs.")
    if kernel is not None:
        return X[pivoted_cholesky(kernel, X, num_points)[1]]
    from scipy.cluster.vq import kmeans2

    highest = np.iinfo(np.int32).max
    seed = int(jax.random.randint(rng_key, (), 0, highest, jnp.int32))  # type: ignore[arg-type]
    spread = np.asarray(X).std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    centres, _ = kmeans2(np.asarray(X) / spread, num_points, minit="++", rng=seed, missing="raise")
    return jnp.asarray(centres * spread, X.dtype)
