"""The Gaussian processes of a model: found in its trace, and evaluated at other inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ensemble.density import filled, plate_of
from numpyro_ensemble.gp.inputs import check_values
from numpyro_ensemble.gp.messages import SUFFIX
from numpyro_ensemble.gp.noise import normal_at
from numpyro_ensemble.gp.process import Process, check_copies
from numpyro_ensemble.gp.subsampling import Dependents, KnownRows
from numpyro_ensemble.gp.weights import (
    mask_of,
    site_weight,
    weighted_likelihood,
    weighted_prior,
)
from numpyro_ensemble.handlers import is_zero, unwrapped


class Site(NamedTuple):
    """A process and its values, from which functions are drawn.

    Attributes:
        process: the process, at its inputs.
        values: values at these inputs, `(*copies, N)`.
        observed: whether the values are observations.
    """

    process: Process
    values: jax.Array
    observed: bool

    @property
    def noisy(self) -> bool:
        """Whether the values have noise; the function is then a site of its own, `{name}_f`."""
        noise = self.process.noise
        return self.observed or not (jnp.ndim(noise) == 0 and is_zero(noise))

    @property
    def copies(self) -> tuple[int, ...]:
        """Shape of independent copies, from plates and `expand`."""
        return self.values.shape[:-1]

    def flat(self) -> jax.Array:
        """Return the values, one row for each copy."""
        return self.values.reshape(-1, self.values.shape[-1])

    def centred(self) -> Site:
        """Return the site without its mean: a call adds its own mean."""
        process = copy.copy(self.process)
        process.mean_fn = None
        mean = jnp.broadcast_to(self.process.mean, self.values.shape)
        return self._replace(process=process, values=self.values - mean)


def is_transformed(fn: Any) -> bool:
    """Return whether a distribution transforms a process, so that its values are not Gaussian."""
    fn = unwrapped(fn)
    return isinstance(fn, dist.TransformedDistribution) and isinstance(
        unwrapped(fn.base_dist), Process
    )


class _Gather(Messenger):
    """Collect the processes of a model, and the names of latents without a value."""

    def __init__(self, rows: KnownRows, known: Collection[str]) -> None:
        super().__init__(rows)
        self.known = known
        self.sites: dict[str, Site] = {}
        self.unknown: list[str] = []
        self.unfitted: list[str] = []
        self.rows = rows
        self.observed: dict[str, Any] = {}  # values of other observed sites
        self.inside: dict[str, set[str]] = {}  # plates around each latent process
        self.parts: list[dict[str, Any]] | None = None  # sites inside of an announced process

    def dependents(self) -> Dependents:
        """Return what may depend on the rows of plates."""
        of_sites = {
            name: jax.tree.leaves((site.process, site.values)) for name, site in self.sites.items()
        }
        return Dependents(of_sites, self.observed)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Record latents and parameters without a value, and refuse transformed processes."""
        if msg["type"] == "gp":
            self.parts = []
        if msg["type"] == "param" and msg["value"] is None:
            self.unfitted.append(msg["name"])
        if msg["type"] != "sample":
            return
        if is_transformed(msg["fn"]):
            raise ValueError(
                f"the site {msg['name']!r} transforms a Gaussian process. Sample the process "
                f"itself, and transform its values in the model."
            )
        # a site that a scan has drawn already has a value
        drawn = msg.get("_control_flow_done") and not msg["is_observed"]
        missing = msg["value"] is None or (drawn and msg["name"] not in self.known)
        if missing and not msg["infer"].get("is_auxiliary"):
            self.unknown.append(msg["name"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Store the process of a site, or its value."""
        name = msg.get("name", "")
        if msg["type"] == "gp":
            name = name.removesuffix(SUFFIX)
            parts, self.parts = self.parts or [], None
            process = self._weighted(name, msg["gp"], parts) if msg["whitened"] else msg["gp"]
            site = Site(process, msg["value"], False)
            self.inside[name] = set().union(*map(self._plates_around, parts))
            inner = self.sites.get(f"{name}_u")
            if inner is not None and inner.process is msg["gp"]:  # found twice, if not whitened
                del self.sites[f"{name}_u"]
        elif msg["type"] == "sample" and isinstance(unwrapped(msg["fn"]), Process):
            site = self._sampled(msg, unwrapped(msg["fn"]))
        else:
            if msg["type"] == "sample" and msg["is_observed"]:
                self.observed[name] = msg["value"]
            elif msg["type"] == "sample":
                _check_shape(name, jnp.shape(msg["value"]), msg["fn"])
                if self.parts is not None:
                    self.parts.append(msg)
            return
        if name in self.sites:
            raise ValueError(f"the model has two Gaussian processes of the name {name!r}.")
        self.sites[name] = site

    def _sampled(self, msg: dict[str, Any], process: Process) -> Site:
        name, value = msg["name"], msg["value"]
        if name.endswith(("_observed", "_unobserved")):  # sites of obs_mask=
            raise ValueError(
                f"{name!r}: a Gaussian process takes no obs_mask. Give GaussianProcess(..., "
                f"observed=mask), or handlers.mask."
            )
        if jnp.shape(value)[-1:] != (len(process.X),):
            raise ValueError(
                f"{name!r} has values of shape {jnp.shape(value)}, and its process "
                f"{len(process.X)} inputs: values take shape (..., {len(process.X)})."
            )
        try:
            check_copies(msg["fn"].batch_shape, process.event_shape, jnp.shape(value))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        if msg["is_observed"] and name in self.known:
            raise ValueError(
                f"the samples and the data both have values of {name!r}: leave {name!r} out of the "
                f"samples, or leave the data out of the call."
            )
        if msg["is_observed"]:
            check_values(f"{name!r}", value, process.observed)
            weight = site_weight(msg, self.rows.sizes)
            process = weighted_likelihood(name, _masked(name, msg["fn"], process), weight)
        elif self.parts is None:
            process = self._weighted(name, process, [msg])
            self.inside[name] = self._plates_around(msg)
        else:  # inducing values that are not whitened
            self.parts.append(msg)
        return Site(process, jnp.asarray(value), bool(msg["is_observed"]))

    def _weighted(self, name: str, process: Process, parts: list[dict[str, Any]]) -> Process:
        """Return a process whose prior has the weights of its sites."""
        weights = [(site_weight(msg, self.rows.sizes), mask_of(msg["fn"])) for msg in parts]
        return weighted_prior(name, process, weights)

    def _plates_around(self, msg: dict[str, Any]) -> set[str]:
        """Return the plates that a site stands in."""
        around = (plate_of(frame.name, self.rows.sizes) for frame in msg["cond_indep_stack"])
        return {plate for plate in around if plate is not None}


def _masked(name: str, fn: dist.Distribution, process: Process) -> Process:
    """Return a process without the observations that a mask around it leaves out."""
    while not isinstance(fn, Process):
        mask = getattr(fn, "_mask", True)
        if jnp.ndim(mask):
            raise ValueError(
                f"{name!r} has a mask {jnp.shape(mask)} of its copies. Mask observations, by "
                f"GaussianProcess(..., observed=), or leave the copies out."
            )
        if mask is not True:
            process = process.where(mask)
        fn = fn.base_dist
    return process


def _check_shape(name: str, shape: tuple[int, ...], fn: dist.Distribution) -> None:
    expected = (*fn.batch_shape, *fn.event_shape)
    if shape != expected:
        raise ValueError(
            f"one sample of {name!r} has shape {shape}, and the model's site has {expected} with "
            f"these arguments: batch_ndims says how many axes of the samples lead, and the "
            f"arguments are those of the fit."
        )


def gather_sites(
    model: Callable, known: Mapping[str, Any], args: tuple, kwargs: dict, moved: str | None = None
) -> _Gather:
    """Run a model on one posterior draw; return its processes, and the names without a value.

    A subsampled plate takes its first rows. The plate with the name `moved` takes its last rows.
    """
    gather = _Gather(KnownRows(filled(model, known), moved), known)
    with handlers.seed(rng_seed=jax.random.key(0)):
        gather(*args, **kwargs)
    return gather


class EvaluatePaths(Messenger):
    """Replace each process by the values of a function at its inputs in this call.

    Args:
        fn: the model.
        functions: functions by process, from inputs `(N, D)` to values `(*copies, N)` without the
            mean.
        sites: the processes of the fit.
        rng_key: key of the noise of observations; each input has its own noise.
        before: how often each input occurred in the earlier blocks of the call, by process.

    Attributes:
        values: values of the processes, by site name.
        inputs: inputs of each process in this call.
        means: mean of each process at these inputs.
        noises: variances of the noise at these inputs, for each process with noise.
        finite: whether all inputs of each process are finite.
    """

    def __init__(
        self,
        fn: Callable,
        functions: Mapping[str, Callable[[jax.Array], jax.Array]],
        sites: Mapping[str, Site],
        rng_key: jax.Array,
        before: Mapping[str, jax.Array] = MappingProxyType({}),
    ) -> None:
        super().__init__(fn)
        self.before = before
        self.functions, self.sites, self.rng_key = functions, sites, rng_key
        self.values: dict[str, jax.Array] = {}
        self.inputs: dict[str, jax.Array] = {}
        self.means: dict[str, jax.Array] = {}
        self.noises: dict[str, jax.Array] = {}
        self.finite: dict[str, jax.Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the value of a process."""
        name = msg.get("name", "")
        if msg["type"] == "gp":
            name = name.removesuffix(SUFFIX)
            msg["value"] = self._value(name, msg["gp"], msg["at"], msg["copies"])
            msg["answered"] = True
        elif msg["type"] == "sample" and isinstance(unwrapped(msg["fn"]), Process):
            if msg["is_observed"]:
                raise ValueError(
                    f"the Gaussian process {name!r} is observed in this call: let the model take "
                    f"y=None, and leave the data out."
                )
            process = unwrapped(msg["fn"])
            msg["value"] = self._value(name, process, process.X, msg["fn"].batch_shape)

    def _value(self, name: str, process: Process, X: jax.Array, copies: tuple) -> jax.Array:
        """Return the function at the inputs, with noise if the process has any."""
        value = self._function(name, X, copies)
        self.means[name] = process.kernel.mean_at(process.mean_fn, X)
        value = value + jnp.broadcast_to(self.means[name], value.shape)
        if self.sites[name].noisy:
            self.values[f"{name}_f"] = value
            self.noises[name] = jnp.broadcast_to(process.variances, (len(X),))
            self.rng_key, key = jax.random.split(self.rng_key)
            sd = jnp.broadcast_to(jnp.sqrt(process.variances), value.shape)
            value = value + sd * normal_at(key, X, copies, value.dtype, self.before.get(name))
        self.values[name] = value
        return value

    def _function(self, name: str, X: jax.Array, copies: tuple) -> jax.Array:
        if name not in self.functions:
            raise ValueError(
                f"the model has a Gaussian process {name!r} in this call, and had "
                f"{sorted(self.functions)} with the arguments of the fit."
            )
        site = self.sites[name]
        if copies != site.copies:
            raise ValueError(
                f"{name!r} has {copies} copies in this call, and had {site.copies} in the fit: "
                f"plates of processes keep their size."
            )

        self.inputs[name] = X
        self.finite[name] = jnp.isfinite(X).all()
        return self.functions[name](X)
