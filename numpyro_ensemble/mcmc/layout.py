"""Devices of a density, and the number of chains evaluated at once. Only speed depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from numpyro_ensemble.mapping import platform_of
from numpyro_ensemble.sharding import Placement

_FEW = 4  # chains at once: gradients of 64 chains on item response take 1.9 ms instead of 4.2


def laid_out(
    log_density: Callable[..., jax.Array], placement: Placement | None = None
) -> Callable[..., jax.Array]:
    """Return the function `(z, data)`, whose gradient for many chains is evaluated the fastest way.

    Chains are spread over the devices of a mesh. XLA's CPU code for the gradient of an index,
    `a[group]`, takes two to three times as long for all chains at once as for a few at a time.
    Everything else is fastest for all chains at once. The function must not close over traced
    values. Its derivative with respect to `data` is 0.
    """
    on_cpu, placement = platform_of() == "cpu", placement or Placement()
    if not on_cpu and placement.mesh is None:
        return log_density
    both = jax.value_and_grad(log_density)

    @jax.custom_batching.custom_vmap
    def of_one(z: Any, data: Any) -> tuple[jax.Array, Any]:
        return both(z, data)

    @of_one.def_vmap
    def of_many(axis_size: int, batched: Any, z: Any, data: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda flag: 0 if flag else None, batched)
        if not all(jax.tree.leaves(batched[0])) or any(jax.tree.leaves(batched[1])):
            out = jax.vmap(both, in_axes=tuple(axes), axis_size=axis_size)(z, data)
        else:
            few = on_cpu and _scatters(both, z, data)
            place = replace(placement, batch_size=_FEW) if few else placement
            out = place.padded(place.map(both, (0, None)), (0, None), axis_size)(z, data)
        return out, jax.tree.map(lambda _: True, out)

    laid = jax.custom_jvp(lambda z, data: of_one(z, data))

    @laid.defjvp
    def curvature(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(both, primals, tangents)  # whatever is mapped over

    @jax.custom_jvp
    def density(z: Any, data: Any) -> jax.Array:
        return log_density(z, data)

    @density.defjvp
    def slope(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        value, grad = laid(*primals)
        along = jax.tree.map(lambda g, t: (g * t).sum(), grad, tangents[0])
        return value, sum(jax.tree.leaves(along), jnp.zeros_like(value))

    return density


def _scatters(fn: Callable, z: Any, data: Any) -> bool:
    """Return whether a function of one chain contains JAX's `scatter-add`."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), z)
    return "scatter-add" in primitives_of(fn, one, data)


def primitives_of(fn: Callable, *inputs: Any) -> set[str]:
    """Return the names of JAX's primitives that a function calls."""
    return set(_primitives(jax.make_jaxpr(fn)(*inputs).jaxpr))


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from _primitives(inner)
