"""Weighting the prior and the likelihood of a model: the one place that tells them apart."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

Role = Literal["prior", "likelihood", "jacobian"]
# with a separator, since a package named numpyro_forecast counts as the user's code
_PACKAGES = (__file__, numpyro.__file__, jax.__file__)
_INSIDE = tuple(f"{Path(path).parent}{os.sep}" for path in _PACKAGES)


def is_factor(site: Mapping[str, Any]) -> bool:
    """Return whether a trace site was made by `numpyro.factor`."""
    return site["type"] == "sample" and isinstance(unwrapped(site["fn"]), dist.Unit)


def unwrapped(fn: Any) -> Any:
    """Return the distribution inside masks, expansions and `to_event`."""
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn


def site_role(
    site: Mapping[str, Any], seen: Collection[str] = (), prior_sites: Collection[str] = ()
) -> Role:
    """Return whether a sample site belongs to the prior, the likelihood or a change of variables.

    Args:
        site: a sample message or trace site.
        seen: names of the sites met so far; they tell a reparameterisation's factor from a user's.
        prior_sites: names of factors the user declared to be prior.
    """
    name = site["name"]
    if not site["is_observed"] or name in prior_sites:
        return "prior"
    if not is_factor(site):
        return "likelihood"
    if _made_by_numpyro(name, "_log_det"):
        return "jacobian"  # numpyro.infer.util._unconstrain_reparam
    circular = name.endswith("_factor") and f"{name.removesuffix('_factor')}_unwrapped" in seen
    neutra = _made_by_numpyro(name, "_log_prob") and any(s.endswith("_shared_latent") for s in seen)
    return "prior" if circular or neutra else "likelihood"


def _made_by_numpyro(name: str, suffix: str) -> bool:
    """Return whether a factor has a name that NumPyro makes of a site's, `_{site}{suffix}`.

    A scope in the model puts its prefix before a site's name, and before the factor's once more:
    `a/x` has the factor `a/_a/x_log_det`.
    """
    starts = (i for i, c in enumerate(name) if c == "_" and name.startswith(name[:i], i + 1))
    return name.endswith(suffix) and any(i == 0 or not name[i - 1].isalnum() for i in starts)


class reweight(Messenger):
    """Multiply the log density of prior sites by one weight and of observed sites by another.

    It composes with `plate` subsampling, `scale`, `mask`, reparameterisations and `scope`.
    Condition a model before it is reweighted: a site is likelihood if the model that this
    handler gets observes it. NumPyro's Jacobian factors (`_{site}_log_det`) are never weighted.
    Any other `factor` is likelihood, unless it is named in `prior_sites`, or comes from
    `CircularReparam` or `NeuTraReparam`.

    Args:
        fn: the model.
        prior: weight of the unobserved sites. A Python `0` drops the term, exactly, in value and
            gradient; a traced weight only multiplies, so schedules should stay positive.
        likelihood: weight of the observed sites, likewise.
        prior_sites: names of `factor` sites that belong to the prior.

    Raises:
        TypeError: if a weight is no single number, or `prior_sites` is a string.
        ValueError: if a weight that is known now is negative or not finite.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro.infer.util import log_density
        >>> from numpyro_ensemble import reweight
        >>> def model(y=1.0):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> without_prior = reweight(model, prior=0)
        >>> print(log_density(without_prior, (), {}, {"mu": 1.0})[0].round(3))
        -0.919
    """

    def __init__(
        self,
        fn: Callable | None = None,
        *,
        prior: ArrayLike = 1.0,
        likelihood: ArrayLike = 1.0,
        prior_sites: Collection[str] = (),
    ) -> None:
        self.prior = check_weight("prior", prior)
        self.likelihood = check_weight("likelihood", likelihood)
        self.prior_sites = check_names("prior_sites", prior_sites)
        self._seen: set[str] = set()
        super().__init__(fn)

    def __exit__(self, *exc_info: Any) -> None:
        self._seen = set()  # a call leaves the handler as it was
        super().__exit__(*exc_info)

    def process_message(self, msg: Any) -> None:
        """Scale the log density of a sample site by the weight of its role, or mask it."""
        if msg["type"] != "sample":
            return
        role = site_role(msg, self._seen, self.prior_sites)
        self._seen.add(msg["name"])
        if role == "jacobian":
            return
        weight = self.prior if role == "prior" else self.likelihood
        if is_zero(weight):
            msg["fn"] = msg["fn"].mask(False)
        elif isinstance(weight, jax.core.Tracer) or weight != 1:
            handlers.scale(scale=weight).process_message(msg)


def check_names(option: str, names: Collection[str]) -> tuple[str, ...]:
    """Return names of sites as a tuple; a string would be read as one name per letter."""
    if isinstance(names, str):
        raise TypeError(f"{option} takes a collection of names, got the string {names!r}.")
    return tuple(names)


def warn(message: str) -> None:
    """Warn at the line of the user's own code, outside of this package, NumPyro and JAX."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def shown(value: Any) -> str:
    """Return a value as an error shows it: of a larger array only dtype and shape."""
    if np.size(value) > 8 and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(np.shape(value))}"
    return repr(value)


def check_count(name: str, value: Any) -> None:
    """Raise where an option is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} takes an integer, got {shown(value)}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def key_of(rng_key: Any) -> Any:
    """Return the key that an integer stands for; anything else as it is."""
    if isinstance(rng_key, int | np.integer) and not isinstance(rng_key, bool):
        return jax.random.key(rng_key)
    return rng_key


def one_key(rng_key: Any) -> jax.Array:
    """Return one key: the one given, or that of an integer.

    Raises:
        ValueError: for anything else.
    """
    rng_key = key_of(rng_key)
    if not is_prng_key(rng_key):
        raise ValueError(
            f"rng_key takes one key, jax.random.key(0) say, or an integer; got {shown(rng_key)}."
        )
    return rng_key


def is_zero(weight: ArrayLike) -> bool:
    """Return whether a weight is known now to be 0, so that its term is dropped altogether."""
    return not isinstance(weight, jax.core.Tracer) and bool(weight == 0)


def check_weight(name: str, weight: ArrayLike) -> ArrayLike:
    """Return a scalar weight; one that is known now must be finite and not negative."""
    if isinstance(weight, str) or np.shape(weight) != ():
        raise TypeError(f"{name} takes one number, got {weight!r}.")
    if isinstance(weight, jax.core.Tracer):
        return weight
    try:
        value = float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} takes one number, got {weight!r}.") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} takes a finite weight of at least 0, got {weight}.")
    return value


def weight_at(name: str, weight: Any, step: Any) -> ArrayLike:
    """Return a weight at a step of the optimiser: the number itself, or that of a schedule."""
    if not callable(weight):
        return weight
    return check_weight(name, _number_of(name, weight(step)))


def check_schedule(name: str, schedule: Any, first: int, num_steps: int) -> None:
    """Raise a ValueError where a schedule is negative, or not finite, in the steps of a run."""
    if not callable(schedule):
        return
    steps = np.arange(first, first + num_steps)
    values = np.asarray(jax.vmap(lambda step: _number_of(name, schedule(step)))(steps))
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        raise ValueError(
            f"{name}'s schedule must be finite and not negative; at step {steps[wrong[0]]} it is "
            f"{values[wrong[0]]}."
        )


def _number_of(name: str, weight: Any) -> Any:
    """Return what a schedule gave for one step."""
    if np.shape(weight) != ():
        raise ValueError(
            f"{name}'s schedule must return one number for a step; it returns an array of shape "
            f"{np.shape(weight)}."
        )
    return weight
