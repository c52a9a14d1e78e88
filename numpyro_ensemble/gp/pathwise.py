"""Posterior functions from the samples of any inference, called like `Predictive`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.density import fill_model
from numpyro_ensemble.gp.checks import (
    check_flags,
    check_inputs,
    flags_of,
    flat_samples,
    holds,
)
from numpyro_ensemble.gp.draw_paths import check_options
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
from numpyro_ensemble.gp.program import PathProgram
from numpyro_ensemble.gp.sites import EvaluatePaths, gather_sites
from numpyro_ensemble.gp.stored import write_functions
from numpyro_ensemble.gp.subsampling import Dependents, KnownRows, check_rows
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mapping import map_draws, pick, platform_of
from numpyro_ensemble.sharding import Placement, as_mesh
from numpyro_ensemble.streaming.forms import RowPlan
from numpyro_ensemble.streaming.options import StoreOptions, call_digests


class Pathwise:
    """Posterior functions of the Gaussian processes in a model, called like `Predictive`.

    `pathwise(rng_key, X_new)` draws functions for each posterior draw, and runs the model on them
    at the new inputs. The same key gives the same functions, and the same noise at each input, in
    every call (for data of the same dtype). A latent process returns its values. An observed
    process returns `{name}` with noise and `{name}_f` without. Other sites without samples are
    drawn from the model.

    Args:
        model: the NumPyro model that was fitted.
        posterior_samples: a dict by site name, from any inference, or the result of a MAP ensemble.
        *args: arguments of the fit.
        params: the model's parameters, in the model's shapes or with a leading axis of draws.
        batch_ndims: number of leading axes of the samples, 0, 1 or 2.
        return_sites: names of the sites to return (default: all that were not given).
        num_paths: functions for each draw.
        num_features: columns of a random basis, even.
        num_bases: random bases for each draw (default: one, and four for a single draw).
        batch_size: draws computed at once (default: one on a CPU, elsewhere as many as fit into a
            quarter of a gigabyte).
        group_by_draw: return `(S, num_paths, ...)`.
        solver: "cholesky" or "cg".
        tolerance: relative residual of conjugate gradients.
        mesh: devices for the draws: a `jax.sharding.Mesh` with an axis "member", or "all".
        **kwargs: keyword arguments of the fit.

    Raises:
        ValueError: for a model without a Gaussian process, samples that lack a latent, and draws
            for which the process cannot be solved.

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
        mesh: Mesh | str | None = None,
        **kwargs: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model takes a callable with NumPyro primitives, got {model!r}.")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if isinstance(return_sites, str):
            raise TypeError(f"return_sites takes a collection of names, got {return_sites!r}.")
        # copy arrays, so that a later change in place does not change the functions
        self.model, (self.args, self.kwargs) = model, jax.tree.map(_copied, (args, kwargs))
        self.samples, self.num_draws, members = flat_samples(posterior_samples, batch_ndims)
        self.shape = (members, self.num_draws // members)
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
        self.programs, self.placement = Programs(), Placement(mesh=as_mesh(mesh))
        self.placement.check(self.num_draws, "draws")
        drawn = (None, self.samples, self.params, model, self.args, self.kwargs)
        self.placement.check_alike(partial(call_digests, *drawn))
        self._check_model()

    # What is given ------------------------------------------------------------------------------

    def _per_draw(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters of each draw; store those in the model's shapes as shared."""
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
        for name in params.keys() & own.keys():  # others belong to a guide
            shapes = own[name]
            given = [jnp.shape(leaf) for leaf in jax.tree.leaves(params[name])]
            lead = next((shape[0] for shape in given if shape), 0) or self.num_draws
            if given == shapes:
                self.shared[name] = params[name]
            elif (
                lead and given == [(lead, *shape) for shape in shapes] and not self.num_draws % lead
            ):
                # one value for each member; the draws of a member follow each other
                repeat = partial(jnp.repeat, repeats=self.num_draws // lead, axis=0)
                each[name] = jax.tree.map(repeat, jax.tree.map(jnp.asarray, params[name]))
            else:
                raise ValueError(
                    f"params[{name!r}] has shapes {given}: the model's are {shapes}, or each with "
                    f"a leading ({self.num_draws},) of draws, or of members."
                )
        return each

    def _check_model(self) -> None:
        """Raise a ValueError for a model without a process or with latents that lack samples."""
        found: list[Any] = []

        def look(moved: str | None = None) -> Dependents:
            known = self.program().known(*pick((self.samples, self.params), 0))
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

    def program(self, plan: RowPlan | None = None) -> PathProgram:
        """Return the program of one draw; `plan` describes how rows are cut, if they are."""
        return PathProgram(
            self.model,
            self.args,
            self.kwargs,
            self.samples.keys(),
            self.shared,
            self.return_sites,
            self._bases,
            self._each,
            self._options,
            plan,
        )

    # Drawing ------------------------------------------------------------------------------------

    def draw(self, rng_key: jax.Array) -> dict[str, Paths]:
        """Return the functions themselves, for each process and all draws.

        A call with the same key evaluates the same functions. Copies of a process, in a plate,
        follow each other within a path.

        Raises:
            TypeError: if a kernel or a mean holds values in a function that is no pytree.
        """
        program = self.program()

        def one(given: tuple) -> Any:
            key, sample, params = given
            return program.trees(key, program.find(sample, params))

        build = partial(self.mapped, one)
        mapped = self.programs.get(build, self.model, self.args, self.kwargs, "draw")
        paths, flags = mapped(*self.inputs(rng_key))
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

    def mapped(self, one: Callable) -> Callable:
        """Return a compiled function that maps another over draws."""

        def program(*inputs: Any) -> Any:
            return map_draws(one, inputs, self.at_once, self.placement)

        compiled = jax.jit(program)
        return lambda *inputs: home(compiled(*self.placement.fill(inputs, None)))

    @property
    def at_once(self) -> int | None:
        """Number of draws computed at once: one on CPUs, where XLA may hang with several."""
        return (
            1 if self.batch_size is None and platform_of(self.samples) == "cpu" else self.batch_size
        )

    def inputs(self, rng_key: jax.Array) -> tuple:
        """Return key, sample and parameters of each draw."""
        rng_key = one_key(rng_key)
        return jax.random.split(rng_key, self.num_draws), self.samples, self.params

    # The call -----------------------------------------------------------------------------------

    def __call__(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return values by site name, for all draws and paths: `(S * num_paths, ...)`.

        Args:
            rng_key: one key, which determines the functions and the noise at each input.
            *args: arguments of the model at the new inputs; leave the data out (None).
            **kwargs: keyword arguments of the model.
        """
        predict, inputs = self.program().predict, self.inputs(rng_key)
        values = self._checked(predict, inputs, args, kwargs, "call")
        number = self._bases * self._each

        def arrange_paths(x: jax.Array) -> jax.Array:
            x = x.swapaxes(1, 2).reshape(self.num_draws, number, *x.shape[3:])
            x = x[:, : self.num_paths]
            return x if self.group_by_draw else jax.lax.collapse(x, 0, 2)

        return {name: arrange_paths(value) for name, value in values.items()}

    @checked_keywords
    def to_zarr(
        self,
        store: Any,
        rng_key: jax.Array,
        *args: Any,
        row_args: Iterable[str | int] | None = None,
        row_batch_size: int | None = None,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, list[str]] | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Write the values of a call to a Zarr store, block by block, as a dataset on disk.

        Functions are drawn once for all inputs. The functions and the noise of observations are
        those of the call with the same key, for any size of the blocks. If rows are cut, other
        random sites use a separate key in each block. If a call was stopped, the same call
        continues it.

        Args:
            store: a path, or a Zarr store.
            rng_key: one key.
            *args: arguments of the model at the new inputs; leave the data out (None).
            row_args: names or positions of the arguments to cut into blocks, along their leading
                axes of inputs.
            row_batch_size: inputs of a block (default: as many as fit).
            coords: coordinates by dimension.
            dims: dimensions by site; `path` comes before them if a draw has several functions.
            progress_bar: show how many blocks are written.
            **kwargs: keyword arguments of the model.

        Returns:
            An `xarray.Dataset` that reads from the store, with `chain` for members, `draw`, and
            `path` for several functions of a draw.

        Raises:
            ValueError: if the store holds another call or a finished one, or if `row_args` is given
                and the rows of other sites depend on each other.
            TypeError: if a kernel holds values in a function that is no pytree.
        """
        options = StoreOptions(row_args, row_batch_size, coords or {}, dims or {}, progress_bar)
        return write_functions(self, store, one_key(rng_key), args, kwargs, options)

    def moments(
        self, *args: Any, covariance: bool = False, **kwargs: Any
    ) -> dict[str, Moments | JointMoments]:
        """Return exact moments of each process over the mixture of all draws; nothing is random.

        By site name: `{name}` with the noise of observations, `{name}_f` without.

        Args:
            *args: arguments of the model at the new inputs; leave the data out (None).
            covariance: add the covariance `(N, N)` of all inputs of a process.
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: if the inputs of a process depend on another one's values.
        """
        each = self._conditionals(bool(covariance), args, kwargs)
        return {name: mixed_moments(*of_draws) for name, of_draws in named(each).items()}

    def quantiles(self, probabilities: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return exact quantiles of each process over the mixture of all draws, by site name.

        Args:
            probabilities: a number, or an array, whose axes come first in the result.
            *args: arguments of the model at the new inputs; leave the data out (None).
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: for a probability outside (0, 1), and in the cases that `moments` names.
        """
        asked = np.asarray(probabilities, float).astype(jnp.result_type(float))
        if not ((asked > 0) & (asked < 1)).all():
            raise ValueError(f"probabilities lie between 0 and 1, got {probabilities!r}.")
        each = named(self._conditionals(False, args, kwargs))
        return {n: mixed_quantiles(mean, spread, asked) for n, (mean, spread) in each.items()}

    def _conditionals(self, joint: bool, args: tuple, kwargs: dict) -> dict[str, Conditional]:
        """Return the distribution of each process given each draw, at the inputs of a call."""
        program = self.program()

        def one(call: tuple, draw: jax.Array, sample: dict, params: dict) -> Any:
            known, sites = program.known(sample, params), program.centred(sample, params)

            def run(functions: dict) -> EvaluatePaths:
                return program.run(call, known, functions, sites, jax.random.key(0))[0]

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
                f"closed form: compute them from the draws that a call returns."
            )
        return each

    def _checked(
        self, one: Callable, inputs: tuple, args: tuple, kwargs: dict, *others: Any
    ) -> Any:
        """Run a program over all draws, and raise a ValueError if a check of it fails."""

        def program(call: tuple, *inputs: Any) -> Any:
            each = lambda given: one(call, *given)  # noqa: E731
            return map_draws(each, inputs, self.at_once, self.placement)

        call, placement = (self.model, args, kwargs, *others), self.placement
        inputs = placement.fill(inputs, None)
        out, flags, finite = home(self.programs.call(program, inputs, *call, placement=placement))
        check_inputs(finite)
        check_flags(flags, self.num_draws)
        return out


def _copied(x: Any) -> Any:
    return x.copy() if isinstance(x, np.ndarray) else x
