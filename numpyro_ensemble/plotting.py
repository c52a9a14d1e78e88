"""The pictures that ArviZ does not draw: members, bands, calibration, losses, weights.

Each function takes matplotlib axes, or makes some, and returns them. Nothing is told by colour
alone: bands differ in lightness and edges, members that failed are dashed and marked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.scoring import calibration_curve, interval

_INK, _WIDE, _NARROW, _FAILED = "#1b3a5c", "#c9d8e8", "#7fa3c7", "#b5482a"


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


def plot_predictive(
    x: ArrayLike,
    means: ArrayLike,
    draws: ArrayLike | None = None,
    *,
    data: tuple[ArrayLike, ArrayLike] | None = None,
    level: float = 0.95,
    weights: Any = None,
    max_members: int = 16,
    ax: Any = None,
) -> Any:
    """Draw members, their mean, the epistemic band and the total one, and the data.

    Args:
        x: inputs `(N,)`.
        means: `(S, N)` mean predictions of members or draws.
        draws: `(S, N)` predictions with noise, for the total band.
        data: observed `(x, y)`.
        level: probability of the bands.
        weights: weights `(S,)` of the means; `draws` are taken as they are.
        max_members: number of lines drawn.
        ax: matplotlib axes.

    Returns:
        The axes.

    Raises:
        ValueError: if shapes do not fit.
    """
    ax = _axes(ax)
    x, means = np.asarray(x), np.asarray(means)
    if means.ndim != 2 or x.shape != means.shape[1:]:
        raise ValueError(f"x of shape {x.shape} does not go with means of shape {means.shape}.")
    order = np.argsort(x)
    if draws is not None:
        low, high = (np.asarray(end[0]) for end in interval(draws, (level,)))
        label = f"{100 * level:g} % of observations"
        ax.fill_between(x[order], low[order], high[order], color=_WIDE, lw=0, label=label)
    low, high = (np.asarray(end[0]) for end in interval(means, (level,), weights=weights))
    label = f"{100 * level:g} % of means"
    ax.fill_between(
        x[order], low[order], high[order], facecolor=_NARROW, edgecolor=_INK, lw=0.6, label=label
    )
    for row in means[:max_members]:
        ax.plot(x[order], row[order], color="white", lw=0.6, alpha=0.8)
    centre = np.average(means, axis=0, weights=weights)
    ax.plot(x[order], centre[order], color=_INK, lw=1.8, label="mean")
    if data is not None:
        ax.plot(*data, ls="", marker="o", ms=3.5, mfc="white", mec="black", label="data")
    ax.set(xlabel="x", ylabel="y")
    return ax


def plot_calibration(
    draws: Any,
    y: ArrayLike | None = None,
    *,
    label: str | None = None,
    ax: Any = None,
    **options: Any,
) -> Any:
    """Draw the share of observations inside central intervals against their probability.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        label: of the curve.
        ax: matplotlib axes.
        **options: as for `scoring.calibration_curve`.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    levels, shares = calibration_curve(draws, y, **options)
    ax.plot([0, 1], [0, 1], color="0.5", lw=1, ls="--")
    ax.plot(levels, np.asarray(shares), color=_INK, marker="o", ms=3, label=label)
    ax.set(xlabel="probability of the interval", ylabel="observations inside")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return ax


def plot_losses(result: Any, *, ax: Any = None) -> Any:
    """Draw the losses of all members; failed ones are dashed, with a cross at their last loss.

    Args:
        result: an `EnsembleResult`, or losses `(E, num_steps)`.
        ax: matplotlib axes.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    losses = np.asarray(getattr(result, "losses", result))
    finite = np.asarray(getattr(result, "finite", np.isfinite(losses[:, -1])))
    for row, good in zip(losses, finite, strict=True):
        steps = np.flatnonzero(np.isfinite(row))
        if good:
            ax.plot(steps, row[steps], color=_INK, lw=0.8, alpha=0.7)
        elif steps.size:
            ax.plot(steps, row[steps], color=_FAILED, lw=1, ls="--")
            ax.plot(steps[-1], row[steps[-1]], color=_FAILED, marker="x", ms=7, mew=2)
    values = losses[np.isfinite(losses)]
    if values.size and values.min() > 0 and values.max() > 100 * values.min():
        ax.set_yscale("log")
    failed = int((~finite).sum())
    title = f"{len(losses)} members" + (f", {failed} failed (dashed)" if failed else "")
    ax.set(xlabel="step", ylabel="loss", title=title)
    return ax


def plot_weights(weights: ArrayLike, *, ax: Any = None) -> Any:
    """Draw the weights of members as bars, with the even weight as a line.

    Args:
        weights: `(E,)`.
        ax: matplotlib axes.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    values = np.asarray(weights)
    ax.bar(np.arange(len(values)), values, color=_NARROW, edgecolor=_INK)
    ax.axhline(1 / len(values), color="0.3", ls="--", lw=1, label="even")
    ax.set(xlabel="member", ylabel="weight")
    return ax
