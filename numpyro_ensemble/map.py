"""Ensembles of MAP estimates: the engine with a point guide."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpyro
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.infer import Trace_ELBO, init_to_uniform

from numpyro_ensemble.enumeration import PRIOR, SummedOut
from numpyro_ensemble.fit.ensemble import Ensemble
from numpyro_ensemble.fit.minimisers import default_minimiser
from numpyro_ensemble.fit.optimisers import choose_optimizer
from numpyro_ensemble.fit.point_guide import PointGuide
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.fit.repulsion import Repulsion
from numpyro_ensemble.fit.state import GuideValues
from numpyro_ensemble.fit.sums import check_sums
from numpyro_ensemble.handlers import check_weight, reweight
from numpyro_ensemble.primitives import combine, density_parts, partition, stack_members
from numpyro_ensemble.results import EnsembleResult


@dataclass(frozen=True, eq=False)
class MAPProblem(Problem):
    """The fit of a point guide, which finds a mode.

    Attributes:
        init_loc_fn: the strategy by which latents start.
        jacobian: whether the density is that over the unconstrained latents; None is True only
            with repulsion.
    """

    init_loc_fn: Callable = init_to_uniform
    jacobian: bool | None = None

    @property
    def with_jacobian(self) -> bool:
        """Whether the density is that of the unconstrained latents."""
        return self.repels if self.jacobian is None else self.jacobian

    @property
    def finds_modes(self) -> bool:
        """Whether a fit ends where a gradient is zero."""
        return not self.repels

    @property
    def sums_out(self) -> bool:
        """Whether discrete latents are summed out."""
        return True

    def fresh_guide(self, init_params: dict | None, sites: dict) -> tuple[Callable, dict | None]:
        """Return a new point guide with the starts of latents, and the rest for `SVI.init`."""
        given = dict(init_params or {})
        latents = {k: given.pop(k) for k in list(given) if sites[k].kind == "latent"}
        guide = PointGuide(
            self.model,
            init_loc_fn=self.init_loc_fn,
            jacobian=self.with_jacobian,
            init_values=latents,
            sums=any(site.kind == "discrete" for site in sites.values()),
        )
        return guide, given or None

    def summed_model(self, guide: Any) -> Callable:
        """Return the model, without its discrete latents where a guide says that it has some."""
        return SummedOut(self.model, self.prior_sites) if guide.sums else self.model

    def weighted(self, guide: Any, scale: float, step: Any) -> tuple[Callable, Callable]:
        """Return the model, its prior and likelihood weighted, and the guide."""
        if not guide.sums:
            return super().weighted(guide, scale, step)
        model, sites = self.summed_model(guide), (PRIOR,)
        return reweight(model, prior=self.prior_weight, likelihood=scale, prior_sites=sites), guide

    def distilled_guide(self, guide: Callable, tracer: type) -> tuple[Callable, GuideValues]:
        """Return the structure of the point guide alone."""
        return guide.distilled(), GuideValues([], [], [])  # type: ignore[attr-defined]

    def current_guide(self, guide: Any) -> Any:
        """Return the point guide with the runner's model and objective."""
        guide = copy.copy(guide)
        guide.model, guide.jacobian = self.model, self.with_jacobian
        return guide

    def constrains_with_arguments(self, guide: Any) -> bool:
        """Return whether a support depends on other latents, and so on the model's arguments."""
        return any(point.transform is None for point in guide.points.values())

    def member_params(self, guide: Any, params: dict, args: tuple, kwargs: dict) -> dict:
        """Return constrained values by site name."""
        return guide.constrained(params, args, kwargs)

    def check_run(self, first: int, num_steps: int) -> None:
        """Raise a ValueError where the weight of the repulsion turns negative in a run."""
        if self.repels:
            self.repulsion.check_run(first, num_steps)

    def check_model(self, sites: dict) -> None:
        """Raise a ValueError for a discrete latent, or where there is nothing to fit."""
        if not any(site.kind in ("latent", "discrete", "param") for site in sites.values()):
            raise ValueError(
                "the model has no latent site and no parameter, so that there is nothing to fit."
                + self.hint
            )
        check_sums(sites)


