"""The density that chains sample: a model's, for the arguments it is given, or one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy

from numpyro_ensemble.density import anatomy, filled_trace
from numpyro_ensemble.mcmc.layout import laid_out

_VALUE_NEEDED = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)


class Target:
    """A model or a potential energy, without arguments: every method is given its own.

    Nothing of a call is kept, so that no density can be stale.

    Args:
        model: a NumPyro model, or None.
        potential_fn: a function of a pytree of unconstrained values, or None.
        init_strategy: where `initial` takes its values from.
    """

    def __init__(
        self,
        model: Callable | None,
        potential_fn: Callable | None = None,
        init_strategy: Callable = init_to_uniform,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("Give one of model and potential_fn.")
        for name, fn in (("model", model), ("potential_fn", potential_fn)):
            if fn is not None and not callable(fn):
                raise TypeError(f"{name} takes a function, got {fn!r}.")
        if not callable(init_strategy):
            raise TypeError(f"init_strategy takes a NumPyro strategy, got {init_strategy!r}.")
        self.model, self.potential_fn, self.init_strategy = model, potential_fn, init_strategy
        self._programs: dict[Any, Callable] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_programs": {}}

    def log_density(self, args: tuple, kwargs: dict) -> Callable[[Any], jax.Array]:
        """Return the log density over unconstrained values."""
        if self.potential_fn is not None:
            potential_fn = self.potential_fn
            return lambda z: -potential_fn(z)
        # concrete arguments stay so: a model may look at them
        arguments = Arguments(args, kwargs, lambda leaf: isinstance(leaf, jax.core.Tracer))

        def density(z: Any, data: tuple[list, dict]) -> jax.Array:
            args, kwargs = arguments.rebuild(data[0])
            return -potential_energy(self._with(data[1]), args, kwargs, z)

        density = laid_out(density)
        data = arguments.arrays, self._fixed(args, kwargs)
        return lambda z: density(z, data)

    def smooth_density(self, args: tuple, kwargs: dict) -> Callable[[Any], jax.Array]:
        """Return the same in a form that can be differentiated twice."""
        model = self.prepared(args, kwargs)
        return lambda z: -potential_energy(model, args, kwargs, z)

    def constrain(self, args: tuple, kwargs: dict) -> Callable[[Any], Any]:
        """Return the map to the model's sites, deterministic ones included."""
        if self.potential_fn is not None:
            return lambda z: z
        model = self.prepared(args, kwargs)
        return lambda z: constrain_fn(model, args, kwargs, z, return_deterministic=True)

    def initial(self, keys: jax.Array, args: tuple, kwargs: dict) -> Any:
        """Draw one valid start for each key, by the initialisation strategy."""
        info = initialize_model(
            keys,
            self.model,
            init_strategy=self.init_strategy,
            dynamic_args=True,
            model_args=args,
            model_kwargs=kwargs,
        )
        return info.param_info.z

    def prepared(self, args: tuple, kwargs: dict) -> Callable:
        """Give the model a key, and parameters and mutable state the values of one start."""
        return self._with(self._fixed(args, kwargs))

    def _fixed(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        assert self.model is not None
        trace = filled_trace(self.model, args, kwargs)
        return {k: v["value"] for k, v in trace.items() if v["type"] in ("param", "mutable")}

    def _with(self, fixed: dict[str, Any]) -> Callable:
        return handlers.seed(handlers.substitute(self.model, data=fixed), jax.random.key(0))

    def check(self, args: tuple, kwargs: dict) -> tuple[str, ...] | None:
        """Return the names of the latent sites, None without a model.

        Raises:
            ValueError: for a latent site that no gradient can move.
        """
        if self.model is None:
            return None
        sites = anatomy(self.model, args, kwargs).values()
        for site in sites:
            if site.kind == "discrete":
                raise ValueError(
                    f"latent site {site.name!r} is discrete ({site.distribution}), and these "
                    f"kernels follow gradients. Sum it out of the model (MixtureSameFamily, for "
                    f"example) or observe it; NumPyro's DiscreteHMCGibbs(NUTS(model)) samples it."
                )
            if site.kind == "latent" and site.distribution == "Delta":
                raise ValueError(
                    f"latent site {site.name!r} is a Delta, which has no density to sample. Write "
                    f"numpyro.deterministic({site.name!r}, value) instead."
                )
        return tuple(site.name for site in sites if site.kind == "latent")

    def compiled(self, name: Any, fn: Callable, args: tuple, kwargs: dict) -> Callable:
        """Compile `fn(*inputs, args, kwargs)`, once for all arguments of the same shapes if it can.

        Arrays among the arguments are traced, so that the program serves other data too. A model
        that looks at their values is compiled for them instead, anew in every call.
        """
        arguments = Arguments(args, kwargs)

        def run(*inputs: Any) -> Any:
            try:
                return self._program(
                    (name, arguments.form),
                    lambda arrays, *inputs: fn(*inputs, *arguments.rebuild(arrays)),
                )(arguments.arrays, *inputs)
            except _VALUE_NEEDED:
                return jax.jit(lambda *inputs: fn(*inputs, args, kwargs))(*inputs)

        return run

    def _program(self, key: Any, fn: Callable) -> Callable:
        try:
            return self._programs.setdefault(key, jax.jit(fn))
        except TypeError:  # an argument that cannot be hashed
            return jax.jit(fn)


class Arguments:
    """A model's arguments, taken apart into those to be traced, arrays say, and the rest."""

    def __init__(self, args: tuple, kwargs: dict, traced: Callable | None = None) -> None:
        leaves, self._treedef = jax.tree.flatten((args, kwargs))
        self._traced = tuple(map(traced or _is_array, leaves))
        self.arrays = [x for x, t in zip(leaves, self._traced, strict=True) if t]
        self._rest = tuple(None if t else x for x, t in zip(leaves, self._traced, strict=True))

    @property
    def form(self) -> tuple:
        """What is not traced, to be compared."""
        return self._treedef, self._traced, self._rest, tuple(map(type, self._rest))

    def rebuild(self, arrays: list) -> tuple[tuple, dict]:
        """Put other arrays in the arguments' places."""
        left = iter(arrays)
        pairs = zip(self._rest, self._traced, strict=True)
        return self._treedef.unflatten([next(left) if t else x for x, t in pairs])


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return True
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"


def flat(tree: Any) -> jax.Array:
    """Return each chain's values as one row, `(C, d)`."""
    return jax.vmap(lambda leaf: ravel_pytree(leaf)[0])(tree)


def site_of(tree: Any, coordinate: int) -> str:
    """Name the entry of one chain's tree that a coordinate of its row belongs to."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = int(np.prod(np.shape(leaf)[1:]))
        if coordinate < size:
            return jax.tree_util.keystr(path, simple=True, separator=".") or "the position"
        coordinate -= size
    raise IndexError(coordinate)


def per_chain(tree: Any, num_chains: int) -> Any:
    """Repeat shared values for every chain: MCMC collects only what has a leading chain axis."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_chains, *jnp.shape(x))), jax.tree.map(jnp.asarray, tree)
    )


def shared(tree: Any) -> Any:
    """Undo `per_chain`."""
    return jax.tree.map(lambda x: x[0], tree)


def all_finite(*trees: Any) -> jax.Array:
    """Say of each chain whether all its numbers are finite."""
    return jnp.stack([jnp.isfinite(flat(tree)).all(axis=1) for tree in trees]).all(axis=0)


def choose(flags: jax.Array, yes: Any, no: Any) -> Any:
    """Take each chain from one of two trees."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(flags.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)
