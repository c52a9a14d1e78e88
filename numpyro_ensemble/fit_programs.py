"""The compiled programs of one runner for one form of arguments, and a call of them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ensemble.arguments import (
    BATCH,
    MEMBER,
    Arguments,
    CallForm,
    has_tracers,
    traces,
)
from numpyro_ensemble.batching import Batches
from numpyro_ensemble.density import Site
from numpyro_ensemble.fingerprints import captured
from numpyro_ensemble.guides import drop_unread, fill, is_set_up, set_up
from numpyro_ensemble.member import Member
from numpyro_ensemble.preflight import (
    check_values,
    model_sites,
    refuse_line_searches,
    without_value,
)
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.programs import keep
from numpyro_ensemble.setup import (
    ARGUMENT_AXES,
    VALUE_AXES,
    FitState,
    GuideValues,
    Setup,
    SetupTemplate,
    SetupValues,
    Static,
    agree,
    plain,
    setup_of,
    with_setup,
)
from numpyro_ensemble.starts import all_alike, check_kept, check_starts, kept
from numpyro_ensemble.tracing import TRACING, looking, tracing_alone
from numpyro_ensemble.training import make_chunk

if TYPE_CHECKING:
    from numpyro_ensemble.engine import Ensemble
    from numpyro_ensemble.options import RunOptions

_PROGRAMS = 32  # of one form of arguments that are kept
_NUMBERS = (float, int, np.ndarray, np.generic, jax.Array)
_FAST_COMPILE = {"xla_backend_optimization_level": "0"}  # halves the time that starts compile


class StartForms(NamedTuple):
    """Shapes and dtypes of what a start returns, with the member axis."""

    state: SVIState
    values: SetupValues


class FitPrograms:
    """Programs that serve all calls with arguments of one form, each compiled when first needed.

    It holds no array of a call. What is cached here can be dropped at any time.

    Args:
        engine: the runner.
        key: what the programs depend on.
        batches: how the data is cut.
        template: of the state that is gone on from, which may have started with other arguments.
    """

    def __init__(
        self,
        engine: Ensemble,
        key: Hashable,
        batches: Batches | None,
        template: SetupTemplate | None = None,
        starts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.engine, self.key = engine, key
        self.batches = batches if batches is None or batches.size < batches.total else None
        self.template = template
        self.starts = starts if template is None else template.undeclared
        self.checked: tuple[dict, dict] | None = None
        self.forms: StartForms | None = None
        self.parameter_forms: dict[str, Any] = {}  # see FitCall.parameter_forms
        self._programs: OrderedDict[Any, Callable] = OrderedDict()

    # What is known before anything runs ---------------------------------------------------------

    def serves(self, starts: Mapping[str, Any]) -> bool:
        """Return whether parameters declared without a value have the shapes of these starts."""
        return all(
            jax.tree.map(_form, form) == jax.tree.map(_form, starts[name])
            for name, form in self.undeclared.items()
            if name in starts
        )

    def prepare(self, arguments: Arguments, call: CallForm) -> None:
        """Check the model with these arguments, and trace a start if no state has a template."""
        if self.checked is None:
            self.checked = model_sites(self.engine, arguments, self.batches, self.starts)
            check_values(self.engine, arguments)
        if self.template is None:
            self.trace_start(arguments, call)

    def trace_start(self, arguments: Arguments, call: CallForm) -> None:
        """Trace the start of a fit abstractly: the template, and the forms of what it returns."""
        if self.forms is not None:
            return
        size = self.engine.ensemble_size
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        axes = jax.tree.map(lambda _: None, self.undeclared)
        start = self.start_program(None, axes or None, True)
        traced = start.trace(call, keys, self.undeclared or None, arguments.dynamic)
        state, values, _, structure, *_ = traced.out_info
        refuse_line_searches(state)
        labels = tuple(label for label, _ in arguments.labelled(MEMBER))
        guide, forms, transforms, leaves = structure.value
        template = SetupTemplate(
            self.key,
            self.engine.model,
            guide,
            forms,
            transforms,
            leaves,
            self.sites,
            self.undeclared,
            labels,
        )
        with TRACING:  # the first thread's, where several have come this far
            if self.template is None:
                self.template = template
            self.forms = StartForms(state, values)

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of the model, checked."""
        assert self.checked is not None
        return self.checked[0]

    @property
    def undeclared(self) -> dict[str, Any]:
        """The shapes of the parameters that are declared without a value."""
        return {} if self.checked is None else self.checked[1]

    # Starts -------------------------------------------------------------------------------------

    def start_program(self, maker: Callable | None, axes: Any, once: bool) -> Any:
        """Return the program that starts all members."""
        leaves, treedef = jax.tree.flatten(axes, is_leaf=lambda x: x is None)
        key = ("start", captured(maker), treedef, tuple(leaves), once)
        return self.program(key, lambda: self._start(maker, axes), once=once)

    def _start(self, maker: Callable | None, axes: Any) -> Callable:
        engine = self.engine

        def one(call: CallForm, key: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            if maker is not None:
                init_params, _ = check_starts(maker(key), self.parameter_forms, None)
            dynamic = self.cut(dynamic)
            args, kwargs = call.rebuild(dynamic)
            guide, given = engine.fresh_guide(init_params, self.sites)
            svi = SVI(engine.model, guide, engine.optim, engine.loss)
            state = svi.init(key, *args, init_params=given, **kwargs)
            engine.check_guide(guide, args, kwargs)
            guide, every = engine.distilled_guide(guide, type(key))
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            read = drop_unread(guide, every, params, args, kwargs)
            leaves, tree = jax.tree.flatten(svi.constrain_fn.args[0])
            # start values can make a tracer of what is a number in another start
            numeric = [isinstance(leaf, _NUMBERS) for leaf in leaves]
            constraints = [jnp.asarray(leaf) for leaf, n in zip(leaves, numeric, strict=True) if n]
            known = tuple(None if n else leaf for leaf, n in zip(leaves, numeric, strict=True))
            forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), every)
            inside = {}
            if init_params:
                reached = engine.member_params(guide, svi.get_params(state), args, kwargs)
                inside = kept(init_params, reached)
            values = SetupValues(constraints, read, {})
            return state, values, every, Static((guide, forms, tree, known)), inside

        def start(call: CallForm, keys: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            member = partial(one, call)
            out_axes = (0, VALUE_AXES, VALUE_AXES.guide, None, 0)
            members = jax.vmap(member, in_axes=(0, axes, ARGUMENT_AXES), out_axes=out_axes)
            state, values, every, structure, inside = members(keys, init_params, dynamic)
            supports, own = ([leaf[0] for leaf in kind] for kind in every[:2])
            first = GuideValues(supports, own, every.shared)
            alike = all_alike(jax.vmap(engine.optim.get_params)(state.optim_state))
            return state, values, first, structure, alike, inside

        return start

    def cut(self, dynamic: dict) -> dict:
        """Return the arguments that a start sees: the first rows where there are batches."""
        if self.batches is None:
            return dynamic
        return {**dynamic, BATCH: [leaf[: self.batches.size] for leaf in dynamic[BATCH]]}

    # Steps --------------------------------------------------------------------------------------

    def member(self, call: CallForm) -> Member:
        """Return one member's functions."""
        assert self.template is not None
        return Member(self.engine, call, self.batches, self.template)

    def updates(self, call: CallForm, stable: bool, forward: bool) -> Callable:
        """Return the function that takes one step with every member."""
        shared = self.batches is None or self.batches.shared

        def one(state: SVIState, values: SetupValues, dynamic: dict, rows: Any) -> tuple:
            return self.member(call).update(state, values, dynamic, rows, stable, forward)

        return jax.vmap(one, in_axes=(0, VALUE_AXES, ARGUMENT_AXES, None if shared else 0))

    def over_members(self, call: CallForm, name: str) -> Callable:
        """Return one of a member's functions, for all members."""
        return jax.vmap(getattr(self.member(call), name), in_axes=(0, VALUE_AXES, ARGUMENT_AXES))

    def program(
        self, key: Any, build: Callable, *, donate: tuple[int, ...] = (), once: bool = False
    ) -> Any:
        """Return a compiled function of a `CallForm` and arrays, made when first asked for.

        Args:
            key: what tells it from the others.
            build: makes the function.
            donate: positions of the arguments that it consumes.
            once: it runs once in a fit, so that a fast compilation counts for more than fast code.
        """
        fn: Any = self._programs.get(key)
        if fn is None:
            fn = tracing_alone(looking(build()))
            options = _FAST_COMPILE if once and jax.default_backend() == "cpu" else None
            fn = jax.jit(fn, static_argnums=0, donate_argnums=donate, compiler_options=options)
        keep(self._programs, key, fn, _PROGRAMS)
        return fn


class FitCall:
    """One call of a runner: its programs, with the arguments of this call."""

    def __init__(self, programs: FitPrograms, arguments: Arguments, form: CallForm) -> None:
        self.programs, self.arguments, self.form = programs, arguments, form
        self.engine, self.dynamic = programs.engine, arguments.dynamic

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
        """The forms of what a start with these arguments returns."""
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
        """Return the members' initial state."""
        programs = self.programs
        axes = maker = None
        if programs.undeclared and init_params is None:
            raise without_value(programs.undeclared)
        if callable(init_params):
            maker = init_params
            check_starts(jax.eval_shape(lambda k: maker(k[0]), keys), self.parameter_forms, None)
            init_params = None
        elif init_params is not None:
            size = self.engine.ensemble_size
            init_params, axes = check_starts(init_params, self.parameter_forms, size)
        once = not traces((keys, init_params, self.arguments.leaves))
        start = programs.start_program(maker, axes, once)
        with jax.disable_jit(False):  # what is traced in a set-up is not the same without jit
            outcome = start(self.form, keys, init_params, self.dynamic)
        state, values, first, _, alike, inside = outcome
        if not has_tracers((state, values, first)):
            check_kept(inside)
            self._set_up_guide(first)
            if self.engine.ensemble_size > 1 and bool(alike):
                warnings.warn(
                    f"All {self.engine.ensemble_size} members start at the same values: pass "
                    f"init_params= with a leading axis of {self.engine.ensemble_size}, or a "
                    f"callable of a member's key.",
                    stacklevel=4,
                )
        return with_setup(state, self.setup_with(values))

    def setup_with(self, values: SetupValues) -> Setup:
        """Return the set-up that a state of this call carries."""
        if not self.engine.constrains_with_arguments(self.template.guide):
            return Setup(values.without_arguments(), self.template)
        arguments = self.programs.cut(self.dynamic)
        return Setup(values._replace(arguments=arguments), self.template, self.form)

    def _set_up_guide(self, first: GuideValues) -> None:
        """Set the user's guide up as the first member's start has done, with concrete values."""
        with TRACING:
            if not is_set_up(self.engine.guide):
                set_up(self.engine.guide, fill(self.template.guide, first))

    def values_of(self, state: SVIState) -> SetupValues:
        """Return the values that the set-up of a state holds.

        Raises:
            ValueError: for a state without a set-up, of a fit whose set-up depends on its start.
        """
        setup = setup_of(state)
        if setup is not None:
            values = setup.values.without_arguments()
            if setup.template not in (None, self.template):
                self._check_form(values)
            return values
        wanted = self.forms.values.without_arguments()
        if not jax.tree.leaves(wanted):
            return wanted
        undeclared = self.programs.undeclared
        bare = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), undeclared) or None
        axes = jax.tree.map(lambda _: None, bare)
        start = self.programs.start_program(None, axes, False)
        other = jax.random.split(jax.random.key(1), self.engine.ensemble_size)
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

    # Steps --------------------------------------------------------------------------------------

    def step(self, state: SVIState, stable: bool, forward: bool) -> tuple[SVIState, jax.Array]:
        """Take one step with every member."""
        programs = self.programs  # a kept program must not hold this call, which holds data

        def build() -> Callable:
            return lambda call, *inputs: programs.updates(call, stable, forward)(*inputs, None)

        program = programs.program(("step", stable, forward), build)
        values = self.values_of(state)
        new, losses = program(self.form, plain(state), values, self.dynamic)
        setup = setup_of(state)
        return with_setup(new, self.setup_with(values) if setup is None else setup), losses

    def chunk(self, capacity: int, options: RunOptions, *, consume: bool = True) -> Callable:
        """Return the compiled loop of `training.make_chunk`, which may consume its carry."""
        stable, forward = options.stable_update, options.forward_mode_differentiation
        rule, programs = options.early_stopping, self.programs
        size = self.engine.ensemble_size

        def build() -> Callable:
            def chunk(call: CallForm, *inputs: Any) -> Any:
                update = programs.updates(call, stable, forward)
                return make_chunk(update, size, capacity, programs.batches, rule)(*inputs)

            return chunk

        key = ("chunk", capacity, stable, forward, rule, consume)
        program = programs.program(key, build, donate=(1,) if consume else ())
        return lambda *inputs: program(self.form, *inputs)

    def evaluate(self, state: SVIState) -> jax.Array:
        """Return the members' losses."""
        programs = self.programs

        def build() -> Callable:
            return lambda call, *inputs: programs.over_members(call, "loss")(*inputs)

        program = programs.program("evaluate", build)
        return program(self.form, plain(state), self.values_of(state), self.dynamic)

    def outcome(self, state: SVIState, values: SetupValues) -> tuple[dict[str, Any], jax.Array]:
        """Return the members' parameters, and which members have nothing but finite values."""
        programs, size = self.programs, self.engine.ensemble_size

        def build() -> Callable:
            def final(call: CallForm, state: SVIState, *inputs: Any) -> tuple:
                params = programs.over_members(call, "params")(state, *inputs)
                leaves = jax.tree.leaves((params, state.mutable_state))
                flags = [
                    jnp.isfinite(x).reshape(size, -1).all(axis=1) for x in leaves if is_inexact(x)
                ]
                return params, jnp.stack([*flags, jnp.ones(size, bool)]).all(axis=0)

            return final

        once = not traces((state, values, self.arguments.leaves))
        program = programs.program(("outcome", once), build, once=once)
        return program(self.form, state, values, self.dynamic)


def constrain(
    engine: Ensemble, template: SetupTemplate, call: CallForm, state: SVIState, values: SetupValues
) -> dict[str, Any]:
    """Return the parameters of a state, with the constraints of its own start."""
    member = Member(engine, call, None, template)
    over = jax.vmap(member.params, in_axes=(0, VALUE_AXES, ARGUMENT_AXES))
    arguments = values.arguments or {kind: [] for kind in ARGUMENT_AXES}
    return over(state, values.without_arguments(), arguments)


def _form(leaf: Any) -> tuple[tuple[int, ...], str]:
    return jnp.shape(leaf), str(jnp.result_type(leaf))
