"""Checks at the end of a run: chains that did not move or mix, and errors of the energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer import MCMC

from numpyro_ensemble.handlers import warn
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mcmc.checks import frames_outside_jax, listed
from numpyro_ensemble.mcmc.diagnostics import (
    limit_alone,
    median_and_width,
    robust_rhat,
    within_rhat,
)

_FEWEST_ALONE = 20  # draws of a chain that is judged alone
_FEWEST_DRAWS = 10  # a chain that accepts 0.8 of its proposals rejects 9 in a row once in 2 million
_MIXED = 1.05  # R-hat of 20 effective draws a chain, or 1,280 of 64 chains
# This over the draws in half a chain is added to the limit, since short chains have larger R-hats.
_SHORTNESS = 1.5
_HARDLY = 0.01  # a chain that moves by less than this part of the width of all draws hardly moves
_BLOCK = 4_000_000  # numbers that are converted to double precision at once

_ENERGY = 1.5  # times the desired energy error, for a warning: short runs estimate it so badly

_parted = ContextVar("_parted", default=False)  # whether `MCMC.run` makes part of a run


class Advice(NamedTuple):
    """The kernel of the collected draws, and what to try, in this order, if they are bad."""

    kernel: str
    latents: tuple[str, ...]  # empty: everything that is collected
    unmixed: str  # for chains that have not mixed
    frozen: str  # for chains that did not move
    alone: bool = False  # whether each chain may stay in its own mode, and is judged alone


class CollectedDraws(dict):
    """The draws by site that `MCMC` collects. The end of a run checks them and makes a plain dict.

    `MCMC` calls no method of a kernel at the end of a run. But its last step swaps the axes of the
    collected values by `jax.tree.map`, which builds this dictionary from all draws.
    """

    def __init__(self, draws: Any, advice: Any) -> None:
        super().__init__(draws)
        self.advice = advice

    def copy(self) -> CollectedDraws:
        """Return a copy of the same type: `MCMC` removes sites from a copy."""
        return CollectedDraws(self, self.advice)

    def check(self) -> None:
        """Check the draws, and warn if chains did not move or mix."""
        check_mixing(self, self.advice)

    def plain(self) -> Any:
        """Return the draws as users see them."""
        return dict(self)


class _Whole(CollectedDraws):
    """Draws of a `potential_fn`, which are no dictionary, stored under one key."""

    def plain(self) -> Any:
        """Return the draws as users see them."""
        return self[""]


class CollectedEnergy(_Whole):
    """The energy errors that `MCMC` collects, and the desired one."""

    def check(self) -> None:
        """Warn if the error is larger than desired."""
        errors = np.asarray(self[""], float)  # (C, N)
        asked = float(np.ravel(np.asarray(self["asked"]))[0]) if errors.size else 0.0
        if errors.size and asked and errors.mean() > _ENERGY * asked:
            over = np.flatnonzero(errors.mean(axis=1) > _ENERGY * asked)
            warn(
                f"The energy error of {self.advice} is larger than desired: its mean square "
                f"per dimension is {errors.mean():.2g}, and desired_energy_var={asked:.2g} "
                f"({len(over)} of {len(errors)} chains: {listed(over)}). So the draws have more "
                f"bias than this desired_energy_var allows. Try, in this order: more warm-up "
                f"(num_warmup=1000 or more); a smaller desired_energy_var; MAMS(model), which has "
                f"no such bias."
            )


def collected(draws: Any, advice: Advice) -> CollectedDraws:
    """Return draws in the form that is checked at a run's end."""
    if isinstance(draws, dict):
        return CollectedDraws(draws, advice)
    return _Whole({"": draws}, advice)


def _flatten(draws: CollectedDraws) -> tuple[list, tuple]:
    keys = tuple(sorted(draws))
    return [draws[key] for key in keys], (keys, draws.advice)


def _unflatten(kind: type[CollectedDraws], structure: tuple, values: Any) -> Any:
    keys, advice = structure
    draws = dict(zip(keys, values, strict=True))
    codes = [frame.f_code for frame in frames_outside_jax()][:2]
    if not codes or codes[0] is not MCMC.run.__code__:
        return kind(draws, advice)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(draws))
    if _parted.get():
        return kind(draws, advice)
    if not traced:
        draws = home(draws)
    whole = kind(draws, advice)
    if not traced and MCMC.warmup.__code__ not in codes:
        whole.check()
    return whole.plain()


for _kind in (CollectedDraws, _Whole, CollectedEnergy):
    jax.tree_util.register_pytree_node(
        _kind, _flatten, lambda structure, values, kind=_kind: _unflatten(kind, structure, values)
    )


def run_unchecked(mcmc: MCMC, *args: Any, **kwargs: Any) -> None:
    """Call `mcmc.run` for a part of a run. `finished` checks the draws of all parts later."""
    token = _parted.set(True)
    try:
        mcmc.run(*args, **kwargs)
    finally:
        _parted.reset(token)


def finished(collected: dict[str, Any]) -> dict[str, Any]:
    """Check draws that were joined from parts of a run, and make plain dicts of them."""

    def plain(draws: Any) -> Any:
        if not isinstance(draws, CollectedDraws):
            return draws
        draws.check()
        return draws.plain()

    return {field: plain(draws) for field, draws in collected.items()}


