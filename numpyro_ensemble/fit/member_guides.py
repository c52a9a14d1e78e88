"""Draws from the guides of all members, in one program of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import FIXED, MEMBER, TRACED, Arguments
from numpyro_ensemble.density import fill_model
from numpyro_ensemble.fit.draws import Density, density_at, draw_latents, draw_with_density
from numpyro_ensemble.fit.setup import SetupTemplate
from numpyro_ensemble.fit.slots import filled_guide
from numpyro_ensemble.fit.state import VALUE_AXES, GuideValues
from numpyro_ensemble.mapping import map_draws, map_member_draws, pick


class MemberGuides(NamedTuple):
    """The guides of one fit, called with these arguments."""

    model: Callable
    template: SetupTemplate
    ensemble_size: int
    arguments: Arguments
    with_density: bool

    def draw(
        self, number: int, key: jax.Array, params: dict, values: GuideValues
    ) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array]:
        """Return the model's sites `(E, number, ...)` at draws from the guides, and log densities.

        The last value says whether the mixture's density is that of the same draws.
        """
        size = self.ensemble_size
        keys = jax.random.split(key, (size, number))
        axes = (0, None, None, None), (0, 0, VALUE_AXES.guide, 0)
        many = jax.vmap(jax.vmap(self._latents, in_axes=axes[0]), in_axes=axes[1])
        latents, density = many(keys, params, values, self.arguments.select(MEMBER))
        samples = self._filled(keys, params, latents)
        if density is None:
            return samples, {}, jnp.asarray(True)
        densities, known = {"log_q": density.log_q}, jnp.asarray(True)
        mixture = self._mixture(latents, density, params, values)
        if mixture is not None:
            densities["log_q_mixture"], known = mixture
        return samples, densities, known

    def _latents(
        self, key: jax.Array, params: dict, values: GuideValues, own: list[Any]
    ) -> tuple[dict[str, Any], Density | None]:
        guide = filled_guide(self.template, values)
        key = jax.random.split(key)[0]
        call = self.arguments.of_member(own)
        if self.with_density:
            return draw_with_density(guide, key, params, *call)
        return draw_latents(guide, key, params, *call), None

    def _filled(self, keys: jax.Array, params: dict, latents: dict) -> dict[str, Any]:
        """Run the model on the draws, as many at once as memory allows."""
        own = [jnp.asarray(leaf) for leaf in self.arguments.select(MEMBER)]
        if not own:
            shared = self.arguments.of_member([])

            def one(where: tuple) -> dict[str, Any]:
                key, e, s = where
                return self._sites(key, {**pick(params, e), **pick(latents, e, s)}, shared)

            return map_member_draws(one, keys)

        def of_member(inputs: tuple) -> dict[str, Any]:
            keys, params, latents, own = inputs
            call = self.arguments.of_member(own)  # read once, and not once for each draw
            return map_draws(
                lambda draw: self._sites(draw[0], {**params, **draw[1]}, call), (keys, latents)
            )

        return jax.lax.map(of_member, (keys, params, latents, own))

    def _sites(self, key: jax.Array, known: dict, call: tuple[tuple, dict]) -> dict[str, Any]:
        """Return the sites of the model with known values, but for its observations."""
        trace = fill_model(self.model, jax.random.split(key)[1], known, *call)
        return {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "deterministic"
            or (site["type"] == "sample" and not site["is_observed"])
        }

    def _mixture(
        self, latents: dict, density: Density, params: dict, values: GuideValues
    ) -> tuple[jax.Array, jax.Array] | None:
        """Return the log density of all draws under the equal mixture of all guides."""
        size, number = density.log_q.shape
        flat = jax.tree.map(
            lambda x: x.reshape(size * number, *x.shape[2:]), (latents, density.values)
        )

        call = self.arguments.of_member([])  # members with arguments of their own have no mixture

        def under(params: dict, values: GuideValues) -> tuple[jax.Array, jax.Array]:
            guide = filled_guide(self.template, values)

            def at(draw: tuple) -> tuple[jax.Array, jax.Array]:
                return density_at(guide, draw[0], draw[1], params, *call)

            return map_draws(at, flat)

        try:
            every = jax.vmap(under, in_axes=(0, VALUE_AXES.guide))
            log_q, same = every(params, values)
        except NotImplementedError:  # flows that cannot be inverted
            return None
        mixture = jax.nn.logsumexp(log_q, axis=0) - np.log(size)
        return mixture.reshape(size, number), same.all()


def check_members(
    arguments: Arguments, member_args: Any, template: SetupTemplate, ensemble_size: int
) -> None:
    """Check the arguments of a call, of which `member_args` names those of the members.

    Raises:
        ValueError: if a leading length is not the ensemble size, or if `member_args` is left out
            and an argument has the data of all members, as in the fit.
    """
    arguments.check_members(ensemble_size)
    if member_args is not None or not template.member_ranks:
        return
    for label, leaf in arguments.labelled(TRACED, FIXED):
        rank = template.member_ranks.get(label)
        if np.ndim(leaf) == rank and np.shape(leaf)[0] == ensemble_size:
            raise ValueError(
                f"argument {label!r} has shape {np.shape(leaf)}, and in the fit it held the data "
                f"of each member. Pass what all members share, the data of one member say; "
                f"sample_posterior also takes member_args."
            )
