"""The density that chains sample: that of a model with its arguments, or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy

from numpyro_ensemble.calls.arguments import arrange, with_nan
from numpyro_ensemble.calls.identity import closure_fingerprint
from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.density import Site, model_sites, unchecked_trace
from numpyro_ensemble.enumeration import (
    as_marked,
    check_funsor,
    check_scan_latents,
    depends_on_sums,
    enumerated,
    is_discrete_latent,
    num_plate_dims,
)
from numpyro_ensemble.mcmc.layout import laid_out, primitives_of
from numpyro_ensemble.mcmc.positions import Coordinates
from numpyro_ensemble.sharding import Placement


class Target:
    """A model or a potential energy. The model's arguments are passed to each method.

    An instance keeps only compiled programs, for arguments and closures that they can serve.

    Args:
        model: a NumPyro model, or None.
        potential_fn: a function of a pytree of unconstrained values, or None.
        init_strategy: the NumPyro initialisation strategy of `initial`.
        placement: devices of the chains.
    """

    def __init__(
        self,
        model: Callable | None,
        potential_fn: Callable | None = None,
        init_strategy: Callable = init_to_uniform,
        placement: Placement | None = None,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("Give one of model and potential_fn.")
        for name, fn in (("model", model), ("potential_fn", potential_fn)):
            if fn is not None and not callable(fn):
                raise TypeError(f"{name} takes a function, got {fn!r}.")
        if not callable(init_strategy):
            raise TypeError(f"init_strategy takes a NumPyro strategy, got {init_strategy!r}.")
        self.model, self.potential_fn, self.init_strategy = model, potential_fn, init_strategy
        self._traced = model  # the model that is traced
        self.placement = placement or Placement()
        self._programs = Programs()

    def log_density(
        self, args: tuple, kwargs: dict, coordinates: Coordinates | None = None
    ) -> Callable[[Any], jax.Array]:
        """Return the log density over unconstrained values, or over a row of coordinates."""
        values_of = (lambda z: z) if coordinates is None else coordinates.tree
        if self.potential_fn is not None:
            potential_fn = self.potential_fn
            if self.placement.mesh is None:
                return lambda z: -potential_fn(values_of(z))
            placed = laid_out(lambda z, _: -potential_fn(values_of(z)), self.placement)
            return lambda z: placed(z, None)
        # concrete arguments stay concrete: a model may depend on their values
        leaves, treedef = jax.tree.flatten((args, kwargs))
        traced = [leaf if isinstance(leaf, jax.core.Tracer) else None for leaf in leaves]

        fixed, sums = self._settled(args, kwargs)

        def density(z: Any, data: tuple[list, dict]) -> jax.Array:
            filled = [x if t is None else t for x, t in zip(leaves, data[0], strict=True)]
            args, kwargs = treedef.unflatten(filled)
            return self._density(data[1], sums, args, kwargs, values_of(z))

        density = laid_out(density, self.placement)
        return lambda z: density(z, (traced, fixed))

    def smooth_density(self, args: tuple, kwargs: dict) -> Callable[[Any], jax.Array]:
        """Return the log density in a form that can be differentiated twice."""
        settled = self._settled(args, kwargs)
        return lambda z: self._density(*settled, args, kwargs, z)

    def _density(
        self, fixed: dict[str, Any], sums: int | None, args: tuple, kwargs: dict, z: Any
    ) -> jax.Array:
        return density_of(self._with(fixed), sums, args, kwargs, z)

    def why_not_finite(self, z: Any, args: tuple, kwargs: dict) -> str:
        """Return the likely cause of a density that is not finite, and what to do about it.

        Args:
            z: unconstrained values with a leading chain axis.
            args: arguments of the model.
            kwargs: its keyword arguments.
        """
        return self.with_nan(self._why_not_finite(z, args, kwargs), args, kwargs)

    def _why_not_finite(self, z: Any, args: tuple, kwargs: dict) -> str:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), z)
        single = all(x.dtype == jnp.float32 for x in jax.tree.leaves(one))
        density = lambda z: self.log_density(args, kwargs)(z)  # noqa: E731, all of it abstract
        if single and "cholesky" in primitives_of(density, one):
            return (
                "The likely cause is a Cholesky factorisation in float32, which fails for matrices "
                "that are nearly singular: add more to the diagonal of the matrix (1e-4 of its "
                "entries), keep priors away from such matrices, or call numpyro.enable_x64()."
            )
        return (
            "Look for data that are not finite or outside of their distribution's support, and for "
            "priors that reach where the model overflows, or give another init_strategy, such as "
            "init_to_median or init_to_value."
        )

    def with_nan(self, remedy: str, args: tuple, kwargs: dict) -> str:
        """Return advice that names the arguments with NaN first."""
        return with_nan(arrange(self.model, args, kwargs, placed=False).holding_nan(), remedy)

    def constrain(self, args: tuple, kwargs: dict) -> Callable[[Any], Any]:
        """Return the map to the model's sites, deterministic sites included.

        Deterministic sites that depend on discrete latents are left out: discrete latents are
        summed out, and have no value.
        """
        if self.potential_fn is not None:
            return lambda z: z
        fixed, sums = self._settled(args, kwargs)
        model = self._with(fixed)
        unknown = set() if sums is None else depends_on_sums(model, args, kwargs)
        unknown |= self._of_some_rows(args, kwargs)

        def constrain(z: Any) -> dict[str, Any]:
            sites = constrain_fn(model, args, kwargs, z, return_deterministic=True)
            return {name: value for name, value in sites.items() if name not in unknown}

        return constrain

    def initial(self, keys: jax.Array, args: tuple, kwargs: dict) -> tuple[Any, jax.Array]:
        """Draw one start for each key by the initialisation strategy; return which are valid."""
        assert self._traced is not None
        _, sums = self._settled(args, kwargs)
        info = initialize_model(
            keys,
            self._traced if sums is None else as_marked(self._traced),
            init_strategy=self.init_strategy,
            dynamic_args=True,
            model_args=args,
            model_kwargs=kwargs,
        ).param_info
        return info.z, all_finite(info.potential_energy, info.z_grad)

    def prepared(self, args: tuple, kwargs: dict) -> Callable:
        """Return the model with a key, and with parameters and mutable state of one start."""
        fixed, sums = self._settled(args, kwargs)
        model = self._with(fixed)
        return model if sums is None else as_marked(model)

    def _settled(self, args: tuple, kwargs: dict) -> tuple[dict[str, Any], int | None]:
        """Return parameters and mutable state at one start, and the number of plate axes.

        The number is needed to sum over discrete latents. It is None without discrete latents.
        """
        assert self._traced is not None
        trace = unchecked_trace(self._traced, args, kwargs)
        fixed = {k: v["value"] for k, v in trace.items() if v["type"] in ("param", "mutable")}
        if not any(map(is_discrete_latent, trace.values())):
            return fixed, None
        check_scan_latents(trace)
        return fixed, num_plate_dims(trace)

    def _with(self, fixed: dict[str, Any]) -> Callable:
        return with_values(self._traced, fixed)

    def coordinates(self, z: Any, args: tuple, kwargs: dict) -> Coordinates:
        """Return the order of all chains' unconstrained values in rows."""
        return Coordinates(z, self.latent_names(args, kwargs))

    def latent_names(self, args: tuple, kwargs: dict) -> tuple[str, ...]:
        """Return the names of the latent sites in the model's order; empty without a model.

        Raises:
            ValueError: for a latent site that no gradient can move, or a model without any.
        """
        if self._traced is None:
            return ()
        found = self._sites(args, kwargs)
        self._check_plates(found)
        sites = found.values()
        discrete = [site.name for site in sites if site.kind == "discrete"]
        if discrete:
            check_funsor(discrete)
        for site in sites:
            if site.not_summed:
                raise ValueError(
                    f"latent site {site.name!r} is discrete ({site.distribution}), these kernels "
                    f"follow gradients, and it cannot be summed out: {site.not_summed}. Sum it out "
                    f"of the model (MixtureSameFamily, for example) or observe it; NumPyro's "
                    f"DiscreteHMCGibbs(NUTS(model)) and MixedHMC(HMC(model)) sample some of these."
                )
            if site.kind == "latent" and site.distribution == "Delta":
                raise ValueError(
                    f"latent site {site.name!r} is a Delta, which has no density to sample. Write "
                    f"numpyro.deterministic({site.name!r}, value) instead."
                )
        latents = [site for site in sites if site.kind == "latent"]
        if latents and not any(np.prod(site.shape) for site in latents):
            raise ValueError(
                f"the latent sites {[site.name for site in latents]} are all empty, so that "
                f"there is nothing to sample: look at the shapes of the data."
            )
        names = tuple(site.name for site in latents)
        if not names and discrete:
            raise ValueError(
                f"the latent sites {discrete} are all discrete, and once they are summed out there "
                f"is nothing to sample: numpyro.contrib.funsor.infer_discrete draws them."
            )
        if not names:
            raise ValueError(
                "the model has no latent site: everything is observed, or a parameter."
            )
        return names

    def _sites(self, args: tuple, kwargs: dict) -> dict[str, Site]:
        assert self._traced is not None
        return model_sites(self._traced, args, kwargs)

    def _check_plates(self, sites: Mapping[str, Site]) -> None:
        """Raise a ValueError for a subsampled plate."""
        for site in sites.values():
            if site.drawn_from is not None:
                raise ValueError(
                    f"plate {site.name!r} takes {site.shape[0]} of its {site.drawn_from} rows at "
                    f"random, and these kernels need the density of all rows. Leave subsample_size "
                    f"out, or take SGMCMC(model), which follows the gradients of such rows; "
                    f"NumPyro's HMCECS(NUTS(model)) samples with subsamples."
                )

    def _of_some_rows(self, args: tuple, kwargs: dict) -> set[str]:
        """Return the deterministic sites without a value in draws: those of subsampled rows."""
        return set()

    def forms(self, num_chains: int, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return shapes and dtypes of the unconstrained values of all chains, by latent site."""
        keys = jax.random.split(jax.random.key(0), num_chains)
        return jax.eval_shape(lambda keys: self.initial(keys, args, kwargs), keys)[0]

    def run(self, name: Any, fn: Callable, inputs: tuple, args: tuple, kwargs: dict) -> Any:
        """Run `fn((args, kwargs), *inputs)`, compiled once for all arguments of the same shapes."""
        surroundings = closure_fingerprint((self.init_strategy, self.potential_fn))
        others = (name, surroundings)
        return self._programs.call(fn, inputs, self.model, args, kwargs, *others)


def with_values(model: Callable | None, fixed: dict[str, Any]) -> Callable:
    """Return a model with a key, and with values for some of its sites."""
    return handlers.seed(handlers.substitute(model, data=fixed), jax.random.key(0))


def density_of(model: Callable, sums: int | None, args: tuple, kwargs: dict, z: Any) -> jax.Array:
    """Return the log density of unconstrained values; `sums` is the number of plate axes."""
    if sums is None:
        return -potential_energy(model, args, kwargs, z)
    return -potential_energy(enumerated(as_marked(model), sums), args, kwargs, z, enum=True)


def per_chain(tree: Any, num_chains: int) -> Any:
    """Repeat shared values for every chain: MCMC collects only what has a leading chain axis."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_chains, *jnp.shape(x))), jax.tree.map(jnp.asarray, tree)
    )


def shared(tree: Any) -> Any:
    """Undo `per_chain`."""
    return jax.tree.map(lambda x: x[0], tree)


def all_finite(*trees: Any) -> jax.Array:
    """Return for each chain whether all its numbers are finite."""
    leaves = jax.tree.leaves(trees)
    return jnp.stack([jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in leaves]).all(0)


def choose(flags: jax.Array, yes: Any, no: Any) -> Any:
    """Take each chain from one of two trees."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(flags.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)