class EnsembleMAP(Ensemble):
    """An ensemble of MAP estimates of one NumPyro model, for about the price of one fit.

    Each member finds a mode of the model's density over constrained latents, by steps in
    unconstrained space. Member e is the fit that `SVI` with
    `AutoDelta(model, init_loc_fn=init_to_uniform)` makes with key e. Parameters
    (`numpyro.param`), neural network modules and mutable state of the model train too.
    `result.params` holds the constrained values by site name.

    Args:
        model: a NumPyro model. Discrete latents that are marked
            `infer={"enumerate": "parallel"}` are summed out, as part of the likelihood.
        optim: a `numpyro.optim` or optax optimiser, or a minimiser of optimistix; L-BFGS,
            `optimistix.LBFGS(rtol=1e-8, atol=1e-8)`, where none is given.
        ensemble_size: number of members E.
        member_batch_size: how many members are computed at once, on each device, to bound memory;
            all of them by default.
        mesh: devices that members are spread over: "all", or a `jax.sharding.Mesh` with an axis
            "member". Rows of the data are spread over an axis "data", if there is one.
        prior_weight: weight of the prior; 1 is MAP, a Python 0 is maximum likelihood.
        init_loc_fn: a NumPyro initialisation strategy, `init_to_uniform(radius=0.5)` say.
        jacobian: whether the density is that over unconstrained latents. None is False, and True
            with `repulsion`, since members then approximate the posterior.
        repulsion: a `Repulsion`: members push each other apart, and are no longer single runs.
            It needs an optimiser that follows a gradient, Adam for example.
        prior_sites: names of `numpyro.factor` sites that belong to the prior.
        likelihood_sites: names of `factor` sites that may be rescaled with the batches.

    Raises:
        TypeError: if an argument is of the wrong kind, the optimiser for example.
        ValueError: if `ensemble_size` or `prior_weight` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ensemble import EnsembleMAP
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> runner = EnsembleMAP(model, numpyro.optim.Adam(0.1), ensemble_size=3)
        >>> result = runner.run(jax.random.key(0), 300, jnp.ones(3), progress_bar=False)
        >>> print(result.params["mu"].round(2))
        [0.75 0.75 0.75]
    """

    kind = MAPProblem
    raw = False  # of a density instead of a model
    hint = (
        " A density (params, *data) -> (log_likelihood, log_prior) goes to "
        "EnsembleMAP.from_log_joint or ensemble_map."
    )

    def __init__(
        self,
        model: Callable,
        optim: Any = None,
        *,
        ensemble_size: int = 16,
        member_batch_size: int | None = None,
        mesh: Any = None,
        prior_weight: ArrayLike = 1.0,
        init_loc_fn: Callable = init_to_uniform,
        jacobian: bool | None = None,
        repulsion: Repulsion | None = None,
        prior_sites: Collection[str] = (),
        likelihood_sites: Collection[str] = (),
    ) -> None:
        self.prior_weight = prior_weight
        self.init_loc_fn, self.jacobian = init_loc_fn, jacobian
        self.repulsion = repulsion
        super().__init__(
            model,
            PointGuide(model, init_loc_fn=init_loc_fn),
            default_minimiser() if optim is None else optim,
            Trace_ELBO(),
            ensemble_size=ensemble_size,
            member_batch_size=member_batch_size,
            mesh=mesh,
            prior_sites=prior_sites,
            likelihood_sites=likelihood_sites,
        )

    def checked_setting(self, name: str, value: Any) -> Any:
        """Return the value that a setting takes."""
        if name == "prior_weight":
            return check_weight(name, value)
        if name == "init_loc_fn" and not callable(value):
            raise TypeError(f"init_loc_fn takes a NumPyro strategy, got {value!r}.")
        if name == "repulsion" and not isinstance(value, Repulsion | None):
            raise TypeError(
                f"repulsion takes a Repulsion, Repulsion(weight=1.0) say; got {value!r}."
            )
        return super().checked_setting(name, value)

    @classmethod
    def from_log_joint(
        cls, log_joint: Callable, init_fn: Callable, optim: Any = None, **options: Any
    ) -> EnsembleMAP:
        """Fit a raw density instead of a model.

        Args:
            log_joint: `(params, *args, **kwargs) -> (log_likelihood, log_prior)`.
            init_fn: makes one member's parameters, any pytree, from its key.
            optim: an optimiser, as for the class.
            **options: as for the class.

        Returns:
            A runner whose `run` takes the arguments of the density after `params`. Its
            `result.params` and `init_params` are stacked members. Member e starts at
            `init_fn(keys[e])`. Leaves that are not arrays of real numbers are shared and not
            trained.

        Example:
            >>> import jax, numpyro
            >>> from numpyro_ensemble import EnsembleMAP
            >>> runner = EnsembleMAP.from_log_joint(
            ...     lambda w, y: (-((y - w) ** 2).sum(), -(w**2)),
            ...     lambda key: jax.random.normal(key), numpyro.optim.Adam(0.1), ensemble_size=2)
            >>> result = runner.run(jax.random.key(0), 200, jax.numpy.ones(3), progress_bar=False)
            >>> print(result.params.round(2))
            [0.75 0.75]
        """
        return _RawMAP(log_joint, init_fn, optim, **options)


