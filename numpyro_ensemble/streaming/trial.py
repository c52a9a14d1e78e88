"""The outputs of a call, found from a trial with a few of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from numpyro_ensemble.mapping import peak_bytes
from numpyro_ensemble.streaming.blocks import Output
from numpyro_ensemble.streaming.forms import RowPlan, SiteForm
from numpyro_ensemble.streaming.rows import REMEDY, Rows
from numpyro_ensemble.streaming.store import stored_dtype


def stored_name(name: str) -> str:
    """Return the name of a site or dimension in a store, where a slash would be a path."""
    return name.replace("/", ".")


def outputs_of(
    values: Mapping[str, Any],
    forms: Mapping[str, SiteForm],
    rows: Rows | None,
    plan: RowPlan | None,
    *,
    group: str = "",
    lead: tuple[tuple[str, int], ...] = (),
) -> list[Output]:
    """Return the arrays that a call fills.

    Args:
        values: shapes and dtypes of one draw by site name, with the rows that the model is tried
            with.
        forms: of the sites.
        rows: of the call.
        plan: how sites follow them.
        group: of the store.
        lead: names and lengths of axes of one draw that the shapes do not have.
    """
    outputs = []
    for name, value in values.items():
        if not isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name!r} is a tree of arrays, which Zarr does not store: leave it out of "
                f"return_sites."
            )
        axis, shape = None, list(value.shape)
        if plan is not None and rows is not None and name in plan.axes:
            axis = plan.axes[name]
            shape[axis] = rows.total
            axis += len(lead)
        dims = forms[name].dims or [f"{name}_dim_{i}" for i in range(len(shape))]
        outputs.append(
            Output(
                (f"{group}/" if group else "") + stored_name(name),
                (*(dim for dim, _ in lead), *map(stored_name, dims)),
                (*(length for _, length in lead), *shape),
                stored_dtype(value.dtype),
                axis,
            )
        )
    if not outputs:
        raise ValueError("the model has no sites to return: all of them were given.")
    return outputs


def check_given(plan: RowPlan, shapes: Mapping[str, tuple[int, ...]], rows: Rows) -> None:
    """Raise a ValueError if a latent of single rows is given for another number of rows.

    Args:
        plan: how sites follow the rows.
        shapes: of the latents that are given, of one draw.
        rows: of the call.
    """
    for name, axis in plan.given.items():
        if shapes[name][axis : axis + 1] != (rows.total,):
            raise ValueError(
                f"{name!r} has one value for each row, and its samples have shape {shapes[name]}: "
                f"to be cut with the rows they need {rows.total} values along axis {axis}. {REMEDY}"
            )


def rows_that_fit(
    rows: Rows, room: int, of_draw: Callable[[tuple, int], Callable], *inputs: Any
) -> int:
    """Return how many rows of a call fit into memory, with all values that one draw computes.

    Args:
        rows: of the call.
        room: bytes that these may take.
        of_draw: returns the function of one draw, for a call with so many rows.
        *inputs: of that function.
    """
    few = rows.few
    whole = rows.at(rows.tried)
    calls = ((rows.cut(whole, slice(few)), few), (whole, 2 * few))
    small, large = (peak_bytes(of_draw(call, number), *inputs) for call, number in calls)
    return max(room // max((large - small) // few, rows.row_bytes, 1), 1)
