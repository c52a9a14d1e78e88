"""The compiled programs of one problem for one form of arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import (
    MEMBER,
    MEMBER_AXES,
    MEMBER_BATCH,
    Arguments,
    CallForm,
)
from numpyro_ensemble.calls.executables import Executables, keep
from numpyro_ensemble.calls.identity import closure_fingerprint
from numpyro_ensemble.calls.tracing import TRACING, looking, tracing_alone
from numpyro_ensemble.density import Site
from numpyro_ensemble.fit.batches import Batches, first_rows
from numpyro_ensemble.fit.checks import check_one_posterior, check_values, checked_sites
from numpyro_ensemble.fit.forces import forces
from numpyro_ensemble.fit.guides import latent_order, note_alike
from numpyro_ensemble.fit.member import Member, Noting
from numpyro_ensemble.fit.noise import check_exact
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.fit.setup import SetupTemplate, Static
from numpyro_ensemble.fit.slots import drop_unread
from numpyro_ensemble.fit.starts import all_alike, check_starts, kept
from numpyro_ensemble.fit.state import STATE_AXES, VALUE_AXES, GuideValues, SetupValues
from numpyro_ensemble.mapping import compiler_options

_PROGRAMS = 32  # of one form of arguments that are kept
_NUMBERS = (float, int, np.ndarray, np.generic, jax.Array)


class StartForms(NamedTuple):
    """Shapes and dtypes of what a start returns, with the member axis."""

    state: SVIState
    values: SetupValues


class FitPrograms:
    """Programs that serve all calls with arguments of one form, each compiled when first needed.

    It holds no array of a call. What is cached here can be dropped at any time.

    Args:
        problem: what is fitted.
        make_key: returns what the programs depend on, once the guide's set-up was traced.
        batches: how the data is cut.
        template: of the earlier run's state, if any, which may have other arguments.
        starts: values, or shapes, for parameters that are declared without any.
        executables: where programs are found, if what they depend on cannot be compared.
    """

    def __init__(
        self,
        problem: Problem,
        make_key: Callable[[], Hashable],
        batches: Batches | None,
        template: SetupTemplate | None = None,
        starts: Mapping[str, Any] = MappingProxyType({}),
        executables: Executables | None = None,
    ) -> None:
        self.problem, self.make_key = problem, make_key
        self.executables = executables
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
            self.checked = checked_sites(self.problem, arguments, self.batches, self.starts)
            check_values(self.problem, arguments)
            check_one_posterior(self.problem, arguments)
        if self.template is None:
            self.trace_start(arguments, call)

    def trace_start(self, arguments: Arguments, call: CallForm) -> None:
        """Trace the start of a fit abstractly: the template, and the forms of what it returns."""
        if self.forms is not None:
            return
        size = self.problem.places
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        axes = jax.tree.map(lambda _: None, self.undeclared)
        start = self.start_program(None, axes or None, True)
        traced = start.trace(call, keys, self.undeclared or None, arguments.dynamic)
        state, values, _, structure, *_ = traced.out_info
        member_ranks = {x: np.ndim(leaf) for x, leaf in arguments.labelled(MEMBER, MEMBER_BATCH)}
        guide, forms, transforms, leaves = structure.value
        note_alike(self.problem.guide, guide)
        template = SetupTemplate(
            (self.make_key(), latent_order(guide)),
            self.problem.model,
            guide,
            forms,
            transforms,
            leaves,
            self.sites,
            self.undeclared,
            member_ranks,
        )
        with TRACING:  # the first thread's, where several have come this far
            if self.template is None:
                self.template = template
            forms = StartForms(state, values)
        loss = self.over_members(call, "loss")
        repels = self.problem.repels
        check_exact(self.problem.optim, loss, *forms, arguments.dynamic, self.batches, repels)
        if repels:  # wrong sites and functions of a repulsion are found before anything is compiled
            place = tracing_alone(looking(self.over_members(call, "place")))
            jax.eval_shape(place, *forms, arguments.dynamic)
        self.forms = forms  # a failed check is made again in the next call

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

    def start_program(self, maker: Callable | None, axes: Any, fast_compile: bool) -> Any:
        """Return the program that starts all members."""
        leaves, treedef = jax.tree.flatten(axes, is_leaf=lambda x: x is None)
        key = ("start", closure_fingerprint(maker), treedef, tuple(leaves), fast_compile)
        return self.program(key, lambda: self._start(maker, axes), fast_compile=fast_compile)

    def _start(self, maker: Callable | None, axes: Any) -> Callable:
        problem = self.problem

        def one(call: CallForm, key: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            if maker is not None:
                init_params, _ = check_starts(maker(key), self.parameter_forms, None)
            args, kwargs = call.rebuild(dynamic)
            guide, given = problem.fresh_guide(init_params, self.sites)
            model, called = Noting(problem.summed_model(guide)), Noting(guide)
            svi = SVI(model, called, problem.optim, problem.loss)
            state = svi.init(key, *args, init_params=given, **kwargs)
            problem.check_guide(guide, args, kwargs)
            guide, every = problem.distilled_guide(guide, type(key))
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            read = drop_unread(guide, every, params, args, kwargs)
            transforms = {**model.transforms(), **called.transforms()}
            leaves, tree = jax.tree.flatten(transforms)
            # a number of one start can be a tracer in another start
            numeric = [isinstance(leaf, _NUMBERS) for leaf in leaves]
            constraints = [jnp.asarray(leaf) for leaf, n in zip(leaves, numeric, strict=True) if n]
            known = tuple(None if n else leaf for leaf, n in zip(leaves, numeric, strict=True))
            forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), every)
            inside = {}
            if init_params:
                reached = problem.member_params(guide, svi.get_params(state), args, kwargs)
                inside = kept(init_params, reached)
            values = SetupValues(constraints, read, {})
            return state, values, every, Static((guide, forms, tree, known)), inside

        def start(call: CallForm, keys: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            member = partial(one, call)
            out_axes = (0, VALUE_AXES, VALUE_AXES.guide, None, 0)
            members = problem.placement.map(member, (0, axes, MEMBER_AXES), out_axes)
            state, values, every, structure, inside = members(keys, init_params, self.cut(dynamic))
            supports, own = ([leaf[0] for leaf in kind] for kind in every[:2])
            first = GuideValues(supports, own, every.shared)
            alike = all_alike(jax.vmap(problem.optim.get_params)(state.optim_state))
            return state, values, first, structure, alike, inside

        return start

    def cut(self, dynamic: dict) -> dict:
        """Return the arguments that a start sees: the first rows where there are batches."""
        return dynamic if self.batches is None else first_rows(dynamic, self.batches.size)

    # Steps --------------------------------------------------------------------------------------

    def member(self, call: CallForm) -> Member:
        """Return one member's functions."""
        assert self.template is not None
        return Member(self.problem, call, self.batches, self.template)

    def updates(self, call: CallForm, stable: bool, forward: bool) -> Callable:
        """Return the function that takes one step with every member."""
        shared = self.batches is None or self.batches.shared

        def one(state: SVIState, values: SetupValues, dynamic: dict, rows: Any) -> tuple:
            return self.member(call).update(state, values, dynamic, rows, stable, forward)

        axes = (*STATE_AXES, None if shared else 0)
        if self.problem.repels:
            return self._repelled_updates(call, axes, stable, forward)
        return self.problem.placement.map(one, axes)

    def _repelled_updates(
        self, call: CallForm, axes: tuple, stable: bool, forward: bool
    ) -> Callable:
        """Return the same for repulsion, where each member needs all others in a step."""
        placement, size = self.problem.placement, self.problem.ensemble_size

        def pull(state: SVIState, values: SetupValues, dynamic: dict, rows: Any) -> Any:
            return self.member(call).pull(state, values, dynamic, rows, forward)

        def every(state: SVIState, values: SetupValues, dynamic: dict, rows: Any) -> tuple:
            move = partial(self.member(call).move, stable=stable, counts=rows is not None)
            pulls = placement.map(pull, axes)(state, values, dynamic, rows)
            pushed = forces(self.problem.repulsion, placement.cut(pulls, 0, size))
            inputs = (state, values, dynamic, pulls, *placement.with_copies(pushed))
            return placement.map(move, (*STATE_AXES, 0, 0, 0))(*inputs)

        return every

    def over_members(self, call: CallForm, name: str, **options: Any) -> Callable:
        """Return one of a member's functions, for all members."""
        one = partial(getattr(self.member(call), name), **options)
        return self.problem.placement.map(one, STATE_AXES)

    def program(
        self, key: Any, build: Callable, *, donate: tuple[int, ...] = (), fast_compile: bool = False
    ) -> Any:
        """Return a compiled function of a `CallForm` and arrays, made when first asked for.

        Args:
            key: identifies the program.
            build: makes the function.
            donate: positions of the arguments that it consumes.
            fast_compile: compile without optimisation, for a program that runs once in a fit.
        """
        fn: Any = self._programs.get(key)
        if fn is None:
            fn = tracing_alone(looking(build()))
            options = compiler_options(0) if fast_compile else None
            fn = jax.jit(fn, static_argnums=0, donate_argnums=donate, compiler_options=options)
            if self.executables is not None:
                fn = self.executables.wrap(fn, statics=1)
        keep(self._programs, key, fn, _PROGRAMS)
        return fn


def constrain(
    problem: Problem, template: SetupTemplate, call: CallForm, state: SVIState, values: SetupValues
) -> dict[str, Any]:
    """Return the parameters of a state, with the constraints of its own start."""
    member = Member(problem, call, None, template)
    over = problem.placement.map(member.params, STATE_AXES)
    arguments = values.arguments or {kind: [] for kind in MEMBER_AXES}
    return over(state, values.without_arguments(), arguments)


def _form(leaf: Any) -> tuple[tuple[int, ...], str]:
    return jnp.shape(leaf), str(jnp.result_type(leaf))
