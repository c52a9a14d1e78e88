"""Repulsion between members: the user's options, and the place of a member."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ensemble.calls.arguments import has_tracers
from numpyro_ensemble.calls.tracing import VALUES_WANTED
from numpyro_ensemble.density import fill_model
from numpyro_ensemble.handlers import check_schedule, check_weight, is_zero, weight_at
from numpyro_ensemble.primitives import is_inexact

_KERNELS, _METHODS = ("rbf",), ("svgd", "wgd")


@dataclass(frozen=True, eq=False, kw_only=True)
class Repulsion:
    """How the members of an `EnsembleMAP` push each other apart.

    Members repel by their parameters, or by the values of a function: of a `site` of the model at
    some `inputs`, or of any `function`. A step computes one gradient of each member, and the forces
    between all pairs. With `weight=1`, members that repel by their parameters approximate draws of
    the posterior; other weights are temperatures, for the posterior to the power `1 / weight`.

    Attributes:
        weight: of the forces, a number or a function of the optimiser's step. A Python 0 is a fit
            without repulsion.
        kernel: how forces fall with the distance: "rbf" is `exp(-distance**2 / bandwidth)`.
        method: "svgd" (Liu and Wang 2016): each member follows the gradients of all, weighed by the
            kernel and divided by the number of members, as in `numpyro.contrib.einstein.SVGD`.
            "wgd" (D'Angelo and Fortuin 2021): each member follows its own gradient, less the slope
            of the log of the kernel density estimate of all members. None is "wgd" with `site` or
            `function`, and "svgd" otherwise.
        bandwidth: of the kernel; None is NumPyro's rule, the squared median of all distances over
            the logarithm of the number of members, at each step.
        site: a deterministic site of the model, a latent, or an observed one, whose mean is taken.
        inputs: the model's arguments for `site`: an array, a tuple of positional ones, or a
            dictionary of named ones.
        function: takes one member's parameters, in the form of `result.params`, and returns an
            array.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range, or arguments do not go together.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsembleMAP, Repulsion
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> optim = numpyro.optim.Adam(0.05)
        >>> runner = EnsembleMAP(model, optim, ensemble_size=20, repulsion=Repulsion())
        >>> result = runner.run(jax.random.key(0), 1000, jnp.ones(3), progress_bar=False)
        >>> print(f"{result.params['mu'].mean():.2f} {result.params['mu'].std():.1f}")
        0.75 0.5
    """

    weight: ArrayLike | Callable = 1.0
    kernel: str = "rbf"
    method: str | None = None
    bandwidth: float | None = None
    site: str | None = None
    inputs: Any = None
    function: Callable | None = None

    def __post_init__(self) -> None:
        if not callable(self.weight):
            check_weight("Repulsion's weight", self.weight)
        for name, value, known in (
            ("kernel", self.kernel, _KERNELS),
            ("method", self.method, (None, *_METHODS)),
        ):
            if value not in known:
                choices = " or ".join(repr(choice) for choice in known if choice)
                raise ValueError(f"Repulsion's {name} takes {choices}, got {value!r}.")
        width = self.bandwidth
        if width is not None and not (
            isinstance(width, int | float | np.number)
            and not isinstance(width, bool)
            and math.isfinite(width)
            and width > 0
        ):
            raise ValueError(
                f"Repulsion's bandwidth takes a positive number, a squared distance, or None for "
                f"the rule of the median; got {width!r}."
            )
        self._check_function_space()

    def _check_function_space(self) -> None:
        if self.site is not None and not isinstance(self.site, str):
            raise TypeError(f"Repulsion's site takes the name of a site, got {self.site!r}.")
        if self.function is not None and not callable(self.function):
            raise TypeError(f"Repulsion's function takes a callable, got {self.function!r}.")
        if self.site is not None and self.function is not None:
            raise ValueError("Repulsion takes either site, with inputs, or function; not both.")
        if (self.site is None) != (self.inputs is None):
            given, lacks = ("inputs", "site") if self.site is None else ("site", "inputs")
            raise ValueError(
                f"Repulsion's {given} was given without {lacks}: site= names what is compared, and "
                f"inputs= are the model's arguments where it is, site='f', inputs=x_grid say."
            )
        if self.in_function_space and self.method == "svgd":
            raise ValueError(
                "method='svgd' does not go with site or function: it would need the "
                "Jacobian of every member's function for every pair. Leave method out, which is "
                "'wgd' there."
            )

    @property
    def in_function_space(self) -> bool:
        """Whether members repel by values of a function, and not by their parameters."""
        return self.site is not None or self.function is not None

    @property
    def mixes_gradients(self) -> bool:
        """Whether each member follows the gradients of all."""
        return self.method == "svgd" or (self.method is None and not self.in_function_space)

    @property
    def is_off(self) -> bool:
        """Whether the weight is known to be 0."""
        return not callable(self.weight) and is_zero(self.weight)

    def check_size(self, ensemble_size: int) -> None:
        """Raise a ValueError if there is only one member."""
        if ensemble_size < 2:
            raise ValueError(
                f"repulsion is between members, and there is one: ensemble_size={ensemble_size}. "
                f"Take 2 or more, or leave repulsion out."
            )

    def check_run(self, first: int, num_steps: int) -> None:
        """Raise a ValueError where a schedule of the weight turns negative in a run."""
        check_schedule("Repulsion's weight", self.weight, first, num_steps)

    def weight_at(self, step: Any) -> jax.Array:
        """Return the weight of the forces at a step of the optimiser."""
        return jnp.asarray(weight_at("Repulsion's weight", self.weight, step), float)

    # Where a member is --------------------------------------------------------------------------

    def outputs(self, model: Callable, params: dict[str, Any], mutable: dict[str, Any]) -> Any:
        """Return the values by which one member is compared with others.

        Args:
            model: the model.
            params: the member's parameters, as users see them.
            mutable: its mutable state.
        """
        if self.function is not None:
            values, what = self.function(params), "Repulsion's function"
        else:
            values, what = self._site_values(model, {**params, **mutable}), f"site {self.site!r}"
        leaves = jax.tree.leaves(values)
        real = all(is_inexact(leaf) and not jnp.iscomplexobj(leaf) for leaf in leaves)
        if not real or not sum(map(jnp.size, leaves)):
            form = [
                f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
                for leaf in leaves
            ]
            raise ValueError(
                f"{what} must return arrays of real numbers, by which members are compared; it "
                f"returns {', '.join(form) or 'none'}."
            )
        return values

    def _site_values(self, model: Callable, known: dict[str, Any]) -> Any:
        args, kwargs = (), {}
        if isinstance(self.inputs, dict):
            kwargs = self.inputs
        else:
            args = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        try:
            trace = fill_model(model, jax.random.key(0), known, args, kwargs)
        except VALUES_WANTED:
            raise
        except Exception as error:
            shapes = [f"{np.shape(leaf)}" for leaf in jax.tree.leaves((args, kwargs))]
            raise ValueError(
                f"the model fails at Repulsion's inputs, of shapes {', '.join(shapes)}: "
                f"{str(error).rstrip('.')}. Latents of single rows have no values at other rows. "
                f"inputs= takes the model's arguments as in a prediction: an array, a tuple of "
                f"positional ones, or a dictionary of named ones."
            ) from error
        if self.site not in trace or trace[self.site]["type"] == "plate":
            names = [name for name, site in trace.items() if site["type"] != "plate"]
            raise ValueError(
                f"Repulsion's site {self.site!r} is no site of the model at these inputs, which "
                f"has {names}."
            )
        site = trace[self.site]
        if site["type"] != "sample" or self.site in known:
            return site["value"]
        mean = None
        with contextlib.suppress(NotImplementedError), jax.ensure_compile_time_eval():
            mean = site["fn"].mean  # NumPyro's means are constants, or NaN, where there is none
        if mean is None or not (has_tracers(mean) or np.isfinite(mean).all()):
            raise ValueError(
                f"Repulsion's site {self.site!r} ({type(site['fn']).__name__}) has no mean: name "
                f"what it depends on, a numpyro.deterministic site of the model."
            )
        return mean
