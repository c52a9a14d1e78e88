"""Inputs of kernels, and hyperparameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers

CONTRADICTION = (
    "values at equal points differ although noise is 0: give the noise's variance, or average them."
)
EXACT = jax.lax.Precision.HIGHEST  # precision of distances, phases and later products


def as_inputs(X: ArrayLike, name: str = "X") -> jax.Array:
    """Return inputs as a matrix `(N, D)` of floats; `(N,)` becomes `(N, 1)`.

    Raises:
        ValueError: if there are not one or two axes, or for entries that are not finite (traced
            entries are not checked).
    """
    check_finite(name, X)  # jnp.asarray may return a tracer, which cannot be checked
    X = jnp.asarray(X)
    if X.ndim not in (1, 2):
        raise ValueError(f"{name} takes inputs of shape (N, D) or (N,), got {X.shape}.")
    if not jnp.issubdtype(X.dtype, jnp.floating):
        X = X.astype(jnp.result_type(float))
    return X[:, None] if X.ndim == 1 else X


def numbered_inputs(*inputs: ArrayLike) -> jax.Array:
    """Stack several sets of inputs, with the number of each set in a last column.

    Args:
        *inputs: `(N_k, D)` or `(N_k,)`. For `multi_output`, set k has the inputs of output k. For
            `Derivatives`, set 0 has the inputs of values, and sets 1, 2, ... have those of slopes
            along each column. A set may be empty, `[]`.

    Returns:
        `(N_0 + N_1 + ..., D + 1)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble.gp import numbered_inputs
        >>> numbered_inputs(jnp.array([0.5, 0.75]), jnp.array([0.25])).tolist()
        [[0.5, 0.0], [0.75, 0.0], [0.25, 1.0]]
    """
    if not inputs:
        raise ValueError("numbered_inputs takes inputs, one set for each output; got none.")
    each = [as_inputs(X, f"the inputs of number {k}") for k, X in enumerate(inputs)]
    widths = [X.shape[1] for X in each if len(X)] or [each[0].shape[1]]
    if len(set(widths)) > 1:
        raise ValueError(f"numbered_inputs takes sets with equally many columns, got {widths}.")
    width = widths[0]
    each = [X if len(X) else jnp.zeros((0, width), X.dtype) for X in each]
    rows = [jnp.pad(X, ((0, 0), (0, 1)), constant_values=k) for k, X in enumerate(each)]
    return jnp.concatenate(rows)


def misnumbered(X: ArrayLike, column: int, count: int) -> str | None:
    """Name the first entry of a column that is not in 0, ..., count - 1, and its row, if any."""
    numbers = np.asarray(X)[:, column]  # inside a trace, a slice of X would be a tracer
    wrong = np.flatnonzero((numbers != np.round(numbers)) | (numbers < 0) | (numbers >= count))
    return f"{numbers[wrong[0]]} in row {wrong[0]}" if len(wrong) else None


def check_finite(name: str, values: ArrayLike) -> None:
    """Raise a ValueError that counts and locates non-finite entries, unless they are traced."""
    if has_tracers(values):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(values, float)))
    if len(bad):
        places = ", ".join(str(tuple(map(int, place))).replace(",)", ")") for place in bad[:5])
        more = ", ..." if len(bad) > 5 else ""
        raise ValueError(
            f"{name} has {len(bad)} of {np.size(values)} entries that are not finite, "
            f"at {places}{more}."
        )


def check_values(name: str, value: ArrayLike, observed: ArrayLike | None = None) -> None:
    """Raise a ValueError for non-finite values of a process, unless they are traced.

    Values that the mask `observed` leaves out may be anything.
    """
    if observed is not None and not has_tracers((value, observed)):
        value = np.where(np.asarray(observed), np.asarray(value), 0.0)
    elif observed is not None:
        return
    try:
        check_finite(name, value)
    except ValueError as error:
        raise ValueError(
            f"{error} Missing observations are left out by observed=~jnp.isnan(y)."
        ) from None


def hyperparameter(owner: str, name: str, value: Any, *, vector: bool = False) -> Any:
    """Return a positive number, or, if `vector` is true, one for each dimension.

    Raises:
        ValueError: for another shape, or a value that is not positive (unless it is traced).
    """
    check_given(f"{owner}: {name}", value)
    shape = jnp.shape(value)
    if len(shape) > (1 if vector else 0) or 0 in shape:
        allowed = "a number, or one for each dimension, (D,)" if vector else "one number"
        raise ValueError(
            f"{owner}: {name} takes {allowed}, got shape {shape}. A kernel holds one draw of its "
            f"hyperparameters; use jax.vmap, or Pathwise, for many."
        )
    check_positive(owner, name, value)
    return float(value) if isinstance(value, int) else value


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raise a ValueError for a hyperparameter that is not positive, unless it is traced."""
    if not has_tracers(value) and not (np.asarray(value) > 0).all():
        raise ValueError(f"{owner}: {name} must be positive, got {np.asarray(value)}.")


def check_given(name: str, value: Any) -> None:
    """Raise a ValueError if a value is None."""
    if value is None:
        raise ValueError(
            f"{name} takes a number, got None. A model that has it among its arguments needs it in "
            f"each call of Pathwise, whose arguments are those of the fit but for the data."
        )


def with_named_errors(cls: type) -> Callable:
    """Return the `__init__` of a class, with errors that name the class and its arguments."""
    init: Callable = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            try:
                signature.bind(self, *args, **kwargs)
            except TypeError as error:
                names = list(signature.parameters)[1:]
                raise TypeError(f"{cls.__name__}: {error}; it takes {', '.join(names)}.") from None
        init(self, *args, **kwargs)

    return checked


def per_dimension(owner: str, name: str, value: Any, X: jax.Array) -> jax.Array:
    """Broadcast a hyperparameter to the columns of inputs.

    Raises:
        ValueError: if the number of entries differs from the number of columns.
    """
    value = _as_array(value, X)
    if value.ndim and value.shape != (X.shape[1],):
        raise ValueError(
            f"{owner}: {name} has shape {value.shape}, and the inputs it works on have "
            f"{X.shape[1]} columns."
        )
    return jnp.broadcast_to(value, (X.shape[1],))


def check_dims(owner: str, dims: tuple[int, ...], X: jax.Array) -> tuple[int, ...]:
    """Return the numbers of the active columns.

    Raises:
        ValueError: if the inputs do not have all of these columns.
    """
    if any(not -X.shape[1] <= i < X.shape[1] for i in dims):
        raise ValueError(f"{owner}: active_dims={dims}, and the inputs have {X.shape[1]} columns.")
    return dims


def _as_array(value: Any, X: jax.Array) -> jax.Array:
    """Return an array; a Python number takes the dtype of the inputs."""
    plain = isinstance(value, bool | int | float)
    return jnp.asarray(value, X.dtype) if plain else jnp.asarray(value)


def diagonal(name: str, value: Any, X: jax.Array) -> jax.Array:
    """Return a variance for each input, from one number or an array `(N,)`.

    Raises:
        ValueError: for another shape, or values that are negative or not finite (unless traced).
    """
    check_given(name, value)
    shape = jnp.shape(value)
    if shape not in ((), (len(X),)):
        raise ValueError(
            f"{name} takes one variance, or one for each of the {len(X)} inputs, got shape {shape}."
        )
    if not has_tracers(value):
        known = np.asarray(value)
        if not ((known >= 0) & np.isfinite(known)).all():
            raise ValueError(f"{name} is a variance, finite and not negative, got {known}.")
    value = _as_array(value, X)
    return jnp.broadcast_to(value, (len(X),))


def contradictions(points: jax.Array, values: jax.Array, noise: jax.Array, jitter: Any) -> Any:
    """Return whether values at equal inputs differ although there is no noise."""
    order = jnp.lexsort(points.T)
    points, values, noise = points[order], values[..., order], noise[order]
    jitter = jnp.broadcast_to(jnp.asarray(jitter), noise.shape)[order][1:]
    limit = 20.0 * jnp.sqrt(jitter).reshape(*[1] * (values.ndim - 1), -1)
    equal = (points[1:] == points[:-1]).all(axis=1) & (noise[1:] + noise[:-1] == 0)
    apart = jnp.abs(jnp.diff(values, axis=-1)) > limit
    return (equal & apart.any(axis=tuple(range(apart.ndim - 1)))).any()


def repeated(X: jax.Array, points: jax.Array) -> np.ndarray:
    """Return, for each row of X, whether it is among the points `(..., N, D)`."""
    rows = [np.ascontiguousarray(x, points.dtype).reshape(-1, X.shape[1]) + 0 for x in (X, points)]
    new, old = (x.view(f"V{x.itemsize * x.shape[1]}")[:, 0] for x in rows)
    return np.isin(new, old)
