"""Models compared by what they predict, and their predictions mixed by weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.handlers import check_count, one_key
from numpyro_ensemble.mapping import check_mixture
from numpyro_ensemble.predict.assembly import makes_inference_data
from numpyro_ensemble.scoring.folds import CrossValidation
from numpyro_ensemble.scoring.leave_one_out import LeftOut, Likelihoods, warn_of_unreliable
from numpyro_ensemble.scoring.reading import group_of

Weighing = Literal["stacking", "pseudo-bma", "bb-pseudo-bma"]
_Part = tuple[str, int | None]  # a model, and one of its members where these are told apart
_METHODS = {
    "stacking": "stacking", "pseudo-bma": "pseudo-BMA", "bb-pseudo-bma": "BB-pseudo-BMA",
}  # fmt: skip


class Comparison(NamedTuple):
    """Scores of several models, and the weights that mix their predictions.

    Attributes:
        table: the pandas frame of `az.compare`, the best model first, with two more columns:
            `pareto_k`, the largest shape of the importance ratios, and `corrected`, whether draws
            were corrected for their guide (never for chains and for guides without a density).
        weights: for each model the weights `(E,)` of its members, or `()` for folds. The weights
            of all models add up to 1. Pass those of a model to `EnsemblePredictive(..., weights=)`
            if they are not all 0, and mix the predictions of models by `scoring.mix`.

    The example of `scoring.compare` makes one.
    """

    table: Any
    weights: dict[str, np.ndarray]


def compare(
    models: Mapping[str, Any],
    *,
    members: bool = False,
    method: Weighing = "stacking",
    var_name: str | Mapping[str, str] | None = None,
    corrected: bool = True,
) -> Comparison:
    """Compare models by leave-one-out or by folds, and weigh them for predictions.

    Unlike `az.compare` it corrects the draws of variational fits for their guides, raises an error
    for models that were fitted to different data, and weighs members of ensembles.

    Args:
        models: a dict by model name of ArviZ data (from `to_arviz`), or of `CrossValidation`.
        members: weigh each member as a separate model, instead of all members of a model alike.
        method: "stacking", "pseudo-bma", or "bb-pseudo-bma" (with the Bayesian bootstrap).
        var_name: the observed site, if there are several; a dict by model if names differ.
        corrected: weigh draws of guides towards the posterior, if the guides have densities.

    Raises:
        TypeError: if `models` is not a dict.
        ValueError: for fewer than two models, an unknown method, models of different data, or data
            that leave-one-out cannot use.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import scoring, to_arviz
        >>> def model(y, scale=1.0):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", 20):
        ...         numpyro.sample("y", dist.Normal(mu, scale), obs=y)
        >>> y = jax.random.normal(jax.random.key(1), (20,))
        >>> draws = {"mu": y.mean() + jax.random.normal(jax.random.key(0), (2, 500)) / 20**0.5}
        >>> found = scoring.compare(
        ...     {"right": to_arviz(model, draws, y), "wide": to_arviz(model, draws, y, scale=3.0)})
        >>> list(found.table.index), found.weights["right"].round(2)
        (['right', 'wide'], array([0.5, 0.5]))
    """
    if not isinstance(models, Mapping):
        raise TypeError(f"models takes a dict by model name, got {type(models).__name__}.")
    if len(models) < (1 if members else 2):
        raise ValueError(f"compare takes two models or more, got {list(models)}.")
    if method not in _METHODS:
        raise ValueError(f"method takes one of {list(_METHODS)}, got {method!r}.")
    named: Any = var_name if isinstance(var_name, Mapping) else dict.fromkeys(models, var_name)
    unknown = sorted(named.keys() - models.keys())
    if unknown:
        raise ValueError(f"var_name names {unknown}; the models are {list(models)}.")
    parts: dict[_Part, LeftOut | CrossValidation] = {}
    for name, given in models.items():
        if isinstance(given, CrossValidation):
            parts[name, None] = given
        else:
            parts |= _left_out(name, given, named.get(name), members, corrected)
    _check_alike(parts)
    left = {_label(*part): one for part, one in parts.items() if isinstance(one, LeftOut)}
    warn_of_unreliable(left)
    table, shares = _compared(parts, method)
    return Comparison(table, {name: _of_members(models[name], name, shares) for name in models})


def _label(name: str, index: int | None) -> str:
    if index is None:
        return name
    return f"{name}[{index}]" if name else f"member {index}"


def _left_out(
    name: str, data: Any, var_name: str | None, members: bool, corrected: bool
) -> dict[_Part, LeftOut]:
    """Return a model's terms, or those of each member, with errors that name the model."""
    try:
        found = Likelihoods.of(data, var_name, corrected)
        if not members:
            return {(name, None): found.left_out()}
        return {(name, e): found.member(e).left_out() for e in range(len(found.terms))}
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error


