"""The functions of one call: drawn once for all rows, and evaluated block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from numpyro_ensemble.checkpoint import describe
from numpyro_ensemble.density import named_axes
from numpyro_ensemble.gp.checks import arrays_of, check_flags, check_inputs, digest_in_parts
from numpyro_ensemble.gp.program import InputBlock
from numpyro_ensemble.gp.repeats import counted_before
from numpyro_ensemble.mapping import ROOM, map_draws, pick
from numpyro_ensemble.streaming.blocks import Block, Grid, Output, room_in_block
from numpyro_ensemble.streaming.forms import SiteForm, forms_of, row_plan, tried_forms
from numpyro_ensemble.streaming.independence import check_independent, tried_numbers
from numpyro_ensemble.streaming.options import argument_digests, tree_digests
from numpyro_ensemble.streaming.rows import Rows
from numpyro_ensemble.streaming.trial import check_given, outputs_of, rows_that_fit, stored_name


class Functions:
    """The functions of one call, evaluated block by block.

    Args:
        pathwise: a `Pathwise`.
        rng_key: the key of the call.
        args: arguments of the model.
        kwargs: its keyword arguments.
        rows: the rows of the call, or None if they are not cut.

    Attributes:
        outputs: the arrays that the blocks fill.
    """

    def __init__(
        self, pathwise: Any, rng_key: jax.Array, args: tuple, kwargs: dict, rows: Rows | None
    ) -> None:
        self.pathwise, self.rows, self.rng_key = pathwise, rows, rng_key
        self.call = (args, kwargs)
        self.few = self.call if rows is None else rows.at(rows.tried)
        self.inputs = pathwise.inputs(rng_key)
        self.first = pick(self.inputs, 0)
        self.program = pathwise.program()
        self.noisy: list[str] = []  # processes with noise in the call
        if rows is not None:
            self._plan(rows)
        self.outputs = self._outputs()
        self._latest: dict[tuple, Any] = {}  # functions of the current draws

    # The sites ----------------------------------------------------------------------------------

    def _forms(self, *call: Any) -> dict[str, SiteForm]:
        """Return the forms of the sites of a call; processes count as deterministic sites."""
        forms: dict[str, SiteForm] = {}

        def look(*first: Any) -> None:
            answer, trace = self.program.first(call, *first, *self.program.drawn(*first))
            forms.update(forms_of({n: site for n, site in trace.items() if site["type"] != "gp"}))
            for name, value in answer.values.items():
                owner = name if name in answer.inputs else name.removesuffix("_f")
                dims = named_axes(trace[owner]) if owner in trace else None
                names = dims or [f"{owner}_dim_{i}" for i in range(value.ndim)]
                forms[name] = SiteForm("deterministic", value.shape, names)
            self.noisy = sorted(answer.noises)

        jax.eval_shape(look, *self.first)
        return forms

    def _of_draw(self, call: tuple, number: int) -> Callable:
        """Return a function that evaluates the first draw for a call with `number` rows."""

        def evaluate(*first: Any) -> Any:
            block = None
            if self.rows is not None:
                block = InputBlock(self.rows.tried[:number], 0, 0, {})
            return self.program.evaluate(call, *first, *self.program.drawn(*first), block)[0]

        return evaluate

    def _outputs(self) -> list[Output]:
        few = 0 if self.rows is None else 2 * self.rows.few
        values = jax.eval_shape(self._of_draw(self.few, few), *self.first)
        plan, number = self.program.plan, self.pathwise.num_paths
        forms = self._forms(*self.few) if plan is None else plan.forms
        one = {n: jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for n, x in values.items()}
        lead = (("path", number),) if number > 1 else ()
        return outputs_of(one, forms, self.rows, plan, lead=lead)

    # Rows ---------------------------------------------------------------------------------------

    def _plan(self, rows: Rows) -> None:
        """Find the rows of each site, and raise a ValueError where it has none of its own."""
        chosen, samples = self.pathwise.return_sites, self.inputs[1]
        processes: list[str] = []
        jax.eval_shape(lambda *first: processes.extend(self.program.find(*first[1:])), *self.first)

        def wanted(name: str) -> bool:
            return chosen is None or name in chosen

        forms = tried_forms(self._forms, rows)
        plan = row_plan(forms, rows.few, samples.keys() - set(processes), wanted)
        check_given(plan, {name: np.shape(x)[1:] for name, x in samples.items()}, rows)
        self.program = self.pathwise.program(plan)

    def check(self, grid: Grid) -> None:
        """Raise a ValueError for sites whose rows depend on each other."""
        if self.rows is not None:
            check_independent(self._numbers(self.rows, grid))

    def _numbers(self, rows: Rows, grid: Grid) -> dict[str, Any]:
        """Compute the numbers of each site for the first function, at few rows."""
        program = self.program
        plan = program.plan
        assert plan is not None

        def look(call: tuple, key: Any, sample: dict, params: dict, paths: Any) -> Any:
            first = (key, sample, params)
            drawn = (program.centred(sample, params), paths)

            def run(call: tuple, places: Any, values: dict) -> dict[str, Any]:
                block = InputBlock(places, 0, 0, {})
                answer, trace = program.first(call, *first, *drawn, block, values)
                # noise depends on the inputs alone: compare functions and noise variances
                found = {n: answer.values.get(f"{n}_f", x) for n, x in answer.values.items()}
                found |= {f"the noise of {name}": x for name, x in answer.noises.items()}
                sites = {n: {"type": "deterministic", "value": x} for n, x in found.items()}
                return {**trace, **sites}

            def compared(name: str, site: dict) -> bool:
                return plan.shows(name, site, program.return_sites)

            return tried_numbers(run, rows, plan, call, compared)

        inputs = (*self.first, self._first_paths(grid))
        return self._called(look, inputs, self.few, "rows", tuple(rows.tried))

    def _first_paths(self, grid: Grid) -> Any:
        return pick(self._functions_at(grid, next(iter(grid)))[1], 0)

    def _functions_at(self, grid: Grid, block: Block) -> tuple[Any, Any, Any]:
        """Return keys, samples and parameters of a block's draws, their functions, and flags."""
        at = (block.chains.start, block.draws.start)
        if at not in self._latest:
            self._latest.clear()
            chain, draw = grid.members(block)
            inputs = pick(self.inputs, (chain * grid.draws + draw).ravel())
            self._latest[at] = (inputs, *self._drawn(inputs))
        return self._latest[at]

    def _called(self, fn: Callable, inputs: tuple, call: tuple, *others: Any) -> Any:
        plan = None if self.program.plan is None else self.program.plan.key
        programs, model = self.pathwise.programs, self.pathwise.model
        return programs.call(fn, inputs, model, *call, "stored", plan, *others)

    @property
    def most_rows(self) -> int | None:
        """Largest number of rows of a block, from the memory that one draw needs."""
        if self.rows is None:
            return None
        room = room_in_block(self.inputs[1])
        return rows_that_fit(self.rows, room, self._of_draw, *self.first)

    @property
    def most_draws(self) -> int:
        """Largest number of draws of a block, from the memory of their functions."""
        drawn = jax.eval_shape(lambda *first: self.program.drawn(*first)[1], *self.first)
        each = sum(int(np.prod(x.shape)) * _itemsize(x) for x in jax.tree.leaves(drawn))
        return max(ROOM // max(each, 1), 1)

    # Blocks -------------------------------------------------------------------------------------

    def started(self, grid: Grid) -> Callable[[Block], Callable[[], dict[str, Any]]]:
        """Return a function that starts a block and returns a function to wait for its arrays."""
        program = self.program
        call_digest = digest_in_parts(arrays_of(*self.call))
        before: list[dict[str, np.ndarray]] = []

        def evaluate(call: tuple, *inputs: Any) -> Any:
            *of_draws, block = inputs

            def one(given: tuple) -> Any:
                key, sample, params, paths = given
                sites = program.centred(sample, params)
                return program.evaluate(call, key, sample, params, sites, paths, block)

            return map_draws(one, tuple(of_draws), self.pathwise.at_once)

        def start(block: Block) -> Callable[[], dict[str, Any]]:
            chain, draw = grid.members(block)
            places = (chain * grid.draws + draw).ravel()
            inputs, paths, flags = self._functions_at(grid, block)
            call, rows = self.call, None
            if self.rows is not None:
                if not before:
                    before.extend(self._before(grid))
                call = self.rows.block(block.rows, grid.row_size)
                number = np.asarray(block.number, np.uint32)
                where = self.rows.places(block.rows, grid.row_size)
                rows = InputBlock(where, number, call_digest, before[block.number])
            values, finite = self._called(evaluate, (*inputs, paths, rows), call, "evaluate")

            def wait() -> dict[str, Any]:
                check_flags(flags, grid.chains * grid.draws, places)
                check_inputs(finite)
                return {stored_name(n): self._arranged(x, grid) for n, x in values.items()}

            return wait

        return start

    def _drawn(self, inputs: tuple) -> tuple[Any, Any]:
        """Draw the functions of some draws."""
        program, pathwise = self.program, self.pathwise

        def one(given: tuple) -> Any:
            key, sample, params = given
            return program.trees(key, program.centred(sample, params))

        build = partial(pathwise.mapped, one)
        fit = (pathwise.model, pathwise.args, pathwise.kwargs)
        return pathwise.programs.get(build, *fit, "drawn")(*inputs)

    def _arranged(self, value: Any, grid: Grid) -> np.ndarray:
        """Return values `(D, bases, each, ...)` by chain, draw and path, one path after another."""
        x = np.asarray(value).swapaxes(1, 2)
        number = self.pathwise.num_paths
        x = x.reshape(grid.chain_size, grid.draw_size, x.shape[1] * x.shape[2], *x.shape[3:])
        return x[:, :, 0] if number == 1 else x[:, :, :number]

    def _before(self, grid: Grid) -> list[dict[str, np.ndarray]]:
        """Return, for each block of rows, how often each noisy input occurred in earlier blocks.

        Noise depends on the input and on its number of earlier occurrences in the call.
        """
        program, rows = self.program, self.rows
        assert rows is not None and program.plan is not None
        names = [name for name in self.noisy if name in program.plan.axes]
        if not names or grid.row_blocks == 1:
            return [{} for _ in range(grid.row_blocks)]

        def look(call: tuple, places: Any, *drawn: Any) -> dict[str, Any]:
            *first, paths = drawn
            block = InputBlock(places, 0, 0, {})
            sites = program.centred(*first[1:])
            answer, _ = program.first(call, *first, sites, paths, block)
            return {name: answer.inputs[name] for name in names}

        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        first = (*self.first, self._first_paths(grid))
        for cut in grid.row_cuts:
            call, places = rows.block(cut, grid.row_size), rows.places(cut, grid.row_size)
            inputs = self._called(look, (places, *first), call, "inputs", tuple(names))
            for name, X in inputs.items():
                found[name].append(np.asarray(X)[: cut.stop - cut.start])
        counts = {name: counted_before(parts, grid.row_size) for name, parts in found.items()}
        return [{n: counts[n][i] for n in names} for i in range(grid.row_blocks)]

    @property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """Digests of all that the values of the call depend on."""
        pathwise, samples = self.pathwise, self.inputs[1]
        setting = {"rng_key": describe(self.rng_key), "num_paths": str(pathwise.num_paths)}
        setting |= {name: describe(value) for name, value in self.program.options.items()}
        fit = argument_digests(pathwise.model, pathwise.args, pathwise.kwargs, None)
        return {
            "sample": tree_digests(samples),
            "parameter": tree_digests({**self.inputs[2], **pathwise.shared}),
            "argument of the fit": fit,
            "setting": setting,
        }


def _itemsize(leaf: Any) -> int:
    return getattr(leaf.dtype, "itemsize", 0)
