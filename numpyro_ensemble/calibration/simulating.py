"""Data sets that are simulated from a model, and the arguments that they replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers

from numpyro_ensemble.calls.tracing import tracing_alone
from numpyro_ensemble.density import (
    is_improper,
    log_joint,
    named_axes,
    observed_sites,
    unchecked_trace,
)
from numpyro_ensemble.handlers import is_factor
from numpyro_ensemble.mapping import compiler_options


class DataSites(NamedTuple):
    """The observed sites of a model, and the arguments that hold their values.

    Attributes:
        model: a NumPyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        places: position or keyword of the argument of each observed site.
        latent: names of the latent sites.
        dims: names of the axes of latent sites in plates.
    """

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    places: dict[str, int | str]
    latent: tuple[str, ...]
    dims: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        data_sites: Mapping[str, str | int] | Collection[str] | str | None,
    ) -> DataSites:
        """Find the data of a call.

        Raises:
            ValueError: for a model that data cannot be simulated from, or whose data cannot be
                found among its arguments.
        """
        trace = unchecked_trace(model, args, kwargs)
        sampled = {name: site for name, site in trace.items() if site["type"] == "sample"}
        observed = observed_sites(trace)
        _check_generative(sampled, observed)
        places = {
            name: _place(name, observed[name]["value"], given, model, args, kwargs)
            for name, given in _given(data_sites, observed).items()
        }
        latent = tuple(name for name, site in sampled.items() if not site["is_observed"])
        axes = {name: named_axes(sampled[name]) for name in latent}
        dims = {name: names for name, names in axes.items() if names is not None}
        return cls(model, args, kwargs, places, latent, dims)

    def call(self, data: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of a call with other data."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for site, place in self.places.items():
            if isinstance(place, int):
                args[place] = data[site]
            else:
                kwargs[place] = data[site]
        return tuple(args), kwargs

    def simulate(self, keys: jax.Array, known: Mapping[str, Any]) -> tuple[dict, dict]:
        """Draw latents and data, `(D, ...)`, one data set for each key.

        Args:
            keys: `(D,)`.
            known: latents `(D, ...)` that are not drawn.
        """
        free = handlers.uncondition(self.model)

        def one(key: jax.Array, known: dict) -> tuple[dict, dict]:
            filled = handlers.substitute(handlers.seed(free, key), data=known)
            trace = handlers.trace(filled).get_trace(*self.args, **self.kwargs)
            latents = {name: trace[name]["value"] for name in self.latent}
            data = {name: self._like(name, trace[name]["value"]) for name in self.places}
            return latents, data

        every = tracing_alone(jax.vmap(one))
        return jax.jit(every, compiler_options=compiler_options(0))(keys, dict(known))

    def _like(self, site: str, value: Any) -> jax.Array:
        own = _by_place(self.args, self.kwargs)[self.places[site]]
        return jnp.asarray(value, jnp.asarray(own).dtype)


def with_data(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Callable:
    """Return a model whose density also has the log joint of another call's data."""
    density = log_joint(model)

    def seen_both(*own: Any, **named: Any) -> Any:
        with handlers.trace() as trace:
            result = model(*own, **named)
        latents = {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        with handlers.block():  # the handlers around this call are for its own sites
            before, _ = density(latents, *args, **kwargs)
        numpyro.factor("_data_seen_before", before)
        return result

    return seen_both


def _check_generative(sampled: dict[str, Any], observed: dict[str, Any]) -> None:
    """Raise a ValueError for a model that data cannot be simulated from."""
    if not observed:
        raise ValueError(
            "the model has no observed site, so there are no data to simulate: pass data of the "
            "shape that is to be simulated."
        )
    factors = [name for name, site in sampled.items() if is_factor(site)]
    if factors:
        raise ValueError(
            f"the model has factors {factors}, which are part of its density but cannot be drawn "
            f"from: write these terms as numpyro.sample."
        )
    improper = [name for name, site in sampled.items() if is_improper(site)]
    if improper:
        raise ValueError(
            f"the prior of {improper} is improper, so nothing can be simulated from it: use a "
            f"proper prior."
        )


def _given(data_sites: Any, observed: dict[str, Any]) -> dict[str, str | int | None]:
    """Return the argument that the user names for each observed site, None where none is named."""
    if data_sites is None and len(observed) > 1:
        raise ValueError(
            f"the model observes {list(observed)}: name them, data_sites={list(observed)}, or "
            f"pass a dict with the argument of each."
        )
    if data_sites is None:
        return dict.fromkeys(observed)
    if isinstance(data_sites, str):
        data_sites = [data_sites]
    if isinstance(data_sites, Mapping):
        named = dict(data_sites)
    else:
        named = dict.fromkeys(data_sites)
    unknown = sorted(named.keys() - observed.keys())
    missing = [name for name in observed if name not in named]
    if unknown or missing:
        raise ValueError(
            f"data_sites must name all observed sites, {list(observed)}: it lacks {missing}, and "
            f"names {unknown}, which are not observed. Each fit would otherwise contain observed "
            f"data that were not simulated."
        )
    return named


def _place(
    site: str, value: Any, given: Any, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> int | str:
    """Return position or keyword of the argument that holds the data of a site."""
    if given is not None:
        return _named_place(site, given, model, args, kwargs)
    places = [place for place, own in _by_place(args, kwargs).items() if _is(own, value)]
    if len(places) == 1:
        return places[0]
    found = f"{len(places)} arguments hold" if places else "no argument holds"
    raise ValueError(
        f"{found} the values of site {site!r}: name it, data_sites={{{site!r}: 'its name'}}. "
        f"Data that a model computes from an argument, or reads from a global, cannot be replaced "
        f"by simulated data: pass them as an argument."
    )


def _by_place(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """Return arguments by position or keyword."""
    return dict(enumerate(args)) | kwargs


def _named_place(
    site: str, given: str | int, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> int | str:
    names = list(inspect.signature(model).parameters)
    if given in kwargs:
        return given
    place = names.index(given) if given in names else given
    if isinstance(place, int) and 0 <= place < len(args):
        return place
    raise ValueError(f"data_sites[{site!r}] names {given!r}, which is none of the arguments.")


def _is(own: Any, value: Any) -> bool:
    """Return whether an argument is an array of these values."""
    if not isinstance(own, np.ndarray | jax.Array | list | float | int):
        return False
    own, value = np.asarray(own), np.asarray(value)
    return own.shape == value.shape and bool(np.array_equal(own, value, equal_nan=True))
