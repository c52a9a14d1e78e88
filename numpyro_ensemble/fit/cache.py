"""The compiled programs of a runner, kept for calls that depend on the same things."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import jax
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import NO_ARGUMENTS, TRACED, Arguments, CallForm, arrange
from numpyro_ensemble.calls.executables import Executables, keep
from numpyro_ensemble.calls.identity import can_return, closure_fingerprint, is_unknown, may_differ
from numpyro_ensemble.calls.marks import Hashed
from numpyro_ensemble.calls.programs import KEPT, REMEMBERED, surroundings
from numpyro_ensemble.calls.tracing import NUMPY_WANTED, LooksAtValuesError, tracing_alone
from numpyro_ensemble.fit.batches import Batches
from numpyro_ensemble.fit.call import FitCall
from numpyro_ensemble.fit.checks import looks_at
from numpyro_ensemble.fit.guides import latent_order
from numpyro_ensemble.fit.options import RunOptions
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.fit.programs import FitPrograms, constrain
from numpyro_ensemble.fit.state import plain, setup_of
from numpyro_ensemble.hosts import home

Returned = TypeVar("Returned")
Key = tuple[CallForm, Any, Hashed]

_KEPT = 2 * KEPT  # programs for a form of arguments are found by two keys


class ProgramCache:
    """The programs of a runner for the last few forms of arguments.

    Results do not depend on the cache: it can be dropped at any time.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._looks: OrderedDict[Hashable, None] = OrderedDict()
        self._executables = Executables()

    def use(
        self,
        problem: Problem,
        use: Callable[[FitCall], Returned],
        args: tuple,
        kwargs: dict,
        options: RunOptions | None = None,
        *,
        starts: Mapping[str, Any] = MappingProxyType({}),
        state: SVIState | None = None,
    ) -> Returned:
        """Call a function with the programs for these arguments, and return its value.

        Arrays among the arguments are inputs of the programs. A model that looks at their values
        is found out when it is traced, and is then given them concretely.

        Args:
            problem: what is fitted.
            use: the function of the programs; it is called again with concrete arguments if the
                model looks at values.
            args: arguments of the model.
            kwargs: its keyword arguments.
            options: of `run`.
            starts: values, or shapes, for parameters that are declared without any.
            state: of the earlier run, if any, which may have started with other arguments.
        """
        options = RunOptions() if options is None else options
        twice = sorted(kwargs.keys() & problem.static_kwargs)
        if twice:
            raise TypeError(f"{twice[0]!r} is given both as a static keyword and in this call.")
        first: Key | None = None
        if options.jit_model_args is not False:
            arguments, first = _arranged(problem, args, kwargs, options, traced=True)
            falls_back = options.jit_model_args is None and _could_be_concrete(arguments)
            if not (falls_back and first in self._looks):
                call = None
                try:
                    call = self._call(problem, arguments, first, starts, state)
                    return use(call)
                except LooksAtValuesError as error:
                    if not falls_back:
                        raise looks_at(arguments, error) from error
                except (
                    NUMPY_WANTED
                ):  # an error before anything ran may come from a model that needs NumPy's arrays
                    if not falls_back or call is not None:
                        raise
        arguments, key = _arranged(problem, args, kwargs, options, traced=False, like=first)
        try:
            call = self._call(problem, arguments, key, starts, state)
            if first is not None and can_return(_marks(first)):
                keep(self._looks, first, None, REMEMBERED)
            return use(call)
        except LooksAtValuesError as error:
            raise looks_at(arguments, error) from error

    def _call(
        self,
        problem: Problem,
        given: Arguments,
        key: Key,
        starts: Mapping[str, Any],
        state: SVIState | None,
    ) -> FitCall:
        """Return kept programs that serve this call, or new ones, with its arguments."""
        form, batches, _ = key
        arguments = problem.placement.place(given)
        setup = None if state is None else setup_of(state)
        template = None if setup is None else setup.template
        if template is not None and may_differ(problem.model, template.model):
            template = None  # the runner's own set-up, with the values of the state's
        order = latent_order(problem.guide)
        keys: list[tuple] = [(key, order)]
        if template is not None:
            keys.append((key, template))
        for candidate in keys:
            kept = self._kept.get(candidate)
            if kept is not None and template in (None, kept.template) and kept.serves(starts):
                keep(self._kept, candidate, kept, _KEPT)
                return FitCall(kept, given, arguments, form)
        executables = self._executables if is_unknown(_marks(key)) else None
        make_key = partial(_key, problem, form, batches)
        programs = FitPrograms(problem, make_key, batches, template, starts, executables)
        programs.prepare(arguments, form)  # what fails is not kept
        if can_return(_marks(key)):
            key = make_key()  # what the set-up of a guide writes is known by now
            keep(self._kept, (key, *keys[-1][1:]), programs, _KEPT)
            if template is None and programs.template is not None and not order:
                # the order that the guide has once it is set up
                later = (key, latent_order(programs.template.guide))
                keep(self._kept, later, programs, _KEPT)
        return FitCall(programs, given, arguments, form)

    def params(self, problem: Problem, state: SVIState) -> dict[str, Any]:
        """Return the parameters of a state.

        Raises:
            ValueError: for a state without a set-up.
        """
        setup = setup_of(state)
        if setup is None or setup.template is None:
            raise ValueError(
                "get_params takes a state that init, update or run of a runner has returned: a "
                "plain SVIState does not hold the constraints of its parameters, nor does one that "
                "was pickled where pickle cannot take the model (cloudpickle may). Use "
                "result.params, or go on from it with run."
            )
        template, call = setup.template, setup.call or CallForm(NO_ARGUMENTS)
        marks = (closure_fingerprint((problem.model, template.guide)), problem.settings(), call.key)
        key = ("params", template, Hashed(marks[:2]))
        program: Callable | None = self._kept.get(key)
        if program is None:
            build = tracing_alone(partial(constrain, problem, template))
            program = jax.jit(build, static_argnums=0)
            if is_unknown(marks):
                program = self._executables.wrap(program, statics=1)
        if can_return(marks):
            keep(self._kept, key, program, _KEPT)
        placement = problem.placement
        values = setup.mapped(placement.fill).values
        params = program(call, placement.fill(plain(state), 0), values)
        return home(placement.cut(params, 0, problem.ensemble_size))


def _could_be_concrete(arguments: Arguments) -> bool:
    """Return whether arguments are traced that need not be."""
    return any(not isinstance(leaf, jax.core.Tracer) for leaf in arguments.select(TRACED))


def _key(problem: Problem, form: CallForm, batches: Batches | None) -> Key:
    """Return what a program depends on."""
    marks = (
        closure_fingerprint((problem.model, problem.guide)),
        *problem.settings(),
        surroundings(),
    )
    return form, batches, Hashed(marks)


def _marks(key: Key) -> tuple:
    form, _, settings = key
    return form.key, settings.value


def _arranged(
    problem: Problem,
    args: tuple,
    kwargs: dict,
    options: RunOptions,
    *,
    traced: bool,
    like: Key | None = None,
) -> tuple[Arguments, Key]:
    """Return the arguments, and what a program for them depends on."""
    arguments = arrange(
        problem.model,
        args,
        {**kwargs, **problem.static_kwargs},
        batched=options.batch_size is not None,
        batch_args=options.batch_args,
        member_args=options.member_args or (),
        traced=traced,
    )
    # options warn, once
    batches = options.batches(arguments, problem.ensemble_size) if like is None else like[1]
    key = _key(problem, CallForm(arguments), batches)
    return arguments, key
