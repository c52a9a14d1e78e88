"""Optimisers whose step is a line search (optax's) or a whole search (`Minimize`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.optim
import optax
from numpyro.optim import optax_to_numpyro

from numpyro_ensemble.fit.minimisers import LossComparing

_LINE_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


class WholeSearch(LossComparing):
    """`numpyro.optim.Minimize`, whose every step is a whole search.

    Its own state has a function in it, which differs from one compiled program to the next; here
    the state is the parameters.
    """

    def __init__(self, optim: numpyro.optim.Minimize) -> None:
        super().__init__(lambda: (lambda params: params, None, lambda params: params))
        self.optim = optim

    def __repr__(self) -> str:
        return "numpyro.optim.Minimize"

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        """Search for the minimum from where the state is."""
        count, params = state
        outcome, new = self.optim.eval_and_update(fn, (count, self.optim.init(params)[1]))
        return outcome, (new[0], self.optim.get_params(new))

    eval_and_stable_update = eval_and_update  # NumPyro's own method would not change the parameters


class OptaxSearch(LossComparing):
    """An optax transformation that is given the loss, for line searches."""

    def __init__(self, transformation: optax.GradientTransformation) -> None:
        plain = optax_to_numpyro(transformation)
        super().__init__(lambda: (plain.init_fn, plain.update_fn, plain.get_params_fn))
        self.update_with_value = True
        self.transformation = transformation

    def __repr__(self) -> str:
        return "an optax line search (optax.lbfgs, say)"

    def compares_losses(self, state: Any) -> bool:
        """Return whether the state is that of a line search."""
        leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _LINE_SEARCHES))
        return any(isinstance(leaf, _LINE_SEARCHES) for leaf in leaves)

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        """Take one step, with a line search where the transformation makes one."""
        if not self.compares_losses(state):
            return super().eval_and_update(fn, state, forward_mode_differentiation)
        count, (params, inner) = state

        def loss_alone(params: Any) -> jax.Array:
            return fn(params)[0]

        if forward_mode_differentiation:
            loss, other = fn(params)
            gradient = jax.jacfwd(loss_alone)(params)
        else:
            (loss, other), gradient = jax.value_and_grad(fn, has_aux=True)(params)
        search = optax.with_extra_args_support(self.transformation)
        known = {"value": loss, "grad": gradient, "value_fn": loss_alone}
        updates, inner = search.update(gradient, inner, params, **known)
        return (loss, other), (count + 1, (optax.apply_updates(params, updates), inner))

    def eval_and_stable_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        """Take one step, but keep the state where the loss or the new state is not finite."""
        forward = forward_mode_differentiation
        if not self.compares_losses(state):
            return super().eval_and_stable_update(fn, state, forward)
        (loss, other), new = self.eval_and_update(fn, state, forward)
        good = jnp.isfinite(loss)
        for leaf in jax.tree.leaves(self.get_params(new)):
            good &= jnp.isfinite(leaf).all()
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        return (jnp.where(good, loss, jnp.nan), other), kept
