"""Plots that ArviZ lacks: members, bands, calibration, losses, weights.

Each function takes matplotlib axes, or makes some, and returns them. Colour is never the only
difference: bands differ in lightness and edges, members that failed are dashed and marked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.calibration import ecdf_band
from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.scoring import calibration_curve, interval

_INK, _WIDE, _NARROW, _FAILED = "#1b3a5c", "#c9d8e8", "#7fa3c7", "#b5482a"
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


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
    """Draw the data, a line for each member, their mean, and bands of means and of observations.

    Args:
        x: inputs `(N,)`.
        means: mean predictions of members `(S, N)`, or of members and draws `(E, S, N)`. A
            member's line is the mean of its draws.
        draws: predictions with noise, `(S, N)` or `(E, S, N)`, for the band of observations.
        data: observed `(x, y)`.
        level: probability of the bands.
        weights: weights of the leading axis of `means`. They do not change `draws`.
        max_members: number of lines drawn, of members spread evenly over the leading axis.
        ax: matplotlib axes.

    Returns:
        The axes.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble import plotting
        >>> x, members = np.linspace(0.0, 1.0, 20), np.array([[0.9], [1.0], [1.1]])
        >>> ax = plotting.plot_predictive(x, members * x, data=(x, x**2))
        >>> ax.get_legend_handles_labels()[1]
        ['95 % of means', 'members', 'mean', 'data']
    """
    check_count("max_members", max_members)
    x, means = np.asarray(x), np.asarray(means)
    if means.ndim not in (2, 3) or not means.size or x.shape != means.shape[-1:]:
        raise ValueError(
            f"x has shape {x.shape} and means {means.shape}: for inputs (N,), means takes (S, N) "
            f"or (E, S, N)."
        )
    lines = means if means.ndim == 2 else means.mean(axis=1)
    if weights is not None and means.ndim == 3:
        weights = np.repeat(np.asarray(weights), means.shape[1])
    flat = means.reshape(-1, x.size)
    order = np.argsort(x)
    ax = _axes(ax)
    if draws is not None:
        draws = np.asarray(draws)
        if draws.ndim not in (2, 3) or draws.shape[-1:] != x.shape:
            raise ValueError(
                f"x has shape {x.shape} and draws {draws.shape}: for inputs (N,), draws takes "
                f"(S, N) or (E, S, N)."
            )
        low, high = (np.asarray(end[0]) for end in interval(draws.reshape(-1, x.size), (level,)))
        label = f"{100 * level:g} % of observations"
        ax.fill_between(x[order], low[order], high[order], color=_WIDE, lw=0, label=label)
    low, high = (np.asarray(end[0]) for end in interval(flat, (level,), weights=weights))
    label = f"{100 * level:g} % of means"
    ax.fill_between(
        x[order], low[order], high[order], facecolor=_NARROW, edgecolor=_INK, lw=0.6, label=label
    )
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(max_members, len(lines))).astype(int))
    for i, row in enumerate(lines[chosen]):
        label = "members" if i == 0 else "_members"
        ax.plot(x[order], row[order], color=_INK, lw=0.5, ls=(0, (4, 2)), alpha=0.6, label=label)
    centre = np.average(flat, axis=0, weights=weights)
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
    """Draw the share of observations inside central intervals against the intervals' probability.

    Further curves on the same axes have other dashes and markers.

    Args:
        draws: `(S, N)` draws, or ArviZ data.
        y: the observations `(N,)`.
        label: of the curve.
        ax: matplotlib axes.
        **options: as for `scoring.calibration_curve`.

    Returns:
        The axes.

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble import plotting
        >>> rng = np.random.default_rng(0)
        >>> draws, y = rng.normal(size=(500, 50)), rng.normal(size=50)
        >>> ax = plotting.plot_calibration(draws, y, label="exact")
        >>> ax.get_ylabel()
        'observations inside'
    """
    levels, shares = calibration_curve(draws, y, **options)
    ax = _axes(ax)
    before = sum(line.get_gid() == "calibration" for line in ax.lines)
    if not before:
        ax.plot([0, 1], [0, 1], color="0.5", lw=1, ls="--")
    ls, marker = _STYLES[before % len(_STYLES)]
    ax.plot(
        levels, np.asarray(shares), color=_INK, ls=ls, marker=marker, ms=3.5, label=label,
        gid="calibration",
    )  # fmt: skip
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

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble import plotting
        >>> ax = plotting.plot_losses(np.array([[3.0, 2.0, 1.0], [3.0, 2.5, np.nan]]))
        >>> ax.get_title()
        '2 members, 1 failed (dashed)'
    """
    losses = np.asarray(getattr(result, "losses", result), float)
    if losses.ndim != 2 or not losses.size:
        raise ValueError(
            f"result takes an EnsembleResult, or losses (E, num_steps); got shape {losses.shape}."
        )
    finite = np.asarray(getattr(result, "finite", np.isfinite(losses[:, -1])))
    ax = _axes(ax)
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

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble import plotting
        >>> ax = plotting.plot_weights(np.array([0.5, 0.3, 0.2]))
        >>> len(ax.patches)
        3
    """
    values = np.asarray(weights, float)
    if values.ndim != 1 or not values.size or not (values >= 0).all():
        raise ValueError(f"weights takes numbers (E,) that are not negative, got {weights}.")
    ax = _axes(ax)
    ax.bar(np.arange(len(values)), values, color=_NARROW, edgecolor=_INK)
    ax.axhline(1 / len(values), color="0.3", ls="--", lw=1, label="even")
    ax.set(xlabel="member", ylabel="weight")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def plot_ranks(calibration: Any, *, level: float = 0.95, max_lines: int = 8, ax: Any = None) -> Any:
    """Draw the distribution function of the ranks, less the uniform one, for each quantity.

    The legend names quantities and p-values. Lines are thicker if ranks are not uniform.

    Args:
        calibration: what `calibration.sbc` returned.
        level: the probability that all of a curve of uniform ranks lies in the band.
        max_lines: number of lines of a quantity, those with the smallest p-values.
        ax: matplotlib axes.

    Returns:
        The axes.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import plotting
        >>> from numpyro_ensemble.calibration import sbc
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", 3):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def exact(key, y):
        ...     return {"mu": y.sum() / 4 + 0.5 * jax.random.normal(key, (99,))}
        >>> found = sbc(model, exact, jnp.zeros(3), rng_key=jax.random.key(0), num_datasets=100)
        >>> ax = plotting.plot_ranks(found)
        >>> ax.get_xlabel()
        'rank, as a share of the draws'
    """
    check_count("max_lines", max_lines)
    ax, number = _axes(ax), len(next(iter(calibration.ranks.values())))
    places, lower, upper = ecdf_band(number, level)
    ax.fill_between(places, lower - places, upper - places, step="mid", color=_WIDE, label="exact")
    of_posterior = hasattr(calibration.data, "posterior_sbc")
    group = calibration.data["posterior_sbc" if of_posterior else "prior_sbc"]
    for i, (name, p_values) in enumerate(calibration.p_values.items()):
        values = group[name].values[0].reshape(number, -1)
        style, _ = _STYLES[i % len(_STYLES)]
        wrong = name in calibration.miscalibrated
        for j, k in enumerate(np.argsort(p_values, axis=None)[:max_lines]):
            curve = (values[:, k, None] <= places).mean(axis=0) - places
            label = None if j else f"{name}, p = {np.min(p_values):.3g}"
            color = _FAILED if wrong else _INK
            ax.plot(places, curve, style, color=color, linewidth=1.8 if wrong else 1.0, label=label)
    ax.axhline(0.0, color=_INK, linewidth=0.5)
    ax.set(xlabel="rank, as a share of the draws", ylabel="distribution less uniform")
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return ax
