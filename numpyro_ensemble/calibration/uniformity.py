"""Whether numbers between 0 and 1 are uniform: one simultaneous test of their distribution."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike

from numpyro_ensemble.handlers import check_count

_PLACES = 100  # at which the distribution functions are compared, at most
_SIMULATED = 2000  # sets of uniform numbers that the test is calibrated with


def uniformity(values: ArrayLike) -> np.ndarray:
    """Test that values are uniform between 0 and 1, by their whole distribution function.

    For uniform values, the number of values below each of 100 points is binomial. The test takes
    the least probable of these numbers, and compares its probability with that in simulated uniform
    values (Säilynoja, Bürkner and Vehtari, 2022).

    Args:
        values: `(N, ...)`, N independent values of each quantity, N at least 10.

    Returns:
        p-values `(...)`; if one is small, the values are not uniform.

    Raises:
        ValueError: for values outside 0 and 1, or fewer than 10.

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble.calibration import uniformity
        >>> u = np.random.default_rng(0).random(200)
        >>> bool(uniformity(u) > 0.05), bool(uniformity(u**2) < 0.001)
        (True, True)
    """
    values = np.asarray(values, float)
    if values.ndim == 0 or len(values) < 10:
        raise ValueError(
            f"values takes shape (N, ...), with 10 values or more of each quantity; got "
            f"{values.shape}."
        )
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("values must be between 0 and 1, and finite.")
    flat = values.reshape(len(values), -1)
    below = np.searchsorted(_simulated(len(values)), _least_probable(flat.T), side="right")
    return ((1.0 + below) / (1.0 + _SIMULATED)).reshape(values.shape[1:])


def ecdf_band(number: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a simultaneous band for the distribution function of uniform values.

    Args:
        number: number of values.
        level: the probability that the whole function lies in the band.

    Returns:
        Points between 0 and 1, and the lower and upper end of the band at each.

    Raises:
        ValueError: if level is not between 0 and 1.

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble.calibration import ecdf_band
        >>> places, lower, upper = ecdf_band(200)
        >>> u = np.random.default_rng(0).random(200)
        >>> ecdf = (u[:, None] <= places).mean(axis=0)
        >>> bool(((lower <= ecdf) & (ecdf <= upper)).all())
        True
    """
    check_count("number", number)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    from scipy import stats

    tail = np.quantile(_simulated(number), 1.0 - level)
    places = _places(number)
    lower = stats.binom.ppf(tail, number, places)
    upper = stats.binom.isf(tail, number, places)
    return places, lower / number, upper / number


def _places(number: int) -> np.ndarray:
    count = min(number, _PLACES)
    return np.arange(1, count) / count


def _least_probable(values: np.ndarray) -> np.ndarray:
    """Return the smallest tail probability of each row's `(R, N)` counts below the places."""
    number = values.shape[1]
    places = _places(number)
    edges = np.concatenate([[0.0], places, [1.0]])
    cells = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(places))
    rows = np.arange(len(values))[:, None] * (len(places) + 1)
    counts = np.bincount((rows + cells).ravel(), minlength=len(values) * (len(places) + 1))
    below = counts.reshape(len(values), -1)[:, :-1].cumsum(axis=1)
    lower, upper = _tails(number)
    where = np.arange(len(places))
    return np.minimum(lower[where, below], upper[where, below]).min(axis=1)


@functools.lru_cache(maxsize=16)
def _tails(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of at most, and of at least, so many values below each place."""
    from scipy import stats

    count, places = np.arange(number + 1), _places(number)[:, None]
    return stats.binom.cdf(count, number, places), stats.binom.sf(count - 1, number, places)


@functools.lru_cache(maxsize=16)
def _simulated(number: int) -> np.ndarray:
    """Return the sorted smallest tail probabilities of sets of uniform values."""
    rng = np.random.default_rng(0)
    parts = [_least_probable(rng.random((100, number))) for _ in range(_SIMULATED // 100)]
    return np.sort(np.concatenate(parts))
