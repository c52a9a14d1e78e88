"""Cross-validation: the fits of all folds in one program, rows held out by masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.primitives import Messenger

from numpyro_ensemble.calibration.fitting import draws_of, mapped_fits
from numpyro_ensemble.calls.keywords import check_call, checked_keywords
from numpyro_ensemble.density import fill_model, is_subsampled, observed_sites, unchecked_trace
from numpyro_ensemble.handlers import check_count, one_key
from numpyro_ensemble.mapping import map_draws
from numpyro_ensemble.predict.densities import each_value
from numpyro_ensemble.scoring.elpd import as_elpd, standard_error

_DRAWS_AT_ONCE = 16  # of each fold, whose terms are computed


class CrossValidation(NamedTuple):
    """Scores of rows, each predicted by a fit without it.

    Attributes:
        elpd: the expected log predictive density of all rows that were held out.
        se: its standard error, with N or N - 1 as in the installed ArviZ.
        elpd_i: `(N, ...)`, the terms of the rows, NaN for rows that were never held out.
        observations: values of the rows that were held out, as one vector.
        data: the terms in ArviZ's form, for `az.compare`, without rows that were never held out.

    The example of `scoring.cross_validate` makes one.
    """

    elpd: float
    se: float
    elpd_i: np.ndarray
    observations: np.ndarray
    data: Any


class _Kept(Messenger):
    """Mask the rows of one site that are held out, so that only the others count in the density.

    The handler is entered around a whole fit, which calls the model inside.
    """

    def __init__(self, site: str, keep: jax.Array) -> None:
        self.site, self.keep = site, keep
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Mask a site's distribution."""
        if msg["type"] == "sample" and msg["name"] == self.site and msg["is_observed"]:
            batch = np.ndim(msg["value"]) - msg["fn"].event_dim
            msg["fn"] = msg["fn"].mask(self.keep.reshape(-1, *[1] * (batch - 1)))


