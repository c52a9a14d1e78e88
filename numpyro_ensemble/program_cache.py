"""The compiled programs of a runner, kept for calls that depend on the same things."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
from numpyro.infer.svi import SVIState
from numpyro.primitives import _PYRO_STACK

from numpyro_ensemble.arguments import NO_ARGUMENTS, Arguments, CallForm, arrange, has_tracers
from numpyro_ensemble.fingerprints import captured, holds_tracers
from numpyro_ensemble.fit_programs import FitCall, FitPrograms, constrain
from numpyro_ensemble.guides import latent_order
from numpyro_ensemble.options import RunOptions
from numpyro_ensemble.setup import SetupTemplate, plain, setup_of
from numpyro_ensemble.tracing import TRACING, tracing_alone

if TYPE_CHECKING:
    from numpyro_ensemble.engine import Ensemble

_KEPT = 8  # forms of arguments whose compiled programs a runner keeps
_MISSES = 4  # calls of update in a row with other arguments, after which none is compiled


class ProgramCache:
    """The programs of a runner for the last few forms of arguments.

    No answer depends on what is kept: it can be dropped at any time.
    """

    def __init__(self, engine: Ensemble) -> None:
        self.engine = engine
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._misses = 0

    def call(
        self,
        args: tuple,
        kwargs: dict,
        options: RunOptions | None = None,
        *,
        starts: Mapping[str, Any] = MappingProxyType({}),
        state: SVIState | None = None,
        steps: bool = False,
    ) -> FitCall:
        """Return the programs for these arguments, with the arguments.

        Args:
            args: arguments of the model.
            kwargs: its keyword arguments.
            options: of `run`.
            starts: values, or shapes, for parameters that are declared without any.
            state: what is gone on from, which may have started with other arguments.
            steps: single steps are taken, which may come with other arguments each time.
        """
        engine = self.engine
        options = RunOptions() if options is None else options
        twice = sorted(kwargs.keys() & engine.static_kwargs)
        if twice:
            raise TypeError(f"{twice[0]!r} is given both as a static keyword and in this call.")
        arguments = arrange(
            engine.model,
            args,
            {**kwargs, **engine.static_kwargs},
            batched=options.batch_size is not None,
            batch_args=options.batch_args,
            member_args=options.member_args or (),
            jit_model_args=options.jit_model_args,
        )
        batches = options.batches(arguments, engine.ensemble_size)
        setup = None if state is None else setup_of(state)
        template = None if setup is None else setup.template
        with TRACING:  # or another thread's handlers are taken for this call's
            around = captured(tuple(_PYRO_STACK))
            settings = (captured(engine.model), captured(engine.guide), *engine.settings(), around)
        form = CallForm(arguments)
        key = (form, batches, settings)
        programs = self._find(key, template, starts, arguments, steps)
        if programs is None:
            programs = FitPrograms(engine, key, batches, template, starts, compiles=False)
            programs.prepare(arguments, form)
        return FitCall(programs, arguments, form)

    def _find(
        self,
        key: tuple[CallForm, Any, tuple],
        template: SetupTemplate | None,
        starts: Mapping[str, Any],
        arguments: Arguments,
        steps: bool,
    ) -> FitPrograms | None:
        """Return kept programs, or new ones; None where there are new ones at every step."""
        order = latent_order(self.engine.guide)
        keys: list[Hashable] = [(key, order)]
        if template is not None:
            keys.append((key, template))
        for candidate in keys:
            kept = self._kept.get(candidate)
            if kept is not None and template in (None, kept.template) and kept.serves(starts):
                self._misses = 0
                self._keep(candidate, kept)
                return kept
        self._misses = self._misses + 1 if steps and not has_tracers(arguments.leaves) else 0
        if self._misses > _MISSES:
            self._warn_of_misses()
            return None
        form, batches, settings = key
        programs = FitPrograms(self.engine, (key, order), batches, template, starts)
        programs.prepare(arguments, form)  # what fails is not kept
        if holds_tracers(settings):  # of a transformation that the model takes values from
            return programs
        self._keep(keys[-1], programs)
        if (
            template is None and programs.template is not None and not order
        ):  # once the guide is set up, it has this order
            self._keep((key, latent_order(programs.template.guide)), programs)
        return programs

    def _warn_of_misses(self) -> None:
        if self._misses == _MISSES + 1:
            warnings.warn(
                "update is called with other data at every step, and a program for each would have "
                "to be compiled; it now runs without one, and slowly. Wrap it, as SVI.update: "
                "update = jax.jit(runner.update).",
                stacklevel=6,
            )

    def params(self, state: SVIState) -> dict[str, Any]:
        """Return the parameters of a state.

        Raises:
            ValueError: for a state without a set-up.
        """
        setup = setup_of(state)
        if setup is None or setup.template is None:
            raise ValueError(
                "get_params takes a state that init, update or run of a runner has returned, in "
                "this process: a plain SVIState, or one that was pickled, does not hold the "
                "constraints of its parameters. Use result.params, or go on from it with run."
            )
        key = ("params", setup.template)
        program: Callable | None = self._kept.get(key)
        if program is None:
            build = tracing_alone(partial(constrain, self.engine, setup.template))
            program = jax.jit(build, static_argnums=0)
        self._keep(key, program)
        call = setup.call or CallForm(NO_ARGUMENTS)
        return program(call, plain(state), setup.values)

    def _keep(self, key: Hashable, value: Any) -> None:
        with TRACING:
            self._kept[key] = value
            self._kept.move_to_end(key)
            while len(self._kept) > 2 * _KEPT:
                self._kept.popitem(last=False)
