"""Leave-one-out by importance sampling, corrected for the guides of variational draws."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ensemble.handlers import one_key, warn
from numpyro_ensemble.predict.assembly import makes_inference_data
from numpyro_ensemble.results import LEAST_DRAWS, SAME_RATIOS, TRUSTED_K
from numpyro_ensemble.scoring.elpd import are_unreliable, as_elpd
from numpyro_ensemble.scoring.reading import group_of, holds_all_members, name_of, observed

_NAMED = 3  # models or members that a warning names


def smoothed(log_ratios: np.ndarray, efficiency: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return ArviZ's smoothed log weights, each row adding up to 1, and the shapes of its tail.

    The shape is 0 if the largest ratios are all the same, as for an exact guide: then there is no
    tail to which ArviZ could fit a distribution.
    """
    rows = np.asarray(log_ratios, float).reshape(-1, log_ratios.shape[-1])
    number = rows.shape[-1]
    tail = int(np.ceil(min(0.2 * number, 3.0 * np.sqrt(number / efficiency))))  # as ArviZ's is
    with np.errstate(invalid="ignore"):  # a row of -inf has no spread
        spread = rows.max(axis=-1) - np.partition(rows, -tail)[:, -tail]
    weights, shapes = rows.copy(), np.zeros(len(rows))
    fitted = spread != 0.0
    if fitted.any():
        weights[fitted], shapes[fitted] = _smoothed_by_arviz(rows[fitted], efficiency)
    unknown = ~np.isfinite(shapes) | np.isnan(weights).any(axis=-1)
    same = unknown & (spread < SAME_RATIOS)
    weights[same], shapes[same] = rows[same], 0.0
    weights -= np.logaddexp.reduce(weights, axis=-1, keepdims=True)
    return weights.reshape(log_ratios.shape), shapes.reshape(log_ratios.shape[:-1])


def _smoothed_by_arviz(rows: np.ndarray, efficiency: float) -> tuple[np.ndarray, np.ndarray]:
    if makes_inference_data():
        import arviz as az

        with np.errstate(divide="ignore", invalid="ignore"):  # of ratios that are all the same
            return az.psislw(rows.copy(), efficiency)
    stats: Any = importlib.import_module("arviz_stats.base")
    # it takes log likelihoods
    return stats.array_stats.psislw(-rows, r_eff=efficiency)


