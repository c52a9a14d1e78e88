"""Ensembles as pure functions: any pytree, any log joint density, any optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from numpyro.util import is_prng_key

from numpyro_ensemble.handlers import check_count, check_weight, is_zero, key_of


class _Array:
    """Stands for an array in the structure of a tree."""

    def __repr__(self) -> str:
        return "array"

    def __reduce__(self) -> str:
        return "_ARRAY"  # there is one, also after pickling


_ARRAY = _Array()


@jax.tree_util.register_pytree_node_class
class EnsembleState:
    """Stacked members and the states of their optimisers.

    It is a pytree of arrays: functions, strings and numbers inside `params` (the activations of an
    Equinox module, say) count as its structure, so that it passes through `jax.jit`.

    Attributes:
        params: the members; real arrays have a leading `(E,)`, everything else is shared.
        opt_state: the optimiser's state, each leaf with a leading `(E,)`.

    The example of `ensemble_init` makes one.
    """

    def __init__(self, params: Any, opt_state: Any) -> None:
        leaves, treedef = jax.tree.flatten(params)
        arrays = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
        self._arrays = [leaf for leaf, a in zip(leaves, arrays, strict=True) if a]
        shared = tuple(_ARRAY if a else leaf for leaf, a in zip(leaves, arrays, strict=True))
        self._structure = (treedef, shared)
        self.opt_state = opt_state

    @property
    def params(self) -> Any:
        """The members."""
        treedef, shared = self._structure
        arrays = iter(self._arrays)
        return treedef.unflatten([next(arrays) if leaf is _ARRAY else leaf for leaf in shared])

    def __repr__(self) -> str:
        return f"EnsembleState(params={self.params!r}, opt_state={self.opt_state!r})"

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Split into arrays and structure."""
        return (self._arrays, self.opt_state), self._structure

    @classmethod
    def tree_unflatten(cls, structure: tuple, children: tuple) -> EnsembleState:
        """Put arrays, or whatever stands in their places, and structure together again."""
        new = object.__new__(cls)
        new._structure = structure
        new._arrays, new.opt_state = children
        return new


def is_inexact(leaf: Any) -> bool:
    """Return whether a leaf is an array of real or complex numbers: what a fit can train."""
    kinds = np.ndarray | np.generic | jax.Array
    return isinstance(leaf, kinds) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def partition(tree: Any) -> tuple[Any, Any]:
    """Split a pytree into its trainable arrays and the rest, with None in the gaps of each."""
    arrays = jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if is_inexact(leaf) else leaf, tree)
    return arrays, rest


