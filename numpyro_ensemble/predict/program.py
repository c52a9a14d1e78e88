"""The program of predictions: NumPyro's `Predictive` for each of some draws of some members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import Predictive

from numpyro_ensemble.calls.identity import closure_fingerprint
from numpyro_ensemble.density import filled
from numpyro_ensemble.fit.draws import draw_latents
from numpyro_ensemble.fit.slots import filled_guide
from numpyro_ensemble.fit.state import VALUE_AXES, GuideValues, Setup
from numpyro_ensemble.mapping import ROOM, map_draws, pick
from numpyro_ensemble.sharding import Placement
from numpyro_ensemble.streaming.forms import RowPlan
from numpyro_ensemble.streaming.rows import block_seed


class Places(NamedTuple):
    """The predictions that a program makes, `(c, s)`: s of each of c members, or of their mixture.

    Attributes:
        index: of each prediction's key, among the keys of all predictions.
        member: of each prediction.
        draw: of each prediction, among the given draws of its member.
    """

    index: Any
    member: Any
    draw: Any


def places_of(rng_key: jax.Array, size: int, number: int, weights: np.ndarray | None) -> Places:
    """Return the places of all predictions, `(E, S)`, or `(1, E * S)` of a mixture by weights."""
    index = np.arange(size * number)
    if weights is None:
        return Places(*(x.reshape(size, number) for x in (index, *np.divmod(index, number))))
    total = size * number
    key_place, key_first = jax.random.split(jax.random.fold_in(rng_key, total))
    # whole strata and the rest separately: in one sum, single precision could round a draw to the
    # next member
    bounds = np.minimum(np.cumsum(weights) * total, total)
    bounds[np.flatnonzero(weights)[-1] :] = total
    whole = np.floor(bounds)[:, None]
    stratum, place = np.arange(total), jax.random.uniform(key_place, (total,))
    ended = (whole < stratum) | ((whole == stratum) & (bounds[:, None] - whole <= place[None]))
    members = ended.sum(axis=0)
    # a member's own draws are taken in turn, starting with a random one
    rank = jnp.arange(total) - jnp.searchsorted(members, members, side="left")
    first = jax.random.randint(key_first, (size,), 0, number)
    draws = (first[members] + rank) % number
    return Places(index[None], members[None], draws[None])


class RowBlock(NamedTuple):
    """A block of rows: the indices `(R,)` of its rows, and its number."""

    places: Any
    number: Any


@dataclass(frozen=True, eq=False)
class PredictiveProgram:
    """What a program of predictions depends on besides its arguments.

    Attributes:
        model: the model.
        guide: draws the latents, if no samples are given.
        setup: of the fit's guides, if the guide is of their kind.
        return_sites: names of the sites to return.
        infer_discrete: as in `Predictive`.
        condition_deterministic: as in `Predictive`.
        at_once: draws made at once: a number, True for all, None for as many as fit in `room`.
        total: number of all predictions.
        ndims: number of leading axes of the samples.
        grouped: whether a row of places is of one member.
        placement: the devices that predictions are spread over.
        plan: the row axes of sites, None if rows are not cut.
        room: bytes that the draws made at once may take.
    """

    model: Callable
    guide: Any
    setup: Setup | None
    return_sites: list[str] | None
    infer_discrete: bool
    condition_deterministic: bool
    at_once: int | bool | None
    total: int
    ndims: int
    grouped: bool
    placement: Placement
    plan: RowPlan | None = None
    room: int = ROOM

    @property
    def key(self) -> tuple:
        """The key of the program among those of one model."""
        template = None if self.setup is None else self.setup.template
        sites = None if self.return_sites is None else tuple(self.return_sites)
        plan = (None if self.plan is None else self.plan.key, self.room)
        how = (sites, self.infer_discrete, self.condition_deterministic, self.at_once)
        where = (self.total, self.ndims, self.grouped, self.placement.mesh)
        return (closure_fingerprint(self.guide), template, *how, *where, plan)

    @property
    def guide_values(self) -> GuideValues | None:
        """The values that the guides' set-up computed, an input of the program."""
        return None if self.setup is None else self.setup.values.guide

    def __call__(
        self,
        call: tuple,
        rng_key: jax.Array,
        places: Places,
        samples: dict,
        params: dict,
        values: GuideValues | None,
        rows: RowBlock | None = None,
    ) -> dict[str, Any]:
        """Return predictions with one leading axis for all places; this function is compiled."""
        keys, samples, where = self.latents(call, rng_key, places, samples, params, values)
        args, kwargs = call

        def one(of_draw: tuple) -> dict[str, Any]:
            key, e, place = of_draw
            known = self.known(pick(samples, *place), rows)
            predictive = Predictive(
                self.model if rows is None else self._seeded(key, known, rows),
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

        at_once = places.index.size if self.at_once is True else self.at_once
        inputs = keys, places.member.reshape(-1), where
        return map_draws(one, inputs, at_once, self.placement, self.room)

    def latents(
        self,
        call: tuple,
        rng_key: jax.Array,
        places: Places,
        samples: dict,
        params: dict,
        values: GuideValues | None,
    ) -> tuple[jax.Array, dict[str, Any], tuple]:
        """Return the predictions' keys, the samples, and the place of each prediction's sample."""
        index, member, draw = (place.reshape(-1) for place in places)
        where = (member, draw) if self.ndims == 2 else (member,)
        if self.guide is not None:
            rng_key, guide_key = jax.random.split(rng_key)
            keys = jax.random.split(guide_key, self.total)[index]
            samples = self._draw(keys, places.member, params, values, call)
            where = (np.arange(index.size),)
        keys = jax.random.split(rng_key, self.total) if self.total > 1 else rng_key[None]
        return keys[index], samples, where

    def known(self, sample: dict[str, Any], rows: RowBlock | None) -> dict[str, Any]:
        """Return the latents of one draw, cut to the rows of the block."""
        if rows is None or self.plan is None:
            return sample
        given = self.plan.given
        return {
            name: value.take(rows.places, axis=given[name]) if name in given else value
            for name, value in sample.items()
        }

    def trace(
        self, call: tuple, key: jax.Array, known: dict, params: dict, values: dict
    ) -> dict[str, Any]:
        """Return the trace of the model for one draw, with given values for some of its sites."""
        model = handlers.substitute(self.model, data=params)
        if self.condition_deterministic:
            model = handlers.substitute(model, data=known)
        model = handlers.substitute(filled(handlers.seed(model, key), known), data=values)
        return handlers.trace(model).get_trace(*call[0], **call[1])

    def _seeded(self, key: jax.Array, known: dict, rows: RowBlock) -> Callable:
        assert self.plan is not None
        return block_seed(self.model, key, known, self.plan.drawn, rows.number)

    def _draw(
        self,
        keys: jax.Array,
        member: Any,
        params: dict[str, Any],
        values: GuideValues | None,
        call: tuple,
    ) -> dict[str, Any]:
        """Draw the latents of each prediction from the guide, with the set-up of each member."""
        args, kwargs = call

        def draw(key: jax.Array, own: Any, values: GuideValues | None) -> dict[str, Any]:
            guide: Any = self.guide
            if values is not None and self.setup is not None:
                guide = filled_guide(self.setup.template, values)  # type: ignore[arg-type]
            return draw_latents(guide, key, own, args, kwargs)

        owner = member[:, 0] if self.grouped else member.reshape(-1)
        if values is not None:
            supports, own = pick(values[:2], owner)
            values = GuideValues(supports, own, values.shared)
        axes = None if values is None else VALUE_AXES.guide
        if not self.grouped:
            return jax.vmap(draw, in_axes=(0, 0, axes))(keys, pick(params, owner), values)
        # values that depend only on a member's parameters are computed once for each member
        many = jax.vmap(jax.vmap(draw, in_axes=(0, None, None)), in_axes=(0, 0, axes))
        grouped = keys.reshape(*member.shape, *keys.shape[1:])
        draws = many(grouped, pick(params, owner), values)
        return jax.tree.map(lambda x: x.reshape(keys.shape[0], *x.shape[2:]), draws)
