"""Ensembles of variational fits: `numpyro.infer.SVI` for many members."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation

from numpyro_ensemble.calls.arguments import arrange, has_tracers
from numpyro_ensemble.calls.identity import closure_fingerprint, may_differ
from numpyro_ensemble.calls.keywords import checked_keywords
from numpyro_ensemble.calls.programs import Programs
from numpyro_ensemble.calls.tracing import NUMPY_WANTED
from numpyro_ensemble.fit.batches import first_member
from numpyro_ensemble.fit.checks import looks_at
from numpyro_ensemble.fit.ensemble import Ensemble
from numpyro_ensemble.fit.guides import is_set_up
from numpyro_ensemble.fit.member_guides import MemberGuides, check_members
from numpyro_ensemble.fit.optimisers import choose_optimizer
from numpyro_ensemble.fit.problem import Problem
from numpyro_ensemble.fit.setup import SetupTemplate
from numpyro_ensemble.fit.state import GuideValues, check_size, setup_of
from numpyro_ensemble.handlers import (
    check_count,
    check_schedule,
    check_weight,
    one_key,
    reweight,
    weight_at,
)
from numpyro_ensemble.results import EnsembleResult


@dataclass(frozen=True, eq=False)
class VIProblem(Problem):
    """A variational fit whose divergence has a weight, `kl_weight`."""

    kl_weight: Any = 1.0

    @property
    def tempered(self) -> bool:
        """Whether the weight of the divergence is not 1."""
        return callable(self.kl_weight) or bool(self.kl_weight != 1.0)

    def weighted(self, guide: Callable, scale: float, step: Any) -> tuple[Callable, Callable]:
        """Return the model and the guide, weighted for one step of one member."""
        weight = weight_at("kl_weight", self.kl_weight, step)
        if self.tempered:
            guide = reweight(guide, prior=weight, likelihood=weight)
        return self.reweighted(weight, scale), guide

    def check_model(self, sites: dict) -> None:
        """Raise a ValueError for enumerated sites with a `kl_weight` other than 1."""
        if self.tempered and isinstance(self.loss, TraceEnum_ELBO):
            discrete = [site.name for site in sites.values() if site.kind == "discrete"]
            if discrete:
                raise ValueError(
                    f"kl_weight={self.kl_weight} does not go with TraceEnum_ELBO, which sums over "
                    f"{discrete} and needs one scale for all sites that depend on them. Sum them "
                    f"out in the model (MixtureSameFamily), or leave kl_weight at 1."
                )

    def check_guide(self, guide: Callable, args: tuple, kwargs: dict) -> None:
        """Raise a ValueError for guide sites whose score term would be weighed too."""
        if not (self.tempered and isinstance(self.loss, TraceGraph_ELBO)):
            return
        seeded = handlers.seed(guide, jax.random.key(0))
        for site in handlers.trace(seeded).get_trace(*args, **kwargs).values():
            if site["type"] == "sample" and not site["is_observed"] and not site["fn"].has_rsample:
                raise ValueError(
                    f"kl_weight={self.kl_weight} does not go with TraceGraph_ELBO and guide site "
                    f"{site['name']!r} ({type(site['fn']).__name__}), which has no reparameterised "
                    f"gradient: its score term would be scaled too. Leave kl_weight at 1, or use a "
                    f"reparameterised distribution."
                )

    def check_run(self, first: int, num_steps: int) -> None:
        """Raise a ValueError where a schedule turns negative in the steps of a run."""
        check_schedule("kl_weight", self.kl_weight, first, num_steps)


class EnsembleVI(Ensemble):
    """An ensemble of variational fits, used like `numpyro.infer.SVI`.

    Positional order, methods and keywords are those of `SVI`. Every leaf of a result has a leading
    member axis, and member e is the single run made with key e. The first call sets an autoguide
    up, as `SVI.init` does, with the first member's values. A guide that was set up before stays as
    it is, with the same results.

    Args:
        model: a NumPyro model.
        guide: an autoguide or a hand-written one.
        optim: a `numpyro.optim`, `jax.example_libraries` or optax optimiser. Line searches and
            minimisers need a guide without noise, `AutoLaplaceApproximation` for example.
        loss: any ELBO of NumPyro.
        ensemble_size: number of members E.
        member_batch_size: how many members are computed at once, on each device, to bound memory;
            all of them by default.
        mesh: devices that members are spread over: "all", or a `jax.sharding.Mesh` with an axis
            "member". Rows of the data are spread over an axis "data", if there is one.
        kl_weight: weight of the divergence from the prior, a number or a schedule of the step; 1
            is the plain ELBO. It weighs the prior in the model and everything in the guide.
        prior_sites: names of `numpyro.factor` sites that belong to the prior.
        likelihood_sites: names of `factor` sites that may be rescaled with the batches.
        **static_kwargs: passed on to the model and the guide in every call.

    Raises:
        TypeError: if an argument is of the wrong kind, the optimiser for example.
        ValueError: if a number is out of range, or where NumPyro's estimator would be wrong under
            a `kl_weight` other than 1.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_ensemble import EnsembleVI
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> vi = EnsembleVI(
        ...     model, AutoNormal(model), numpyro.optim.Adam(0.05), Trace_ELBO(), ensemble_size=3)
        >>> result = vi.run(jax.random.key(0), 500, jnp.ones(3), progress_bar=False)
        >>> result.params["mu_auto_loc"].shape
        (3,)
    """

    kind = VIProblem

    @checked_keywords
    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        ensemble_size: int = 16,
        member_batch_size: int | None = None,
        mesh: Any = None,
        kl_weight: ArrayLike | Callable = 1.0,
        prior_sites: Collection[str] = (),
        likelihood_sites: Collection[str] = (),
        **static_kwargs: Any,
    ) -> None:
        self.kl_weight = kl_weight  # type: ignore[assignment]
        super().__init__(
            model,
            guide,
            optim,
            loss,
            ensemble_size=ensemble_size,
            member_batch_size=member_batch_size,
            mesh=mesh,
            prior_sites=prior_sites,
            likelihood_sites=likelihood_sites,
            **static_kwargs,
        )
        self._drawing = Programs()

    def checked_setting(self, name: str, value: Any) -> Any:
        """Return the value that a setting takes."""
        if name == "kl_weight" and not callable(value):
            value = check_weight(name, value)
        value = super().checked_setting(name, value)
        now = {**vars(self), name: value}
        weight, laplace = now["kl_weight"], isinstance(now.get("guide"), AutoLaplaceApproximation)
        if laplace and (callable(weight) or bool(weight != 1.0)):
            raise ValueError(
                f"kl_weight={weight} does not go with AutoLaplaceApproximation: it takes its "
                f"Hessian from the untempered model. Give both the guide "
                f"and EnsembleVI reweight(model, prior={weight}) instead."
            )
        return value

    @property
    def prior_weight(self) -> Any:  # type: ignore[override]
        """The weight of the prior, 1 where a schedule sets it at each step."""
        return 1.0 if callable(self.kl_weight) else self.kl_weight

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_drawing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_drawing": Programs()})

    @checked_keywords
    def sample_posterior(
        self,
        rng_key: jax.Array,
        result: EnsembleResult,
        *args: Any,
        num_samples: int = 1,
        group_by_member: bool = False,
        member_args: Iterable[str | int] | None = None,
        **kwargs: Any,
    ) -> dict[str, jax.Array]:
        """Draw from all members' guides at once, with the model's deterministic sites.

        Args:
            rng_key: one key.
            result: what `run` of a runner of this model returned.
            *args: arguments of the model and guide.
            num_samples: number of draws from each member.
            group_by_member: return `(E, num_samples, ...)` instead of `(E * num_samples, ...)`.
            member_args: names or positions of arguments with a leading `(E,)`, as in `run`.
            **kwargs: keyword arguments of the model and guide.

        Returns:
            Draws by site name. Sites of the model that the guide lacks are drawn too, and
            deterministic sites are computed from the same draws.
        """
        samples, _ = self.draws(rng_key, result, num_samples, args, kwargs, member_args=member_args)
        if group_by_member:
            return samples
        total = self.ensemble_size * num_samples
        return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), samples)

    def draws(
        self,
        rng_key: jax.Array,
        result: EnsembleResult,
        num_samples: int,
        args: tuple,
        kwargs: dict,
        with_density: bool = False,
        member_args: Iterable[str | int] | None = None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Draw `(E, num_samples, ...)` from the guides, then run the model on the draws.

        The second value has the log density of each draw under its own guide, `log_q`, and under
        the mixture of all guides, `log_q_mixture`, where they are wanted and known. They are
        unknown for point masses, for `AutoLaplaceApproximation`, and where a support depends on
        another latent. `log_q_mixture` needs a guide whose density follows from its latents.
        """
        if not isinstance(result, EnsembleResult):
            raise TypeError(f"result takes what run returned, got {type(result).__name__}.")
        rng_key = one_key(rng_key)
        check_count("num_samples", num_samples)
        check_size(result.state, self.ensemble_size)
        if member_args is not None:
            member_args = [member_args] if isinstance(member_args, str | int) else member_args
            member_args = tuple(member_args)
        arrange_members = functools.partial(
            arrange, self.model, member_args=member_args or (), placed=False
        )
        own_keywords, kwargs = kwargs, {**kwargs, **self.static_kwargs}
        arguments = arrange_members(args, kwargs)
        first_args, first = arguments.rebuild(first_member(arguments.dynamic))
        first = {name: first[name] for name in own_keywords}  # the runner adds the static ones
        template, values = self._setup_of(result, first_args, first)
        check_members(arguments, member_args, template, self.ensemble_size)
        moving = isinstance(self.guide, AutoGuide) and template.guide_forms.supports
        size, with_density = self.ensemble_size, with_density and not moving

        def draw(call: tuple, *inputs: Any) -> tuple:
            guides = MemberGuides(self.model, template, size, arrange_members(*call), with_density)
            return guides.draw(num_samples, *inputs)

        params = {**result.params, **(result.state.mutable_state or {})}
        inputs = (rng_key, params, values)
        form = closure_fingerprint(template.guide)
        how = (template, form, size, num_samples, with_density, member_args)
        try:
            found = self._drawing.call(draw, inputs, self.model, args, kwargs, *how)
        except NUMPY_WANTED as error:
            if not member_args:
                raise
            raise looks_at(arguments, error) from error
        samples, densities, known = found
        if "log_q_mixture" in densities and not has_tracers(known) and not bool(known):
            del densities["log_q_mixture"]
        return samples, densities

    def _setup_of(
        self, result: EnsembleResult, args: tuple, kwargs: dict
    ) -> tuple[SetupTemplate, GuideValues]:
        """Return the set-up of the guides of a result; it must be of this runner's model."""
        setup = setup_of(result.state)
        if setup is not None and setup.template is not None:
            if may_differ(setup.template.model, self.model):
                raise ValueError(
                    "the result is of another model than this runner's: pass it to the runner that "
                    "made it."
                )
            return setup.template, setup.values.guide
        if setup is not None and setup.values.guide.supports:
            raise ValueError(
                "the result was on disk, and its constraints depend on where each member started: "
                "go on from it for a step, run(rng_key, 1, ..., init_state=result.state), and pass "
                "that result."
            )
        if not is_set_up(self.guide):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All .* members start at the same values")
                self.init(jax.random.key(0), *args, **kwargs)
        nothing = GuideValues([], [], [])
        return SetupTemplate(
            object(), self.model, self.guide, nothing, None, (), {}, {}, {}
        ), nothing


