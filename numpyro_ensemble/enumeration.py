"""Discrete latents that are summed out of a model, by funsor, as NumPyro's HMC does it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger

from numpyro_ensemble._compat import check_plates
from numpyro_ensemble.handlers import reweight, unwrapped

# factors that stand for the density of a model whose discrete latents are summed out
LIKELIHOOD, PRIOR = "_summed_out_log_likelihood", "_summed_out_log_prior"


def is_discrete_latent(site: Mapping[str, Any]) -> bool:
    """Return whether a sample message or trace site is a discrete latent."""
    latent = site["type"] == "sample" and not site["is_observed"]
    return latent and bool(site["fn"].support.is_discrete)


def is_marked(site: Mapping[str, Any]) -> bool:
    """Return whether a site is marked `infer={"enumerate": "parallel"}`."""
    return bool((site.get("infer") or {}).get("enumerate") == "parallel")


def needs_sum(site: Mapping[str, Any]) -> bool:
    """Return whether a site is a discrete latent that is marked to be summed out."""
    return is_discrete_latent(site) and is_marked(site)


def with_placeholders(model: Callable) -> Callable:
    """Return a model that can be traced without values of what is marked to be summed out."""

    def value(site: Mapping[str, Any]) -> Any:
        wanted = needs_sum(site) and site["value"] is None
        return jnp.zeros(site["fn"].shape(), int) if wanted else None

    return handlers.substitute(model, substitute_fn=value)


def why_not_summed(site: Mapping[str, Any]) -> str:
    """Return why a discrete latent cannot be summed out, "" where it can."""
    fn, mark = site["fn"], (site.get("infer") or {}).get("enumerate", "parallel")
    if mark not in (None, "parallel"):
        return f"it is marked enumerate={mark!r}; mark it enumerate='parallel'"
    if not fn.has_enumerate_support:
        return "its values cannot be enumerated"
    if fn.event_dim:
        return "one draw of it is an array, whose combinations are not enumerated: use a plate"
    # NumPyro enumerates 0, 1, ..., whatever the support begins with
    lowest = getattr(fn.support, "lower_bound", 0)
    if isinstance(lowest, jax.core.Tracer) or np.any(np.asarray(lowest) != 0):
        return "its lowest value is not 0: add an offset to a site that begins at 0"
    return ""


def check_funsor(names: Iterable[str]) -> None:
    """Raise an ImportError where discrete latents need funsor and it is not installed."""
    if importlib.util.find_spec("funsor") is None:
        raise ImportError(
            f"the latent sites {list(names)} are discrete, and summing them out needs funsor: "
            f"pip install funsor."
        )


_OF_TRACES = ("dim_to_name", "name_to_dim")  # what funsor's traces write into a site's `infer`


class _OwnInfer(Messenger):
    """Give each sample message an `infer` of its own: NumPyro writes into the user's."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            msg["infer"] = _without_traces(msg["infer"])


def _without_traces(infer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in infer.items() if key not in _OF_TRACES}


def num_plate_dims(trace: Mapping[str, Any]) -> int:
    """Return how many trailing axes the plates of a trace take.

    Raises:
        ValueError: for an axis of a sample site that has no plate.
    """
    samples = [site for site in trace.values() if site["type"] == "sample"]
    check_plates({s["name"]: {**s, "infer": _without_traces(s["infer"])} for s in samples})
    return -min((f.dim for site in samples for f in site["cond_indep_stack"]), default=0)


def check_scan_latents(trace: Mapping[str, Any]) -> None:
    """Raise a ValueError for a constrained latent of a `scan` in a trace with discrete latents.

    NumPyro's enumeration does not take the Jacobian factor that its unconstrained value brings.
    """
    for name, site in trace.items():
        if site["type"] != "sample" or site["is_observed"] or is_discrete_latent(site):
            continue
        support = site["fn"].support
        base = getattr(support, "base_constraint", support)
        if site.get("_control_flow_done", False) and base is not constraints.real:
            kind = type(unwrapped(site["fn"])).__name__
            raise ValueError(
                f"latent site {name!r} is drawn in a scan from a constrained distribution "
                f"({kind}), and NumPyro cannot sum discrete latents out of such a model, under "
                f"NUTS neither. Draw {name!r} before the scan, in a plate of its steps, and pass "
                f"the values as xs."
            )


def as_marked(model: Callable) -> Callable:
    """Return a model whose discrete latents are all marked to be summed out."""
    from numpyro.contrib.funsor import config_enumerate

    return config_enumerate(_OwnInfer(model))


