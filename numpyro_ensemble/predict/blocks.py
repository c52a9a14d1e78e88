"""The predictions of one call, of which blocks of draws and rows are computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from numpyro_ensemble.checkpoint import describe
from numpyro_ensemble.mapping import ROOM, pick
from numpyro_ensemble.predict.checks import check_model, check_returned
from numpyro_ensemble.predict.program import Places, RowBlock
from numpyro_ensemble.streaming.blocks import Block, Grid, Output, room_in_block
from numpyro_ensemble.streaming.forms import row_plan, site_forms, tried_forms
from numpyro_ensemble.streaming.independence import check_independent, tried_numbers
from numpyro_ensemble.streaming.options import tree_digests
from numpyro_ensemble.streaming.rows import REMEDY, Rows
from numpyro_ensemble.streaming.trial import check_given, outputs_of, rows_that_fit, stored_name


class Predictions:
    """The predictions of one call, of which blocks are computed.

    Args:
        predictive: an `EnsemblePredictive`.
        rng_key: the key of the call.
        args: arguments of the model.
        kwargs: its keyword arguments.
        rows: the rows of the call, where they are cut.
        group: the group of the store that they are written to.

    Attributes:
        outputs: the arrays that they fill.
        places: member and draw of each prediction.

    Raises:
        ValueError: for a model whose rows depend on each other.
    """

    def __init__(
        self,
        predictive: Any,
        rng_key: jax.Array,
        args: tuple,
        kwargs: dict,
        rows: Rows | None,
        group: str = "",
    ) -> None:
        self.predictive, self.rng_key, self.rows = predictive, rng_key, rows
        self.call = (args, kwargs)
        self.few = self.call if rows is None else rows.at(rows.tried)
        self.group = group
        self.room = room_in_block(predictive.given.samples, predictive.given.params)
        forms = None if rows is None else tried_forms(partial(site_forms, predictive.model), rows)
        check_model(predictive, *self.few)
        self.places: Places = predictive.places(rng_key)
        self.program = predictive.program(None, self.room)
        if rows is not None and forms is not None:
            self._plan(rows, forms)
        self.outputs = self._outputs()
        if rows is not None:
            check_independent(self._numbers(rows))

    # What is made -------------------------------------------------------------------------------

    def _inputs(self, places: Places) -> tuple:
        given = self.predictive.given
        return (self.rng_key, places, given.samples, given.params, self.program.guide_values)

    @property
    def _first(self) -> Places:
        return Places(*(place[:1, :1] for place in self.places))

    def _abstract(self, call: tuple, number: int) -> Callable:
        """Return a function that makes the first prediction of a call with so many rows."""

        def predict(*inputs: Any) -> Any:
            rows = None if self.rows is None else RowBlock(self.rows.tried[:number], 0)
            return self.program(call, *inputs, rows)

        return predict

    def _outputs(self) -> list[Output]:
        few = 0 if self.rows is None else 2 * self.rows.few
        values = jax.eval_shape(self._abstract(self.few, few), *self._inputs(self._first))
        check_returned(self.predictive.return_sites, values)
        plan = self.program.plan
        forms = site_forms(self.predictive.model, *self.few) if plan is None else plan.forms
        one = {name: _without_lead(value) for name, value in values.items()}
        return outputs_of(one, forms, self.rows, plan, group=self.group)

    # Rows ---------------------------------------------------------------------------------------

    def _plan(self, rows: Rows, forms: tuple) -> None:
        """Find the row axis of each site, and raise a ValueError if a site has none."""
        predictive = self.predictive
        if predictive.infer_discrete:
            raise ValueError(
                f"infer_discrete=True draws discrete latents given all rows at once. {REMEDY}"
            )
        half = rows.cut(self.few, slice(rows.few))
        latents = self._latent_shapes(half)
        chosen = predictive.return_sites
        conditioned = predictive.condition_deterministic

        def wanted(name: str) -> bool:
            return chosen is None or name in chosen or (conditioned and name in latents)

        plan = row_plan(forms, rows.few, latents, wanted, conditioned)
        check_given(plan, latents, rows)
        self.program = predictive.program(plan, self.room)

    def _latent_shapes(self, call: tuple) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the latents of one draw, given or drawn by the guide."""

        def first(*inputs: Any) -> Any:
            _, samples, where = self.program.latents(call, *inputs)
            return pick(samples, *(place[0] for place in where))

        shapes = jax.eval_shape(first, *self._inputs(self._first))
        return {name: value.shape for name, value in shapes.items()}

    def _numbers(self, rows: Rows) -> dict[str, Any]:
        """Compute the numbers of each site for the first draw, at few rows."""
        program, first, predictive = self.program, self._first, self.predictive
        assert program.plan is not None
        plan = program.plan

        def look(call: tuple, *inputs: Any) -> dict[str, Any]:
            def run(call: tuple, places: Any, values: dict) -> dict[str, Any]:
                keys, samples, where = program.latents(call, *inputs)
                sample = pick(samples, *(place[0] for place in where))
                known = program.known(sample, RowBlock(places, 0))
                params = pick(inputs[3], inputs[1].member[0, 0])
                trace = program.trace(call, keys[0], known, params, values)
                drawn = sample if program.guide is not None else {}
                return {
                    f"{name} of the guide": {"type": "deterministic", "value": value}
                    for name, value in drawn.items()
                } | trace

            def compared(name: str, site: dict) -> bool:
                return plan.shows(name, site, predictive.return_sites)

            return tried_numbers(run, rows, plan, call, compared)

        key = (*program.key, "rows", tuple(rows.tried))
        return predictive.programs.call(
            look, self._inputs(first), predictive.model, *self.few, *key
        )

    @property
    def most_rows(self) -> int | None:
        """Rows of a block at most, for what the model needs to compute them in one draw."""
        if self.rows is None:
            return None
        return rows_that_fit(self.rows, self.room, self._abstract, *self._inputs(self._first))

    @property
    def most_draws(self) -> int:
        """Draws of a block at most, for the latents that a guide draws for it."""
        drawn = jax.eval_shape(
            lambda *inputs: self.program.latents(self.few, *inputs)[1], *self._inputs(self._first)
        )
        if self.program.guide is None:
            return self.places.index.size
        each = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(drawn))
        return max(ROOM // max(each, 1), 1)

    # Blocks -------------------------------------------------------------------------------------

    def started(self, grid: Grid) -> Callable[[Block], Callable[[], dict[str, Any]]]:
        """Return what starts to compute a block, and waits for its arrays."""
        latest: tuple[int, Any] = (-1, None)

        def start(block: Block) -> Callable[[], dict[str, Any]]:
            nonlocal latest
            call, inputs = self.call, self._inputs(self._places(grid, block))
            if self.rows is not None:
                if latest[0] != block.number:  # several blocks of draws have the same rows
                    latest = block.number, self.rows.block(block.rows, grid.row_size)
                places = self.rows.places(block.rows, grid.row_size)
                call = latest[1]
                inputs = (*inputs, RowBlock(places, np.asarray(block.number, np.uint32)))
            values = self.predictive.programs.call(
                self.program, inputs, self.predictive.model, *call, *self.program.key
            )
            shape = (grid.chain_size, grid.draw_size)

            def wait() -> dict[str, Any]:
                arrays = {name: np.asarray(value) for name, value in values.items()}
                prefix = f"{self.group}/" if self.group else ""
                return {
                    prefix + stored_name(name): x.reshape(*shape, *x.shape[1:])
                    for name, x in arrays.items()
                }

            return wait

        return start

    def _places(self, grid: Grid, block: Block) -> Places:
        chain, draw = grid.members(block)
        return Places(*(place[chain, draw] for place in self.places))

    @property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """Digests that identify the call."""
        predictive, given = self.predictive, self.predictive.given
        guide = jax.tree.leaves(self.program.guide_values)
        setting = {
            "rng_key": describe(self.rng_key),
            "num_samples": str(predictive.num_samples),
            "weights": describe(predictive.weights),
            "guide": " ".join([type(predictive.guide).__name__, *map(describe, guide)]),
            "infer_discrete": str(predictive.infer_discrete),
            "condition_deterministic": str(predictive.condition_deterministic),
        }
        return {
            "sample": tree_digests(given.samples),
            "parameter": tree_digests(given.params),
            "setting": setting,
        }


def _without_lead(value: Any) -> Any:
    """Return the shape and dtype of one draw."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    return jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
