"""Maxima and minima of functions: many starts for each function, refined by gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.spectra import sobol
from numpyro_ensemble.handlers import check_count, one_key

_TOLERANCE = 1e-9
_FIRST_STEPS = 10  # first steps of all searches; then only the best continue
_FINALISTS = 2


class Optimum(NamedTuple):
    """Where each path is highest, or lowest.

    Attributes:
        place: `(num_paths, D)`.
        value: `(num_paths,)`.

    The example of `gp.maximise` makes one.
    """

    place: jax.Array
    value: jax.Array


def maximise(
    rng_key: jax.Array,
    paths: Paths,
    bounds: Any,
    *,
    num_points: int = 1024,
    num_starts: int = 16,
    max_steps: int = 100,
) -> Optimum:
    """Find where each path is highest within bounds, for all paths in one program.

    All paths are evaluated at Sobol points of the box. BFGS then climbs each path from its best
    points, in unconstrained coordinates of the box. For a batch of n evaluations by Thompson
    sampling, give n paths: the places are the batch.

    Args:
        rng_key: one key for the points.
        paths: functions, from `draw_paths` or `Pathwise.draw`.
        bounds: `(low, high)` for each column of the inputs, `(D, 2)`, or `(low, high)` alone for
            one column. Equal bounds fix a column, such as the number of an output. With
            `Derivatives`, the last column may be omitted: the path's values are maximised.
        num_points: number of points at which each path is evaluated.
        num_starts: number of searches, from the best points; the best two searches are completed.
        max_steps: largest number of steps of a completed search.

    Raises:
        TypeError: if `paths` is not a `Paths`.
        ValueError: for bounds of another shape or that enclose no box, and for counts below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, draw_paths, maximise
        >>> X = jnp.linspace(0.0, 6.0, 12)
        >>> paths = draw_paths(jax.random.key(0), RBF(), X, jnp.sin(X), noise=1e-4, num_paths=3)
        >>> maximise(jax.random.key(1), paths, (0.0, 6.0)).place.shape
        (3, 1)
    """
    return _found(rng_key, paths, bounds, 1.0, num_points, num_starts, max_steps)


def minimise(
    rng_key: jax.Array,
    paths: Paths,
    bounds: Any,
    *,
    num_points: int = 1024,
    num_starts: int = 16,
    max_steps: int = 100,
) -> Optimum:
    """Find where each path is lowest within bounds, with the arguments of `maximise`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble.gp import RBF, draw_paths, minimise
        >>> X = jnp.linspace(0.0, 6.0, 12)
        >>> paths = draw_paths(jax.random.key(0), RBF(), X, jnp.sin(X), noise=1e-4, num_paths=3)
        >>> lowest = minimise(jax.random.key(1), paths, (0.0, 6.0))
        >>> bool((abs(lowest.place - 4.7) < 0.3).all())
        True
    """
    return _found(rng_key, paths, bounds, -1.0, num_points, num_starts, max_steps)


def _found(
    rng_key: jax.Array, paths: Paths, bounds: Any, sign: float, points: int, starts: int, steps: int
) -> Optimum:
    if not isinstance(paths, Paths):
        raise TypeError(
            f"paths takes functions of draw_paths or Pathwise.draw, got {type(paths).__name__}."
        )
    for name, value in {"num_points": points, "num_starts": starts, "max_steps": steps}.items():
        check_count(name, value)
    if starts > points:
        raise ValueError(f"num_starts={starts} of num_points={points} are too many.")
    low, high = _box(bounds, paths.points.shape[-1], paths.kernel.is_whole)
    unit = sobol(one_key(rng_key), points, len(low), paths.points.dtype)
    box = jnp.asarray([low, high], unit.dtype)
    paths.kernel.check_inputs(box[:1] + (box[1:] - box[:1]) * unit)
    return _search(paths, unit, box, sign, starts, steps)


def _box(bounds: Any, dims: int, of_values: bool) -> tuple[np.ndarray, np.ndarray]:
    box = np.asarray(bounds, float)
    box = box[None] if box.shape == (2,) else box
    if of_values and box.shape == (dims - 1, 2):
        box = np.concatenate([box, np.zeros((1, 2))])
    if box.shape != (dims, 2):
        raise ValueError(
            f"bounds takes (low, high) for each of {dims} columns of the inputs, shape "
            f"({dims}, 2); got shape {np.shape(bounds)}."
        )
    ordered = (box[:, 0] <= box[:, 1]).all() and (box[:, 0] < box[:, 1]).any()
    if not (np.isfinite(box).all() and ordered):
        raise ValueError(f"bounds takes finite numbers, low below high; got {box.tolist()}.")
    return box[:, 0], box[:, 1]


@partial(jax.jit, static_argnums=(3, 4, 5))
def _search(
    paths: Paths,
    unit: jax.Array,
    box: jax.Array,
    sign: float,
    num_starts: int,
    max_steps: int,
) -> Optimum:
    import optimistix

    low, high = box

    def inside(angle: jax.Array) -> jax.Array:
        """Map an angle to a place in the box; each place has an angle, and borders have slope 0."""
        return low + (high - low) * 0.5 * (1.0 + jnp.sin(angle))

    angles = jnp.arcsin(2.0 * unit - 1.0)
    values = sign * paths(jax.vmap(inside)(angles))
    _, best = jax.lax.top_k(jnp.where(jnp.isnan(values), -jnp.inf, values), num_starts)
    tolerance = max(_TOLERANCE, 10.0 * float(jnp.finfo(values.dtype).eps))
    solver: Any = optimistix.BFGS(rtol=tolerance, atol=tolerance)

    def followed(i: jax.Array, steps: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        path = paths[i]

        def loss(angle: jax.Array, _: Any) -> jax.Array:
            return -sign * path(inside(angle)[None])[0, 0]

        found = optimistix.minimise(loss, solver, start, max_steps=steps, throw=False).value
        end, before = loss(found, None), loss(start, None)
        # a search may end with NaN, or at a worse place than its start
        better = jnp.isfinite(end) & (end <= before)
        return jnp.where(better, found, start), -jnp.where(better, end, before)

    def of_path(i: jax.Array, starts: jax.Array) -> Optimum:
        """Search from all starts for a few steps, then complete the best searches."""
        if len(starts) > _FINALISTS:
            starts, heights = jax.vmap(partial(followed, i, min(_FIRST_STEPS, max_steps)))(starts)
            starts = starts[jax.lax.top_k(heights, _FINALISTS)[1]]
        ends, heights = jax.vmap(partial(followed, i, max_steps))(starts)
        top = jnp.argmax(heights)
        return Optimum(inside(ends[top]), sign * heights[top])

    return jax.vmap(of_path)(jnp.arange(paths.num_paths), angles[best])
