"""The engine under every ensemble: NumPyro's `SVI`, one for each member, in one program."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim
from jax.typing import ArrayLike
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState
from numpyro.util import is_prng_key

from numpyro_ensemble.arguments import has_tracers, traces
from numpyro_ensemble.batching import batch_keys, first_order
from numpyro_ensemble.fingerprints import Same, captured
from numpyro_ensemble.fit_programs import FitCall
from numpyro_ensemble.guides import fresh, take_out
from numpyro_ensemble.handlers import check_count, check_names, reweight
from numpyro_ensemble.keywords import checked_keywords
from numpyro_ensemble.optimisers import loopable
from numpyro_ensemble.options import RunOptions
from numpyro_ensemble.preflight import check_size, check_state
from numpyro_ensemble.primitives import member_keys
from numpyro_ensemble.program_cache import ProgramCache
from numpyro_ensemble.results import EnsembleResult, name_members
from numpyro_ensemble.setup import GuideValues, SetupValues, plain, with_setup
from numpyro_ensemble.starts import start_forms
from numpyro_ensemble.training import (
    Carry,
    EarlyStopping,
    capacity_for,
    copy_buffers,
    first_stop,
    train,
    without_stopped,
)


class Ensemble:
    """What `EnsembleMAP` and `EnsembleVI` share: `SVI`'s methods over a leading member axis.

    Attributes:
        model, guide, optim, loss, static_kwargs: as in `numpyro.infer.SVI`.
        ensemble_size: number of members E.
    """

    prior_weight: Any
    hint = ""  # where the model cannot be called
    data_sites: tuple[str, ...] = ()  # factors that must depend on the batch, though none said so

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        ensemble_size: int = 16,
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
        self.ensemble_size = ensemble_size
        self.model, self.guide, self.loss = model, guide, loss
        self.optim, self.static_kwargs = optim, static_kwargs
        self.prior_sites = prior_sites  # type: ignore[assignment]
        self.likelihood_sites = likelihood_sites  # type: ignore[assignment]
        both = sorted(set(self.prior_sites) & set(self.likelihood_sites))
        if both:
            raise ValueError(f"prior_sites and likelihood_sites both name {both}.")
        self._cache = ProgramCache(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting; it holds from the next call on."""
        object.__setattr__(self, name, self.checked_setting(name, value))

    def checked_setting(self, name: str, value: Any) -> Any:
        """Return the value that a setting takes.

        Raises:
            TypeError: for a value of the wrong kind.
            ValueError: for a number out of range.
        """
        if name == "ensemble_size":
            check_count(name, value)
            return int(value)
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
        if isinstance(optim, numpyro.optim.Minimize):
            raise TypeError(
                "optim takes an optimiser that makes one gradient step at a time; "
                "numpyro.optim.Minimize makes a whole search in one. Use numpyro.optim.Adam, say."
            )
        try:
            return loopable(SVI(self.model, self.guide, optim, self.loss).optim)
        except TypeError as error:
            raise TypeError(f"optim takes an optimiser, got {optim!r}. {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled programs out of copies."""
        return {name: value for name, value in vars(self).items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _cache=ProgramCache(self))

    # One member, in the terms of a plain SVI --------------------------------------------------

    def weighted(self, guide: Callable, scale: float, step: Any) -> tuple[Callable, Callable]:
        """Return the model and the guide, weighted for one step of one member.

        Args:
            guide: the member's guide.
            scale: weight of the likelihood, which is `N / |B|` for batches.
            step: the optimiser's step.
        """
        return self.reweighted(self.prior_weight, scale), guide

    def reweighted(self, prior: ArrayLike, likelihood: ArrayLike) -> Callable:
        """Return the model with its prior and likelihood weighted."""
        sites = self.prior_sites
        return reweight(self.model, prior=prior, likelihood=likelihood, prior_sites=sites)

    def settings(self) -> tuple:
        """Return the settings that a program depends on, as a hashable."""
        return (
            type(self), Same(self.loss), Same(self.optim), self.ensemble_size,
            captured(self.prior_weight), self.prior_sites, self.likelihood_sites,
        )  # fmt: skip

    def fresh_guide(self, init_params: dict | None, sites: dict) -> tuple[Callable, dict | None]:
        """Return a guide that was not set up, and the start values that `SVI.init` is to take."""
        return fresh(self.guide), init_params

    def distilled_guide(self, guide: Callable, tracer: type) -> tuple[Callable, GuideValues]:
        """Return what a guide is after its set-up, with what was traced apart."""
        return take_out(guide, tracer)

    def current_guide(self, guide: Callable) -> Callable:
        """Return the guide of a set-up with the settings that the runner has now."""
        return guide if isinstance(self.guide, AutoGuide) else self.guide

    def constrains_with_arguments(self, guide: Any) -> bool:
        """Return whether `member_params` reads the arguments of the model."""
        return False

    def check_run(self, first: int, num_steps: int) -> None:
        """Raise an error where the steps to come cannot be taken."""

    def check_guide(self, guide: Callable, args: tuple, kwargs: dict) -> None:
        """Raise an error where the guide does not go with the options."""

    def member_params(self, guide: Callable, params: dict, args: tuple, kwargs: dict) -> dict:
        """Turn one member's `SVI` parameters into those that users see."""
        return params

    def check_model(self, sites: dict) -> None:
        """Raise an error where the model cannot be fitted."""

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
                leading E is per member. What a parameter that is declared without a value is given
                here decides its shape, and is shared.
            **kwargs: keyword arguments of the model.
        """
        keys = member_keys(rng_key, self.ensemble_size)
        starts = start_forms(init_params, keys)
        return self._cache.use(lambda c: c.start(keys, init_params), args, kwargs, starts=starts)

    def get_params(self, state: SVIState) -> dict[str, Any]:
        """Return the constrained parameters of a state, each leaf with a leading `(E,)`.

        Raises:
            ValueError: for a state that does not hold its constraints: NumPyro's own, or one that
                was pickled.
        """
        check_size(state, self.ensemble_size)
        return self._cache.params(state)

    @checked_keywords
    def update(
        self,
        state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[SVIState, jax.Array]:
        """Take one step with every member and return the new state and the losses `(E,)`."""
        check_size(state, self.ensemble_size)
        forward = forward_mode_differentiation
        return self._cache.use(lambda c: c.step(state, False, forward), args, kwargs, state=state)

    @checked_keywords
    def stable_update(
        self,
        state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[SVIState, jax.Array]:
        """Take one step, in which a member whose loss or state fails keeps its last good state."""
        check_size(state, self.ensemble_size)
        forward = forward_mode_differentiation
        return self._cache.use(lambda c: c.step(state, True, forward), args, kwargs, state=state)

    @checked_keywords
    def evaluate(self, state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the members' losses `(E,)`, with the randomness that `update` would use."""
        check_size(state, self.ensemble_size)
        return self._cache.use(lambda call: call.evaluate(state), args, kwargs, state=state)

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
            batch_args: names or positions of the batched arguments (default: every array).
            shared_batches: all members see the same batches, or each its own.
            early_stopping: when a member stops, an `EarlyStopping`.
            callback: `callback(step, state, losses)` after each chunk; a true value ends the run.
            jit_model_args: None makes arrays among the arguments inputs of the program, so that
                other values of equal shapes use it again; a model that looks at their values is
                given them concretely. True never does that, and False always, as `SVI.run`.
            member_args: names or positions of arguments with a leading `(E,)`, one per member.
            chunk_size: steps between two looks at the losses (default: a twentieth of a run that
                has a progress bar, a callback or early stopping).
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
        )
        options.check(num_steps)
        keys = member_keys(rng_key, self.ensemble_size)
        starts = start_forms(init_params, keys)

        def fit(call: FitCall) -> EnsembleResult:
            return self._fit(call, rng_key, keys, num_steps, options)

        result = self._cache.use(
            fit, args, kwargs, options, starts=starts, state=options.init_state
        )
        if not has_tracers((result.params, result.losses)):
            result.seconds = time.perf_counter() - begin
        return result

    def _fit(
        self,
        call: FitCall,
        rng_key: jax.Array,
        keys: jax.Array,
        num_steps: int,
        options: RunOptions,
    ) -> EnsembleResult:
        """Start, or go on from a state, and take the steps of `run`."""
        if options.init_state is None:
            state: SVIState = call.start(keys, options.init_params)
            step: Any = 0
        else:
            state = options.init_state
            check_state(state, call.forms.state, self.ensemble_size)
            step = jnp.max(state.optim_state[0])
        values = call.values_of(state)
        setup = call.setup_with(values)
        batches, stable = call.batches, options.stable_update
        single = rng_key if is_prng_key(rng_key) else keys[0]
        shuffles = None if batches is None else batch_keys(keys, single, batches.shared)
        carry = Carry(
            plain(state),
            None if options.early_stopping is None else first_stop(self.ensemble_size),
            None if batches is None else first_order(batches, self.ensemble_size),
        )
        callback = options.callback
        if callback is not None:

            def report(step: int, state: SVIState, losses: Any) -> Any:
                return callback(step, with_setup(state, setup), losses)

            options = options._replace(callback=report)
        carry, losses, stopped = self._loop(call, carry, num_steps, options, step, values, shuffles)
        params, finite = call.outcome(carry.state, values)
        result = EnsembleResult(params, with_setup(carry.state, setup), jax.device_put(losses))
        if stopped is not None:  # steps that were left out on purpose are no failures either
            result.stopped = stopped | stable
        if not has_tracers((finite, losses)):
            _warn_failed(np.asarray(finite) & np.asarray(result.finite), losses, stable)
        return result

    def _loop(
        self,
        call: FitCall,
        carry: Carry,
        num_steps: int,
        options: RunOptions,
        step: Any,
        values: SetupValues,
        shuffles: Any,
    ) -> tuple[Carry, Any, Any]:
        """Run the compiled loop; under an outer transformation as one chunk without a host."""
        dynamic = call.dynamic
        if traces((carry, step, values, shuffles, call.arguments.leaves)):
            if options.callback is not None:
                raise ValueError("callback cannot be called from inside jit, vmap or grad.")
            whole = call.chunk(num_steps, options, consume=False)
            carry, (losses, flags) = whole(carry, num_steps, 0, step, values, dynamic, shuffles)
            return carry, without_stopped(losses, 0, flags).T, None
        step = int(step)
        self.check_run(step, num_steps)
        looks = (options.progress_bar, options.callback, options.early_stopping)
        size, capacity = capacity_for(num_steps, options.chunk_size, any(looks))
        compiled = call.chunk(capacity, options)
        if options.init_state is not None or options.init_params is not None:
            carry = copy_buffers(carry)  # its arrays may be the user's own

        def chunk(carry: Carry, number: int, done: int) -> tuple[Carry, Any]:
            return compiled(carry, number, done, step + done, values, dynamic, shuffles)

        return train(
            chunk,
            carry,
            num_steps,
            size,
            progress_bar=options.progress_bar,
            callback=options.callback,
            stable=options.stable_update,
            holding_nan=call.arguments.holding_nan,
        )


def _warn_failed(finite: np.ndarray, losses: np.ndarray, stable: bool) -> None:
    """Name the members that have failed since their start."""
    failed = ~finite
    if not stable:
        failed &= np.isfinite(losses).any(axis=1)  # the others were named at their start
    if failed.any():
        warnings.warn(
            f"{failed.sum()} of {finite.size} members ended with values that are not finite: "
            f"{name_members(failed)}. See result.finite; stable_update=True keeps a member's last "
            f"good state.",
            stacklevel=4,
        )
