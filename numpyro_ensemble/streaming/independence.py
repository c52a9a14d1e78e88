"""Check that rows are independent of each other, by the numbers of a few of them.

A mean over the rows, or their number, does not show in shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.handlers import unwrapped
from numpyro_ensemble.streaming.forms import RowPlan
from numpyro_ensemble.streaming.rows import Rows


class Numbers(NamedTuple):
    """Numbers of one site: of all rows that the model is tried with, and of each half of them."""

    whole: list[Any]
    halves: tuple[list[Any], list[Any]]
    densities: tuple[Any, Any, Any] | None = None  # of its values, whole and by halves


def tried_numbers(
    run: Callable[[tuple, Any, dict], dict[str, Any]],
    rows: Rows,
    plan: RowPlan,
    call: tuple[tuple, dict],
    compared: Callable[[str, dict], bool],
) -> dict[str, Numbers]:
    """Run a model on a few rows, and on each half of these (called inside a compiled function).

    Args:
        run: `run(call, places, values)` returns the trace of the model for one draw, at rows at
            these places, with values for what it would draw.
        rows: of the call.
        plan: how sites follow them.
        call: with the rows it is tried with.
        compared: whether a site of the trace is compared.
    """
    few = rows.few
    whole = run(call, rows.tried, {})
    drawn = {
        name: site["value"]
        for name, site in whole.items()
        if site["type"] == "sample" and not site["is_observed"] and name not in plan.known
    }
    halves = []
    for half in (slice(few), slice(few, 2 * few)):
        values = {
            name: value[(slice(None),) * plan.axes[name] + (half,)] if name in plan.axes else value
            for name, value in drawn.items()
        }
        halves.append(run(rows.cut(call, half), rows.tried[half], values))
    return {
        name: Numbers(
            _numbers(site),
            (_numbers(halves[0][name]), _numbers(halves[1][name])),
            _densities(site, halves[0][name], halves[1][name]),
        )
        for name, site in whole.items()
        if compared(name, site)
    }


def _numbers(site: dict[str, Any]) -> list[Any]:
    """Return a site's value, or the parameters of its distribution."""
    tree = site["value"] if site["type"] == "deterministic" else site["fn"]
    leaves = map(jnp.asarray, filter(_is_number, jax.tree.leaves(tree)))
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _densities(*sites: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """Return the log density of a sample site's values, since parameters may not be visible."""
    if sites[0]["type"] != "sample":
        return None
    try:
        whole, *halves = (
            jnp.asarray(unwrapped(site["fn"]).log_prob(site["value"])) for site in sites
        )
    except (NotImplementedError, ValueError, TypeError):
        return None
    return whole, halves[0], halves[1]


def check_independent(numbers: Mapping[str, Numbers]) -> None:
    """Raise a ValueError for sites whose numbers change if half of the rows is left out."""
    bound = []
    for name, (whole, halves, densities) in numbers.items():
        equal = True
        for part, half in enumerate(halves):
            if len(half) != len(whole):
                equal = False
            else:
                pairs = zip(whole, half, strict=True)
                equal &= all(_is_part(np.asarray(a), np.asarray(b), part) for a, b in pairs)
        shapes = [[np.shape(x) for x in leaves] for leaves in (whole, halves[0])]
        if densities is not None and shapes[0] == shapes[1]:  # rows are not among the parameters
            full, *parts = map(np.asarray, densities)
            equal &= all(_is_part(full, each, part) for part, each in enumerate(parts))
        if not equal:
            bound.append(name)
    if bound:
        raise ValueError(
            f"the sites {bound} depend on all rows of the call at once (a mean over them, or their "
            f"number): their values change if rows are left out. Compute the mean or the number "
            f"before, and pass it as an argument; or leave row_args out: the call is then cut by "
            f"draws alone."
        )


def _is_part(whole: np.ndarray, half: np.ndarray, part: int) -> bool:
    """Return whether numbers of half of the rows are those among the numbers of all, to rounding.

    Two kinds of tolerance: one for what differs between rows, and a smaller one for what they
    share.
    """
    if whole.ndim != half.ndim:
        return False
    cut: list[slice] = []
    for most, number in zip(whole.shape, half.shape, strict=True):
        if most not in (number, 2 * number):
            return False
        start = part * number if most != number else 0
        cut.append(slice(start, start + number))
    mine = whole[tuple(cut)]
    if not jnp.issubdtype(mine.dtype, jnp.inexact):
        return bool(np.array_equal(mine, half))
    finite = whole[np.isfinite(whole)]
    tolerance = 0.0
    if finite.size:
        eps, size = float(jnp.finfo(whole.dtype).eps), np.abs(finite).max()
        spread = np.abs(finite - finite.flat[0]).max()
        tolerance = float(np.sqrt(eps) * spread + 64 * eps * size)
    return bool(np.allclose(half, mine, rtol=0.0, atol=tolerance, equal_nan=True))
