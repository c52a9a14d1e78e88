"""Latent processes as functions of independent normals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam

from numpyro_ensemble.gp.distribution import GaussianProcess
from numpyro_ensemble.gp.inputs import EXACT
from numpyro_ensemble.gp.messages import announce, plates


class WhitenReparam(Reparam):
    """Write a latent `GaussianProcess` as its Cholesky factor times independent normals.

    The site `{name}_base` replaces the process's site, and the process's values are a deterministic
    site. The posterior of the base is then close to independent normals where data are few, which
    suits samplers and guides.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.handlers import reparam
        >>> from numpyro_ensemble.gp import RBF, GaussianProcess, WhitenReparam
        >>> @reparam(config={"f": WhitenReparam()})
        ... def model(X, y=None):
        ...     f = numpyro.sample("f", GaussianProcess(RBF(), X))
        ...     numpyro.sample("y", dist.Poisson(jnp.exp(f)).to_event(1), obs=y)
    """

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, jax.Array]:
        """Sample the base, and return the values."""
        if obs is not None:
            raise ValueError(f"WhitenReparam is for latent processes, and {name!r} is observed.")
        process, expand_shape, event_dim = self._unwrap(fn)
        if not isinstance(process, GaussianProcess):
            raise ValueError(
                f"WhitenReparam is for sites with a GaussianProcess, and {name!r} has a "
                f"{type(process).__name__}."
            )
        if process.observed is not None:
            raise ValueError(f"{name!r} is latent: mask its likelihood, not the process.")

        def draw() -> jax.Array:
            normal = dist.Normal(jnp.zeros(len(process.X), process.X.dtype), 1.0).to_event(1)
            z = numpyro.sample(f"{name}_base", self._wrap(normal, expand_shape, event_dim))
            values = jnp.einsum("ij,...j->...i", process.scale_tril(), z, precision=EXACT)
            return jnp.broadcast_to(process.mean, values.shape) + values

        copies = np.broadcast_shapes(expand_shape, plates())
        message = announce(name, process, process.X, draw, copies, whitened=True)
        return None, message["value"]