@checked_keywords
def cross_validate(
    model: Callable,
    fit: Any,
    *args: Any,
    rng_key: jax.Array,
    folds: int | ArrayLike | tuple[ArrayLike, ArrayLike] = 10,
    num_draws: int = 200,
    num_steps: int | None = None,
    run_options: Mapping[str, Any] | None = None,
    var_name: str | None = None,
    batch_size: int | None = None,
    **kwargs: Any,
) -> CrossValidation:
    """Fit a model without the rows of each fold, and score the predictions of these rows.

    All folds are fitted in one program. Rows that are held out are masked and stay in the arrays,
    so that a latent of a single row is drawn from its distribution without the row's data.

    Args:
        model: a NumPyro model.
        fit: an `EnsembleVI`, an `MCMC` with any kernel, or a function of a key and the model's
            arguments that returns draws by site.
        *args: arguments of the model, with the data.
        rng_key: one key.
        folds: the number of random folds; or the fold of each row, `(N,)`, for groups; or two masks
            `(K, N)`, of the rows that are fitted and those that are scored, to hold out the future.
        num_draws: draws of each fit.
        num_steps: steps of a variational fit.
        run_options: options of the variational fit's `run`.
        var_name: the observed site, if there are several; its first axis has the rows.
        batch_size: how many folds are fitted at once (default: all).
        **kwargs: keyword arguments of the model.

    Raises:
        TypeError: if `fit` is none of these.
        ValueError: for folds that do not fit the rows, that leave no row to fit or to score, or
            for a site whose rows are one event.
        RuntimeError: if the density of a row is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import scoring
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", 6):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def center(key, y):
        ...     return {"mu": jnp.zeros(200)}
        >>> found = scoring.cross_validate(
        ...     model, center, jnp.zeros(6), rng_key=jax.random.key(0), folds=3)
        >>> round(found.elpd, 3), found.elpd_i.shape
        (-5.514, (6,))
    """
    check_count("num_draws", num_draws)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_call(model, args, kwargs)
    site, values, shape = _rows_of(model, args, kwargs, var_name)
    fold_key, fit_key = jax.random.split(one_key(rng_key))
    fitted, scored = _masks(folds, shape[0], fold_key)
    draw = draws_of(fit, num_draws, num_steps, run_options or {})

    def one(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, keep = given
        run_key, density_key = jax.random.split(key)
        with _Kept(site, keep):
            draws = draw(run_key, args, kwargs)

        def terms(draw: dict[str, jax.Array]) -> jax.Array:
            return each_value(fill_model(model, density_key, draw, args, kwargs)[site])

        return jax.nn.logsumexp(map_draws(terms, draws, _DRAWS_AT_ONCE), axis=0)

    keys = jax.random.split(fit_key, len(fitted))
    densities = mapped_fits(one, (keys, jnp.asarray(fitted)), batch_size) - np.log(num_draws)
    return _scored(densities, scored, values, num_draws)


def _rows_of(
    model: Callable, args: tuple, kwargs: dict[str, Any], var_name: str | None
) -> tuple[str, np.ndarray, tuple[int, ...]]:
    """Return the site whose rows are held out, its values, and the shape of its terms."""
    trace = unchecked_trace(model, args, kwargs)
    some = [name for name, found in trace.items() if is_subsampled(found)]
    if some:
        raise ValueError(
            f"the model draws some rows of the plates {some}, and cross-validation needs all rows: "
            f"leave subsample_size out."
        )
    observed = list(observed_sites(trace))
    if not observed:
        raise ValueError("the model has no observed site: pass the data, as to the fit.")
    if var_name is None and len(observed) > 1:
        raise ValueError(f"the model observes {observed}: name one by var_name=.")
    name = observed[0] if var_name is None else var_name
    if name not in observed:
        raise ValueError(f"var_name={name!r} is none of the observed sites, {observed}.")
    found = trace[name]
    shape = np.shape(found["value"])[: np.ndim(found["value"]) - found["fn"].event_dim]
    if not shape:
        raise ValueError(
            f"site {name!r} is one event, so its rows cannot be held out one by one: put them in a "
            f"plate (without to_event)."
        )
    return name, np.asarray(found["value"]), shape


def _masks(folds: Any, number: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows each fold is fitted to, and which it is scored on, `(K, N)`."""
    if isinstance(folds, tuple):
        fitted, scored = (np.asarray(part, bool) for part in folds)
        if fitted.ndim != 2 or fitted.shape != scored.shape or fitted.shape[1] != number:
            raise ValueError(
                f"folds takes two masks (K, {number}), of the rows that are fitted and of those "
                f"that are scored; got {fitted.shape} and {scored.shape}."
            )
        if (scored.sum(axis=0) > 1).any() or (fitted & scored).any():
            raise ValueError(
                "folds scores a row twice, or in a fold that is fitted to it: score each row once, "
                "in a fold that leaves it out."
            )
    else:
        if np.ndim(folds) == 0:
            check_count("folds", folds)
            if not 2 <= folds <= number:
                raise ValueError(f"folds takes 2 to {number} for {number} rows, got {folds}.")
            labels = np.asarray(jax.random.permutation(key, number)) % int(folds)
        else:
            labels = np.asarray(folds)
            if labels.shape != (number,):
                raise ValueError(
                    f"folds takes a number for each of {number} rows, got shape {labels.shape}."
                )
        names = np.unique(labels)
        if len(names) < 2:
            raise ValueError(
                "folds has only one fold, which leaves no row to fit: give two or more."
            )
        scored = labels[None] == names[:, None]
        fitted = ~scored
    for what, mask in (("fit", fitted), ("score", scored)):
        empty = np.flatnonzero(~mask.any(axis=1))
        if empty.size:
            raise ValueError(f"the folds {empty.tolist()} leave no row to {what}.")
    return fitted, scored


def _scored(
    densities: np.ndarray, scored: np.ndarray, values: np.ndarray, num_draws: int
) -> CrossValidation:
    """Take the terms of each row from the fold that held it out."""
    held = scored.any(axis=0)
    terms = np.where(
        held.reshape(-1, *[1] * (densities.ndim - 2)),
        densities[scored.argmax(axis=0), np.arange(scored.shape[1])],
        np.nan,
    )
    of_held = terms[held].ravel()
    bad = np.flatnonzero(~np.isfinite(of_held))
    if bad.size:
        raise RuntimeError(
            f"the predictive density of {bad.size} of {of_held.size} values is not finite: "
            f"{bad[:10].tolist()}."
        )
    data = as_elpd(of_held, num_draws, folds=len(scored))
    elpd, se = float(of_held.sum()), standard_error(of_held)
    return CrossValidation(elpd, se, terms, values[held].ravel(), data)