class Likelihoods(NamedTuple):
    """Log likelihoods of draws, and importance ratios of the draws.

    Attributes:
        name: of the observed site.
        terms: `(E, S, N)` log likelihoods of the observations that are not masked.
        seen: `(...)`, True for observations that are not masked.
        observations: their values as one vector, None if the data has none.
        ratios: `(E, S)` log densities of the posterior less those of each member's own guide, None
            for draws of the posterior itself.
        mixture: log densities of the posterior less those of the mixture of all guides.
        efficiency: effective draws over draws, for draws of the posterior itself.
    """

    name: str
    terms: np.ndarray
    seen: np.ndarray
    observations: np.ndarray | None
    ratios: np.ndarray | None
    mixture: np.ndarray | None
    efficiency: float

    @classmethod
    def of(cls, data: Any, var_name: str | None, corrected: bool) -> Likelihoods:
        """Read ArviZ data.

        Raises:
            ValueError: if it has no log likelihood, or several and `var_name` is None.
        """
        found = group_of(data, "log_likelihood")
        if found is None:
            raise ValueError(
                "the data lacks the group log_likelihood: use to_arviz(..., log_likelihood=True)."
            )
        name = name_of(found, var_name)
        terms = np.asarray(found[name].values, float)
        values = observed(data, name)
        seen = _seen(values, terms.shape[2:])
        observations = None if values is None else values[~np.isnan(values)]
        stats = group_of(data, "sample_stats")
        ratios = mixture = None
        efficiency = 1.0
        if corrected and stats is not None and "log_q" in stats:
            ratios = stats["log_p"].values - stats["log_q"].values
            if len(terms) > 1 and "log_q_mixture" in stats and holds_all_members(data):
                mixture = stats["log_p"].values - stats["log_q_mixture"].values
        elif terms.shape[0] > 1 and terms.shape[1] > 1:
            efficiency = _efficiency(data, terms.shape[0] * terms.shape[1])
        return cls(name, terms[:, :, seen], seen, observations, ratios, mixture, efficiency)

    def member(self, index: int) -> Likelihoods:
        """Return the log likelihoods of one member."""
        ratios = None if self.ratios is None else self.ratios[[index]]
        return self._replace(terms=self.terms[[index]], ratios=ratios, mixture=None, efficiency=1.0)

    def left_out(self) -> LeftOut:
        """Predict each observation from all others, by importance weights of the draws.

        Raises:
            ValueError: if there are too few draws, or they are all the same.
        """
        size, number = self.terms.shape[:2]
        self._check_draws(size, number)
        terms = self.terms.reshape(size * number, -1).T
        corrections = self._corrections()
        base = np.zeros(size * number) if corrections is None else corrections.reshape(-1)
        log_weights, shapes = smoothed(base - terms, self.efficiency)
        all_seen = -np.log(base.size) if corrections is None else smoothed(base)[0]
        elpd = np.logaddexp.reduce(log_weights + terms, axis=1)
        lppd = np.logaddexp.reduce(all_seen + terms, axis=1)
        return LeftOut(
            elpd,
            self.observations,
            shapes,
            log_weights,
            num_parameters=float((lppd - elpd).sum()),
            corrected=corrections is not None,
        )

    def _corrections(self) -> np.ndarray | None:
        """Return log weights `(E, S)` of the draws towards the posterior, None where unknown."""
        if self.ratios is None or len(self.terms) == 1:
            return self.ratios
        if self.mixture is None:
            warn(
                "the guide has no density for another member's draws, so leave-one-out of all "
                "members is not corrected for the guide. For a correction compare single members, "
                "by members=True in scoring.compare."
            )
        return self.mixture

    def _check_draws(self, size: int, number: int) -> None:
        """Raise a ValueError if the draws cannot be weighed."""
        if size * number < LEAST_DRAWS:
            raise ValueError(
                f"LOO needs {LEAST_DRAWS} draws at least, got {size * number}. For a variational "
                f"fit write to_arviz(..., num_samples=100). A MAP member has one draw: weigh MAP "
                f'members by their losses, member_weights(..., "elbo").'
            )
        if number > 1 and (np.ptp(self.terms, axis=1) == 0).all() and size < LEAST_DRAWS:
            raise ValueError(
                "the draws of each member are all the same, as those of MAP estimates, so LOO "
                'cannot weigh them. Use member_weights(..., "elbo"), or score held-out data.'
            )
        bad = ~np.isfinite(self.terms)
        if bad.any():
            rows, draws = np.flatnonzero(bad.any(axis=(0, 1))), bad.any(axis=2).sum()
            raise ValueError(
                f"the log likelihood of site {self.name!r} is not finite in {draws} of "
                f"{size * number} draws, at the observations {rows[:10].tolist()} of those that "
                f"are not masked: LOO cannot weigh such draws. Check that these observations are "
                f"in the support of the site's distribution."
            )


class LeftOut(NamedTuple):
    """Predictions of each observation from all others.

    Attributes:
        terms: `(N,)` log predictive densities.
        observations: their values as one vector, None if the data has none.
        pareto_k: `(N,)`; do not trust a term above 0.7.
        log_weights: `(N, S)`, of the draws of all members.
        num_parameters: the effective number.
        corrected: whether draws were weighed towards the posterior first.
    """

    terms: np.ndarray
    observations: np.ndarray | None
    pareto_k: np.ndarray
    log_weights: np.ndarray
    num_parameters: float
    corrected: bool

    @property
    def unreliable(self) -> int:
        """Number of observations whose Pareto k is above 0.7 or unknown."""
        return int(are_unreliable(self.pareto_k).sum())

    @property
    def data(self) -> Any:
        """The terms in ArviZ's form, for `az.compare`."""
        number = self.log_weights.shape[1]
        return as_elpd(
            self.terms, number, pareto_k=self.pareto_k, num_parameters=self.num_parameters
        )