def _check_alike(parts: Mapping[_Part, LeftOut | CrossValidation]) -> None:
    """Raise a ValueError for models of different data."""
    models = {name: part for (name, _), part in parts.items()}
    number = {name: part.data["n_data_points"] for name, part in models.items()}
    if len(set(number.values())) > 1:
        raise ValueError(
            f"the models have different numbers of observations, so their scores cannot be "
            f"compared: {number}."
        )
    values = {
        name: part.observations for name, part in models.items() if part.observations is not None
    }
    first = next(iter(values), None)
    for name, seen in values.items():
        if not np.array_equal(seen, values[first]):  # type: ignore[index]
            raise ValueError(
                f"the models {first!r} and {name!r} have different observations, so their scores "
                f"cannot be compared: make the data of both with the same observations."
            )


def _compared(
    parts: Mapping[_Part, LeftOut | CrossValidation], method: str
) -> tuple[Any, dict[_Part, float]]:
    """Return ArviZ's table, and the weight of each part."""
    import arviz as az

    rows = {_label(*part): part for part in parts}
    if len(rows) < len(parts):
        raise ValueError(
            f"names of models equal those of members, name[e]: {list(parts)}. Rename the models."
        )
    given = {row: parts[part].data for row, part in rows.items()}
    plain: Any = {"seed": 0} if makes_inference_data() else {"round_to": "none"}  # for bootstraps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword")  # pandas, of ArviZ's own call
        table = az.compare(given, method=_METHODS[method], **plain)  # type: ignore[arg-type]
    found = [parts[rows[row]] for row in table.index]
    table["pareto_k"] = [
        float(np.max(part.pareto_k)) if isinstance(part, LeftOut) else np.nan for part in found
    ]
    table["corrected"] = [isinstance(part, LeftOut) and part.corrected for part in found]
    weights = np.maximum(table["weight"].to_numpy(float), 0.0)
    weights = weights / weights.sum()
    return table, {rows[row]: float(w) for row, w in zip(table.index, weights, strict=True)}


def _of_members(data: Any, name: str, shares: Mapping[_Part, float]) -> np.ndarray:
    """Return the weights of all members of a model, with 0 for those that were left out."""
    if isinstance(data, CrossValidation):
        return np.asarray(shares[name, None])
    size = group_of(data, "posterior").sizes["chain"]
    if (name, None) in shares:
        return for_every_member(data, np.full(size, shares[name, None] / size))
    return for_every_member(data, np.array([shares[name, e] for e in range(size)]))


def for_every_member(data: Any, weights: np.ndarray) -> np.ndarray:
    """Return weights of all members of ArviZ data, 0 for those that were left out of it."""
    posterior = group_of(data, "posterior")
    every = np.zeros(posterior.attrs.get("ensemble_size", len(weights)))
    if len(every) == len(weights):
        return weights
    every[posterior.coords["chain"].values] = weights
    return every


def mix(
    rng_key: jax.Array,
    predictions: Mapping[str, Any],
    weights: Mapping[str, ArrayLike],
    num_samples: int | None = None,
) -> Any:
    """Draw from the mixture of the predictions of several models.

    Args:
        rng_key: one key.
        predictions: a dict by model name of draws `(S, ...)`, or of dicts of draws by site.
        weights: a dict by model name of weights, from `compare`. A model of weight 0 needs no
            predictions.
        num_samples: number of draws (default: the largest number of draws of a model).

    Raises:
        ValueError: for predictions of different sites or shapes, or weights that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble import scoring
        >>> draws = {"a": jnp.zeros((100, 3)), "b": jnp.ones((100, 3))}
        >>> mixed = scoring.mix(jax.random.key(0), draws, {"a": 0.25, "b": [0.5, 0.25]}, 4000)
        >>> mixed.shape, round(float(mixed.mean()), 1)
        ((4000, 3), 0.8)
    """
    shares = {name: float(np.sum(value)) for name, value in weights.items()}
    missing = sorted(name for name, share in shares.items() if share and name not in predictions)
    unknown = sorted(predictions.keys() - shares.keys())
    if missing or unknown:
        raise ValueError(
            f"predictions lack the models {missing}, and weights lack {unknown}: give both for "
            f"each model."
        )
    names = [name for name in shares if name in predictions]
    check = check_mixture([shares[name] for name in names], len(names), "models")
    forms = {name: jax.tree.map(lambda x: jnp.shape(x)[1:], predictions[name]) for name in names}
    if any(form != forms[names[0]] for form in forms.values()):
        raise ValueError(f"the models predict different sites or shapes: {forms}.")
    lengths = {name: {len(x) for x in jax.tree.leaves(predictions[name])} for name in names}
    if any(len(found) != 1 for found in lengths.values()):
        raise ValueError(f"the sites of a model have different numbers of draws: {lengths}.")
    sizes = [lengths[name].pop() for name in names]
    number = max(sizes) if num_samples is None else num_samples
    check_count("num_samples", number)
    model_key, draw_key = jax.random.split(one_key(rng_key))
    chosen = jax.random.categorical(model_key, jnp.log(check), shape=(number,))
    places = jnp.zeros(number, int)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for i, size in enumerate(sizes):
        order = jax.random.permutation(jax.random.fold_in(draw_key, i), size)
        rank = jnp.cumsum(chosen == i) - 1  # each draw is taken once before one is taken twice
        places = jnp.where(chosen == i, offsets[i] + order[rank % size], places)
    parts = [predictions[name] for name in names]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs)[places], *parts)
