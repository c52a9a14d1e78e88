"""Simulation-based calibration: all simulated data sets are fitted in one program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ensemble.calibration.fitting import draws_of, mapped_fits, thinned
from numpyro_ensemble.calibration.simulating import DataSites, with_data
from numpyro_ensemble.calibration.uniformity import uniformity
from numpyro_ensemble.calls.keywords import check_call, checked_keywords
from numpyro_ensemble.density import log_joint
from numpyro_ensemble.handlers import check_count, one_key, warn
from numpyro_ensemble.mapping import finite_members
from numpyro_ensemble.predict.assembly import single_group
from numpyro_ensemble.results import name_members
from numpyro_ensemble.vi import EnsembleVI

_LIKELIHOOD = "log_likelihood"
_LEAST = 10  # with fewer data sets a test of uniformity detects nothing
_ALARM = 0.01  # a p-value below which a quantity is called miscalibrated


class Calibration(NamedTuple):
    """Ranks of true values among draws, and a test that the ranks are uniform.

    Attributes:
        data: ArviZ data with the group `prior_sbc`, or `posterior_sbc`: the ranks of each quantity
            as numbers between 0 and 1, `(1, D, ...)`, uniform for an exact posterior.
        ranks: for each quantity, `(D, ...)`, the number of draws below the true value.
        p_values: for each quantity, `(...)`, the p-value of the test that ranks are uniform.
        miscalibrated: quantities whose smallest p-value is below 0.01 over their size.
        truths: the latents that the data were simulated with, `(D, ...)`.
        failed: indices of the data sets that were left out.

    The example of `calibration.sbc` makes one.
    """

    data: Any
    ranks: dict[str, np.ndarray]
    p_values: dict[str, np.ndarray]
    miscalibrated: list[str]
    truths: dict[str, np.ndarray]
    failed: np.ndarray


class _Counts(NamedTuple):
    """How many draws of each quantity are below the true value, and equal to it."""

    below: dict[str, jax.Array]
    equal: dict[str, jax.Array]
    finite: jax.Array


@checked_keywords
def sbc(
    model: Callable,
    fit: Any,
    *args: Any,
    rng_key: jax.Array,
    num_datasets: int = 200,
    num_draws: int = 99,
    num_steps: int | None = None,
    run_options: Mapping[str, Any] | None = None,
    posterior_samples: Mapping[str, Any] | None = None,
    data_sites: Mapping[str, str | int] | Collection[str] | str | None = None,
    quantities: Callable | None = None,
    batch_size: int | None = None,
    on_failed: str = "warn",
    **kwargs: Any,
) -> Calibration:
    """Simulate data from the prior, fit all of them, and rank the true values among the draws.

    If the fits are exact, the ranks are uniform (Talts et al., 2018). If draws are too narrow, true
    values too often rank lowest or highest. If draws are shifted, they gather at one end.

    Args:
        model: a NumPyro model.
        fit: an `EnsembleVI` (one member fits each data set); an `MCMC` with any kernel; or a
            function of a key and the model's arguments that returns draws by site.
        *args: arguments of the model, with data of the shape that is to be simulated.
        rng_key: one key.
        num_datasets: number D of data sets that are simulated.
        num_draws: number of draws of each fit among which a true value is ranked. Of chains,
            equally spaced draws are taken.
        num_steps: steps of a variational fit.
        run_options: options of the variational fit's `run`.
        posterior_samples: draws `(S, ...)` of all latents from the posterior of the call's own
            data. Data are then simulated from these draws, and fitted together with the call's own
            data (posterior calibration; Säilynoja et al., 2025). `fit` is then a function of a
            model that returns one of the above.
        data_sites: names of the observed sites, or a dict with the name or position of the
            argument of each site's data. Needed for several sites, or if no argument equals them.
        quantities: a function of the latents and the model's arguments that returns more numbers
            to rank, by name. The log likelihood is always ranked: it detects errors that the
            latents do not show.
        batch_size: number of data sets that are fitted at once (default: all).
        on_failed: "warn" leaves out data sets that are not finite, or whose fits are not, "raise"
            raises.
        **kwargs: keyword arguments of the model.

    Returns:
        A `Calibration`. `az.plot_ecdf_pit(calibration.data)` draws it in ArviZ 1.0 and later,
        `plotting.plot_ranks(calibration)` in all.

    Raises:
        TypeError: if `fit` is none of these.
        ValueError: for a model that data cannot be simulated from, or options that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble.calibration import sbc
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", 3):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def exact(key, y):
        ...     return {"mu": y.sum() / 4 + 0.5 * jax.random.normal(key, (99,))}
        >>> found = sbc(model, exact, jnp.zeros(3), rng_key=jax.random.key(0), num_datasets=500)
        >>> found.miscalibrated, found.ranks["mu"].shape
        ([], (500,))
    """
    check_count("num_datasets", num_datasets)
    if num_datasets < _LEAST:
        raise ValueError(f"num_datasets must be at least {_LEAST}, got {num_datasets}.")
    check_count("num_draws", num_draws)
    if on_failed not in ("warn", "raise"):
        raise ValueError(f'on_failed takes "warn" or "raise", got {on_failed!r}.')
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_call(model, args, kwargs)
    sites = DataSites.of(model, args, kwargs, data_sites)
    known: dict[str, jax.Array] = {}
    if posterior_samples is not None:
        known = _drawn_before(posterior_samples, sites, num_datasets)
        fit = _made(fit, with_data(model, args, kwargs))
    draw = draws_of(fit, num_draws, num_steps, run_options or {})
    simulate_key, fit_key, tie_key = jax.random.split(one_key(rng_key), 3)
    truths, data = sites.simulate(jax.random.split(simulate_key, num_datasets), known)
    simulated = finite_members((truths, data), num_datasets)

    def one(given: tuple) -> _Counts:
        key, truth, values = given
        return _counted(sites, draw, quantities, key, truth, values)

    keys = jax.random.split(fit_key, num_datasets)
    counts = mapped_fits(one, (keys, truths, data), batch_size)
    good = simulated & counts.finite
    _report_left_out(simulated, counts.finite, on_failed)
    kept = jax.tree.map(lambda x: np.asarray(x)[good], (truths, counts.below, counts.equal))
    truths, below, equal = kept
    ties = _uniform(tie_key, below)
    shares = {k: (below[k] + ties[k] * (equal[k] + 1)) / (num_draws + 1) for k in below}
    p_values = {name: uniformity(values) for name, values in shares.items()}
    wrong = [name for name, p in p_values.items() if p.size and p.min() * p.size < _ALARM]
    group = single_group(
        "posterior_sbc" if known else "prior_sbc",
        {name: values[None] for name, values in shares.items()},
        sites.dims,
        {"num_draws": num_draws, "num_datasets": num_datasets},
    )
    return Calibration(group, below, p_values, wrong, truths, np.flatnonzero(~good))


def _drawn_before(samples: Mapping[str, Any], sites: DataSites, number: int) -> dict[str, Any]:
    """Return as many draws of all latents as there are data sets."""
    missing = sorted(set(sites.latent) - samples.keys())
    if missing:
        raise ValueError(f"posterior_samples lacks {missing}: pass draws of all latents.")
    try:
        return thinned({name: samples[name] for name in sites.latent}, number)
    except ValueError as error:
        raise ValueError(f"posterior_samples has too few draws for num_datasets: {error}") from None


def _made(make: Any, model: Callable) -> Any:
    """Return the fit of a model with the call's own data added."""
    if isinstance(make, EnsembleVI | MCMC) or not callable(make):
        raise TypeError(
            "with posterior_samples, fit takes a function that makes the fit of a given model: "
            "lambda model: MCMC(NUTS(model), ...)."
        )
    return make(model)