def combine(arrays: Any, rest: Any) -> Any:
    """Undo `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, arrays, rest, is_leaf=lambda leaf: leaf is None
    )


def member_keys(rng_key: Any, ensemble_size: int, *, name: str = "rng_key") -> jax.Array:
    """Return the keys of the members: one key is split, E keys are taken as they are.

    Raises:
        ValueError: if it is neither, nor an integer, which stands for one key.
    """
    rng_key = key_of(rng_key)
    if is_prng_key(rng_key):
        return jax.random.split(rng_key, ensemble_size)
    typed = jnp.issubdtype(getattr(rng_key, "dtype", np.dtype(object)), jax.dtypes.prng_key)
    shape = np.shape(rng_key)
    if shape != ((ensemble_size,) if typed else (ensemble_size, 2)):
        raise ValueError(
            f"{name} takes one key or ensemble_size={ensemble_size} keys, got an object of type "
            f"{type(rng_key).__name__} and shape {shape}."
        )
    return rng_key


def stack_members(init_fn: Callable, keys: jax.Array) -> Any:
    """Make one member with each key and stack them; what cannot be trained is the first one's."""
    first: list[Any] = []

    def one(key: jax.Array) -> list[jax.Array]:
        leaves, treedef = jax.tree.flatten(init_fn(key))
        arrays = [isinstance(leaf, np.ndarray | np.generic | jax.Array) for leaf in leaves]
        if not any(is_inexact(leaf) for leaf in leaves):
            raise ValueError(
                f"init_fn makes nothing that can be trained: it returned "
                f"{jax.tree.unflatten(treedef, leaves)!r}, without an array of real numbers. Wrap "
                f"numbers in jax.numpy.asarray."
            )
        first[:] = [treedef, [_ARRAY if a else x for x, a in zip(leaves, arrays, strict=True)]]
        return [jnp.asarray(x) for x, a in zip(leaves, arrays, strict=True) if a]

    try:
        stacked = iter(jax.jit(jax.vmap(one))(keys))
    except Exception as error:
        if any(is_inexact(leaf) for leaf in jax.tree.leaves(init_fn)):
            raise TypeError(
                f"init_fn takes a function that makes one member from a key, got a member "
                f"({type(init_fn).__name__}). Make it inside of one: lambda key: ..."
            ) from error
        raise
    treedef, shared = first
    leaves = [next(stacked) if leaf is _ARRAY else leaf for leaf in shared]
    leaves = [
        leaf if is_inexact(leaf) or mark is not _ARRAY else leaf[0]
        for leaf, mark in zip(leaves, shared, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def ensemble_init(
    init_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    ensemble_size: int,
    rng_key: int | jax.Array | None = None,
    seed: int | jax.Array | None = None,
) -> EnsembleState:
    """Make the members of an ensemble and the states of their optimisers.

    Args:
        init_fn: makes one member, any pytree, from a key.
        optimizer: an optax transformation.
        ensemble_size: number of members E.
        rng_key: one key (split into E), E keys, or an integer that stands for one key.
        seed: another name of `rng_key`.

    Raises:
        ValueError: if `ensemble_size` is below 1, or the keys are of another number.
        TypeError: if both names are given, or neither.

    Example:
        >>> import jax, optax
        >>> from numpyro_ensemble import ensemble_init
        >>> state = ensemble_init(
        ...     lambda key: {"w": jax.random.normal(key, (3,))}, optax.adam(0.1),
        ...     ensemble_size=4, rng_key=jax.random.key(0))
        >>> state.params["w"].shape
        (4, 3)
    """
    check_count("ensemble_size", ensemble_size)
    if (rng_key is None) == (seed is None):
        given = "neither" if rng_key is None else "both"
        raise TypeError(f"ensemble_init takes rng_key, or its other name seed; got {given}.")
    name = "seed" if rng_key is None else "rng_key"
    keys = member_keys(seed if rng_key is None else rng_key, ensemble_size, name=name)
    params = stack_members(init_fn, keys)
    return EnsembleState(params, jax.vmap(optimizer.init)(partition(params)[0]))


def density_parts(returned: Any) -> tuple[Any, Any]:
    """Return the log likelihood and the log prior that a density has returned.

    Raises:
        TypeError: if these are not two values.
    """
    try:
        log_likelihood, log_prior = returned
    except (TypeError, ValueError):
        shape = getattr(returned, "shape", None)
        told = f"a {type(returned).__name__}" if shape is None else f"an array of shape {shape}"
        raise TypeError(
            f"log_joint must return two numbers, (log_likelihood, log_prior); it returned {told}."
        ) from None
    return log_likelihood, log_prior


def ensemble_loss(
    log_joint: Callable, *, prior_weight: ArrayLike = 1.0, scale: ArrayLike = 1.0
) -> Callable[..., jax.Array]:
    """Return one member's loss, `-(scale * log_likelihood + prior_weight * log_prior)`.

    Args:
        log_joint: `(params, *batch) -> (log_likelihood, log_prior)`.
        prior_weight: weight of the prior; a Python 0 drops it exactly.
        scale: weight of the likelihood, `N / |B|` for batches.

    Raises:
        ValueError: if a weight is negative.

    Example:
        >>> from numpyro_ensemble import ensemble_loss
        >>> loss = ensemble_loss(lambda w, y: (-(y - w) ** 2, -w**2), prior_weight=0)
        >>> loss(1.0, 3.0)
        4.0
    """
    prior_weight = check_weight("prior_weight", prior_weight)
    scale = check_weight("scale", scale)

    def loss(params: Any, *batch: Any) -> jax.Array:
        log_likelihood, log_prior = density_parts(log_joint(params, *batch))
        if is_zero(prior_weight):
            return -(scale * log_likelihood)
        return -(scale * log_likelihood + prior_weight * log_prior)

    return loss


def ensemble_step(
    state: EnsembleState,
    *batch: Any,
    log_joint: Callable,
    optimizer: optax.GradientTransformation,
    prior_weight: ArrayLike = 1.0,
    scale: ArrayLike = 1.0,
) -> tuple[EnsembleState, jax.Array]:
    """Take one gradient step with every member.

    Args:
        state: the members and their optimisers' states.
        *batch: passed on to `log_joint`, the same for all members.
        log_joint: `(params, *batch) -> (log_likelihood, log_prior)`.
        optimizer: the transformation that `state` was made with.
        prior_weight: see `ensemble_loss`.
        scale: see `ensemble_loss`.

    Returns:
        The new state and the losses `(E,)` at the old one.

    Example:
        >>> import functools, jax, optax
        >>> from numpyro_ensemble import ensemble_init, ensemble_step
        >>> adam = optax.adam(0.1)
        >>> step = jax.jit(functools.partial(
        ...     ensemble_step, log_joint=lambda w, y: (-((y - w) ** 2), -(w**2)), optimizer=adam))
        >>> state = ensemble_init(jax.random.normal, adam, ensemble_size=2, seed=0)
        >>> for _ in range(200):
        ...     state, losses = step(state, 1.0)
        >>> print(state.params.round(2))
        [0.5 0.5]
    """
    arrays, shared = partition(state.params)
    loss = ensemble_loss(log_joint, prior_weight=prior_weight, scale=scale)
    update = optax.with_extra_args_support(optimizer).update

    def one(arrays: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
        def objective(arrays: Any) -> jax.Array:
            return loss(combine(arrays, shared), *batch)

        value, grad = jax.value_and_grad(objective)(arrays)
        extra = {"value": value, "grad": grad, "value_fn": objective}  # for line searches
        updates, opt_state = update(grad, opt_state, arrays, **extra)
        return optax.apply_updates(arrays, updates), opt_state, value

    arrays, opt_state, losses = jax.vmap(one)(arrays, state.opt_state)
    return EnsembleState(combine(arrays, shared), opt_state), losses


def ensemble_predict(params: Any, predict_fn: Callable, *inputs: Any) -> Any:
    """Apply a function to every member and stack what it returns.

    Args:
        params: stacked members.
        predict_fn: `(member, *inputs) -> prediction`.
        *inputs: shared by all members.

    Returns:
        The predictions, each leaf with a leading `(E,)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_ensemble import ensemble_predict
        >>> ensemble_predict(jnp.array([1.0, 2.0]), lambda w, x: w * x, jnp.ones(3)).shape
        (2, 3)
    """
    arrays, shared = partition(params)
    return jax.vmap(lambda member: predict_fn(combine(member, shared), *inputs))(arrays)
