"""The density that a Laplace guide approximates, at the members' points and at draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
from numpyro.infer.svi import SVIState

from numpyro_ensemble._compat import hessian_of
from numpyro_ensemble.calls.arguments import CallForm
from numpyro_ensemble.density import fill_model
from numpyro_ensemble.fit.call import FitCall
from numpyro_ensemble.fit.member import Member
from numpyro_ensemble.fit.state import STATE_AXES, SetupValues, plain
from numpyro_ensemble.mapping import map_draws


class Curvature(NamedTuple):
    """A density in unconstrained space at the members' points.

    Attributes:
        point: `(E, D)`.
        log_density: `(E,)`, with the Jacobian of the constraints.
        gradient: `(E, D)`.
        precision: `(E, D, D)`, the negative Hessian.
    """

    point: Any
    log_density: Any
    gradient: Any
    precision: Any


def curvatures(call: FitCall, state: SVIState) -> Curvature:
    """Return the density at the members' points, its gradients and its curvatures."""

    def one(member: Member, state: SVIState, values: SetupValues, dynamic: dict) -> Curvature:
        point, unravel = ravel_pytree(member.problem.optim.get_params(state.optim_state))
        loss_of = member.loss_at(state, values, dynamic)

        def loss(point: jax.Array) -> jax.Array:
            return loss_of(unravel(point))

        value, gradient = jax.value_and_grad(loss)(point)
        return Curvature(point, -value, -gradient, hessian_of(member.problem.guide)(loss, point))

    return _over_members(call, "curvature", one)(state)


def draws_at(call: FitCall, state: SVIState, points: jax.Array, key: jax.Array) -> tuple[dict, Any]:
    """Return the model's sites and the log densities at points `(S, D)` in unconstrained space."""

    def one(
        member: Member, state: SVIState, values: SetupValues, dynamic: dict, points: Any, keys: Any
    ) -> tuple[dict, jax.Array]:
        unravel = ravel_pytree(member.problem.optim.get_params(state.optim_state))[1]
        args, kwargs = member.call.rebuild(dynamic)
        loss = member.loss_at(state, values, dynamic)
        guide: Any = member.guide(values)

        def at(draw: tuple) -> tuple[dict, jax.Array]:
            params, key = unravel(draw[0]), draw[1]
            known = guide.median(params)
            trace = fill_model(member.problem.model, key, known, args, kwargs)
            sites = {
                name: site["value"]
                for name, site in trace.items()
                if site["type"] == "deterministic" or name in known
            }
            return sites, -loss(params)

        return map_draws(at, (points, keys))

    keys = jax.random.split(key, len(points))
    return with_first_member(call, ("draws", len(points)), one)(state, points, keys)


def with_first_member(call: FitCall, key: Any, one: Callable) -> Callable:
    """Return a compiled function of a state that uses its first member.

    It is for densities that all members share. It has no `vmap` over members, since XLA's thread
    pool can hang on many factorisations at once.
    """
    programs = call.programs  # a kept program must not hold this call, which holds data

    def build() -> Callable:
        def first(form: CallForm, state: Any, values: SetupValues, *inputs: Any) -> Any:
            state = jax.tree.map(lambda leaf: leaf[0], state)
            own = (values.constraints, values.guide.supports, values.guide.own)
            constraints, supports, own = jax.tree.map(lambda leaf: leaf[0], own)
            guide = values.guide._replace(supports=supports, own=own)
            values = values._replace(constraints=constraints, guide=guide)
            return one(programs.member(form), state, values, *inputs)

        return first

    program = programs.program(key, build)

    def run(state: SVIState, *more: Any) -> Any:
        state = call.filled(state)
        return program(call.form, plain(state), call.values_of(state), call.dynamic, *more)

    return run


def _over_members(call: FitCall, key: Any, one: Callable) -> Callable:
    """Return a compiled function of a member for all members of a state."""
    programs = call.programs

    def build() -> Callable:
        def every(form: CallForm, *inputs: Any) -> Any:
            member = partial(one, programs.member(form))
            return programs.problem.placement.map(member, STATE_AXES)(*inputs)

        return every

    program = programs.program(key, build)

    def run(state: SVIState) -> Any:
        state = call.filled(state)
        found = program(call.form, plain(state), call.values_of(state), call.dynamic)
        return call.cut(found)

    return run
