"""R-hat of many short chains, and of each chain alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from scipy.special import ndtri
from scipy.stats import f as f_ratio
from scipy.stats import rankdata

_METHODS = ("rank", "identity")
_FOR_MEDIANS = 50  # draws of a chain that medians are computed from, about
_EFFECTIVE = 10  # effective draws that half of a chain is assumed to have, if it is judged alone
_CHANCE = 0.01  # probability of a warning about good chains that are judged alone


def rhat_nested(samples: Any, superchains: ArrayLike, *, method: str = "rank") -> Any:
    """Compute nested R-hat, for many short chains (Margossian et al., 2024).

    Chains that start at the same point make a superchain. Nested R-hat compares the means of
    superchains, so a chain may have one draw only. It is at least 1, and near 1 if the chains have
    forgotten where they started. From ArviZ 1.0 on, `arviz.rhat_nested` computes the same for one
    parameter or for ArviZ data.

    Args:
        samples: draws `(C, N, ...)`, or a dict of them: `mcmc.get_samples(group_by_chain=True)`.
        superchains: `(C,)`, the number of each chain's starting point. All superchains need the
            same number of chains. After `starts.from_nuts` with S starts the numbers are
            `np.arange(C) % S`.
        method: "rank" returns the larger of the values for ranks and for folded ranks, on halves of
            chains. "identity" uses the draws themselves.

    Returns:
        Nested R-hat of each parameter, in the form of the samples.

    Raises:
        ValueError: if superchains do not fit the chains, or differ in size.

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble.mcmc import rhat_nested
        >>> draws = np.random.default_rng(0).normal(size=(64, 20))
        >>> print(rhat_nested(draws, np.arange(64) % 4).round(1))
        1.0
    """
    if method not in _METHODS:
        raise ValueError(f"method takes one of {list(_METHODS)}, got {method!r}.")
    superchains = np.asarray(superchains)
    _, groups, sizes = np.unique(superchains, return_inverse=True, return_counts=True)
    if superchains.ndim != 1 or len(sizes) < 2 or (sizes != sizes[0]).any():
        raise ValueError(
            f"superchains takes the number of each chain's starting point, at least 2 of them with "
            f"as many chains each; got {sizes.tolist()} chains."
        )

    def of_one(draws: Any) -> np.ndarray:
        draws = np.asarray(draws, float)
        if draws.ndim < 2 or len(draws) != len(superchains):
            raise ValueError(
                f"samples takes draws (C, N, ...) of {len(superchains)} chains, got shape "
                f"{draws.shape}. Use get_samples(group_by_chain=True)."
            )
        columns = np.moveaxis(draws.reshape(*draws.shape[:2], -1), 2, 0)
        values = [_by_method(column, groups, method) for column in columns]
        return np.array(values).reshape(draws.shape[2:])[()]

    return jax.tree.map(of_one, samples)


def _by_method(draws: np.ndarray, groups: np.ndarray, method: str) -> float:
    if method == "identity":
        return _nested(draws, groups)
    half = draws.shape[1] // 2
    if half < 1:
        raise ValueError('samples of one draw a chain have no halves: use method="identity".')
    halves = np.concatenate([draws[:, :half], draws[:, -half:]])
    groups = np.concatenate([groups, groups])
    folded = np.abs(halves - np.median(halves))
    return max(_nested(_normal_scores(halves), groups), _nested(_normal_scores(folded), groups))


def _normal_scores(draws: np.ndarray) -> np.ndarray:
    ranks = rankdata(draws, axis=None).reshape(draws.shape)
    return ndtri((ranks - 0.375) / (draws.size + 0.25))


def _nested(draws: np.ndarray, groups: np.ndarray) -> float:
    """Return nested R-hat, equation 8 of Margossian et al. (2024)."""
    order = np.argsort(groups, kind="stable")
    number = groups.max() + 1
    means = draws.mean(axis=1)[order].reshape(number, -1)
    variances = draws.var(axis=1, ddof=1) if draws.shape[1] > 1 else np.zeros(len(draws))
    within = variances[order].reshape(number, -1).mean(axis=1)
    if means.shape[1] > 1:  # equation 7
        within = within + means.var(axis=1, ddof=1)
    return float(np.sqrt(1.0 + means.mean(axis=1).var(ddof=1) / within.mean()))


def robust_rhat(draws: np.ndarray) -> np.ndarray:
    """Return the larger split R-hat of draws `(C, N, k)`: that of location or that of scale.

    It is close to the rank-normalised R-hat of Vehtari et al. (2021), but needs no sorting. Draws
    are centred at the median, divided by the median distance from it, and shrunk by arsinh. So
    heavy tails do not hide differences in the middle.
    """
    median, width = median_and_width(draws)
    shrunk = np.arcsinh((draws - median) / np.where(width > 0.0, width, 1.0))
    return np.maximum(split_rhat(shrunk), split_rhat(np.abs(shrunk)))


def within_rhat(draws: np.ndarray) -> np.ndarray:
    """Return `robust_rhat` of each chain alone, `(C, k)`: it compares the chain's two halves."""
    return np.stack([robust_rhat(chain[None]) for chain in draws])


def limit_alone(number: int, half: int) -> float:
    """Return the R-hat that any of `number` values exceeds in one of 100 runs of good chains.

    It assumes two halves of 10 independent draws each, or `half` if that is fewer. The variance
    between the halves over the variance within them is then an F ratio. R-hat is computed for
    location and for scale, which doubles the chance.
    """
    effective = min(half, _EFFECTIVE)
    ratio = f_ratio.isf(0.5 * _CHANCE / number, 1, 2 * (effective - 1))
    return float(np.sqrt(1.0 + ratio / effective))


def median_and_width(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median, and the median distance from it, of a part of the draws `(C, N, k)`."""
    some = draws[:, :: max(1, draws.shape[1] // _FOR_MEDIANS)].reshape(-1, draws.shape[2])
    median = np.median(some, axis=0)
    return median, np.median(np.abs(some - median), axis=0)


def split_rhat(draws: np.ndarray) -> np.ndarray:
    """Return split R-hat of draws `(C, N, k)`: 1 where a value is the same in all draws."""
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, -half:]]).astype(float)
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = halves.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat = np.sqrt((half - 1) / half + between / within)
    return np.where(between + within > 0.0, rhat, 1.0)
