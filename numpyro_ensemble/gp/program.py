"""The program of `Pathwise`: functions of one posterior draw, and the model run on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers

from numpyro_ensemble.density import filled
from numpyro_ensemble.gp.checks import arrays_of, digest, flags_of
from numpyro_ensemble.gp.means import Function
from numpyro_ensemble.gp.paths import Paths
from numpyro_ensemble.gp.sites import EvaluatePaths, Site, gather_sites
from numpyro_ensemble.mapping import pick
from numpyro_ensemble.streaming.forms import RowPlan
from numpyro_ensemble.streaming.rows import block_seed


class InputBlock(NamedTuple):
    """A block of the rows of a call.

    Attributes:
        places: indices of the rows, `(R,)`.
        number: index of the block.
        digest: digest of the arguments with all rows.
        before: for each row, how many rows before the block have equal inputs, by process.
    """

    places: Any
    number: Any
    digest: Any
    before: dict[str, Any]


@dataclass(frozen=True, eq=False)
class PathProgram:
    """Everything that the programs depend on, except their inputs.

    Attributes:
        model: the model.
        args: arguments of the fit.
        kwargs: keyword arguments of the fit.
        sampled: names of the samples.
        shared: parameters that all draws share.
        return_sites: names of the sites to return, None for all that were not given.
        bases: random bases for each draw.
        each: paths of one basis.
        options: options of `Process.draw_paths`.
        plan: how the sites depend on rows, or None if rows are not cut.
    """

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    sampled: Collection[str]
    shared: Mapping[str, Any]
    return_sites: list[str] | None
    bases: int
    each: int
    options: Mapping[str, Any]
    plan: RowPlan | None = None

    def known(self, sample: dict, params: dict) -> dict[str, Any]:
        """Return the samples and parameters of one draw."""
        return {**sample, **params, **self.shared}

    def find(self, sample: dict, params: dict) -> dict[str, Site]:
        """Return the processes of one draw, as they were fitted."""
        known = self.known(sample, params)
        return gather_sites(self.model, known, self.args, self.kwargs).sites

    def centred(self, sample: dict, params: dict) -> dict[str, Site]:
        """Return the processes of one draw without their means: a call adds its own means."""
        return {name: site.centred() for name, site in self.find(sample, params).items()}

    def functions(self, rng_key: jax.Array, sites: dict[str, Site]) -> dict[str, Paths]:
        """Draw the functions of one posterior draw; copies of a process follow each other."""
        keys = jax.random.split(rng_key, len(sites))
        paths = {}
        number = self.bases * self.each
        for key, (name, site) in zip(keys, sorted(sites.items()), strict=True):
            copies = len(site.flat())
            values = jnp.tile(site.flat(), (number, 1))
            options = {"num_paths": len(values), "copies": copies, "latent": not site.observed}
            paths[name] = site.process.draw_paths(key, values, **options, **self.options)
        return paths

    def drawn(
        self, rng_key: jax.Array, sample: dict, params: dict
    ) -> tuple[dict[str, Site], dict[str, Paths]]:
        """Return the processes of one draw without their means, and its functions."""
        sites = self.centred(sample, params)
        return sites, self.functions(jax.random.split(rng_key)[0], sites)

    def trees(self, rng_key: jax.Array, sites: dict[str, Site]) -> tuple[dict[str, Paths], Any]:
        """Return the functions as pytrees that can leave a compiled program, and their flags.

        Raises:
            TypeError: if a kernel or a mean holds values in a function that is no pytree.
        """
        paths = self.functions(jax.random.split(rng_key)[0], sites)
        for name, drawn in paths.items():
            parts = jax.tree.leaves(drawn, is_leaf=lambda part: isinstance(part, Function))
            if any(isinstance(p, Function) and p.closes_over_tracers() for p in parts):
                raise TypeError(
                    f"the kernel or the mean of {name!r} uses a function that closes over latents "
                    f"or parameters: give it as a pytree, functools.partial(fn, values) or a "
                    f"module."
                )
        return paths, flags_of(sites, {name: p.ok.all() for name, p in paths.items()})

    # The call -----------------------------------------------------------------------------------

    def predict(self, call: tuple, rng_key: jax.Array, sample: dict, params: dict) -> Any:
        """Run the model at the new inputs on the functions of one posterior draw."""
        sites, paths = self.drawn(rng_key, sample, params)
        values, finite = self.evaluate(call, rng_key, sample, params, sites, paths)
        solved = {name: drawn.ok.all() for name, drawn in paths.items()}
        return values, flags_of(sites, solved), finite

    def evaluate(
        self,
        call: tuple,
        rng_key: jax.Array,
        sample: dict,
        params: dict,
        sites: dict[str, Site],
        paths: dict[str, Paths],
        block: InputBlock | None = None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Run the model on functions `(bases, each)`, and return whether its inputs are finite."""
        known = self.known(sample, params)

        def run(features: dict, own: dict, key: jax.Array) -> Any:
            functions = _functions(paths, features, own, sites)
            answer, trace = self.run(call, known, functions, sites, key, block)
            return self._wanted(answer, trace), answer.finite

        # map over bases, then over the paths of each basis
        over_paths = jax.vmap(run, in_axes=(None, 0, 0))
        values, finite = jax.vmap(over_paths)(*self._parts(rng_key, sites, paths))
        return values, jax.tree.map(jnp.all, finite)

    def first(
        self,
        call: tuple,
        rng_key: jax.Array,
        sample: dict,
        params: dict,
        sites: dict[str, Site],
        paths: dict[str, Paths],
        block: InputBlock | None = None,
        drawn: Mapping[str, Any] | None = None,
    ) -> tuple[EvaluatePaths, dict]:
        """Run the model on the first of the functions, with given values for random sites."""
        features, own, keys = self._parts(rng_key, sites, paths)
        functions = _functions(paths, pick(features, 0), pick(own, 0, 0), sites)
        known = self.known(sample, params)
        return self.run(call, known, functions, sites, keys[0, 0], block, drawn)

    def _parts(
        self, rng_key: jax.Array, sites: dict[str, Site], paths: dict[str, Paths]
    ) -> tuple[dict, dict, jax.Array]:
        """Return the bases, the weights of each path, and keys `(bases, each)`."""
        copies = {name: site.flat().shape[0] for name, site in sites.items()}
        shape = (self.bases, self.each)

        def grouped(name: str, drawn: Paths) -> tuple[jax.Array, jax.Array]:
            weights = drawn.weights.reshape(*shape, copies[name], drawn.weights.shape[-1])
            alpha = drawn.alpha.reshape(*shape[::-1], copies[name], drawn.alpha.shape[-1])
            return weights, alpha.swapaxes(0, 1)  # paths cycle over the bases

        features = {name: drawn.features for name, drawn in paths.items()}
        own = {name: grouped(name, drawn) for name, drawn in paths.items()}
        return features, own, jax.random.split(jax.random.split(rng_key)[1], shape)

    def run(
        self,
        call: tuple,
        known: dict,
        functions: dict,
        sites: dict[str, Site],
        key: jax.Array,
        block: InputBlock | None = None,
        drawn: Mapping[str, Any] | None = None,
    ) -> tuple[EvaluatePaths, dict]:
        """Run the model once on functions in place of its processes; return these and its trace.

        Args:
            call: arguments of the model.
            known: samples and parameters of the draw.
            functions: functions by the name of their process.
            sites: the processes of the fit.
            key: key of the noise and of other random sites.
            block: block of rows, or None if rows are not cut.
            drawn: values for random sites, which are then not drawn.
        """
        key_model, key_noise = jax.random.split(key)
        # noise depends on the input alone; other random sites depend on all arguments
        call_digest = digest(arrays_of(*call)) if block is None else block.digest
        key_model = jax.random.fold_in(key_model, call_digest)
        others = {name: value for name, value in known.items() if name not in sites}
        seed: Any = handlers.seed(rng_seed=key_model)
        before: dict[str, Any] = {}
        if block is not None and self.plan is not None:
            given, before = self.plan.given, block.before
            others = {
                name: value.take(block.places, axis=given[name]) if name in given else value
                for name, value in others.items()
            }
            seed = block_seed(None, key_model, (), self.plan.drawn, block.number)
        args, kwargs = call
        model = handlers.substitute(filled(self.model, others), data=drawn or {})
        answer = EvaluatePaths(model, functions, sites, key_noise, before)
        with seed:
            return answer, handlers.trace(answer).get_trace(*args, **kwargs)

    def _wanted(self, answer: EvaluatePaths, trace: dict) -> dict[str, jax.Array]:
        """Return the values of `return_sites`, by default of all sites that were not given."""
        values = {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "deterministic"
            or (site["type"] == "sample" and name not in self.sampled)
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


def _functions(
    paths: dict[str, Paths], features: dict, own: dict, sites: dict[str, Site]
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Return one function for each process."""
    return {
        name: partial(_values, paths[name], features[name], own[name], sites[name].copies)
        for name in paths
    }


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
