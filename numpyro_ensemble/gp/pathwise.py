"""Functions from the samples of any inference, called as NumPyro's `Predictive` is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.density import fill_model, filled
from numpyro_ensemble.gp.checks import (
    arrays_of,
    check_flags,
    check_inputs,
    digest,
    flags_of,
    flat_samples,
    holds,
)
from numpyro_ensemble.gp.draw_paths import check_options
from numpyro_ensemble.gp.means import Function
from numpyro_ensemble.gp.mixtures import (
    Conditional,
    JointMoments,
    Moments,
    conditionals,
    mixed_moments,
    mixed_quantiles,
    named,
)
from numpyro_ensemble.gp.path_arrays import PER_PATH
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.sites import Answer, Site, gather_sites
from numpyro_ensemble.gp.subsampling import Dependents, KnownRows, check_rows
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.mapping import map_draws, pick, platform_of


class Pathwise:
    """Posterior functions of the Gaussian processes in a model, called as `Predictive` is.

    `pathwise(rng_key, X_new)` draws functions for each posterior draw and runs the model on them at
    the new inputs. One key is one set of functions, wherever they are evaluated, for data of one
    dtype, and of the noise at each input. Latent processes return their values, observed ones
    `{name}` with noise and `{name}_f` without; other sites that were not sampled are drawn on top.

    Args:
        model: the NumPyro model that was fitted.
        posterior_samples: a dict by site name, from any inference, or the result of a MAP ensemble.
        *args: arguments of the fit.
        params: the model's parameters: of its own shapes, or for each draw.
        batch_ndims: number of leading axes of the samples, 0, 1 or 2.
        return_sites: names of the sites to return (default: all that were not given).
        num_paths: functions for each draw.
        num_features: columns of a random basis, even.
        num_bases: random bases for each draw (default: one, and four for a single draw).
        batch_size: draws made at once (default: one on a CPU, elsewhere as many as fit into a
            quarter of a gigabyte).
        group_by_draw: return `(S, num_paths, ...)`.
        solver: "cholesky" or "cg".
        tolerance: relative residual of conjugate gradients.
        **kwargs: keyword arguments of the fit.

    Raises:
        ValueError: for a model without a Gaussian process, samples that lack a latent, and draws
            that no functions can be made of.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.gp import RBF, GaussianProcess, Pathwise
        >>> def model(X, y=None):
        ...     lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        ...     kernel = RBF(lengthscale=lengthscale)
        ...     numpyro.sample("y", GaussianProcess(kernel, X, noise=0.01), obs=y)
        >>> X = jnp.linspace(0.0, 6.0, 20)
        >>> samples = {"lengthscale": jnp.array([0.9, 1.0, 1.1])}
        >>> pathwise = Pathwise(model, samples, X, jnp.sin(X), num_paths=2)
        >>> pathwise(jax.random.key(0), jnp.linspace(0.0, 6.0, 50))["y_f"].shape
        (6, 50)
    """

    @checked_keywords
    def __init__(
        self,
        model: Callable,
        posterior_samples: Any,
        *args: Any,
        params: dict[str, Any] | None = None,
        batch_ndims: int = 1,
        return_sites: Collection[str] | None = None,
        num_paths: int = 1,
        num_features: int = 1024,
        num_bases: int | None = None,
        batch_size: int | None = None,
        group_by_draw: bool = False,
        solver: str = "cholesky",
        tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model takes a callable with NumPyro primitives, got {model!r}.")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if isinstance(return_sites, str):
            raise TypeError(f"return_sites takes a collection of names, got {return_sites!r}.")
        # copies: an array that is changed in place later does not change the functions
        self.model, (self.args, self.kwargs) = model, jax.tree.map(_copied, (args, kwargs))
        self.samples, self.num_draws = flat_samples(posterior_samples, batch_ndims)
        bases = (4 if self.num_draws == 1 else 1) if num_bases is None else num_bases
        check_options(num_paths, bases, num_features, solver)
        self.num_paths, self._bases = num_paths, min(bases, num_paths)
        self._each = -(-num_paths // self._bases)  # paths of one basis
        self._options = {
            "num_features": num_features,
            "num_bases": self._bases,
            "solver": solver,
            "tolerance": tolerance,
        }
        self.return_sites = None if return_sites is None else list(return_sites)
        self.batch_size, self.group_by_draw = batch_size, group_by_draw
        self.shared: dict[str, Any] = {}
        self.params = self._per_draw(params or {})
        self._programs = Programs()
        self._check_model()

    # What is given ------------------------------------------------------------------------------

    def _per_draw(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters of each draw; those of the model's own shapes are shared."""
        first = pick(self.samples, 0)
        own: dict[str, Any] = {}

        def look() -> None:
            model = KnownRows(self.model)
            trace = fill_model(model, jax.random.key(0), first, self.args, self.kwargs)
            for name, site in trace.items():
                if site["type"] == "param":
                    own[name] = [jnp.shape(leaf) for leaf in jax.tree.leaves(site["value"])]

        if not params:
            return {}
        jax.eval_shape(look)
        each = {}
        for name in params.keys() & own.keys():  # the others are a guide's
            shapes = own[name]
            given = [jnp.shape(leaf) for leaf in jax.tree.leaves(params[name])]
            lead = next((shape[0] for shape in given if shape), 0) or self.num_draws
            if given == shapes:
                self.shared[name] = params[name]
            elif (
                lead and given == [(lead, *shape) for shape in shapes] and not self.num_draws % lead
            ):
                # of members, whose draws follow each other
                repeat = partial(jnp.repeat, repeats=self.num_draws // lead, axis=0)
                each[name] = jax.tree.map(repeat, jax.tree.map(jnp.asarray, params[name]))
            else:
                raise ValueError(
                    f"params[{name!r}] has shapes {given}: the model's are {shapes}, or each with "
                    f"a leading ({self.num_draws},) of draws, or of members."
                )
        return each

    def _check_model(self) -> None:
        """Raise a ValueError for a model that functions cannot be found in."""
        found: list[Any] = []

        def look(moved: str | None = None) -> Dependents:
            known = self._known(*pick((self.samples, self.params), 0))
            found.append(gather_sites(self.model, known, self.args, self.kwargs, moved))
            return found[-1].dependents()

        jax.eval_shape(look)
        if found[0].unknown:
            raise ValueError(
                f"{found[0].unknown} are neither observed nor among the samples, "
                f"{sorted(self.samples)}: give the samples of all latents (of a variational fit, "
                f"those that sample_posterior returns), and the data of the fit after them."
            )
        if found[0].unfitted:
            warn(
                f"the model's parameters {found[0].unfitted} are not in params: they have their "
                f"initial values."
            )
        if not found[0].sites:
            raise ValueError(
                "the model has no Gaussian process: a site with gp.GaussianProcess, WhitenReparam, "
                "sparse_gp or CollapsedSparseGP."
            )
        rows = found[0].rows
        check_rows(rows.subsampled, rows.sizes, found[0].inside, look)

    def _find(self, sample: dict, params: dict) -> dict[str, Site]:
        known = self._known(sample, params)
        return gather_sites(self.model, known, self.args, self.kwargs).sites

    def _known(self, sample: dict, params: dict) -> dict[str, Any]:
        return {**sample, **params, **self.shared}

    # Drawing ------------------------------------------------------------------------------------

    def _functions(self, rng_key: jax.Array, sites: dict[str, Site]) -> dict[str, Paths]:
        """Draw the functions of one posterior draw; copies of a process follow each other."""
        keys = jax.random.split(rng_key, len(sites))
        paths = {}
        number = self._bases * self._each
        for key, (name, site) in zip(keys, sorted(sites.items()), strict=True):
            copies = len(site.flat())
            values = jnp.tile(site.flat(), (number, 1))
            options = {"num_paths": len(values), "copies": copies, "latent": not site.observed}
            paths[name] = site.process.draw_paths(key, values, **options, **self._options)
        return paths

    def draw(self, rng_key: jax.Array) -> dict[str, Paths]:
        """Return the functions themselves, of each process and all draws.

        They are those that a call with this key evaluates. Copies of a process, in a plate, follow
        each other within a path.

        Raises:
            TypeError: if a kernel or a mean holds values in a function that is no pytree.
        """

        def one(given: tuple) -> Any:
            key, sample, params = given
            sites = self._find(sample, params)
            paths = self._functions(jax.random.split(key)[0], sites)
            for name, drawn in paths.items():
                parts = jax.tree.leaves(drawn, is_leaf=lambda part: isinstance(part, Function))
                if any(isinstance(p, Function) and p.closes_over_tracers() for p in parts):
                    raise TypeError(
                        f"the kernel or the mean of {name!r} uses a function that closes over "
                        f"latents or parameters: give it as a pytree, functools.partial(fn, "
                        f"values) or a module."
                    )
            return paths, flags_of(sites, {name: p.ok.all() for name, p in paths.items()})

        build = partial(self._mapped, one)
        program = self._programs.get(build, self.model, self.args, self.kwargs, "draw")
        paths, flags = program(*self._inputs(rng_key))
        check_flags(flags, self.num_draws)
        return self._trim(paths)

    def _trim(self, paths: dict[str, Paths]) -> dict[str, Paths]:
        if self._bases * self._each == self.num_paths:
            return paths
        kept = {}
        for name, drawn in paths.items():
            copies = drawn.alpha.shape[1] // (self._bases * self._each)
            number = self.num_paths * copies
            parts = {k: getattr(drawn, k)[:, :number] for k in ("order", *PER_PATH)}
            kept[name] = replace(drawn, **parts)
        return kept

    def _mapped(self, one: Callable) -> Callable:
        def program(*inputs: Any) -> Any:
            return map_draws(one, inputs, self._at_once())

        return jax.jit(program)

    def _at_once(self) -> int | None:
        """Return how many draws go at once: one on CPUs, where XLA's programs for many may hang."""
        return (
            1 if self.batch_size is None and platform_of(self.samples) == "cpu" else self.batch_size
        )

    def _inputs(self, rng_key: jax.Array) -> tuple:
        rng_key = one_key(rng_key)
        return jax.random.split(rng_key, self.num_draws), self.samples, self.params

    # The call -----------------------------------------------------------------------------------

    def __call__(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return values by site name, samples and paths leading: `(S * num_paths, ...)`.

        Args:
            rng_key: one key: one set of functions, and one draw of noise for each input.
            *args: arguments of the model at the new inputs; leave the data out (None).
            **kwargs: keyword arguments of the model.
        """
        values = self._checked(self._predict, self._inputs(rng_key), args, kwargs, "call")
        number = self._bases * self._each

        def arrange_paths(x: jax.Array) -> jax.Array:
            x = x.swapaxes(1, 2).reshape(self.num_draws, number, *x.shape[3:])
            x = x[:, : self.num_paths]
            return x if self.group_by_draw else jax.lax.collapse(x, 0, 2)

        return {name: arrange_paths(value) for name, value in values.items()}

    def moments(
        self, *args: Any, covariance: bool = False, **kwargs: Any
    ) -> dict[str, Moments | JointMoments]:
        """Return exact moments of each process over the mixture of all draws; nothing is random.

        By site name: `{name}` with the noise of observations, `{name}_f` without.

        Args:
            *args: arguments of the model at the new inputs; leave the data out (None).
            covariance: add the covariance `(N, N)`; all inputs of a process stand in one matrix.
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: if the inputs of a process depend on another one's values.
        """
        each = self._conditionals(bool(covariance), args, kwargs)
        return {name: mixed_moments(*of_draws) for name, of_draws in named(each).items()}

    def quantiles(self, probabilities: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return exact quantiles of each process over the mixture of all draws, by site name.

        Args:
            probabilities: a number, or an array of them, which leads in the result.
            *args: arguments of the model at the new inputs; leave the data out (None).
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: for a number that is no probability, and as `moments` does.
        """
        asked = np.asarray(probabilities, float).astype(jnp.result_type(float))
        if not ((asked > 0) & (asked < 1)).all():
            raise ValueError(f"probabilities lie between 0 and 1, got {probabilities!r}.")
        each = named(self._conditionals(False, args, kwargs))
        return {n: mixed_quantiles(mean, spread, asked) for n, (mean, spread) in each.items()}

    def _conditionals(self, joint: bool, args: tuple, kwargs: dict) -> dict[str, Conditional]:
        """Return the distribution of each process given each draw, at the inputs of a call."""

        def one(call: tuple, draw: jax.Array, sample: dict, params: dict) -> Any:
            known = self._known(sample, params)
            sites = {k: site.centred() for k, site in self._find(sample, params).items()}

            def run(functions: dict) -> Answer:
                return self._call(call, known, functions, sites, jax.random.key(0))[0]

            each, free, answer = conditionals(sites, run, joint)
            solved = {
                name: jnp.isfinite(mean).all() & jnp.isfinite(spread).all()
                for name, (mean, spread, _) in each.items()
            }
            met = {name: sites[name] for name in each}
            return (each, free), flags_of(met, solved), answer.finite

        inputs = (jnp.arange(self.num_draws), self.samples, self.params)
        each, free = self._checked(one, inputs, args, kwargs, "conditionals", joint)
        bound = [name for name, of_draw in free.items() if not holds(of_draw)]
        if bound:
            raise ValueError(
                f"the inputs of {bound} depend on another process, so that the moments have no "
                f"closed form: take those of draws."
            )
        return each

    def _checked(
        self, one: Callable, inputs: tuple, args: tuple, kwargs: dict, *others: Any
    ) -> Any:
        """Run a program over all draws, and raise a ValueError for what it found wrong."""

        def program(call: tuple, *inputs: Any) -> Any:
            return map_draws(lambda given: one(call, *given), inputs, self._at_once())

        call = (self.model, args, kwargs, *others)
        out, flags, finite = self._programs.call(program, inputs, *call)
        check_inputs(finite)
        check_flags(flags, self.num_draws)
        return out

    def _predict(self, call: tuple, rng_key: jax.Array, sample: dict, params: dict) -> Any:
        """Run the model at the new inputs on the functions of one posterior draw."""
        sites = {k: site.centred() for k, site in self._find(sample, params).items()}
        path_key, noise_key = jax.random.split(rng_key)
        paths = self._functions(path_key, sites)
        copies = {name: site.flat().shape[0] for name, site in sites.items()}
        shape = (self._bases, self._each)

        def grouped(name: str, drawn: Paths) -> tuple[jax.Array, jax.Array]:
            weights = drawn.weights.reshape(*shape, copies[name], drawn.weights.shape[-1])
            alpha = drawn.alpha.reshape(*shape[::-1], copies[name], drawn.alpha.shape[-1])
            return weights, alpha.swapaxes(0, 1)  # one path after another is of another basis

        # the bases and what goes with each path: mapped over bases, then over their paths
        features = {name: drawn.features for name, drawn in paths.items()}
        own = {name: grouped(name, drawn) for name, drawn in paths.items()}
        keys = jax.random.split(noise_key, shape)

        def run(features: dict, own: dict, key: jax.Array) -> Any:
            functions = {
                name: partial(_values, paths[name], features[name], own[name], sites[name].copies)
                for name in paths
            }
            answer, trace = self._call(call, self._known(sample, params), functions, sites, key)
            return self._wanted(answer, trace), answer.finite

        over_paths = jax.vmap(run, in_axes=(None, 0, 0))
        values, finite = jax.vmap(over_paths)(features, own, keys)
        solved = {name: drawn.ok.all() for name, drawn in paths.items()}
        return values, flags_of(sites, solved), jax.tree.map(jnp.all, finite)

    def _call(
        self, call: tuple, known: dict, functions: dict, sites: dict[str, Site], key: jax.Array
    ) -> tuple[Answer, dict]:
        """Run the model once on functions in place of its processes; return these and its trace."""
        key_model, key_noise = jax.random.split(key)
        # each input has noise of its own; other sites are drawn anew for other arguments
        key_model = jax.random.fold_in(key_model, digest(arrays_of(*call)))
        others = {name: value for name, value in known.items() if name not in sites}
        args, kwargs = call
        answer = Answer(filled(self.model, others), functions, sites, key_noise)
        with handlers.seed(rng_seed=key_model):
            return answer, handlers.trace(answer).get_trace(*args, **kwargs)

    def _wanted(self, answer: Answer, trace: dict) -> dict[str, jax.Array]:
        """Return the values that were asked for, by default all that were not given."""
        values = {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "deterministic"
            or (site["type"] == "sample" and name not in self.samples)
        }
        values.update(answer.values)
        if self.return_sites is not None:
            unknown = sorted(set(self.return_sites) - values.keys())
            if unknown:
                raise ValueError(
                    f"return_sites names {unknown}; the sites to return are {sorted(values)}."
                )
            values = {name: values[name] for name in self.return_sites}
        return values


def _copied(x: Any) -> Any:
    return x.copy() if isinstance(x, np.ndarray) else x


def _values(
    paths: Paths,
    features: Any,
    own: tuple[jax.Array, jax.Array],
    copies: tuple[int, ...],
    X: jax.Array,
) -> jax.Array:
    """Evaluate one path, all copies of it, at inputs: `(*copies, N)`."""
    weights, alpha = own
    one = replace(
        paths,
        features=jax.tree.map(lambda leaf: leaf[None], features),
        weights=weights[None],
        order=jnp.arange(len(alpha)),
        alpha=alpha,
    )
    return one(X).reshape(*copies, len(X))
