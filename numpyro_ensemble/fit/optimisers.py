"""Choosing an optimiser, and adapting optimisers that `SVI` does not know."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpyro.optim
import optax

from numpyro_ensemble._compat import NumPyroOptimiser
from numpyro_ensemble.fit.line_searches import OptaxSearch, WholeSearch
from numpyro_ensemble.fit.minimisers import Minimiser, is_minimiser


def choose_optimizer(optimizer: Any, learning_rate: float | None) -> Any:
    """Return the optimiser given, or Adam at the rate given, 5e-3 by default.

    Raises:
        ValueError: if both are given.
    """
    if optimizer is not None and learning_rate is not None:
        raise ValueError(
            f"give either optimizer or learning_rate, not both: got learning_rate={learning_rate} "
            f"and an optimizer, which has a rate of its own."
        )
    if optimizer is not None:
        return optimizer
    return optax.adam(5e-3 if learning_rate is None else learning_rate)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclass(frozen=True)
class _Held:
    """A number that belongs to the structure of a state, not to its values."""

    value: int


class GradientOnly(NumPyroOptimiser):
    """An optimiser that takes no step: its next state is the gradient."""

    def __init__(self, optim: NumPyroOptimiser) -> None:
        super().__init__(lambda: (optim.init_fn, None, optim.get_params_fn))

    def update(self, g: Any, state: Any, value: Any = None) -> Any:
        """Return the gradient."""
        return g


def adapted(optim: Any) -> Any:
    """Return an optimiser with NumPyro's interface, if `SVI` does not wrap it well enough.

    Raises:
        TypeError: for a solver of optimistix that is not a minimiser.
    """
    if is_minimiser(optim):
        return Minimiser(optim)
    if isinstance(optim, numpyro.optim.Minimize):
        return WholeSearch(optim)
    if isinstance(optim, optax.GradientTransformation):
        return OptaxSearch(optim)
    return optim


def loopable(optim: Any) -> Any:
    """Return an optimiser whose state holds arrays alone.

    SM3 keeps the shape of each parameter in its state as plain numbers, which a compiled loop would
    turn into arrays and then not accept as a shape.
    """
    if not isinstance(optim, numpyro.optim.SM3):
        return optim

    def hold(state: Any) -> Any:
        return jax.tree.map(lambda x: _Held(x) if isinstance(x, int) else x, state)

    def release(state: Any) -> Any:
        held = lambda x: isinstance(x, _Held)  # noqa: E731
        return jax.tree.map(lambda x: x.value if held(x) else x, state, is_leaf=held)

    new = copy.copy(optim)
    new.init_fn = lambda params: hold(optim.init_fn(params))
    new.update_fn = lambda i, grads, state: hold(optim.update_fn(i, grads, release(state)))
    new.get_params_fn = lambda state: optim.get_params_fn(release(state))
    return new
