"""Latent processes written by independent normals, and how sites without a distribution tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam
from numpyro.primitives import apply_stack

from numpyro_ensemble._compat import HANDLERS
from numpyro_ensemble.gp.distribution import GaussianProcess
from numpyro_ensemble.gp.inputs import EXACT

SUFFIX = "_gp"  # of the announcing message's name


def plates() -> tuple[int, ...]:
    """Return the batch shape that the plates around a call give to a sample site."""
    around = [handler for handler in HANDLERS if isinstance(handler, numpyro.plate)]
    sizes = {handler.dim: handler.subsample_size for handler in around}
    return tuple(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))


def announce(
    name: str,
    gp: Any,
    at: jax.Array,
    draw: Callable[[], jax.Array],
    copies: tuple[int, ...] = (),
    whitened: bool = False,
) -> dict[str, Any]:
    """Tell handlers of a process whose sample site they cannot see.

    Where it is `whitened`, its own sample site is written in other terms, and `at` are its inputs;
    else its values are those at inducing points.

    A handler that has functions for it sets the message's "value" to theirs at the inputs `at`, and
    "answered"; otherwise the value is drawn, at the process's own inputs.
    """
    message = {
        "type": "gp",
        "name": f"{name}{SUFFIX}",  # a trace takes each name once; scopes put theirs in front
        "gp": gp,
        "at": at,
        "copies": copies,
        "whitened": whitened,
        "fn": draw,
        "args": (),
        "kwargs": {},
        "value": None,
        "answered": False,
        "cond_indep_stack": [],
    }
    return apply_stack(message)


class WhitenReparam(Reparam):
    """Write a latent `GaussianProcess` as its Cholesky factor times independent normals.

    The site `{name}_base` takes its place, and the process's values are a deterministic site. For
    samplers and guides the posterior is then close to independent wherever data say little.

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

        message = announce(name, process, process.X, draw, expand_shape, whitened=True)
        return None, message["value"]
