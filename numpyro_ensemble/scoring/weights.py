"""Importance weights of variational draws, and weights of members, by ArviZ's PSIS and LOO."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.results import LEAST_DRAWS, TRUSTED_K, last_losses
from numpyro_ensemble.scoring.comparison import compare, for_every_member
from numpyro_ensemble.scoring.leave_one_out import smoothed
from numpyro_ensemble.scoring.reading import group_of, holds_all_members

Method = Literal["stacking", "pseudo-bma", "elbo", "uniform"]


def psis(log_ratios: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Smooth importance weights by a Pareto distribution, as ArviZ does.

    Args:
        log_ratios: `(..., S)` log densities of the target less those of the proposal.

    Returns:
        The smoothed log weights `(..., S)`, each row adding up to 1, and the shapes k-hat `(...)`.
        Do not trust the weights above 0.7.

    Raises:
        ValueError: if there are too few draws.

    Example:
        >>> import numpy as np
        >>> from numpyro_ensemble import scoring
        >>> log_ratios = np.random.default_rng(0).normal(size=1000)
        >>> log_weights, shape = scoring.psis(log_ratios)
        >>> print(np.exp(log_weights).sum().round(6), bool(shape < 0.7))
        1.0 True
    """
    ratios = np.asarray(log_ratios, float)
    if ratios.ndim < 1 or ratios.shape[-1] < LEAST_DRAWS:
        raise ValueError(
            f"PSIS needs {LEAST_DRAWS} draws at least, got log_ratios of shape {ratios.shape}: "
            f"make more draws of each member, num_samples=100."
        )
    return smoothed(ratios)


class Khat(NamedTuple):
    """Shapes of the tails of importance ratios.

    The example of `scoring.khat` makes one.
    """

    members: np.ndarray  # (E,)
    mixture: float


def _ratios(data: Any, name: str = "log_q") -> np.ndarray:
    """Return the log importance ratios `(E, S)` of variational draws."""
    stats = group_of(data, "sample_stats")
    if stats is None or "log_q" not in stats:
        raise ValueError(
            "the ArviZ data has no log_q: importance weights need data that to_arviz made of a "
            "variational fit, with a guide that has a density. AutoDelta, "
            "AutoLaplaceApproximation and guides with supports that depend on other latents have "
            "none."
        )
    return stats["log_p"].values - stats[name].values


def khat(data: Any) -> Khat:
    """Return the Pareto k-hat of each member's guide, and that of the mixture of all.

    Args:
        data: what `to_arviz` made of variational fits.

    Returns:
        `Khat`: the k-hat of each member, and that of the equal mixture of all guides (NaN if a
        guide has no density for another member's draws). Below 0.5 is good, above 0.7 bad.

    Raises:
        ValueError: if the data has no densities, or too few draws.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_ensemble import EnsembleVI, scoring, to_arviz
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide, optim = AutoNormal(model), numpyro.optim.Adam(0.05)
        >>> vi = EnsembleVI(model, guide, optim, Trace_ELBO(), ensemble_size=2)
        >>> result = vi.run(jax.random.key(0), 500, jnp.ones(3), progress_bar=False)
        >>> data = to_arviz(vi, result, jnp.ones(3), num_samples=200)
        >>> shapes = scoring.khat(data)
        >>> print(shapes.members.shape, shapes.mixture < 0.7)
        (2,) True
    """
    mixture = float("nan")
    members = psis(_ratios(data))[1]
    if "log_q_mixture" in group_of(data, "sample_stats") and holds_all_members(data):
        mixture = float(psis(_ratios(data, "log_q_mixture").reshape(-1))[1])
    return Khat(members, mixture)


