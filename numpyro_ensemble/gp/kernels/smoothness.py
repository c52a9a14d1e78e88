"""Whether the functions of a kernel have slopes, determined from its profile."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import has_tracers

_SQUARED_DISTANCES = 10.0 ** np.arange(-12.0, -1.0, 2.0)  # in lengthscales


def is_smooth(profile: Callable[[jax.Array], jax.Array]) -> bool:
    """Return whether JAX's slope of a profile at distance 0 is correct.

    That slope gives the variance of the functions' slopes. It is correct if the profile's slopes at
    small distances converge to it: one of them is within 1 % of it, or some are nearer to it than
    the slope at the largest distance. One distance is enough. At the smallest distances rounding
    spoils a profile such as sin(r) / r, and at the larger ones a narrow profile is already 0. A
    profile with traced numbers cannot be checked, and counts as smooth.
    """
    with jax.ensure_compile_time_eval():
        squared = jnp.asarray(np.append(0.0, _SQUARED_DISTANCES))[None, :]
        slopes = jax.jvp(profile, (squared,), (jnp.ones_like(squared),))[1]
    if has_tracers(slopes):
        return True
    at_zero, near = np.split(np.asarray(slopes)[0], [1])
    if not np.isfinite(at_zero).all():
        return False
    apart = abs(near - at_zero)
    comes_nearer = (apart[:-1] < apart[-1]).any() and (apart <= 0.5 * abs(near)).any()
    return bool(comes_nearer or (apart <= 0.01 * abs(near)).any())
