"""The engine under every ensemble: NumPyro's `SVI`, one for each member, in one program."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields, replace
from typing import Any

import jax
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.checkpoint import Checkpoint
from numpyro_ensemble.fit.cache import ProgramCache
from numpyro_ensemble.fit.call import FitCall
from numpyro_ensemble.fit.optimisers import adapted, loopable
from numpyro_ensemble.fit.options import RunOptions
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.fit.run import fit
from numpyro_ensemble.fit.starts import start_forms
from numpyro_ensemble.fit.state import check_size
from numpyro_ensemble.fit.stopping import EarlyStopping
from numpyro_ensemble.handlers import check_count, check_names, key_of
from numpyro_ensemble.primitives import member_keys
from numpyro_ensemble.results import EnsembleResult
from numpyro_ensemble.sharding import as_mesh


class Ensemble:
    """What `EnsembleMAP` and `EnsembleVI` share: `SVI`'s methods over a leading member axis.

    Attributes:
        model, guide, optim, loss, static_kwargs: as in `numpyro.infer.SVI`.
        ensemble_size: number of members E.
    """

    kind: type[Problem] = Problem  # what it fills in from its attributes
    prior_weight: Any = 1.0
    repulsion: Any = None
    data_sites: tuple[str, ...] = ()
    hint = ""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        ensemble_size: int = 16,
        member_batch_size: int | None = None,
        mesh: Any = None,
        prior_sites: Collection[str] = (),
        likelihood_sites: Collection[str] = (),
        **static_kwargs: Any,
    ) -> None:
        taken = sorted(static_kwargs.keys() & RunOptions._fields)
        if taken:
            raise ValueError(
                f"static keywords {taken} are options of run; bind them to the model and the guide "
                f"with functools.partial instead."
            )
        self.ensemble_size, self.member_batch_size = ensemble_size, member_batch_size
        self.mesh = mesh
        self.model, self.guide, self.loss = model, guide, loss
        self.optim, self.static_kwargs = optim, static_kwargs
        self.prior_sites = prior_sites  # type: ignore[assignment]
        self.likelihood_sites = likelihood_sites  # type: ignore[assignment]
        both = sorted(set(self.prior_sites) & set(self.likelihood_sites))
        if both:
            raise ValueError(f"prior_sites and likelihood_sites both name {both}.")
        self._cache = ProgramCache()

    def problem(self) -> Problem:
        """Describe what is fitted, with the settings of this moment."""
        problem = self.kind(**{f.name: getattr(self, f.name) for f in fields(self.kind)})
        problem.placement.check(self.ensemble_size)
        if problem.repulsion is not None:
            if problem.repulsion.is_off:  # a plain fit, with its programs
                return replace(problem, repulsion=None)
            problem.repulsion.check_size(self.ensemble_size)
        return problem

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting; it holds from the next call on."""
        object.__setattr__(self, name, self.checked_setting(name, value))

    def checked_setting(self, name: str, value: Any) -> Any:
        """Return the value that a setting takes.

        Raises:
            TypeError: for a value of the wrong kind.
            ValueError: for a number out of range.
        """
        if name == "ensemble_size" or (name == "member_batch_size" and value is not None):
            check_count(name, value)
            return int(value)
        if name == "mesh":
            return as_mesh(value)
        if name in ("prior_sites", "likelihood_sites"):
            return check_names(name, value)
        if name == "guide" and isinstance(value, type):
            raise TypeError(
                f"guide takes an instance, {value.__name__}(model) say; got the class itself."
            )
        if name in ("model", "guide") and not callable(value):
            raise TypeError(f"{name} takes a callable with NumPyro primitives, got {value!r}.")
        if name == "loss" and (isinstance(value, type) or not hasattr(value, "loss")):
            raise TypeError(f"loss takes an ELBO of NumPyro, Trace_ELBO() say; got {value!r}.")
        if name == "optim":
            return self._checked_optim(value)
        return value

    def _checked_optim(self, optim: Any) -> Any:
        try:
            return loopable(SVI(self.model, self.guide, adapted(optim), self.loss).optim)
        except TypeError as error:
            raise TypeError(f"optim takes an optimiser, got {optim!r}. {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled programs out of copies."""
        return {name: value for name, value in vars(self).items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _cache=ProgramCache())

    def use(self, use: Callable[[FitCall], Any], *call: Any, **how: Any) -> Any:
        """Call a function with the programs for a call, see `ProgramCache.use`."""
        return self._cache.use(self.problem(), use, *call, **how)

    # SVI's methods ------------------------------------------------------------------------------

    @checked_keywords
    def init(
        self, rng_key: jax.Array, *args: Any, init_params: Any = None, **kwargs: Any
    ) -> SVIState:
        """Return the initial state, an `SVIState` whose leaves have a leading `(E,)`.

        Args:
            rng_key: one key, split into E, or E keys; member e is what `SVI.init` makes of key e.
            *args: arguments of the model.
            init_params: start values by the names of `get_params`, or a callable that makes them
                from one member's key. A leaf of the single fit's shape is shared, one with a
                leading E is per member. A parameter that is declared without a value takes its
                shape from the value here, which all members share.
            **kwargs: keyword arguments of the model.
        """
        keys = member_keys(rng_key, self.ensemble_size)
        starts = start_forms(init_params, keys)

        def use(call: FitCall) -> SVIState:
            return call.cut_state(call.start(keys, init_params))

        return self.use(use, args, kwargs, starts=starts)

    def get_params(self, state: SVIState) -> dict[str, Any]:
        """Return the constrained parameters of a state, each leaf with a leading `(E,)`.

        Raises:
            ValueError: for a state that does not hold its constraints: NumPyro's own, or one that
                was pickled without its model.
        """
        check_size(state, self.ensemble_size)
        return self._cache.params(self.problem(), state)

    @checked_keywords
    def update(
        self,
        state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[SVIState, jax.Array]:
        """Take one step with every member and return the new state and the losses `(E,)`."""
        return self._step(state, False, forward_mode_differentiation, args, kwargs)

    @checked_keywords
    def stable_update(
        self,
        state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[SVIState, jax.Array]:
        """Take one step, in which a member whose loss or state fails keeps its last good state."""
        return self._step(state, True, forward_mode_differentiation, args, kwargs)

    def _step(
        self, state: SVIState, stable: bool, forward: bool, args: tuple, kwargs: dict
    ) -> tuple[SVIState, jax.Array]:
        check_size(state, self.ensemble_size)
        return self.use(lambda call: call.step(state, stable, forward), args, kwargs, state=state)

    @checked_keywords
    def evaluate(self, state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the members' losses `(E,)`, with the randomness that `update` would use."""
        check_size(state, self.ensemble_size)
        return self.use(lambda call: call.evaluate(state), args, kwargs, state=state)

    @checked_keywords
    def run(
        self,
        rng_key: jax.Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        forward_mode_differentiation: bool = False,
        init_state: SVIState | None = None,
        init_params: Any = None,
        batch_size: int | None = None,
        batch_args: Iterable[str | int] | None = None,
        shared_batches: bool = True,
        early_stopping: EarlyStopping | None = None,
        callback: Callable | None = None,
        jit_model_args: bool | None = None,
        member_args: Iterable[str | int] | None = None,
        chunk_size: int | None = None,
        checkpoint: Checkpoint | None = None,
        gather: bool = True,
        **kwargs: Any,
    ) -> EnsembleResult:
        """Fit all members and return their parameters, state and losses.

        Args:
            rng_key: one key, split into E, or E keys; member e is the single run made with key e.
            num_steps: number of optimisation steps.
            *args: arguments of the model (and guide).
            progress_bar: show a bar with the mean, best and worst loss.
            stable_update: a member whose loss or state turns non-finite keeps its last good state.
            forward_mode_differentiation: as in `SVI.run`.
            init_state: go on from the state of an earlier run; the key then only orders batches.
            init_params: start values, see `init`.
            batch_size: rows in a batch; epochs are whole and without replacement, and the
                likelihood is rescaled by `N / |B|`. Batch order depends on `rng_key` and the
                optimiser's step alone.
            batch_args: names or positions of the batched arguments (default: every array with rows,
                which stand along the first axis, or the second one in what `member_args` names).
            shared_batches: whether all members see the same batches, or each its own.
            early_stopping: an `EarlyStopping`, the rule by which each member stops.
            callback: `callback(step, state, losses)` after each chunk; a true value ends the run.
            jit_model_args: whether arrays among the arguments are inputs of the program, so that
                other values of equal shapes compile nothing. None is True with a fallback: a
                model that looks at their values is given them concretely. False always gives
                them concretely, as `SVI.run` does.
            member_args: names or positions of arguments with a leading `(E,)`, one per member.
            chunk_size: steps in a chunk; the progress bar, the callback and early stopping act
                between chunks (default: a twentieth of a run that has one of these).
            checkpoint: a `Checkpoint`: the same call made again goes on from the newest one.
                Ctrl-C ends a run after the current chunk, and the result so far is returned.
                SIGTERM writes a checkpoint, and then ends the process.
            gather: whether every process gets the whole result, on a mesh of several processes;
                False leaves parameters and state on their devices.
            **kwargs: keyword arguments of the model (and guide).

        Returns:
            An `EnsembleResult`; its `losses` are `(E, num_steps)`.

        Raises:
            ValueError: for options out of range, a model that cannot follow its batches, starts of
                the wrong shape, or if all members start where the loss is not finite.
        """
        begin = time.perf_counter()
        options = RunOptions(
            progress_bar=progress_bar,
            stable_update=stable_update,
            forward_mode_differentiation=forward_mode_differentiation,
            init_state=init_state,
            init_params=init_params,
            batch_size=batch_size,
            batch_args=batch_args,
            shared_batches=shared_batches,
            early_stopping=early_stopping,
            callback=callback,
            jit_model_args=jit_model_args,
            member_args=member_args,
            chunk_size=chunk_size,
            checkpoint=checkpoint,
            gather=gather,
        )
        options.check(num_steps)
        rng_key = key_of(rng_key)
        keys = member_keys(rng_key, self.ensemble_size)
        starts = start_forms(init_params, keys)

        def use(call: FitCall) -> EnsembleResult:
            return fit(call, rng_key, keys, num_steps, options)

        result = self.use(use, args, kwargs, options, starts=starts, state=options.init_state)
        if not has_tracers((result.params, result.losses)):
            result.seconds = time.perf_counter() - begin
        return result
