"""Which of a runner's compiled programs serve a call: kept ones where the contents are equal."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from numpyro.infer.svi import SVIState
from numpyro.primitives import _PYRO_STACK

from numpyro_ensemble.arguments import arrange, has_tracers
from numpyro_ensemble.bound import Bound
from numpyro_ensemble.fingerprints import Same, captured
from numpyro_ensemble.options import RunOptions
from numpyro_ensemble.preflight import Anatomy

if TYPE_CHECKING:
    from numpyro_ensemble.engine import Ensemble

_KEPT = 8  # sets of arguments whose compiled programs a runner keeps
_MISSES = 4  # calls of update in a row with other arguments, after which none is compiled


class Bindings:
    """The sets of arguments that a runner has seen last, with their programs."""

    def __init__(self, engine: Ensemble) -> None:
        self.engine = engine
        self.last: Bound | None = None
        self._kept: OrderedDict[tuple, Bound] = OrderedDict()
        self._traced: OrderedDict[tuple, Anatomy] = OrderedDict()
        self._last_key: tuple = ()
        self._misses = 0

    def bind(
        self,
        args: tuple,
        kwargs: dict,
        options: RunOptions | None = None,
        *,
        starts: Mapping[str, Any] = MappingProxyType({}),
        state: SVIState | None = None,
    ) -> Bound:
        """Return the programs for these arguments.

        Args:
            args: arguments of the model.
            kwargs: its keyword arguments.
            options: of `run`.
            starts: values, or shapes, for parameters that are declared without any.
            state: what a single step starts from, which may come with other arguments each time.
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
        if not starts and self.last is not None:
            starts = self.last.bare
        bound = Bound(engine, arguments, batches, starts)
        around = captured(tuple(_PYRO_STACK))  # handlers that the call stands in
        parts = (Same(engine.loss), Same(engine.optim), engine.prior_sites, around)
        surroundings = (captured(engine.model), captured(engine.guide), *engine.weights(), *parts)
        if has_tracers(arguments.leaves):
            return self._bind_traced(bound, (arguments.form(), batches, surroundings), state)
        key: tuple = (arguments.key(), batches, surroundings)
        if key not in self._kept and self._leads(state):
            key = (*key, self._last_key)
        kept = self._kept.get(key)
        self._misses = self._misses + 1 if state is not None and kept is None else 0
        if self._misses > _MISSES:
            return self._bind_eagerly(bound, state)
        bound = kept or bound
        bound.arguments = arguments
        self._settle(bound, state if len(key) > 3 else None)
        _keep(self._kept, key, bound)
        if state is None or self.last is None:
            self.last, self._last_key = bound, key
        return bound

    def _leads(self, state: SVIState | None) -> bool:
        """Say whether a step from this state is a step of the fit that was started last."""
        last = self.last
        return state is not None and last is not None and last.leads(state)

    def _settle(self, bound: Bound, state: SVIState | None) -> None:
        """Give new arguments what the start of a fit has found, as `SVI` does, or their own."""
        if self.last is not None and self._leads(state):
            bound.follow(self.last)
            return
        _ = bound.anatomy  # checks the model: only what passes is kept
        bound.adopt(self.last)

    def _bind_traced(self, bound: Bound, key: tuple, state: SVIState | None) -> Bound:
        """Remember what a traced call tells of the model, and nothing that was traced."""
        if self._leads(state):
            self._settle(bound, state)
            return bound
        if key in self._traced:
            bound.anatomy = self._traced[key]
        _keep(self._traced, key, bound.anatomy)
        bound.adopt(self.last)
        self.last = self.last or bound.without_arguments()
        return bound

    def _bind_eagerly(self, bound: Bound, state: SVIState | None) -> Bound:
        """Step without compiling, since the arguments are others at every call."""
        if self._misses == _MISSES + 1:
            warnings.warn(
                "update is called with other data at every step, and a program for each would have "
                "to be compiled; it now runs without one, and slowly. Wrap it, as SVI.update: "
                "update = jax.jit(runner.update).",
                stacklevel=5,
            )
        bound.compiles = False
        self._settle(bound, state)
        return bound


def _keep(store: OrderedDict, key: tuple, value: Any) -> None:
    store[key] = value
    store.move_to_end(key)
    if len(store) > _KEPT:
        store.popitem(last=False)
