"""Predictions from all members: NumPyro's `Predictive` for each, in one bounded program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import Predictive
from numpyro.primitives import _PYRO_STACK
from numpyro.util import is_prng_key

from numpyro_ensemble.arguments import arrange, has_tracers
from numpyro_ensemble.density import anatomy
from numpyro_ensemble.draws import (
    batch_for,
    bytes_per_draw,
    check_failed,
    draw_latents,
    finite_members,
    map_draws,
    pick,
)
from numpyro_ensemble.fingerprints import captured
from numpyro_ensemble.primitives import check_count, combine, partition
from numpyro_ensemble.results import EnsembleResult

_KEPT = 8  # sets of arguments whose compiled programs are kept


class EnsemblePredictive:
    """Predictions from all members of an ensemble, called as NumPyro's `Predictive` is.

    Samples lead, `E * num_samples` of them, or `(E, num_samples)` with `group_by_member=True` and
    for samples given as `(E, S, ...)`. Members that are not finite are left out.

    Args:
        model: a NumPyro model.
        posterior_samples: an `EnsembleResult`, or a dict of samples by site name that lead with
            `(E,)`, or `(E, S)` if `batch_ndims=2`. A variational result takes its `guide` along.
        params: parameters of the model and the guide, each leaf with a leading `(E,)`.
        guide: draws the latents, with each member's parameters.
        num_samples: draws per member, 1 by default; needed with a guide and for prior predictions.
        return_sites: names of the sites to return (default: the model's sample sites that were not
            given, and its deterministic ones).
        group_by_member: return `(E, num_samples, ...)`.
        weights: weights `(E,)` of a mixture; as many draws, from members resampled by weight.
        batch_size: draws made at once (default: as many as fit into a quarter of a gigabyte).
        parallel: True makes all draws at once, False one at a time.
        batch_ndims: number of leading axes of the samples, 0 (one member), 1 or 2.
        infer_discrete: as in `Predictive`.
        condition_deterministic: as in `Predictive`.
        on_failed: "warn" leaves members that are not finite out with a warning, "raise" raises.

    Raises:
        ValueError: for samples with unequal leading axes, weights that are none, a result of
            another model, or options that contradict each other.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsemblePredictive
        >>> def model(x, y=None):
        ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("y", dist.Normal(w * x, 0.1), obs=y)
        >>> predictive = EnsemblePredictive(model, {"w": jnp.array([1.0, 2.0])}, num_samples=50)
        >>> predictive(jax.random.key(0), jnp.ones(3))["y"].shape
        (100, 3)
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: Any = None,
        *,
        params: Any = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = None,
        group_by_member: bool = False,
        weights: ArrayLike | None = None,
        batch_size: int | None = None,
        parallel: bool | None = None,
        batch_ndims: int | None = None,
        infer_discrete: bool = False,
        condition_deterministic: bool = False,
        on_failed: str = "warn",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model takes a callable with NumPyro primitives, got {model!r}.")
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        if isinstance(return_sites, str):
            raise TypeError(f"return_sites takes a collection of names, got {return_sites!r}.")
        if on_failed not in ("warn", "raise"):
            raise ValueError(f'on_failed takes "warn" or "raise", got {on_failed!r}.')
        if batch_size is not None and parallel is not None:
            raise ValueError("give either batch_size or parallel, not both.")
        if weights is not None and group_by_member:
            raise ValueError(
                "weights resample the members, so that draws cannot be grouped by them: leave out "
                "one of weights and group_by_member."
            )
        self.model, self.guide = model, guide
        self.return_sites = None if return_sites is None else list(return_sites)
        self.infer_discrete = infer_discrete
        self.condition_deterministic = condition_deterministic
        self.batch_size, self.parallel = batch_size, parallel
        self._fitted: set[str] = set()
        self._ended_well: Any = True
        if isinstance(posterior_samples, EnsembleResult):
            self._fitted = set(posterior_samples.params)
            self._ended_well = posterior_samples.finite
        self._read(posterior_samples, params, num_samples, batch_ndims)
        self.grouped = group_by_member or self.batch_ndims == 2
        if group_by_member and self._size is None:
            raise ValueError("group_by_member needs members: posterior_samples, or params.")
        self._leave_out_failed(on_failed)
        self.weights = self._check_weights(weights)
        self._programs: dict[Any, Callable] = {}

    # What was given -----------------------------------------------------------------------------

    def _read(self, given: Any, params: Any, num_samples: int | None, ndims: int | None) -> None:
        """Sort out samples, parameters and numbers of draws."""
        samples = given
        if isinstance(given, EnsembleResult):
            if params is not None:
                raise ValueError("params comes with the EnsembleResult: leave it out.")
            if ndims not in (None, 1):
                raise ValueError(f"an EnsembleResult has batch_ndims=1, got {ndims}.")
            state = given.state.mutable_state or {}
            samples, params = (
                (None, {**given.params, **state}) if self.guide else (given.params, state)
            )
        for name, value in (("posterior_samples", samples), ("params", params)):
            if value is not None and not isinstance(value, dict):
                raise TypeError(
                    f"{name} takes a dict by site name"
                    + (" or an EnsembleResult" if name == "posterior_samples" else "")
                    + f", got {type(value).__name__}."
                )
        # the parameters of a module are a tree, which Predictive takes as params alone
        trees = {k: v for k, v in (samples or {}).items() if not hasattr(v, "shape")}
        if trees:
            samples = {k: v for k, v in samples.items() if k not in trees}
            params = {**trees, **(params or {})}
        if samples is not None and self.guide is not None:
            raise ValueError("give either posterior_samples or a guide, not both.")
        if ndims not in (None, 0, 1, 2):
            raise ValueError(f"batch_ndims takes 0, 1 or 2, got {ndims}.")
        self.batch_ndims = 1 if ndims is None else ndims
        if self.batch_ndims == 2 and samples is None:
            raise ValueError("batch_ndims=2 goes with posterior_samples alone.")
        self.samples, self.params = samples or {}, params or {}
        if self.batch_ndims == 0:
            self.samples, self.params = jax.tree.map(
                lambda leaf: jnp.asarray(leaf)[None], (self.samples, self.params)
            )
        lead = _leading(self.samples, 2 if self.batch_ndims == 2 else 1, "posterior_samples")
        size = _leading(self.params, 1, "params")
        if lead and size and lead[:1] != size:
            raise ValueError(f"posterior_samples lead with {lead[:1]}, and params with {size}.")
        self._size: int | None = (lead or size or (None,))[0]
        if num_samples is None and not self.samples:
            raise ValueError(
                "num_samples is needed with a guide, and for predictions from the prior."
            )
        self.num_samples = lead[1] if lead and self.batch_ndims == 2 else num_samples or 1
        if lead and self.batch_ndims == 2 and num_samples not in (None, lead[1], lead[0] * lead[1]):
            raise ValueError(f"num_samples={num_samples}, and posterior_samples lead with {lead}.")

    def _leave_out_failed(self, on_failed: str) -> None:
        given = (self.samples, self.params)
        self._finite = np.ones(self.ensemble_size, bool)
        if self._size is None or has_tracers((given, self._ended_well)):
            return
        self._finite = finite_members(given, self.ensemble_size) & np.asarray(self._ended_well)
        check_failed(self._finite, on_failed)
        if not self._finite.all():
            kept = np.flatnonzero(self._finite)
            self.samples, self.params = (_members(tree, kept, self._size) for tree in given)
            self._size = kept.size

    def _check_weights(self, weights: ArrayLike | None) -> np.ndarray | None:
        """Return the weights of the finite members, adding up to 1."""
        if weights is None:
            return None
        values = np.asarray(weights, float)
        if values.shape != self._finite.shape:
            raise ValueError(
                f"weights takes one number for each of {self._finite.size} members, got shape "
                f"{values.shape}."
            )
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"weights takes finite numbers that are not negative, got {values}.")
        values = values[self._finite]
        if not values.sum() > 0:
            raise ValueError("weights add up to 0 over the finite members.")
        return values / values.sum()

    @property
    def ensemble_size(self) -> int:
        """Number of members E, 1 where there are none."""
        return 1 if self._size is None else self._size

    # The call -----------------------------------------------------------------------------------

    def __call__(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return predictions by site name.

        Args:
            rng_key: one key.
            *args: arguments of the model; leave observed ones out (None), or they are returned.
            **kwargs: keyword arguments of the model.
        """
        if not is_prng_key(rng_key):
            raise ValueError(f"rng_key takes one key, jax.random.key(0) say; got {rng_key!r}.")
        arguments = arrange(self.model, args, kwargs)
        program = None
        if not has_tracers(arguments.leaves):
            around = captured(tuple(_PYRO_STACK))
            key = (arguments.key(), captured(self.model), captured(self.guide), around)
            program = self._programs.get(key)
        if program is None:
            self._check_model(args, kwargs)
            program = self._build(args, kwargs)
            if not has_tracers(arguments.leaves):
                self._programs[key] = program
                if len(self._programs) > _KEPT:
                    del self._programs[next(iter(self._programs))]
        member, draw = self._indices(rng_key)
        predictions = program(rng_key, member, draw, self.samples, self.params)
        if self.batch_ndims == 0:
            return predictions if self.num_samples > 1 else pick(predictions, 0)
        if not self.grouped or self.weights is not None:
            return predictions
        shape = (self.ensemble_size, self.num_samples)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), predictions)

    def _indices(self, rng_key: jax.Array) -> tuple[Any, Any]:
        """Return member and draw of each prediction."""
        size, number = self.ensemble_size, self.num_samples
        if self.weights is None:
            member, draw = np.divmod(np.arange(size * number), number)
            return member, draw
        total = size * number
        key_place, key_first = jax.random.split(jax.random.fold_in(rng_key, total))
        places = (jnp.arange(total) + jax.random.uniform(key_place, (total,))) / total
        bounds = jnp.asarray(np.cumsum(self.weights)[:-1], places.dtype)
        members = jnp.searchsorted(bounds, places, side="right")
        # a member's own draws are taken in turn, from a random one on
        rank = jnp.arange(total) - jnp.searchsorted(members, members, side="left")
        first = jax.random.randint(key_first, (size,), 0, number)
        return members, (first[members] + rank) % number

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        sites = anatomy(self.model, args, kwargs)
        if self._fitted and not self.guide:
            unknown = sorted(self._fitted - sites.keys())
            if unknown:
                raise ValueError(
                    f"the result is of another model, which has {unknown}, or of a variational "
                    f"fit: that takes its guide along, guide=runner.guide."
                )
        observed = [
            name
            for name, site in sites.items()
            if site.kind == "observed" and (self.return_sites is None or name in self.return_sites)
        ]
        if observed and not self.infer_discrete:
            warnings.warn(
                f"{observed} are observed in this call, so that what is returned for them is the "
                f"data. Leave the observed arguments out, y=None say.",
                stacklevel=3,
            )

    def _build(self, args: tuple, kwargs: dict) -> Callable:
        """Compile the program for these arguments, which stay concrete."""
        total = self.ensemble_size * self.num_samples
        if self.parallel is not None:
            at_once = total if self.parallel else 1
        else:
            at_once = self.batch_size or batch_for(total, bytes_per_draw(self.model, args, kwargs))

        def predict(rng_key: Any, member: Any, draw: Any, samples: Any, params: Any) -> Any:
            arrays, shared = partition(params)
            places = (member, draw) if self.batch_ndims == 2 else (member,)
            if self.guide is not None:
                rng_key, guide_key = jax.random.split(rng_key)
                samples = self._draw(guide_key, member, arrays, shared, args, kwargs)
                places = (np.arange(total),)
            keys = jax.random.split(rng_key, total) if total > 1 else rng_key[None]

            def one(where: tuple) -> dict[str, Any]:
                key, e, place = where
                known = pick(samples, *place)
                predictive = Predictive(
                    self.model,
                    known,
                    params=combine(pick(arrays, e), shared),
                    num_samples=None if known else 1,
                    batch_ndims=0,
                    return_sites=self.return_sites,
                    infer_discrete=self.infer_discrete,
                    condition_deterministic=self.condition_deterministic,
                )
                predictions = predictive(key, *args, **kwargs)
                return predictions if known else pick(predictions, 0)

            return map_draws(one, (keys, member, places), at_once)

        return jax.jit(predict)

    def _draw(
        self, rng_key: jax.Array, member: Any, arrays: Any, shared: Any, args: tuple, kwargs: dict
    ) -> dict[str, Any]:
        """Draw the latents of each prediction from the guide."""

        def draw(key: jax.Array, own: Any) -> dict[str, Any]:
            return draw_latents(self.guide, key, combine(own, shared), args, kwargs)  # type: ignore[arg-type]

        size, number = self.ensemble_size, self.num_samples
        keys = jax.random.split(rng_key, size * number)
        if self.weights is not None or self._size is None:
            return jax.vmap(lambda key, e: draw(key, pick(arrays, e)))(keys, member)
        # what a guide computes from a member's parameters alone, it computes once
        many = jax.vmap(jax.vmap(draw, in_axes=(0, None)))
        draws = many(keys.reshape(size, number, *keys.shape[1:]), arrays)
        return jax.tree.map(lambda x: x.reshape(size * number, *x.shape[2:]), draws)


def _leading(tree: dict[str, Any], ndims: int, option: str) -> tuple[int, ...]:
    """Return the leading shape that all arrays share, nothing where there is none."""
    shapes = {
        name: {np.shape(leaf)[:ndims] for leaf in jax.tree.leaves(value) if hasattr(leaf, "shape")}
        for name, value in tree.items()
    }
    found = set().union(*shapes.values()) if shapes else set()
    if len(found) > 1 or any(len(shape) < ndims for shape in found):
        named = {name: sorted(values) for name, values in shapes.items()}
        raise ValueError(
            f"{option} must lead with the same {ndims} axes, of members"
            f"{' and draws' if ndims == 2 else ''}; got {named}."
        )
    return next(iter(found), ())


def _members(tree: Any, kept: np.ndarray, size: int) -> Any:
    def take(leaf: Any) -> Any:
        return leaf[kept] if np.shape(leaf)[:1] == (size,) else leaf

    return jax.tree.map(take, tree)
