"""One member after its start: a plain `SVI` as pure functions of its state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from numpyro.distributions import biject_to, constraints
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.infer.util import transform_fn
from numpyro.primitives import Messenger

from numpyro_ensemble.calls.arguments import ROW_AXES, CallForm
from numpyro_ensemble.fit.batches import Batches
from numpyro_ensemble.fit.forces import Pull
from numpyro_ensemble.fit.loop import keep_good
from numpyro_ensemble.fit.optimisers import GradientOnly
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.fit.setup import SetupTemplate
from numpyro_ensemble.fit.slots import filled_guide
from numpyro_ensemble.fit.starts import arrays_alone
from numpyro_ensemble.fit.state import SetupValues
from numpyro_ensemble.results import converged


class Noting(Messenger):
    """A handler that notes the constraints of parameters."""

    def __init__(self, fn: Callable) -> None:
        self.constraints: dict[str, Any] = {}
        super().__init__(fn)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Note a parameter's constraint."""
        if msg["type"] == "param":
            self.constraints[msg["name"]] = msg["kwargs"].get("constraint", constraints.real)

    def transforms(self) -> dict[str, Any]:
        """Return the transforms by which `SVI` constrains these parameters."""
        return {name: biject_to(constraint) for name, constraint in self.constraints.items()}