def importance_resample(
    rng_key: jax.Array, data: Any, num_samples: int | None = None
) -> dict[str, jax.Array]:
    """Resample the variational draws of all members towards the posterior.

    The draws are weighted as draws of the equal mixture of all guides, so that members that agree
    do not count twice.

    Args:
        rng_key: one key.
        data: what `to_arviz` made of variational fits.
        num_samples: number of draws (default: as many as there are).

    Returns:
        Draws by site name, with a leading axis `(num_samples,)`.

    Raises:
        ValueError: if the data has no densities, or too few draws.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_ensemble import EnsembleVI, scoring, to_arviz
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide, optim = AutoNormal(model), numpyro.optim.Adam(0.05)
        >>> vi = EnsembleVI(model, guide, optim, Trace_ELBO(), ensemble_size=2)
        >>> result = vi.run(jax.random.key(0), 500, jnp.ones(3), progress_bar=False)
        >>> data = to_arviz(vi, result, jnp.ones(3), num_samples=200)
        >>> scoring.importance_resample(jax.random.key(1), data, 50)["mu"].shape
        (50,)
    """
    ratios = _ratios(data)
    if ratios.shape[0] > 1:
        if "log_q_mixture" not in group_of(data, "sample_stats") or not holds_all_members(data):
            raise ValueError(
                "the guide has no density for another member's draws: resample one member at a "
                "time, data.sel(chain=[e])."
            )
        ratios = _ratios(data, "log_q_mixture")
    if num_samples is not None:
        check_count("num_samples", num_samples)
    log_weights, shape = psis(ratios.reshape(-1))
    if not shape <= TRUSTED_K:
        warn(
            f"k-hat is {float(shape):.2f}, above 0.7: a few draws have most of the weight. Fit "
            f"longer, or with a more flexible guide."
        )
    number = ratios.size if num_samples is None else num_samples
    chosen = jax.random.categorical(one_key(rng_key), jnp.asarray(log_weights), shape=(number,))
    posterior = group_of(data, "posterior")
    flat = {name: v.values.reshape(-1, *v.shape[2:]) for name, v in posterior.data_vars.items()}
    return {name: jnp.asarray(value)[chosen] for name, value in flat.items()}


def member_weights(
    data: Any, method: Method = "stacking", *, var_name: str | None = None
) -> np.ndarray:
    """Return weights `(E,)` of the members, adding up to 1; 0 for those that failed.

    Args:
        data: what `to_arviz` made.
        method: "stacking" or "pseudo-bma", by the PSIS-LOO of ArviZ; "elbo", by the mean of the
            last 100 losses; or "uniform".
        var_name: the observed site, where there are several.

    Raises:
        ValueError: for an unknown method, or if the data lacks what it needs.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_ensemble import EnsembleVI, scoring, to_arviz
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide, optim = AutoNormal(model), numpyro.optim.Adam(0.05)
        >>> vi = EnsembleVI(model, guide, optim, Trace_ELBO(), ensemble_size=2)
        >>> result = vi.run(jax.random.key(0), 500, jnp.ones(3), progress_bar=False)
        >>> data = to_arviz(vi, result, jnp.ones(3), num_samples=200)
        >>> scoring.member_weights(data, "uniform")
        array([0.5, 0.5])
        >>> print(scoring.member_weights(data, "elbo").sum().round(4))
        1.0
    """
    if method not in ("stacking", "pseudo-bma", "elbo", "uniform"):
        raise ValueError(
            f'method takes "stacking", "pseudo-bma", "elbo" or "uniform", got {method!r}.'
        )
    posterior = group_of(data, "posterior")
    size = posterior.sizes["chain"]
    if method == "uniform":
        values = np.full(size, 1 / size)
    elif method == "elbo":
        training = group_of(data, "training")
        if training is None:
            raise ValueError(
                'method="elbo" needs the losses, which only data of a runner has: write '
                "to_arviz(runner, result, ...)."
            )
        score = np.array([last_losses(row) for row in training["loss"].values])
        values = np.asarray(jax.nn.softmax(-jnp.asarray(score)))
    else:
        found = compare({"": data}, members=True, method=method, var_name=var_name, corrected=False)
        return found.weights[""]
    return for_every_member(data, values)
