"""Pathfinder: draws from normal approximations along the paths of quasi-Newton searches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_uniform

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.density import model_sites
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.mapping import map_draws, pick
from numpyro_ensemble.results import TRUSTED_K, PathfinderResult, name_members

_SPARE = 4  # draws that resampling chooses from, for each that is asked for


class Pathfinder:
    """Draws from a posterior in the time of a few optimisations (Zhang et al. 2022).

    Each path is an L-BFGS search for a mode. Each of its points has a normal approximation,
    from the curvature so far. The one with the highest evidence lower bound is kept.
    Draws of all paths are weighed as draws of their mixture, so that paths that agree do not count
    twice. Further rounds draw from a t distribution with the mean and the covariance of the
    weighted draws, and weigh all draws together. Samples are chosen from these by weight.

    Args:
        model: a NumPyro model whose latents are continuous.
        num_paths: number of searches P; one is single-path Pathfinder.
        history: number of steps that the curvature is read from.
        num_elbo_draws: number of draws for each evidence lower bound.
        max_steps: number of evaluations in a search, at most.
        num_refits: number of further rounds, at most; 0 is the algorithm of the paper. They end
            when there are enough effective draws, or far too few for the number of latents.
        init_strategy: where the searches start, a NumPyro strategy.

    Raises:
        ValueError: if a number is too small.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import Pathfinder
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 0.5))
        >>> result = Pathfinder(model, num_paths=4).run(jax.random.key(0), num_samples=500)
        >>> result.samples["x"].shape, bool(abs(result.samples["x"].mean() - 3.0) < 0.1)
        ((500,), True)
    """

    def __init__(
        self,
        model: Callable,
        num_paths: int = 16,
        history: int = 6,
        num_elbo_draws: int = 10,
        max_steps: int = 200,
        *,
        num_refits: int = 4,
        init_strategy: Callable = init_to_uniform,
    ) -> None:
        # these load BlackJAX, which `import numpyro_ensemble` does not
        from numpyro_ensemble.mcmc.pathfinding import Settings
        from numpyro_ensemble.mcmc.target import Target

        counts = {"num_paths": num_paths, "history": history, "num_elbo_draws": num_elbo_draws}
        for name, value in {**counts, "max_steps": max_steps}.items():
            check_count(name, value)
        if isinstance(num_refits, bool) or not isinstance(num_refits, int) or num_refits < 0:
            raise ValueError(f"num_refits takes a whole number, 0 or more; got {num_refits!r}.")
        self.model, self.num_paths = model, int(num_paths)
        self._target = Target(model, init_strategy=init_strategy)
        self._settings = Settings(
            int(history), int(num_elbo_draws), int(max_steps), int(num_refits)
        )

    @checked_keywords
    def run(
        self,
        rng_key: jax.Array,
        *args: Any,
        num_samples: int = 1000,
        importance_resampling: bool = True,
        **kwargs: Any,
    ) -> PathfinderResult:
        """Search, approximate, and draw.

        Args:
            rng_key: one key.
            *args: arguments of the model.
            num_samples: number of samples S.
            importance_resampling: choose samples by their weights, with replacement; otherwise
                they are draws as they come, with weights.
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: for a model with discrete latents, without latents, or with parameters of
                its own; if no path has come to an approximation, with how each has ended.
        """
        rng_key = one_key(rng_key)
        check_count("num_samples", num_samples)
        self._check_model(args, kwargs)
        how = (self.num_paths, int(num_samples), bool(importance_resampling), self._settings)
        find = partial(_find, target=self._target, how=how)
        result = self._target.run(("pathfinder", how), find, (rng_key,), args, kwargs)
        if has_tracers(result):
            return result[0]
        found, log_density = result
        elbo = np.asarray(found.elbo)
        if not np.isfinite(elbo).any():
            raise self._no_path(found, np.asarray(log_density))
        k = float(found.pareto_k)
        if not k <= TRUSTED_K:
            warn(
                f"Pathfinder's samples are not the posterior: Pareto k is {k:.2f}, above "
                f"{TRUSTED_K}. They serve as starts of chains (mcmc.starts.from_pathfinder)."
            )
        numbers = {
            name: np.asarray(getattr(found, name))
            for name in ("log_weights", "path", "num_points", "converged", "pool_log_weights")
        }
        return found._replace(pareto_k=k, elbo=elbo, **numbers)

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        self._target.latent_names(args, kwargs)
        sites = model_sites(self.model, args, kwargs).values()
        params = [site.name for site in sites if site.kind == "param"]
        if params:
            raise ValueError(
                f"the model has parameters {params}, which have no posterior. Give them priors, by "
                f"numpyro.sample, or values, by numpyro.handlers.substitute."
            )

    def _no_path(self, found: PathfinderResult, log_density: np.ndarray) -> ValueError:
        """Return the error that tells how each path has ended."""
        length = np.asarray(found.num_points)
        nowhere = ~np.isfinite(log_density) | (length == 0)
        stuck = ~nowhere & (length == 1)
        number = self._settings.max_steps
        ends = {
            "start where the log density is not finite": nowhere,
            f"found no better point than their start in {number} evaluations": stuck,
            "have points, but none with a finite evidence lower bound": ~nowhere & ~stuck,
        }
        told = "; ".join(
            f"{flags.sum()} of {len(flags)} {end} ({name_members(flags)})"
            for end, flags in ends.items()
            if flags.any()
        )
        return ValueError(
            f"no path has come to an approximation. Of the paths, {told}. Look for data that are "
            f"not finite, or give other starts, by init_strategy=, or more max_steps."
        )


def _find(call: tuple[tuple, dict], key: jax.Array, *, target: Any, how: tuple) -> tuple:
    """Return what was found, and the log density at the end of each path."""
    from numpyro_ensemble.mcmc.pathfinding import choose, pathfind

    num_paths, num_samples, resampling, settings = how
    start_key, path_key, pick_key = jax.random.split(key, 3)
    starts, _ = target.initial(jax.random.split(start_key, num_paths), *call)
    coordinates = target.coordinates(starts, *call)
    num_draws = num_samples * (_SPARE if resampling else 1)
    paths, normals, pool = pathfind(
        target.log_density(*call, coordinates),
        path_key,
        coordinates.rows(starts),
        num_draws,
        settings,
    )
    if resampling:
        chosen = choose(pick_key, pool.log_weights, num_samples, replace=True)
        log_weights = jnp.full(num_samples, -jnp.log(float(num_samples)))
    else:
        there = jnp.where(pool.log_weights > -jnp.inf, 0.0, -jnp.inf)
        chosen = choose(pick_key, there, num_samples, replace=False)
        log_weights = jax.nn.log_softmax(pool.log_weights[chosen])
    z = coordinates.tree(pool.points)
    samples = map_draws(target.constrain(*call), pick(z, chosen))
    found = PathfinderResult(
        samples,
        pool.pareto_k,
        normals.elbo,
        log_weights,
        pool.path[chosen],
        paths.length,
        paths.converged,
        z,
        pool.log_weights,
    )
    return found, paths.log_density