class _RawMAP(EnsembleMAP):
    """The engine on a raw density, written as a model of one parameter and two factors."""

    data_sites = ("log_likelihood",)
    raw = True

    def __init__(self, log_joint: Callable, init_fn: Callable, optim: Any, **options: Any) -> None:
        self._init_fn = init_fn
        # shared leaves are those of one member; only the shapes of its arrays count
        self._shared = shared = partition(stack_members(init_fn, jax.random.key(0)[None]))[1]

        def model(*args: Any, **kwargs: Any) -> None:
            arrays = numpyro.param("params", lambda key: partition(init_fn(key))[0])
            with handlers.block():  # hides the sites of a density that was made from a model
                returned = log_joint(combine(arrays, shared), *args, **kwargs)
            log_likelihood, log_prior = density_parts(returned)
            numpyro.factor("log_likelihood", log_likelihood)
            numpyro.factor("log_prior", log_prior)

        with contextlib.suppress(TypeError, ValueError):  # errors name the density's arguments
            first, *rest = inspect.signature(log_joint).parameters.values()
            model.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
        taken = sorted(options.keys() & {"prior_sites", "likelihood_sites"})
        if taken:
            raise TypeError(f"from_log_joint takes no {taken[0]}: log_joint says which is which.")
        options |= {"likelihood_sites": ("log_likelihood",), "prior_sites": ("log_prior",)}
        super().__init__(model, optim, **options)

    def problem(self) -> Problem:
        """Describe what is fitted; a function by which members repel takes whole members."""
        problem = super().problem()
        repulsion, shared = problem.repulsion, self._shared
        if repulsion is None or not repulsion.in_function_space:
            return problem
        function = repulsion.function
        if function is None:
            raise ValueError(
                f"Repulsion's site {repulsion.site!r}: a density has no sites. Pass "
                f"function=, a callable of one member's parameters."
            )

        def of_whole(params: dict[str, Any]) -> Any:
            return function(combine(params["params"], shared))

        return replace(problem, repulsion=replace(repulsion, function=of_whole))

    def _starts(self, init_params: Any) -> Any:
        if init_params is None or callable(init_params):
            make = init_params or self._init_fn
            return lambda key: {"params": partition(make(key))[0]}
        return {"params": partition(init_params)[0]}

    def _whole(self, params: dict[str, Any]) -> Any:
        return combine(params["params"], self._shared)

    def init(self, rng_key: jax.Array, *args: Any, init_params: Any = None, **kwargs: Any) -> Any:
        return super().init(rng_key, *args, init_params=self._starts(init_params), **kwargs)

    def get_params(self, state: Any) -> Any:
        return self._whole(super().get_params(state))

    def run(
        self, rng_key: jax.Array, num_steps: int, *args: Any, init_params: Any = None, **kwargs: Any
    ) -> EnsembleResult:
        if kwargs.get("init_state") is None or init_params is not None:
            init_params = self._starts(init_params)
        result = super().run(rng_key, num_steps, *args, init_params=init_params, **kwargs)
        whole = result._replace(params=self._whole(result.params))
        vars(whole).update(vars(result))
        return whole


def ensemble_map(
    log_joint: Callable,
    init_fn: Callable,
    *,
    ensemble_size: int,
    num_steps: int,
    data: Any,
    rng_key: jax.Array,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    prior_weight: ArrayLike = 1.0,
    optimizer: Any = None,
) -> tuple[Any, jax.Array]:
    """Fit an ensemble of MAP estimates of a raw density in one call.

    Args:
        log_joint: `(params, *data) -> (log_likelihood, log_prior)`.
        init_fn: makes one member, any pytree, from a key.
        ensemble_size: number of members E.
        num_steps: number of optimisation steps.
        data: a tuple of arrays, passed on to `log_joint`; a single array counts as one.
        rng_key: one key, split into E, or E keys: member e starts at `init_fn(keys[e])`.
        batch_size: rows in a batch; the likelihood is rescaled by `N / |B|`.
        learning_rate: of Adam, 5e-3 if neither this nor `optimizer` is given.
        prior_weight: weight of the prior; a Python 0 drops it exactly.
        optimizer: a `numpyro.optim` or optax optimiser.

    Returns:
        The stacked members and the losses `(E, num_steps)`.

    Raises:
        ValueError: if both `learning_rate` and `optimizer` are given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_ensemble import ensemble_map
        >>> params, losses = ensemble_map(
        ...     lambda w, y: (-((y - w) ** 2).sum(), -(w**2)), jax.random.normal,
        ...     ensemble_size=2, num_steps=200, data=(jnp.ones(3),), rng_key=jax.random.key(0),
        ...     learning_rate=0.1)
        >>> print(params.round(2), losses.shape)
        [0.75 0.75] (2, 200)
    """
    optimizer = choose_optimizer(optimizer, learning_rate)
    data = data if isinstance(data, tuple | list) else (data,)
    runner = EnsembleMAP.from_log_joint(
        log_joint, init_fn, optimizer, ensemble_size=ensemble_size, prior_weight=prior_weight
    )
    result = runner.run(rng_key, num_steps, *data, batch_size=batch_size, progress_bar=False)
    return result.params, result.losses
