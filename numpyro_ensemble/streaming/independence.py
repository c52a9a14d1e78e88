"""Whether the rows of a model's call are independent of each other, so that they can be cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.density import filled_trace, is_subsampled, named_axes
from numpyro_ensemble.handlers import unwrapped
from numpyro_ensemble.streaming.rows import REMEDY, Rows


class SiteForm(NamedTuple):
    """What is known of a site before the model runs."""

    type: str
    shape: Any  # a tuple, or a tree of tuples for parameters
    dims: list[str] | None = None
    distribution: str = ""
    event_dim: int = 0  # trailing axes that are one event, but for what `to_event` has made one
    observed: bool = False
    looped: bool = False  # within a scan
    subsampled: bool = False  # of a plate


def site_forms(model: Callable, args: tuple, kwargs: dict) -> dict[str, SiteForm]:
    """Trace a model abstractly, with nothing computed."""
    forms: dict[str, SiteForm] = {}

    def look() -> None:
        forms.update(forms_of(filled_trace(model, args, kwargs)))

    jax.eval_shape(tracing_alone(look))
    return forms


def forms_of(trace: Mapping[str, dict[str, Any]]) -> dict[str, SiteForm]:
    """Return what a trace tells of its sites."""
    forms = {}
    for name, site in trace.items():
        form = SiteForm(site["type"], jax.tree.map(jnp.shape, site["value"]))
        if site["type"] in ("sample", "deterministic"):
            looped = bool(site.get("_control_flow_done"))
            form = form._replace(dims=named_axes(site), looped=looped)
        if site["type"] == "sample":
            fn = unwrapped(site["fn"])
            form = form._replace(
                distribution=type(fn).__name__,
                event_dim=fn.event_dim,
                observed=bool(site["is_observed"]),
            )
        forms[name] = form._replace(subsampled=is_subsampled(site))
    return forms


@dataclass(frozen=True)
class RowPlan:
    """How the sites of a model follow its rows.

    Attributes:
        forms: of the sites, with the few rows that the model was tried with.
        axes: the axis of the rows, of the values of all sites that have one.
        known: names of the latents that are given.
    """

    forms: Mapping[str, SiteForm]
    axes: Mapping[str, int]
    known: frozenset[str]

    @property
    def given(self) -> dict[str, int]:
        """Axes of the rows of the latents that are given."""
        return {name: axis for name, axis in self.axes.items() if name in self.known}

    @property
    def drawn(self) -> frozenset[str]:
        """Names of the sites with rows that are drawn."""
        return frozenset(n for n in self.axes if self.forms[n].type == "sample") - self.known

    @property
    def key(self) -> tuple:
        """A hashable that is equal for plans that one program can serve."""
        return (tuple(sorted(self.axes.items())), self.known)


def tried_forms(
    look: Callable[..., dict[str, SiteForm]], rows: Rows
) -> tuple[dict[str, SiteForm], dict[str, SiteForm]]:
    """Return the sites of a model with half of the rows that it is tried with, and with all.

    Args:
        look: returns the sites of a call, by its arguments and keyword arguments.
        rows: of the call.

    Raises:
        ValueError: if the model cannot be called with some of the rows, or has other sites then.
    """
    call = rows.at(rows.tried)
    try:
        large = look(*call)
        small = look(*rows.cut(call, slice(rows.few)))
    except Exception as error:  # whatever a model raises that does not bear fewer rows
        raise ValueError(
            f"the model cannot be called with {2 * rows.few} or fewer of the {rows.total} rows of "
            f"row_args={rows.labels}: {type(error).__name__}: {error} If other arguments have rows "
            f"too, name them. Or leave row_args out: the call is then cut by draws alone."
        ) from error
    if small.keys() != large.keys():
        raise ValueError(
            f"the sites {sorted(small.keys() ^ large.keys())} depend on the number of rows. "
            f"{REMEDY}"
        )
    return small, large


def row_plan(
    forms: tuple[Mapping[str, SiteForm], Mapping[str, SiteForm]],
    few: int,
    known: Collection[str],
    wanted: Callable[[str], bool],
    conditioned: bool = False,
) -> RowPlan:
    """Find the rows of each site from two numbers of rows, and refuse what has rows within it.

    Args:
        forms: what `tried_forms` returned.
        few: the smaller number of rows.
        known: names of sites whose values are given.
        wanted: whether a deterministic site is returned, by its name.
        conditioned: whether values that are given of deterministic sites count.

    Raises:
        ValueError: for a site that shows by its shape that it is of several rows.
    """
    small, large = forms
    computed = {name for name, form in large.items() if form.type == "deterministic"}
    known = frozenset(known) - (frozenset() if conditioned else computed)
    axes = {}
    for name, form in large.items():
        try:
            axis = _row_axis(name, small[name], form, few)
        except ValueError:
            if form.type == "deterministic" and not wanted(name):
                continue
            raise
        if axis is not None:
            axes[name] = axis
        elif form.looped and form.type == "sample" and not (form.observed or name in known):
            raise ValueError(
                f"{name!r} is drawn within a scan and has no rows: blocks would not agree on its "
                f"value. {REMEDY}"
            )
    return RowPlan(large, axes, known)


def _row_axis(name: str, small: SiteForm, large: SiteForm, few: int) -> int | None:
    """Return the axis of a site's rows, None where it has none."""
    if large.subsampled:
        raise ValueError(f"the plate {name!r} draws some of its rows. {REMEDY}")
    if small.shape == large.shape or large.type == "plate":
        return None
    if large.type not in ("sample", "deterministic"):
        raise ValueError(f"the parameter {name!r} has values of single rows. {REMEDY}")
    pairs = list(zip(small.shape, large.shape, strict=False))
    changed = [i for i, (a, b) in enumerate(pairs) if a != b]
    if len(small.shape) != len(large.shape) or [pairs[i] for i in changed] != [(few, 2 * few)]:
        raise ValueError(
            f"{name!r} has shape {small.shape} with {few} rows and {large.shape} with {2 * few}: "
            f"it has no axis that follows the rows. {REMEDY}"
        )
    (axis,) = changed
    if axis >= len(large.shape) - large.event_dim:
        raise ValueError(
            f"{name!r} ({large.distribution}) is one event of all rows, which depend on each "
            f"other. {REMEDY}"
        )
    if large.looped and axis == 0:
        raise ValueError(f"{name!r} is drawn in a scan over the rows. {REMEDY}")
    return axis


# What the shapes do not show ------------------------------------------------------------------


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
    """Run a model on the rows it is tried with, and on each half of them; this is compiled.

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
    """Return the log density of a sample site's values: parameters may be out of sight."""
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
    """Raise a ValueError for sites whose numbers are others where a half of the rows is missing.

    A mean over the rows, or their number, is not seen in any shape.
    """
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
            f"number): they are others with some of the rows left out. Compute what is of all rows "
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
