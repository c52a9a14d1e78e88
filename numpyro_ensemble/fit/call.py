"""One call of a runner: the programs for its arguments, run with its arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import (
    Arguments,
    CallForm,
    has_tracers,
    traces,
)
from numpyro_ensemble.calls.tracing import TRACING, tracing_alone
from numpyro_ensemble.fit.batches import Batches
from numpyro_ensemble.fit.checks import without_value
from numpyro_ensemble.fit.guides import is_set_up, set_up
from numpyro_ensemble.fit.loop import make_chunk
from numpyro_ensemble.fit.options import RunOptions
from numpyro_ensemble.fit.programs import FitPrograms, StartForms
from numpyro_ensemble.fit.setup import SetupTemplate
from numpyro_ensemble.fit.slots import fill
from numpyro_ensemble.fit.starts import check_kept, check_starts
from numpyro_ensemble.fit.state import (
    FitState,
    GuideValues,
    Setup,
    SetupValues,
    agree,
    mapped_state,
    plain,
    setup_of,
    with_setup,
)
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.hosts import home
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.storage import Leaves, restored


class FitCall:
    """One call of a runner: its programs, with the arguments of this call.

    Args:
        programs: for these arguments.
        given: the arguments as the user gave them.
        arguments: the same, put on their devices.
        form: the arguments without inputs of programs, by which programs are found.
    """

    def __init__(
        self, programs: FitPrograms, given: Arguments, arguments: Arguments, form: CallForm
    ) -> None:
        self.programs, self.given, self.arguments, self.form = programs, given, arguments, form
        self.problem, self.dynamic = programs.problem, arguments.dynamic

    @property
    def batches(self) -> Batches | None:
        """How the data is cut, None where each step takes all of it."""
        return self.programs.batches

    @property
    def template(self) -> SetupTemplate:
        """The structure of the fit's set-up."""
        assert self.programs.template is not None
        return self.programs.template

    @property
    def forms(self) -> StartForms:
        """The shapes and dtypes of what a start with these arguments returns."""
        self.programs.trace_start(self.arguments, self.form)
        assert self.programs.forms is not None
        return self.programs.forms

    @property
    def parameter_forms(self) -> dict[str, Any]:
        """The shapes and dtypes of one member's parameters, as users see them."""
        if not self.programs.parameter_forms:
            over = tracing_alone(self.programs.over_members(self.form, "params"))
            stacked = jax.eval_shape(over, *self.forms, self.dynamic)
            self.programs.parameter_forms = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked
            )
        return self.programs.parameter_forms

    # Starts -------------------------------------------------------------------------------------

    def start(self, keys: jax.Array, init_params: Any) -> FitState:
        """Return the initial state of all members that are computed."""
        programs, placement = self.programs, self.problem.placement
        keys = placement.fill(keys, 0)
        axes = maker = None
        if programs.undeclared and init_params is None:
            raise without_value(programs.undeclared)
        if callable(init_params):
            maker = init_params
            check_starts(jax.eval_shape(lambda k: maker(k[0]), keys), self.parameter_forms, None)
            init_params = None
        elif init_params is not None:
            size = self.problem.ensemble_size
            init_params, axes = check_starts(init_params, self.parameter_forms, size)
            init_params = placement.fill(init_params, axes)
        fast_compile = not traces((keys, init_params, self.arguments.leaves))
        start = programs.start_program(maker, axes, fast_compile)
        with jax.disable_jit(False):  # a set-up traces other values without jit
            outcome = start(self.form, keys, init_params, self.dynamic)
        state, values, first, _, alike, inside = outcome
        if not has_tracers((state, values, first)):
            check_kept(inside)
            self._set_up_guide(home(first))
            shared_data = not self.template.member_ranks
            if self.problem.ensemble_size > 1 and shared_data and bool(alike):
                warn(
                    f"All {self.problem.ensemble_size} members start at the same values: pass "
                    f"init_params= with a leading axis of {self.problem.ensemble_size}, or a "
                    f"callable of a member's key."
                )
        return with_setup(state, self.setup_with(values))

    def setup_with(self, values: SetupValues) -> Setup:
        """Return the set-up that a state of this call carries."""
        if not self.problem.constrains_with_arguments(self.template.guide):
            return Setup(values.without_arguments(), self.template)
        arguments = self.programs.cut(self.dynamic)
        return Setup(values._replace(arguments=arguments), self.template, self.form)

    def _set_up_guide(self, first: GuideValues) -> None:
        """Set the user's guide up as the first member's start has done, with concrete values."""
        with TRACING:
            if not is_set_up(self.problem.guide):
                set_up(self.problem.guide, fill(self.template.guide, first))

    def values_of(self, state: SVIState) -> SetupValues:
        """Return the values that the set-up of a state holds.

        Raises:
            ValueError: for a state without a set-up, of a fit whose set-up depends on its start.
        """
        setup = setup_of(state)
        if setup is not None:
            values = setup.values.without_arguments()
            if setup.template != self.template:
                self._check_form(values)
            return values
        wanted = self.forms.values.without_arguments()
        if not jax.tree.leaves(wanted):
            return wanted
        undeclared = self.programs.undeclared
        bare = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), undeclared) or None
        axes = jax.tree.map(lambda _: None, bare)
        start = self.programs.start_program(None, axes, False)
        other = jax.random.split(jax.random.key(1), self.problem.places)
        found = [start(self.form, keys, bare, self.dynamic)[1] for keys in (state.rng_key, other)]
        if not has_tracers(found) and not agree(*found):
            raise ValueError(
                "the state is a plain SVIState, and some constraints of this fit depend on where "
                "it started: go on with a state that init, update or run of a runner has returned."
            )
        return found[0].without_arguments()

    def _check_form(self, values: SetupValues) -> None:
        """Raise a ValueError where a state's set-up is of another form than this fit's."""
        wanted = self.forms.values.without_arguments()
        same = jax.tree.structure(wanted) == jax.tree.structure(values)
        pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(values), strict=False)
        if not same or any(a.shape != jnp.shape(b) for a, b in pairs):
            raise ValueError(
                "the state is of another model or guide than this runner's, whose constraints are "
                "of another form: begin anew, with init_params= from the earlier result."
            )

    # Members that are added -----------------------------------------------------------------------

    def filled(self, state: SVIState) -> SVIState:
        """Return the state of all members that are computed, where they are."""
        step, optimiser = state.optim_state
        if isinstance(optimiser, Leaves):
            try:
                optimiser = restored(optimiser, self.forms.state.optim_state[1])
            except ValueError as error:
                raise ValueError(
                    f"the state is of another model, guide or optimiser: {error}"
                ) from error
            state = state._replace(optim_state=(step, optimiser))
        placement = self.problem.placement
        return state if placement.mesh is None else mapped_state(state, placement.fill)

    def cut_state(self, state: SVIState) -> SVIState:
        """Return the state of the members that were asked for."""
        size = self.problem.ensemble_size
        if self.problem.places == size:
            return state
        return mapped_state(state, partial(self.problem.placement.cut, total=size))

    def cut(self, arrays: Any) -> Any:
        """Return the arrays of the members that were asked for."""
        return self.problem.placement.cut(arrays, 0, self.problem.ensemble_size)

    def home_state(self, state: SVIState) -> SVIState:
        """Return a state that each of several hosts has all of."""
        return mapped_state(state, lambda arrays, _: home(arrays))

    # Steps --------------------------------------------------------------------------------------

    def step(self, state: SVIState, stable: bool, forward: bool) -> tuple[SVIState, jax.Array]:
        """Take one step with every member."""
        programs = self.programs  # a kept program must not hold this call, which holds data
        state = self.filled(state)

        def build() -> Callable:
            return lambda call, *inputs: programs.updates(call, stable, forward)(*inputs, None)

        program = programs.program(("step", stable, forward), build)
        values = self.values_of(state)
        new, losses = program(self.form, plain(state), values, self.dynamic)
        setup = setup_of(state)
        if setup is None or setup.template is None:
            setup = self.setup_with(values)
        new = with_setup(new, setup)
        return self.cut_state(new), home(self.cut(losses))

    def chunk(self, capacity: int, options: RunOptions, *, consume: bool = True) -> Callable:
        """Return the compiled loop of `loop.make_chunk`, which may consume its carry."""
        stable, forward = options.stable_update, options.forward_mode_differentiation
        rule, programs = options.early_stopping, self.programs
        size = self.problem.places

        def build() -> Callable:
            def chunk(call: CallForm, *inputs: Any) -> Any:
                update = programs.updates(call, stable, forward)
                return make_chunk(update, size, capacity, programs.batches, rule)(*inputs)

            return chunk

        key = ("chunk", capacity, stable, forward, rule, consume)
        program = programs.program(key, build, donate=(1,) if consume else ())

        def call(*inputs: Any) -> tuple[Any, Any]:
            carry, outcome = program(self.form, *inputs)
            return carry, home(outcome)

        return call

    def evaluate(self, state: SVIState) -> jax.Array:
        """Return the members' losses."""
        programs = self.programs

        def build() -> Callable:
            return lambda call, *inputs: programs.over_members(call, "loss")(*inputs)

        program, state = programs.program("evaluate", build), self.filled(state)
        losses = program(self.form, plain(state), self.values_of(state), self.dynamic)
        return home(self.cut(losses))

    def outcome(
        self, state: SVIState, values: SetupValues, forward: bool
    ) -> tuple[dict[str, Any], jax.Array, jax.Array | None]:
        """Return the members' parameters, which members have nothing but finite values, and slopes.

        The slopes are the lengths of the gradients of fits that look for modes.
        """
        programs, size = self.programs, self.problem.places

        def build() -> Callable:
            def final(call: CallForm, state: SVIState, *inputs: Any) -> tuple:
                params = programs.over_members(call, "params")(state, *inputs)
                leaves = jax.tree.leaves((params, state.mutable_state))
                flags = [
                    jnp.isfinite(x).reshape(size, -1).all(axis=1) for x in leaves if is_inexact(x)
                ]
                finite = jnp.stack([*flags, jnp.ones(size, bool)]).all(axis=0)
                if not programs.problem.finds_modes:
                    return params, finite, None
                slopes = programs.over_members(call, "slope", forward=forward)
                return params, finite, slopes(state, *inputs)

            return final

        fast_compile = not traces((state, values, self.arguments.leaves))
        program = programs.program(
            ("outcome", fast_compile, forward), build, fast_compile=fast_compile
        )
        return self.cut(program(self.form, state, values, self.dynamic))
