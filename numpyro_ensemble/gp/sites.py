"""The Gaussian processes of a model: found in its trace, and answered at other inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ensemble.draws import filled
from numpyro_ensemble.gp.distribution import Process
from numpyro_ensemble.gp.whiten import SUFFIX
from numpyro_ensemble.handlers import is_zero, unwrapped


class Site(NamedTuple):
    """What the functions of one process are drawn from.

    Attributes:
        process: the process, at its inputs.
        values: at these inputs, `(*copies, N)`.
        observed: whether the values are observations.
        at: the inputs that the model works on.
    """

    process: Process
    values: jax.Array
    observed: bool
    at: jax.Array

    @property
    def copies(self) -> tuple[int, ...]:
        """Shape of independent copies, by plates and `expand`."""
        return self.values.shape[:-1]

    def flat(self) -> jax.Array:
        """Return the values, one row for each copy."""
        return self.values.reshape(-1, self.values.shape[-1])


def is_transformed(fn: Any) -> bool:
    """Say whether a distribution transforms a process, so that its values are no Gaussian's."""
    fn = unwrapped(fn)
    return isinstance(fn, dist.TransformedDistribution) and isinstance(
        unwrapped(fn.base_dist), Process
    )


class _Gather(Messenger):
    """Collect the processes of a model, and the names of latents that nothing is known of."""

    def __init__(self, fn: Callable) -> None:
        super().__init__(fn)
        self.sites: dict[str, Site] = {}
        self.unknown: list[str] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        """Note latents without a value, and refuse processes that are transformed."""
        if msg["type"] != "sample":
            return
        if is_transformed(msg["fn"]):
            raise ValueError(
                f"the site {msg['name']!r} transforms a Gaussian process. Sample the process "
                f"itself, and transform its values in the model."
            )
        if msg["value"] is None and not msg["infer"].get("is_auxiliary"):
            self.unknown.append(msg["name"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Keep what is needed of a process."""
        name = msg.get("name", "")
        if msg["type"] == "gp":
            name = name.removesuffix(SUFFIX)
            site = Site(msg["gp"], msg["value"], False, msg["at"])
        elif msg["type"] == "sample" and isinstance(unwrapped(msg["fn"]), Process):
            process = unwrapped(msg["fn"])
            site = Site(process, jnp.asarray(msg["value"]), bool(msg["is_observed"]), process.X)
        else:
            return
        if name in self.sites:
            raise ValueError(f"the model has two Gaussian processes of the name {name!r}.")
        self.sites[name] = site


def find_sites(
    model: Callable, known: Mapping[str, Any], args: tuple, kwargs: dict
) -> tuple[dict[str, Site], list[str]]:
    """Run a model on one posterior draw; return its processes, and unknown latents' names."""
    gather = _Gather(filled(model, known))
    with handlers.seed(rng_seed=jax.random.key(0)):
        gather(*args, **kwargs)
    return gather.sites, gather.unknown


class Answer(Messenger):
    """Give each process the values of a function at the inputs the model has for it now.

    Args:
        fn: the model.
        functions: by name, from inputs `(N, D)` to values `(*copies, N)`.
        sites: the processes as they were found.
        rng_key: of the noise of observations, None to add none.
    """

    def __init__(
        self,
        fn: Callable,
        functions: Mapping[str, Callable[[jax.Array], jax.Array]],
        sites: Mapping[str, Site],
        rng_key: jax.Array | None,
    ) -> None:
        super().__init__(fn)
        self.functions, self.sites, self.rng_key = functions, sites, rng_key
        self.values: dict[str, jax.Array] = {}
        self.stayed: dict[str, jax.Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the value of a process."""
        if msg["type"] == "gp":
            name = msg["name"].removesuffix(SUFFIX)
            msg["value"] = self.values[name] = self._function(name, msg["at"])
            msg["answered"] = True
        elif msg["type"] == "sample" and isinstance(unwrapped(msg["fn"]), Process):
            self._sample(msg, unwrapped(msg["fn"]))

    def _sample(self, msg: dict[str, Any], process: Process) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            raise ValueError(
                f"the Gaussian process {name!r} is observed in this call: let the model take "
                f"y=None, and leave the data out."
            )
        value = self._function(name, process.X)
        silent = jnp.ndim(process.noise) == 0 and is_zero(process.noise)
        noisy = self.sites[name].observed or not silent
        if noisy:
            self.values[f"{name}_f"] = value
            if self.rng_key is not None:
                self.rng_key, key = jax.random.split(self.rng_key)
                sd = jnp.broadcast_to(jnp.sqrt(process.variances), value.shape)
                value = value + sd * jax.random.normal(key, value.shape, value.dtype)
        msg["value"] = self.values[name] = value

    def _function(self, name: str, X: jax.Array) -> jax.Array:
        if name not in self.functions:
            raise ValueError(
                f"the model has a Gaussian process {name!r} in this call, and had "
                f"{sorted(self.functions)} with the arguments of the fit."
            )
        before = self.sites[name].at
        same = (X == before).all() if X.shape == before.shape else False
        self.stayed[name] = jnp.asarray(same)
        return self.functions[name](X)
