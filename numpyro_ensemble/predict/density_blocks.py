"""Log densities, log likelihoods and deterministic sites, computed block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.density import fill_model
from numpyro_ensemble.mapping import map_draws, pick
from numpyro_ensemble.predict.collect import Draws, Sites
from numpyro_ensemble.predict.densities import OfDraw, Wanted, of_draw
from numpyro_ensemble.predict.program import RowBlock
from numpyro_ensemble.sharding import Placement
from numpyro_ensemble.streaming.blocks import Block, Grid, Output, room_in_block
from numpyro_ensemble.streaming.forms import RowPlan, SiteForm, row_plan
from numpyro_ensemble.streaming.independence import check_independent, tried_numbers
from numpyro_ensemble.streaming.rows import REMEDY, Rows
from numpyro_ensemble.streaming.trial import check_given, outputs_of, rows_that_fit, stored_name

GROUPS = ("posterior", "log_likelihood", "log_prior")  # of what is computed
SUMS = "sample_stats/lp_of_blocks"  # the terms of each block of rows in the log densities


class Densities:
    """Values and log densities of the draws of one call, computed block by block.

    Args:
        draws: of members.
        sites: of the model.
        wanted: names of the sites whose values or log densities are computed.
        rng_key: for sites that the model draws itself.
        args: arguments of the model.
        kwargs: its keyword arguments.
        rows: the rows of the call, None if they are not cut.
        forms: of the sites, with few rows, None if rows are not cut.

    Attributes:
        outputs: the arrays that they fill, without the log densities.

    Raises:
        ValueError: for a model whose rows depend on each other.
    """

    def __init__(
        self,
        draws: Draws,
        sites: Sites,
        wanted: Wanted,
        rng_key: jax.Array,
        args: tuple,
        kwargs: dict,
        rows: Rows | None,
        forms: tuple[dict[str, SiteForm], dict[str, SiteForm]] | None,
        placement: Placement,
    ) -> None:
        self.placement = placement
        self.draws, self.rows, self.call = draws, rows, (args, kwargs)
        self.few = self.call if rows is None else rows.at(rows.tried)
        self.keys = jax.random.split(rng_key, draws.shape)
        self.wanted, self.hidden = wanted, frozenset(sites.deterministic)
        self.plan: RowPlan | None = None
        self.axes: dict[str, int | None] = {}  # of the rows, in the terms of the density
        self.programs = Programs()
        self.room = room_in_block(draws.samples, draws.params)
        if rows is not None and forms is not None:
            self._plan(rows, forms)
        self.outputs = self._outputs(sites)

    # One draw -----------------------------------------------------------------------------------

    def _known(self, sample: dict, params: dict, places: Any) -> dict[str, Any]:
        known = {**params, **{n: x for n, x in sample.items() if n not in self.hidden}}
        given = {} if self.plan is None else self.plan.given
        return {
            name: value.take(places, axis=given[name]) if name in given else value
            for name, value in known.items()
        }

    def _of_draw(self, call: tuple, first: tuple, places: Any) -> OfDraw:
        key, sample, params = first
        known = self._known(sample, params, places)
        return of_draw(self.draws.model, key, known, self.wanted, *call)

    @property
    def _first(self) -> tuple:
        return (self.keys[0, 0], pick(self.draws.samples, 0, 0), pick(self.draws.params, 0))

    def _shapes(self, call: tuple, number: int) -> OfDraw:
        places = None if self.rows is None else self.rows.tried[:number]
        return jax.eval_shape(lambda *first: self._of_draw(call, first, places), *self._first)

    def _outputs(self, sites: Sites) -> list[Output]:
        few = 0 if self.rows is None else 2 * self.rows.few
        values = self._shapes(self.few, few)
        self.dtype = jax.eval_shape(
            lambda terms: sum((x.sum() for x in terms.values()), jnp.zeros(())), values.terms
        ).dtype
        outputs = []
        for group in GROUPS:
            of_group = getattr(values, group)
            forms = {n: SiteForm("", x.shape, _dims(sites, n, x.ndim)) for n, x in of_group.items()}
            plan = self.plan
            if plan is not None and group != "posterior":
                axes = {n: axis for n in of_group if (axis := self.axes[n]) is not None}
                plan = RowPlan(forms, axes, plan.known)
            if of_group:
                outputs += outputs_of(of_group, forms, self.rows, plan, group=group)
        return outputs

    # Rows ---------------------------------------------------------------------------------------

    def _plan(self, rows: Rows, forms: tuple) -> None:
        """Find the row axis of sites and log densities, and raise a ValueError if one has none."""
        samples = self.draws.samples
        known = samples.keys() - self.hidden
        self.plan = row_plan(forms, rows.few, known, lambda name: name in self.wanted.deterministic)
        check_given(self.plan, {n: np.shape(x)[2:] for n, x in samples.items()}, rows)
        half = rows.cut(self.few, slice(rows.few))
        large = self._shapes(self.few, 2 * rows.few)
        small = self._shapes(half, rows.few)
        for few_terms, terms in (
            (small.terms, large.terms), (small.log_likelihood, large.log_likelihood),
            (small.log_prior, large.log_prior),
        ):  # fmt: skip
            for name, term in terms.items():
                pairs = list(zip(few_terms[name].shape, term.shape, strict=False))
                changed = [i for i, (a, b) in enumerate(pairs) if a != b]
                right = [pairs[i] for i in changed] == [(rows.few, 2 * rows.few)]
                if (changed and not right) or (not changed and name in self.plan.axes):
                    raise ValueError(
                        f"the log density of {name!r} is one number for all rows: put the rows in "
                        f"a plate, and not in an event (to_event). {REMEDY}"
                    )
                self.axes[name] = changed[0] if changed else None
        check_independent(self._numbers(rows))

    def _numbers(self, rows: Rows) -> dict[str, Any]:
        """Compute the numbers of each site for the first draw, at few rows."""
        plan = self.plan
        assert plan is not None

        def look(call: tuple, *first: Any) -> dict[str, Any]:
            def run(call: tuple, places: Any, values: dict) -> dict[str, Any]:
                known = self._known(first[1], first[2], places)
                return fill_model(self.draws.model, first[0], {**known, **values}, *call)

            def compared(name: str, site: dict) -> bool:
                return site["type"] == "sample" or name in self.wanted.deterministic

            return tried_numbers(run, rows, plan, call, compared)

        return self.programs.call(look, self._first, self.draws.model, *self.few, "rows")

    @property
    def most_rows(self) -> int | None:
        """Rows of a block at most, for what the model needs to compute them in one draw."""
        if self.rows is None:
            return None
        tried = self.rows.tried

        def of_draw(call: tuple, number: int) -> Callable:
            return lambda *first: self._of_draw(call, first, tried[:number])

        return rows_that_fit(self.rows, self.room, of_draw, *self._first)

    # Blocks -------------------------------------------------------------------------------------

    def sums(self, grid: Grid) -> Output:
        """Return the array of the terms of each block of rows in the log densities."""
        shape = (grid.row_blocks,)
        return Output(SUMS, ("row_block",), shape, np.dtype(self.dtype), axis=0, sums=True)

    def started(self, grid: Grid) -> Callable[[Block], Callable[[], dict[str, Any]]]:
        """Return what starts to compute a block, and waits for its arrays."""
        draws = self.draws

        def compute(call: tuple, keys: Any, chain: Any, draw: Any, *inputs: Any) -> Any:
            samples, params, rows = inputs

            def one(where: tuple) -> Any:
                key, e, s = where
                first = (key, pick(samples, e, s), pick(params, e))
                found = self._of_draw(call, first, None if rows is None else rows.places)
                return found._replace(terms=self._total(found.terms, rows))

            return map_draws(one, (keys, chain, draw), None, self.placement, self.room)

        def start(block: Block) -> Callable[[], dict[str, Any]]:
            chain, draw = (x.ravel() for x in grid.members(block))
            call, rows = self.call, None
            if self.rows is not None:
                call = self.rows.block(block.rows, grid.row_size)
                places = self.rows.places(block.rows, grid.row_size)
                rows = RowBlock(places, np.asarray(block.number, np.uint32))
            inputs = (self.keys[chain, draw], chain, draw, draws.samples, draws.params, rows)
            found = self.programs.call(
                compute, self.placement.fill(inputs, None), draws.model, *call, "compute",
                placement=self.placement,
            )  # fmt: skip

            def wait() -> dict[str, Any]:
                shape = (grid.chain_size, grid.draw_size)
                arrays = {
                    f"{group}/{stored_name(name)}": np.asarray(x).reshape(*shape, *x.shape[1:])
                    for group in GROUPS
                    for name, x in getattr(found, group).items()
                }
                return {**arrays, SUMS: np.asarray(found.terms).reshape(*shape, 1)}

            return wait

        return start

    def _total(self, terms: dict[str, Any], rows: RowBlock | None) -> jax.Array:
        """Add up the terms of a log density; those without rows count in the first block."""
        total = jnp.zeros(())
        for name, term in terms.items():
            axis = self.axes.get(name)
            if rows is not None and axis is None:
                term = jnp.where(rows.number == 0, term.sum(), 0.0)
            elif rows is not None:
                # copies of the last row pad the block
                real = jnp.append(True, rows.places[1:] != rows.places[:-1])
                shape = [len(real) if i == axis else 1 for i in range(term.ndim)]
                term = jnp.where(real.reshape(shape), term, 0.0)
            total = total + term.sum()
        return total


def _dims(sites: Sites, name: str, ndim: int) -> list[str]:
    """Return the dimensions of a site, or of the leading axes that its log likelihood has."""
    own = [f"{name}_dim_{i}" for i in range(ndim)]
    return (sites.dims.get(name) or own)[:ndim]