class Member(NamedTuple):
    """Pure functions of one member's state, its set-up's values, and its arguments."""

    problem: Problem
    call: CallForm
    batches: Batches | None
    template: SetupTemplate

    def guide(self, values: SetupValues) -> Callable:
        """Return the guide, with the values of the member's own set-up in it."""
        return self.problem.current_guide(filled_guide(self.template, values.guide))

    def svi(self, state: SVIState, values: SetupValues, scale: float = 1.0) -> SVI:
        """Return a plain SVI, as it is after its `init`."""
        model, guide = self.problem.weighted(self.guide(values), scale, state.optim_state[0])
        svi = SVI(model, guide, self.problem.optim, self.problem.loss)
        constraints = iter(values.constraints)
        leaves = [next(constraints) if leaf is None else leaf for leaf in self.template.leaves]
        transforms = jax.tree.unflatten(self.template.transforms, leaves)
        svi.constrain_fn = partial(transform_fn, transforms)
        return svi

    def arguments(self, dynamic: dict, rows: Any) -> tuple[tuple, dict, float]:
        """Return the arguments on these rows, if there are any, and the likelihood's weight."""
        scale = 1.0
        if rows is not None and self.batches is not None:
            scale = self.batches.total / rows.shape[-1]
            dynamic = dict(dynamic)
            for kind in ROW_AXES:  # one member's own arrays lead with their rows too
                kept = [leaf.at[rows].get(mode="promise_in_bounds") for leaf in dynamic[kind]]
                dynamic[kind] = kept
        return *self.call.rebuild(dynamic), scale

    def update(
        self, state: SVIState, values: SetupValues, dynamic: dict, rows: Any, stable: bool,
        forward: bool,
    ) -> tuple[SVIState, jax.Array]:  # fmt: skip
        """Take one step, on these rows of the batched arguments if there are any."""
        args, kwargs, scale = self.arguments(dynamic, rows)
        svi = self.svi(state, values, scale)
        step = svi.stable_update if stable else svi.update
        new, loss = step(state, *args, forward_mode_differentiation=forward, **kwargs)
        return self._settled(state, new, loss, stable, rows is not None)

    def _settled(
        self, state: SVIState, new: SVIState, loss: jax.Array, stable: bool, counts: bool
    ) -> tuple[SVIState, jax.Array]:
        """Return the state after a step, held where the step failed or the member has ended."""
        if new.mutable_state is None:  # losses of several particles do not set it
            new = new._replace(mutable_state=state.mutable_state)
        if stable:
            new, loss = keep_good(state, new, loss, counts)
        ended = converged(state)
        if ended is not None:  # nothing of the member changes any more, nor its key
            new = jax.tree.map(lambda a, b: jnp.where(ended, a, b), state, new)
        return new, loss

    def pull(
        self, state: SVIState, values: SetupValues, dynamic: dict, rows: Any, forward: bool
    ) -> Pull:
        """Return what the member contributes to a step with repulsion."""
        args, kwargs, scale = self.arguments(dynamic, rows)
        svi = self.svi(state, values, scale)
        svi.optim = GradientOnly(svi.optim)
        new, loss = svi.update(state, *args, forward_mode_differentiation=forward, **kwargs)
        place, step = self.place(state, values, dynamic), state.optim_state[0]
        return Pull(new._replace(optim_state=None), loss, new.optim_state, place, step)

    def move(
        self, state: SVIState, values: SetupValues, dynamic: dict, pull: Pull, gradient: Any,
        push: Any, stable: bool, counts: bool,
    ) -> tuple[SVIState, jax.Array]:  # fmt: skip
        """Take the optimiser's step along a gradient, less a push on the values of a function."""
        optim = self.problem.optim
        if push is not None:
            params = optim.get_params(state.optim_state)
            (push,) = jax.vjp(self.place_at(state, values, dynamic), params)[1](push)
            gradient = jax.tree.map(jnp.subtract, gradient, push)
        optim_state = optim.update(gradient, state.optim_state, value=pull.loss)
        new = pull.state._replace(optim_state=optim_state)
        return self._settled(state, new, pull.loss, stable, counts)

    def place_at(self, state: SVIState, values: SetupValues, dynamic: dict) -> Callable:
        """Return the member's place as a function of unconstrained parameters, see `Pull`."""
        repulsion = self.problem.repulsion
        if not repulsion.in_function_space:
            return lambda params: params

        def place(params: dict) -> Any:
            known = self.shown(state, values, dynamic, params)
            return repulsion.outputs(self.problem.model, known, state.mutable_state or {})

        return place

    def place(self, state: SVIState, values: SetupValues, dynamic: dict) -> Any:
        """Return the member's place, see `Pull`."""
        params = self.problem.optim.get_params(state.optim_state)
        return self.place_at(state, values, dynamic)(params)

    def loss_at(self, state: SVIState, values: SetupValues, dynamic: dict) -> Callable:
        """Return the loss as a function of unconstrained parameters, and of rows if there are any.

        Its randomness is that of the next step.
        """
        key = jax.random.split(state.rng_key)[1]  # as SVI.evaluate

        def loss(params: dict, rows: Any = None) -> jax.Array:
            args, kwargs, scale = self.arguments(dynamic, rows)
            svi = self.svi(state, values, scale)
            every = {**svi.constrain_fn(params), **(state.mutable_state or {})}
            return svi.loss.loss(key, every, svi.model, svi.guide, *args, **kwargs)

        return loss

    def loss(self, state: SVIState, values: SetupValues, dynamic: dict) -> jax.Array:
        """Return the loss, with the randomness of the next step."""
        params = self.problem.optim.get_params(state.optim_state)
        return self.loss_at(state, values, dynamic)(params)

    def slope(
        self, state: SVIState, values: SetupValues, dynamic: dict, forward: bool
    ) -> jax.Array:
        """Return the length of the loss's gradient in the unconstrained parameters.

        It is that over all rows, summed over batches where there are any: a batch's loss weighs
        its rows by `N / |B|`, and the mean over an epoch by `|B| / N`.
        """
        params = self.problem.optim.get_params(state.optim_state)
        differentiate = jax.jacfwd if forward else jax.grad
        gradient_of = differentiate(self.loss_at(state, values, dynamic))
        if self.batches is None:
            return optax.tree.norm(gradient_of(params))
        size, total = self.batches.size, self.batches.total

        def add(sum_so_far: Any, rows: jax.Array) -> tuple[Any, None]:
            part, weight = gradient_of(params, rows), rows.shape[-1] / total
            return jax.tree.map(lambda a, b: a + weight * b, sum_so_far, part), None

        full = jnp.arange(total - self.batches.ragged).reshape(-1, size)
        gradient, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), full)
        if self.batches.ragged:
            gradient, _ = add(gradient, jnp.arange(total - self.batches.ragged, total))
        return optax.tree.norm(gradient)

    def params(self, state: SVIState, values: SetupValues, dynamic: dict) -> dict[str, Any]:
        """Return the parameters, as users see them."""
        return self.shown(state, values, dynamic, self.problem.optim.get_params(state.optim_state))

    def shown(
        self, state: SVIState, values: SetupValues, dynamic: dict, params: dict
    ) -> dict[str, Any]:
        """Return unconstrained parameters in the form that users see."""
        args, kwargs = self.call.rebuild(dynamic)
        params = self.svi(state, values).constrain_fn(params)
        guide = self.problem.current_guide(self.template.guide)
        return arrays_alone(self.problem.member_params(guide, params, args, kwargs))