def _seen(values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return which terms belong to observations that are not masked."""
    if values is None:
        return np.ones(shape, bool)
    return ~np.isnan(values).reshape(*shape, -1).any(axis=-1)  # a row may be one event


def _efficiency(data: Any, number: int) -> float:
    """Return effective draws over draws, as `az.loo` computes it."""
    import arviz as az

    ess: Any = az.ess(group_of(data, "posterior"), method="mean")
    values = [np.asarray(ess[name]).ravel() for name in ess.data_vars]
    efficiency = float(np.concatenate(values).mean() / number)
    return efficiency if np.isfinite(efficiency) else 1.0  # NaN for a few draws


def loo_pit(
    data: Any,
    *,
    var_name: str | None = None,
    corrected: bool = True,
    rng_key: jax.Array | None = None,
) -> np.ndarray:
    """Return the predictive probability below each observation, given the others.

    If a model predicts well, these probabilities are uniform, and nearly independent:
    `calibration.uniformity(values[:, None])` tests this. For counts they are uniform only with a
    key. A draw that is equal to an observation counts half, or with a key a random fraction.

    Args:
        data: ArviZ data from `to_arviz`. An ensemble needs enough draws, `num_samples=100`.
        var_name: the observed site, if there are several.
        corrected: weigh draws of guides towards the posterior, if the guides have densities.
        rng_key: one key, for discrete sites.

    Returns:
        An array of the shape of the observations, NaN for masked ones.

    Raises:
        ValueError: if the data lacks predictions or log likelihoods, has too few draws, or if an
            observation is a vector.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import scoring, to_arviz
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", 20):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mu = jax.random.normal(jax.random.key(0), (4, 500)) / 20**0.5
        >>> values = scoring.loo_pit(to_arviz(model, {"mu": mu}, jnp.linspace(-2.0, 2.0, 20)))
        >>> bool(values[0] < 0.05 and values[-1] > 0.95)
        True
    """
    found = Likelihoods.of(data, var_name, corrected)
    group = group_of(data, "posterior_predictive")
    values = observed(data, found.name)
    if group is None or found.name not in group or values is None:
        raise ValueError(
            f"loo_pit needs predictions and observations of {found.name!r}, which the data lacks: "
            f"make it by to_arviz(..., posterior_predictive=True) with the observed data."
        )
    if values.shape != found.seen.shape:
        raise ValueError(
            f"site {found.name!r} has events of shape {values.shape[found.seen.ndim :]}, and a "
            f"vector has no probability below it: put its values in a plate."
        )
    left = found.left_out()
    warn_of_unreliable({f"site {found.name!r}": left})
    draws = group[found.name].values
    draws = draws.reshape(-1, *draws.shape[2:])[:, found.seen].T
    seen = values[found.seen][:, None]
    part: Any = 0.5
    if rng_key is not None:
        part = np.asarray(jax.random.uniform(one_key(rng_key), (len(seen), 1)), float)
    below = (draws < seen) + part * (draws == seen)
    result = np.full(values.shape, np.nan)
    result[found.seen] = np.clip((np.exp(left.log_weights) * below).sum(axis=1), 0.0, 1.0)
    return result


def warn_of_unreliable(found: dict[str, LeftOut]) -> None:
    """Warn of terms whose Pareto k is above 0.7 or unknown."""
    bad = {name: left for name, left in found.items() if left.unreliable}
    if not bad:
        return
    parts = [
        f"{left.unreliable} of {left.pareto_k.size} of {name} (the largest "
        f"{np.nanmax(left.pareto_k):.2f})"
        for name, left in list(bad.items())[:_NAMED]
    ]
    more = [f"{len(bad) - _NAMED} others"] if len(bad) > _NAMED else []
    warn(
        f"leave-one-out is not to be trusted where the shape k of the importance ratios is above "
        f"{TRUSTED_K}: {'; '.join(parts + more)}. Use scoring.cross_validate there, which fits "
        f"without these rows."
    )
