"""Optimistix minimisers as optimisers of NumPyro, with one evaluation of the loss per step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ensemble._compat import NumPyroOptimiser

_ROUNDINGS = 10  # a criterion below this many units of rounding is never met
_TOLERANCE = 1e-8
_HISTORY = 10  # optimistix's own


class MinimiserState(NamedTuple):
    """The state of a minimiser for one member.

    Attributes:
        params: unconstrained parameters by name.
        point: the same as one vector, in the precision that the solver works in.
        solver: the arrays of the solver's own state.
        loss: that of the last step.
        converged: whether the solver's criterion is met; a member that has met it stays as it is.
    """

    params: Any
    point: jax.Array
    solver: list[jax.Array]
    loss: jax.Array
    converged: jax.Array


class LossComparing(NumPyroOptimiser):
    """An optimiser that compares losses at different points, and so needs a loss without noise."""

    def compares_losses(self, state: Any) -> bool:
        """Return whether the optimiser with this state compares losses."""
        return True


class Minimiser(LossComparing):
    """A minimiser of optimistix with the interface of NumPyro's optimisers.

    A step evaluates the loss once, at a point that the solver then accepts or rejects, so that
    the members of an ensemble step together, independently of their line searches. The loss of a
    step is that at the parameters before it, as in `SVI.update`.

    Args:
        solver: an `optimistix.AbstractMinimiser`.
    """

    def __init__(self, solver: Any) -> None:
        super().__init__(lambda: (self._begin, None, lambda state: state.params))
        self.solver = solver

    def __repr__(self) -> str:
        innermost = _innermost(self.solver)
        return f"{type(innermost).__name__}(rtol={innermost.rtol}, atol={innermost.atol})"

    def _begin(self, params: Any) -> MinimiserState:
        point = _ravelled(params)[0]
        dynamic, _ = self._parts(point)
        loss = jnp.asarray(jnp.inf, point.dtype)
        return MinimiserState(params, point, jax.tree.leaves(dynamic), loss, jnp.asarray(False))

    def _parts(self, point: jax.Array) -> tuple[Any, Any]:
        """Return the arrays and the structure of the solver's state at a start."""
        import equinox

        form = jax.ShapeDtypeStruct((), point.dtype)
        solver, nothing = self.reachable(point.dtype), frozenset[object]()
        state = solver.init(_no_loss, point, None, {}, form, form, nothing)
        return equinox.partition(state, equinox.is_array)

    def reachable(self, dtype: Any) -> Any:
        """Return the solver with a criterion that numbers of this dtype can meet."""
        import equinox

        floor = _ROUNDINGS * float(jnp.finfo(dtype).eps)

        def tolerances(solver: Any) -> list[Any]:
            innermost = _innermost(solver)
            return [innermost.rtol, innermost.atol]

        return equinox.tree_at(tolerances, self.solver, replace_fn=lambda x: max(x, floor))

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        """Take one step of the solver."""
        import equinox

        count, (params, point, leaves, *_) = state
        restore = _ravelled(params)[1]
        mutable: list[Any] = []

        def objective(point: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
            loss, other = fn(restore(point))
            mutable.append(jax.tree.structure(other))
            loss = loss.astype(point.dtype)
            # far away a log density may overflow to +inf: accepted, it would make the next step NaN
            return jnp.where(loss == -jnp.inf, jnp.inf, loss), loss

        options = {"autodiff_mode": "fwd" if forward_mode_differentiation else "bwd"}
        solver, tags = self.reachable(point.dtype), frozenset[object]()
        dynamic, static = self._parts(point)
        dynamic = jax.tree.unflatten(jax.tree.structure(dynamic), leaves)
        before = equinox.combine(dynamic, static)
        point, after, loss = solver.step(objective, point, None, options, before, tags)
        converged, _ = solver.terminate(objective, point, None, options, after, tags)
        params = restore(point)
        leaves = jax.tree.leaves(equinox.filter(after, equinox.is_array))
        # mutable state is that of the parameters, not of a point that was rejected
        other = fn(params)[1] if mutable[0].num_leaves else None
        new = MinimiserState(params, point, leaves, loss, converged & jnp.isfinite(loss))
        return (loss, other), (count + 1, self.noted(new, after))

    eval_and_stable_update = eval_and_update  # a step to values that are not finite is rejected

    def noted(self, new: MinimiserState, solver: Any) -> Any:
        """Return the state after a step; a subclass adds values from the solver's state.

        Args:
            new: the state after the step.
            solver: the solver's own state after the step.
        """
        return new


def is_minimiser(optim: Any) -> bool:
    """Return whether an optimiser is a minimiser of optimistix.

    Raises:
        TypeError: for a solver of optimistix that solves another problem.
    """
    optimistix = sys.modules.get("optimistix")  # without the import no object can be a minimiser
    if optimistix is None or not isinstance(optim, optimistix.AbstractIterativeSolver):
        return False
    if not isinstance(optim, optimistix.AbstractMinimiser):
        raise TypeError(
            f"optim takes a minimiser of optimistix, optimistix.LBFGS(rtol=1e-8, atol=1e-8) say; "
            f"{type(optim).__name__} solves another kind of problem."
        )
    return True


def default_minimiser(tolerance: float = _TOLERANCE, history: int = _HISTORY) -> Any:
    """Return the minimiser that is used if no optimiser is given.

    Args:
        tolerance: of its criterion, relative and absolute.
        history: number of steps that it reads the curvature from.
    """
    import optimistix

    return optimistix.LBFGS(rtol=tolerance, atol=tolerance, history_length=history)


def _innermost(solver: Any) -> Any:
    """Return the solver within wrappers such as `optimistix.BestSoFarMinimiser`."""
    while hasattr(solver, "solver"):
        solver = solver.solver
    return solver


def _ravelled(params: Any) -> tuple[jax.Array, Callable]:
    """Return parameters as a vector of JAX's own precision, and the function that undoes it.

    Optimistix keeps histories in that precision, whatever that of the parameters.
    """
    vector, unravel = ravel_pytree(params)
    wide = jnp.result_type(vector.dtype, float)
    return vector.astype(wide), lambda point: unravel(point.astype(vector.dtype))


def _no_loss(point: Any, args: Any) -> Any:
    raise TypeError(
        "optim takes a minimiser whose init does not evaluate the loss, as those of optimistix."
    )