def _counted(
    sites: DataSites,
    draw: Callable,
    quantities: Callable | None,
    key: jax.Array,
    truth: dict[str, jax.Array],
    data: dict[str, jax.Array],
) -> _Counts:
    """Fit one data set, and count the draws below and at the true values."""
    args, kwargs = sites.call(data)
    draws = draw(key, args, kwargs)
    known = [name for name in sites.latent if name in draws]
    if not known:
        raise ValueError(
            f"fit returned draws of {sorted(draws)}, and the model's latents are "
            f"{list(sites.latent)}: return a dict of draws by these names."
        )
    latents = {name: draws[name] for name in known}
    density = log_joint(sites.model)

    def more(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = {} if quantities is None else dict(quantities(values, *args, **kwargs))
        clash = sorted(found.keys() & {*values, _LIKELIHOOD})
        if clash:
            raise ValueError(f"quantities returns {clash}, which are ranked already: rename them.")
        if known == list(sites.latent):
            found[_LIKELIHOOD] = density(values, *args, **kwargs)[0]
        return {name: jnp.asarray(value) for name, value in found.items()}

    own = {name: truth[name] for name in known}
    expected, every = own | more(own), latents | jax.vmap(more)(latents)
    below = {name: (every[name] < expected[name][None]).sum(axis=0) for name in every}
    equal = {name: (every[name] == expected[name][None]).sum(axis=0) for name in every}
    return _Counts(below, equal, _all_finite(every))


def _all_finite(values: dict[str, jax.Array]) -> jax.Array:
    """Return whether all numbers are finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in values.values()]).all()


def _report_left_out(simulated: np.ndarray, fitted: np.ndarray, on_failed: str) -> None:
    """Name the data sets that are left out, or raise."""
    parts = []
    for text, bad in (
        ("simulated data that are not finite", ~simulated),
        ("draws or densities that are not finite", simulated & ~fitted),
    ):
        if bad.any():
            parts.append(f"{bad.sum()} of {bad.size} data sets have {text}: {name_members(bad)}")
    if not parts:
        return
    message = "; ".join(parts)
    if on_failed == "raise" or (simulated & fitted).sum() < _LEAST:
        raise RuntimeError(
            f"{message}. on_failed='warn' leaves them out, if {_LEAST} others remain."
        )
    warn(f"{message}. They are left out, so the ranks are only those of the other data sets.")


def _uniform(key: jax.Array, shapes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a uniform number for each rank, which places it between two draws."""
    sizes = [value.size for value in shapes.values()]
    parts = np.split(np.asarray(jax.random.uniform(key, (sum(sizes),))), np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(value.shape)
        for part, (name, value) in zip(parts, shapes.items(), strict=True)
    }