def enumerated(model: Callable, plate_dims: int) -> Callable:
    """Return a model whose marked latents take all their values at once, on axes of their own.

    Args:
        model: a NumPyro model.
        plate_dims: see `num_plate_dims`.
    """
    from numpyro.contrib.funsor import enum

    return enum(model, -plate_dims - 1)


def depends_on_sums(model: Callable, args: tuple, kwargs: dict) -> set[str]:
    """Return the names of the deterministic sites that depend on discrete latents.

    Args:
        model: a NumPyro model, with a seed.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    trace = handlers.trace(model).get_trace(*args, **kwargs)
    names = [name for name, site in trace.items() if is_discrete_latent(site)]

    def deterministic(**values: jax.Array) -> dict[str, Any]:
        known = {names[int(i.removeprefix("value"))]: x for i, x in values.items()}
        sites = handlers.trace(handlers.substitute(model, data=known)).get_trace(*args, **kwargs)
        return {k: s["value"] for k, s in sites.items() if s["type"] == "deterministic"}

    values = {f"value{i}": trace[name]["value"] for i, name in enumerate(names)}
    sources = eval_provenance(deterministic, **values)
    return {name for name, each in sources.items() if any(jax.tree.leaves(each))}


def split_density(
    model: Callable,
    trace: Mapping[str, Any],
    values: Mapping[str, Any],
    args: tuple,
    kwargs: dict,
    prior_sites: Collection[str] = (),
) -> tuple[jax.Array, jax.Array]:
    """Return log likelihood and log prior of a model whose marked discrete latents are summed out.

    The prior is that of the continuous latents alone, and the likelihood that of the data given
    these: both are sums over the discrete latents.

    Args:
        model: a NumPyro model.
        trace: its sites, at any values.
        values: of its continuous latents and parameters.
        args: its arguments.
        kwargs: its keyword arguments.
        prior_sites: names of factors that belong to the prior.
    """
    check_funsor(name for name, site in trace.items() if needs_sum(site) and name not in values)
    from numpyro.contrib.funsor import infer_config, log_density

    def unmark(site: Mapping[str, Any]) -> dict[str, Any]:
        return {"enumerate": None} if site["name"] in values and needs_sum(site) else {}

    dims = num_plate_dims(trace)
    model = infer_config(handlers.substitute(_OwnInfer(model), data=dict(values)), unmark)

    def density(model: Callable) -> jax.Array:
        with handlers.block():
            return log_density(enumerated(model, dims), args, kwargs, {})[0]

    log_prior = density(reweight(model, likelihood=0, prior_sites=prior_sites))
    return density(model) - log_prior, log_prior


class _Continuous(Messenger):
    """Show the continuous latents and parameters of a model alone, without their log densities."""

    def __init__(self) -> None:
        self.trace: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            if msg["is_observed"] or is_discrete_latent(msg):
                msg["stop"] = True
            else:
                msg["fn"] = msg["fn"].mask(False)
        elif msg["type"] == "deterministic":
            msg["stop"] = True

    def postprocess_message(self, msg: Any) -> None:
        if "name" not in msg:
            return
        self.trace[msg["name"]] = dict(msg)
        latent = msg["type"] == "sample" and not (msg["is_observed"] or is_discrete_latent(msg))
        if latent or msg["type"] in ("param", "mutable", "plate"):
            self.values[msg["name"]] = copy(msg["value"])


class SummedOut:
    """A model without the discrete latents of another, and with the same density otherwise.

    Its sites are the continuous latents and parameters, without densities, and two factors.

    Args:
        model: a NumPyro model, whose discrete latents are all marked.
        prior_sites: names of factors that belong to the prior.
    """

    def __init__(self, model: Callable, prior_sites: Collection[str] = ()) -> None:
        self.model, self.prior_sites = model, prior_sites

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and add the density of its data and latents."""
        key = numpyro.prng_key()
        shown = _Continuous()
        with shown:
            out = with_placeholders(self.model)(*args, **kwargs)
        check_scan_latents(shown.trace)
        model = self.model if key is None else handlers.seed(self.model, key)
        log_likelihood, log_prior = split_density(
            model, shown.trace, shown.values, args, kwargs, self.prior_sites
        )
        numpyro.factor(LIKELIHOOD, log_likelihood)
        numpyro.factor(PRIOR, log_prior)
        return out
