"""A guide of point masses, with which the engine finds modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import periodic_repeat, sum_rightmost
from numpyro.infer import init_to_uniform
from numpyro.infer.autoguide import AutoGuide

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.opening import note_learnt
from numpyro_ensemble.enumeration import SummedOut


class Point(NamedTuple):
    """One latent site of the point guide."""

    frames: tuple[Any, ...]
    event_dim: int
    free_event_dim: int  # of the unconstrained value
    transform: Any  # None if the support depends on other sites


class PointGuide(AutoGuide):
    """A guide of point masses at unconstrained parameters `{site}_auto_loc`.

    It has the starts and steps of `AutoDelta` with the same key, with one difference: a support
    that depends on other latents is that at their current values, not at their start.

    Args:
        model: the model, unweighted.
        init_loc_fn: a NumPyro initialisation strategy.
        jacobian: add the log Jacobian of the constraining transforms to the objective.
        init_values: constrained start values by site name.
        sums: whether the model has discrete latents that are summed out.
    """

    def __init__(
        self,
        model: Callable,
        *,
        init_loc_fn: Callable = init_to_uniform,
        jacobian: bool = False,
        init_values: dict[str, Any] | None = None,
        sums: bool = False,
    ) -> None:
        super().__init__(SummedOut(model) if sums else model, init_loc_fn=init_loc_fn)
        self.jacobian, self.sums = jacobian, sums
        self.init_values = init_values or {}
        self.points: dict[str, Point] = {}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.items():
            if site["type"] == "sample" and not site["is_observed"]:
                self.points[name] = self._point(site)
        if self.init_values:
            plates = self._create_plates(*args, **kwargs)
            walked = self._walk(self._init_locs, plates, args, kwargs, given=self.init_values)
            for name, value in self.init_values.items():
                self._init_locs[name] = walked[name][1].inv(value)

    def _point(self, site: dict[str, Any]) -> Point:
        name, event_dim = site["name"], site["fn"].event_dim
        transform = biject_to(site["fn"].support)
        depends = has_tracers(transform)
        loc = self._init_locs[name]
        free_event_dim = event_dim + jnp.ndim(loc) - jnp.ndim(site["value"])
        for frame in site["cond_indep_stack"]:
            full_size = self._prototype_frame_full_sizes[frame.name]
            if full_size != frame.size:
                if depends:
                    raise ValueError(
                        f"latent site {name!r} in subsampled plate {frame.name!r} has a support "
                        f"that depends on other sites: write it with a fixed support, by "
                        f"numpyro.infer.reparam.TransformReparam for example."
                    )
                loc = periodic_repeat(loc, full_size, frame.dim - free_event_dim)
        self._init_locs[name] = loc
        frames = tuple(site["cond_indep_stack"])
        return Point(frames, event_dim, free_event_dim, None if depends else transform)

    def distilled(self) -> PointGuide:
        """Return a guide that is set up, with nothing in it that was traced."""
        guide = PointGuide(self.model, init_loc_fn=self.init_loc_fn, jacobian=self.jacobian)
        guide.sums = self.sums
        learnt = {
            "points": self.points,
            "_prototype_frames": self._prototype_frames,
            "_prototype_frame_full_sizes": self._prototype_frame_full_sizes,
            "_init_locs": dict.fromkeys(self.points),
            "prototype_trace": {},
        }
        for name, value in learnt.items():
            setattr(guide, name, value)
        note_learnt(guide, frozenset(learnt))
        return guide

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Sample the latent sites from point masses, whose positions are parameters."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        locs = {}
        for name, point in self.points.items():
            with ExitStack() as stack:
                for frame in point.frames:
                    stack.enter_context(plates[frame.name])
                loc = self._init_locs[name]
                locs[name] = numpyro.param(
                    f"{name}_{self.prefix}_loc", loc, event_dim=point.free_event_dim
                )
        values = {}
        for name, (value, transform) in self._walk(locs, plates, args, kwargs).items():
            point = self.points[name]
            if self.jacobian:
                log_det = transform.log_abs_det_jacobian(locs[name], value)
                extra = jnp.ndim(log_det) - jnp.ndim(value) + point.event_dim
                log_density = -sum_rightmost(log_det, extra)
                mass = dist.Delta(value, log_density, event_dim=point.event_dim)
            else:  # its log density at its own sample is 0, so none is computed
                mass = dist.Delta(value, event_dim=point.event_dim).mask(False)
            with ExitStack() as stack:
                for frame in point.frames:
                    stack.enter_context(plates[frame.name])
                values[name] = numpyro.sample(name, mass)
        return values

    def _walk(
        self,
        locs: dict[str, Any],
        plates: dict,
        args: tuple,
        kwargs: dict,
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, tuple[jax.Array, Any]]:
        """Return each site's constrained value and transform at unconstrained values.

        Sites may have constrained values instead; the supports of other sites depend on them.
        """
        if all(point.transform is not None for point in self.points.values()):
            return {k: (p.transform(locs[k]), p.transform) for k, p in self.points.items()}
        walked: dict[str, tuple[jax.Array, Any]] = {}

        def constrain(site: dict[str, Any]) -> Any:
            if site["type"] == "plate" and site["name"] in plates:
                return plates[site["name"]]._indices
            if site["type"] != "sample" or site["name"] not in locs:
                return None
            transform = biject_to(site["fn"].support)
            value = given.get(site["name"], transform(locs[site["name"]]))
            walked[site["name"]] = (value, transform)
            return value

        # SVI sees the model's parameters; everything else of this trace is hidden from it
        with handlers.block(hide_fn=lambda site: site["type"] != "param"):
            seeded = handlers.seed(self.model, jax.random.key(0))
            handlers.substitute(seeded, substitute_fn=constrain)(*args, **kwargs)
        return walked

    def constrained(self, params: dict[str, Any], args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return values by site name, and the model's parameters, for unconstrained `params`."""
        params = dict(params)
        locs = {name: params.pop(f"{name}_{self.prefix}_loc") for name in self.points}

        def walk() -> dict[str, tuple[jax.Array, Any]]:
            return self._walk(locs, {}, args, kwargs)

        values = handlers.substitute(walk, data=params)()
        return {**{name: value for name, (value, _) in values.items()}, **params}

    def sample_posterior(
        self, rng_key: Any, params: Any, *args: Any, sample_shape: tuple = (), **kwargs: Any
    ) -> dict[str, Any]:
        """Return copies of the point, in the shape of the samples."""
        values = self.constrained(params, args, kwargs)
        return {k: jnp.broadcast_to(values[k], sample_shape + values[k].shape) for k in self.points}
