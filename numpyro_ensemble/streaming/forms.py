"""The sites of a model, and the axes of their rows, found from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.density import filled_trace, is_subsampled, named_axes
from numpyro_ensemble.handlers import unwrapped
from numpyro_ensemble.streaming.rows import REMEDY, Rows


class SiteForm(NamedTuple):
    """Properties of a site that are known before the model runs."""

    type: str
    shape: Any  # a tuple, or a tree of tuples for parameters
    dims: list[str] | None = None
    distribution: str = ""
    event_dim: int = 0  # trailing axes that are one event, without those of `to_event`
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
    """Return the properties of the sites of a trace."""
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

    def shows(self, name: str, site: Mapping[str, Any], chosen: Collection[str] | None) -> bool:
        """Return whether a call returns this site, or values that depend on its draws."""
        if site["type"] == "deterministic":
            return chosen is None or name in chosen or name not in self.forms
        drawn = site["type"] == "sample" and not site["is_observed"]
        return drawn and name not in self.known

    @property
    def key(self) -> tuple:
        """A hashable that is equal for plans with the same program."""
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
    except Exception as error:  # a model may raise anything if it needs all rows
        raise ValueError(
            f"the model cannot be called with {2 * rows.few} or fewer of the {rows.total} rows of "
            f"row_args={rows.labels}: {type(error).__name__}: {error} If other arguments have rows "
            f"too, name them in row_args. Or leave row_args out: the call is then cut by draws "
            f"alone."
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
    """Find the row axis of each site from its shapes with two numbers of rows.

    Args:
        forms: what `tried_forms` returned.
        few: the smaller number of rows.
        known: names of sites whose values are given.
        wanted: whether a deterministic site is returned, by its name.
        conditioned: whether given values of deterministic sites are used.

    Raises:
        ValueError: for a site whose shape shows that it depends on several rows.
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
                f"{name!r} is drawn within a scan and has no rows: each block would draw another "
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
        raise ValueError(f"the parameter {name!r} has values for single rows. {REMEDY}")
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