class _Seen(NamedTuple):
    """Statistics of the draws of all latents: of each chain `(C,)`, and R-hat of each value."""

    num_draws: int
    varies: bool  # whether any two draws differ; without draws, zeros are collected
    moved: np.ndarray  # whether each chain moved at all
    # whether each chain moved by a hundredth of the width of all draws, or at all if judged alone
    walked: np.ndarray
    rhat: np.ndarray  # (k,), or (C, k) if chains are judged alone
    name: Callable[[int], str]  # returns the name of a latent value


def check_mixing(draws: dict[str, Any], advice: Advice) -> None:
    """Warn if chains did not move or, if all moved, if they have not mixed.

    Args:
        draws: draws by site, `(C, N, ...)`.
        advice: the kernel of the draws, and what to try.
    """
    seen = _look_at(
        {name: draws[name] for name in advice.latents or draws if name in draws}, advice
    )
    if seen is None or not seen.varies:
        return
    message, remedy = _unmixed(seen, advice), advice.unmixed
    if not seen.walked.all():
        frozen, remedy = np.flatnonzero(~seen.walked), advice.frozen
        did = "hardly moved" if seen.moved[frozen].any() else "did not move"
        where = "" if advice.alone else f" ({_largest(seen)})"
        message = (
            f"{len(frozen)} of {len(seen.moved)} chains of {advice.kernel} {did} in "
            f"{seen.num_draws} draws: {listed(frozen)}. Their draws are where they were after "
            f"warm-up{where}. "
        )
    if message:
        warn(f"{message}Try, in this order: {remedy}.")


def _look_at(latents: dict[str, Any], advice: Advice) -> _Seen | None:
    """Return statistics of the draws, or None if there are no draws or too few."""
    varies, moved, walked = False, np.array(False), np.array(False)
    rhats, names = [], []
    fewest = _FEWEST_ALONE if advice.alone else _FEWEST_DRAWS
    for name, block in _blocks(latents):
        num_draws = block.shape[1]
        if num_draws < fewest:
            return None
        varies = varies or bool((block != block[:1, :1]).any())
        own = (block != block[:, :1]).any(axis=(1, 2))
        moved = moved | own
        walked = walked | (own if advice.alone else _walked(block))
        rhats.append(within_rhat(block) if advice.alone else robust_rhat(block))
        names.append(name)
    if not rhats:
        return None
    ends = np.cumsum([rhat.shape[-1] for rhat in rhats])

    def name_of(value: int) -> str:
        part = int(np.searchsorted(ends, value, "right"))
        return names[part](value - (ends[part] - rhats[part].shape[-1]))

    rhat = np.concatenate(rhats, axis=-1)
    return _Seen(num_draws, varies, moved, walked, rhat, name_of)


def _largest(seen: _Seen) -> str:
    """Return a text with the largest R-hat and the name of its latent."""
    place = np.unravel_index(int(np.argmax(seen.rhat)), seen.rhat.shape)
    chain = f" of chain {place[0]}" if len(place) > 1 else ""
    return f"R-hat is up to {seen.rhat[place]:.3g}, at {seen.name(int(place[-1]))}{chain}"


def _unmixed(seen: _Seen, advice: Advice) -> str:
    """Return the message about chains that have not mixed, or "" if they have."""
    half = seen.num_draws // 2
    limit = limit_alone(seen.rhat.size, half) if advice.alone else _MIXED + _SHORTNESS / half
    over = seen.rhat > limit
    if not over.any():
        return ""
    where = f"{_largest(seen)}, and above {limit:.2f} for {over.sum()} of {over.size}"
    if not advice.alone:
        return (
            f"The chains of {advice.kernel} have not mixed: {where} latent values. Do not use "
            f"these draws. "
        )
    chains = np.flatnonzero(over.any(axis=1))
    return (
        f"{len(chains)} of {len(over)} chains of {advice.kernel}, each of which is judged alone, "
        f"have not settled: {listed(chains)}. The first and the second half of these "
        f"chains differ: {where} latent values of chains. "
    )


def _blocks(draws: dict[str, Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield draws `(C, N, k)` of a few latent values at a time, with a function of their names."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(draws):
        site = jax.tree_util.keystr(path, simple=True, separator=".") or "the position"
        values = np.asarray(leaf)
        if not values.size:
            continue
        columns = values.reshape(*values.shape[:2], -1)
        width = max(1, _BLOCK // (values.shape[0] * values.shape[1]))
        for first in range(0, columns.shape[2], width):

            def name(
                i: int, first: int = first, site: str = site, shape: Any = values.shape
            ) -> str:
                place = np.unravel_index(first + i, shape[2:])
                return repr(site) + (f"[{', '.join(map(str, place))}]" if place else "")

            yield name, columns[:, :, first : first + width]


def _walked(draws: np.ndarray) -> np.ndarray:
    """Return which chains moved by at least a hundredth of the width of all draws `(C, N, k)`."""
    distance = draws.max(axis=1) - draws.min(axis=1)
    return ((distance > 0.0) & (distance >= _HARDLY * median_and_width(draws)[1])).any(axis=1)