def ensemble_vi(
    model: Callable,
    guide: Callable,
    *,
    ensemble_size: int,
    num_steps: int,
    data: Any,
    rng_key: jax.Array,
    kl_weight: ArrayLike | Callable = 1.0,
    learning_rate: float | None = None,
    optimizer: Any = None,
    num_particles: int = 1,
) -> tuple[dict[str, Any], jax.Array]:
    """Fit an ensemble of variational approximations in one call.

    Args:
        model: a NumPyro model.
        guide: an autoguide or a hand-written one.
        ensemble_size: number of members E.
        num_steps: number of optimisation steps.
        data: a tuple of arguments of the model and guide; a single array counts as one.
        rng_key: one key, split into E, or E keys.
        kl_weight: weight of the divergence from the prior, a number or a schedule.
        learning_rate: of Adam, 5e-3 if neither this nor `optimizer` is given.
        optimizer: a `numpyro.optim` or optax optimiser.
        num_particles: number of draws in each estimate of the ELBO.

    Returns:
        The stacked parameters by name and the losses `(E, num_steps)`.

    Raises:
        ValueError: if both `learning_rate` and `optimizer` are given.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_ensemble import ensemble_vi
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> params, losses = ensemble_vi(
        ...     model, AutoNormal(model), ensemble_size=3, num_steps=200, data=jnp.ones(3),
        ...     rng_key=jax.random.key(0), learning_rate=0.05)
        >>> params["mu_auto_loc"].shape, losses.shape
        ((3,), (3, 200))
    """
    optimizer = choose_optimizer(optimizer, learning_rate)
    data = data if isinstance(data, tuple | list) else (data,)
    loss = Trace_ELBO(num_particles=num_particles)
    runner = EnsembleVI(
        model, guide, optimizer, loss, ensemble_size=ensemble_size, kl_weight=kl_weight
    )
    result = runner.run(rng_key, num_steps, *data, progress_bar=False)
    return result.params, result.losses
