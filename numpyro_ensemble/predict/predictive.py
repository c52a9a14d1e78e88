"""Predictions from all members: NumPyro's `Predictive` for each, in one bounded program."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoGuide

from numpyro_ensemble.calls.identity import captured
from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.density import anatomy
from numpyro_ensemble.fit.draws import check_guide, draw_latents
from numpyro_ensemble.fit.slots import filled_guide
from numpyro_ensemble.fit.state import VALUE_AXES, GuideValues, Setup
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.mapping import map_draws, pick
from numpyro_ensemble.predict.given import read_given

_DRAWN = ("latent", "discrete")  # kinds of sites


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
        given = read_given(posterior_samples, params, guide, num_samples, batch_ndims, on_failed)
        if group_by_member and given.size is None:
            raise ValueError("group_by_member needs members: posterior_samples, or params.")
        self._given, self.num_samples = given, given.number
        self.grouped = group_by_member or given.ndims == 2
        self.weights = given.finite_weights(weights)
        self._setup = self._setup_of_guides()
        self._programs = Programs()

    @property
    def ensemble_size(self) -> int:
        """Number of members E, 1 where there are none."""
        return self._given.size or 1

    def _setup_of_guides(self) -> Setup | None:
        """Return the set-up of the fit's guides, if the guide that was given is one of these."""
        setup = self._given.setup
        if setup is None or setup.template is None or not isinstance(self.guide, AutoGuide):
            return None
        fitted: Any = setup.template.guide
        same = type(fitted) is type(self.guide) and fitted.prefix == self.guide.prefix
        return setup if same else None

    # The call -----------------------------------------------------------------------------------

    def __call__(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        """Return predictions by site name.

        Args:
            rng_key: one key.
            *args: arguments of the model; leave observed ones out (None), or they are returned.
            **kwargs: keyword arguments of the model.
        """
        rng_key = one_key(rng_key)
        given = self._given
        values = None if self._setup is None else self._setup.values.guide
        inputs = (rng_key, *self._indices(rng_key), given.samples, given.params, values)
        predictions = self._programs.call(
            self._predict, inputs, self.model, args, kwargs, *self._settings(),
            prepare=lambda: self._check_model(args, kwargs),
        )  # fmt: skip
        missing = sorted(set(self.return_sites or ()) - predictions.keys())
        if missing:
            raise ValueError(
                f"return_sites names {missing}, which are no sites of the model or the guide."
            )
        if self._given.ndims == 0:
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
        # whole strata and the rest apart, or single precision would round a draw to the next member
        bounds = np.minimum(np.cumsum(self.weights) * total, total)
        bounds[np.flatnonzero(self.weights)[-1] :] = total
        whole = np.floor(bounds)[:, None]
        stratum, place = np.arange(total), jax.random.uniform(key_place, (total,))
        ended = (whole < stratum) | ((whole == stratum) & (bounds[:, None] - whole <= place[None]))
        members = ended.sum(axis=0)
        # a member's own draws are taken in turn, from a random one on
        rank = jnp.arange(total) - jnp.searchsorted(members, members, side="left")
        first = jax.random.randint(key_first, (size,), 0, number)
        return members, (first[members] + rank) % number

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        sites = anatomy(self.model, args, kwargs)
        if self._given.fitted and not self.guide:
            unknown = sorted(self._given.fitted - sites.keys())
            if unknown:
                raise ValueError(
                    f"the result is of another model, which has {unknown}, or of a variational "
                    f"fit: that takes its guide along, guide=runner.guide."
                )
        for name, value in self._given.samples.items():
            site, shape = sites.get(name), np.shape(value)[max(self._given.ndims, 1) :]
            if site is not None and site.kind == "latent" and len(shape) != len(site.shape):
                raise ValueError(
                    f"each of the samples of {name!r} has shape {shape}, and the model's site "
                    f"{site.shape}: batch_ndims says how many axes of the samples lead (2 for "
                    f"members and draws), got {self._given.ndims}."
                )
        known = self._given.known
        if known is not None:
            new = [n for n, s in sites.items() if s.kind in _DRAWN and n not in known]
            if new:
                warn(f"{new} were no sites of the fitted model and are drawn from their prior.")
        if self.guide is not None:
            guide = self.guide
            if self._setup is not None:
                guide = _first_guide(self._setup)
            check_guide(guide, self._given.params, args, kwargs)
        observed = [
            name
            for name, site in sites.items()
            if site.kind == "observed" and (self.return_sites is None or name in self.return_sites)
        ]
        if observed and not self.infer_discrete:
            warn(
                f"{observed} are observed in this call, so that what is returned for them is the "
                f"data. Leave the observed arguments out, y=None say."
            )

    def _settings(self) -> tuple:
        """Return what a program depends on besides its arguments and the model."""
        sites = None if self.return_sites is None else tuple(self.return_sites)
        discrete = (self.infer_discrete, self.condition_deterministic)
        template = None if self._setup is None else self._setup.template
        return (captured(self.guide), template, sites, *discrete, self.batch_size, self.parallel)

    def _predict(
        self,
        call: tuple,
        rng_key: Any,
        member: Any,
        draw: Any,
        samples: Any,
        params: Any,
        values: GuideValues | None,
    ) -> Any:
        """Return all predictions; this is what is compiled."""
        args, kwargs = call
        total = self.ensemble_size * self.num_samples
        at_once = self.batch_size
        if self.parallel is not None:
            at_once = total if self.parallel else 1
        places = (member, draw) if self._given.ndims == 2 else (member,)
        if self.guide is not None:
            rng_key, guide_key = jax.random.split(rng_key)
            samples = self._draw(guide_key, member, params, values, args, kwargs)
            places = (np.arange(total),)
        keys = jax.random.split(rng_key, total) if total > 1 else rng_key[None]

        def one(where: tuple) -> dict[str, Any]:
            key, e, place = where
            known = pick(samples, *place)
            predictive = Predictive(
                self.model,
                known,
                params=pick(params, e),
                num_samples=None if known else 1,
                batch_ndims=0,
                return_sites=self.return_sites,
                infer_discrete=self.infer_discrete,
                condition_deterministic=self.condition_deterministic,
            )
            predictions = predictive(key, *args, **kwargs)
            return predictions if known else pick(predictions, 0)

        return map_draws(one, (keys, member, places), at_once)

    def _draw(
        self,
        rng_key: jax.Array,
        member: Any,
        params: Any,
        values: GuideValues | None,
        args: tuple,
        kwargs: dict,
    ) -> dict[str, Any]:
        """Draw the latents of each prediction from the guide, as each member has set it up."""

        def draw(key: jax.Array, own: Any, values: GuideValues | None) -> dict[str, Any]:
            guide: Any = self.guide
            if values is not None and self._setup is not None:
                guide = filled_guide(self._setup.template, values)  # type: ignore[arg-type]
            return draw_latents(guide, key, own, args, kwargs)

        size, number = self.ensemble_size, self.num_samples
        keys = jax.random.split(rng_key, size * number)
        axes = None if values is None else VALUE_AXES.guide
        if self.weights is not None or self._given.size is None:
            if values is not None:
                supports, own = pick(values[:2], member)
                values = GuideValues(supports, own, values.shared)
            each = jax.vmap(lambda key, e, own: draw(key, pick(params, e), own), (0, 0, axes))
            return each(keys, member, values)
        # what a guide computes from a member's parameters alone, it computes once
        many = jax.vmap(jax.vmap(draw, in_axes=(0, None, None)), in_axes=(0, 0, axes))
        draws = many(keys.reshape(size, number, *keys.shape[1:]), params, values)
        return jax.tree.map(lambda x: x.reshape(size * number, *x.shape[2:]), draws)


def _first_guide(setup: Setup) -> Any:
    """Return the guide of the first member."""
    first = setup.of_members(0).values.guide
    assert setup.template is not None
    return filled_guide(setup.template, first)
