"""Checks of chains' starts and of options; which chains do not move."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.handlers import warn
from numpyro_ensemble.mcmc.counted import counted, in_folds, largest_eigenvalue
from numpyro_ensemble.mcmc.positions import Coordinates

_NAMED = 10
_FREEZING = 1e3  # a larger eigenvalue makes steps shorter than a 60th of the scale
_STILL = (
    10  # iterations: a chain that accepts 0.8 of its proposals rejects so many once in 10 million
)
_CRAWLING = 0.01  # strides below this part of the scale count as standing still
_FAR = 5.0  # a start is far if its virial is more than this, where the typical set has 1


_JAX = str(Path(jax.__file__).parent)


def frames_outside_jax() -> Iterator[FrameType]:
    """Yield the frames of the call stack from the innermost on, except those of JAX."""
    frame = inspect.currentframe()
    while frame is not None:
        if not frame.f_code.co_filename.startswith((_JAX, str(Path(__file__).parent))):
            yield frame
        frame = frame.f_back


def listed(numbers: np.ndarray) -> str:
    """Return the first few numbers as text."""
    return ", ".join(map(str, numbers[:_NAMED])) + (", ..." if len(numbers) > _NAMED else "")


def is_frozen(iterations_since_move: jax.Array, stride: jax.Array) -> jax.Array:
    """Return which chains stand still, or need 10,000 such strides to diffuse by the scale."""
    return (iterations_since_move >= _STILL) | (stride < _CRAWLING)


class Survey(NamedTuple):
    """Statistics of a start."""

    finite: jax.Array  # (C,), whether density and gradient are finite
    varies: jax.Array  # (d,), whether the chains of every fold differ in the coordinate
    eigenvalue: jax.Array  # (K,), largest eigenvalue of the scaled gradients of chains that count
    virial: jax.Array  # mean of -(z - mean) * gradient: 1 in the typical set


def survey(log_density: Any, rows: jax.Array, num_folds: int) -> tuple[jax.Array, Any, Survey]:
    """Return the log densities and gradients at positions `(C, D)`, and statistics of these."""
    values, slopes = jax.vmap(jax.value_and_grad(log_density))(rows)
    finite = jnp.isfinite(values) & jnp.isfinite(slopes).all(axis=1)
    folds = rows.reshape(num_folds, -1, rows.shape[1])
    counts = in_folds(counted(values, rows.shape[1]).reshape(num_folds, -1))
    scale = folds.std(axis=1, where=counts[..., None])
    scaled = slopes.reshape(folds.shape) * scale[:, None]
    varies = (folds.max(axis=1) > folds.min(axis=1)).all(axis=0)  # a scale may round above 0
    eigenvalues = jax.vmap(largest_eigenvalue)(scaled, counts)
    virial = -((rows - rows.mean(axis=0, keepdims=True)) * slopes).mean()
    return values, slopes, Survey(finite, varies, eigenvalues, virial)


def check_start(
    name: str,
    coordinates: Coordinates,
    found: Survey,
    remedy: str,
    with_nan: Callable[[str], str],
    alone: bool = False,
) -> None:
    """Raise if chains cannot start at their positions, and warn if they would freeze there.

    Args:
        name: name of the kernel.
        coordinates: coordinates of the chains' positions.
        found: statistics of the start.
        remedy: the message's advice.
        with_nan: adds the arguments with NaN to the advice.
        alone: whether each chain is adapted alone, so that nothing depends on the chains' spread.

    Raises:
        ValueError: if a chain has no finite density, or all chains agree in a coordinate.
    """
    if isinstance(found.finite, jax.core.Tracer):
        return
    finite = np.asarray(found.finite)
    if not finite.all():
        wrong = np.flatnonzero(~finite)
        raise ValueError(
            f"{len(wrong)} of {len(finite)} chains start where the log density or its gradient is "
            f"not finite: {listed(wrong)}. {with_nan(remedy)}"
        )
    if alone:
        return
    varies = np.asarray(found.varies)
    if not varies.all():
        site = coordinates.site_of(int(np.flatnonzero(~varies)[0]))
        raise ValueError(
            f"The chains start at the same value of {site!r}, which makes its scale zero: they "
            f"must be spread. {remedy}"
        )
    largest, virial = float(np.max(np.asarray(found.eigenvalue))), float(found.virial)
    if largest > _FREEZING and virial > _FAR:
        warn(
            f"{name} starts far from the typical set, where its chains may freeze: the largest "
            f"eigenvalue of the scaled gradients is {largest:.1e} (1 to 100 is usual), so that "
            f"steps are {0.5 / largest**0.5:.1e} of the scale. {remedy}"
        )


def checked_values(init_params: Any, expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return unconstrained values in the dtypes of the latent sites.

    Raises:
        ValueError: if they have other names or shapes than the latent sites.
    """
    if not isinstance(init_params, dict) or init_params.keys() != expected.keys():
        got = sorted(init_params) if isinstance(init_params, dict) else type(init_params).__name__
        raise ValueError(
            f"init_params takes unconstrained values by the names of the latent sites, "
            f"{sorted(expected)}; got {got}."
        )
    for name, form in expected.items():
        given = jnp.shape(init_params[name])
        if given != form.shape:
            raise ValueError(
                f"init_params[{name!r}] takes unconstrained values of shape {form.shape}, chains "
                f"leading; got {given}."
            )
    return {name: jnp.asarray(x, expected[name].dtype) for name, x in init_params.items()}


def check_positive(name: str, value: Any) -> None:
    """Raise if an option is not a finite number above 0."""
    if not (_check_number(name, value) and value > 0):
        raise ValueError(f"{name} takes a finite number above 0, got {value}.")


def check_scale(name: str, value: Any) -> None:
    """Raise if an option is not a finite number, 0 or above."""
    if not (_check_number(name, value) and value >= 0):
        raise ValueError(f"{name} takes a finite number, 0 or above, got {value}.")


def check_fraction(name: str, value: Any) -> float:
    """Return an option that is a fraction.

    Raises:
        TypeError, ValueError: if it is not a number from 0 to 1.
    """
    if not (_check_number(name, value) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name} takes 0 to 1, got {value}.")
    return float(value)


def _check_number(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} takes a number, got {value!r}.")
    return bool(np.isfinite(value))
