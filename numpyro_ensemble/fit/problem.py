"""What is fitted: how one member differs from a plain `SVI`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jax.typing import ArrayLike
from numpyro.infer.autoguide import AutoGuide

from numpyro_ensemble.calls.identity import closure_fingerprint
from numpyro_ensemble.calls.marks import ByIdentity
from numpyro_ensemble.density import Site
from numpyro_ensemble.fit.guides import fresh
from numpyro_ensemble.fit.slots import take_out
from numpyro_ensemble.fit.state import GuideValues
from numpyro_ensemble.handlers import reweight
from numpyro_ensemble.sharding import Placement

_APART = ("model", "guide", "static_kwargs", "hint")  # not settings, or without effect on programs


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, how to fit it, and its checks: the engine knows nothing else of a runner.

    A runner makes a new description for each call, so that an assigned setting holds from the next
    call on. Each kind of ensemble derives a class from this one, whose methods define how a member
    differs from a plain `SVI`. Programs are kept for each value of all fields.

    Attributes:
        model, guide, optim, loss, static_kwargs: as in `numpyro.infer.SVI`.
        ensemble_size: number of members E.
        member_batch_size: how many members each device computes at once; None for all.
        mesh: devices that members are spread over.
        prior_weight: weight of the prior.
        repulsion: how members push each other apart, None where each is fitted alone.
        prior_sites: factors that belong to the prior.
        likelihood_sites: factors that may be rescaled with the batches.
        data_sites: factors that must depend on the batch, besides `likelihood_sites`.
        hint: a text for the error when the model cannot be called.
    """

    model: Callable
    guide: Callable
    optim: Any = field(metadata={"by": "identity"})
    loss: Any = field(metadata={"by": "identity"})
    ensemble_size: int
    member_batch_size: int | None = None
    mesh: Any = field(default=None, metadata={"by": "identity"})
    prior_weight: Any = 1.0
    repulsion: Any = None
    prior_sites: tuple[str, ...] = ()
    likelihood_sites: tuple[str, ...] = ()
    data_sites: tuple[str, ...] = ()
    static_kwargs: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""

    def settings(self) -> tuple:
        """Return what a program depends on besides model, guide and arguments, as a hashable."""
        marks: list[Any] = [type(self)]
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.metadata.get("by") == "identity":
                marks.append(ByIdentity(value))
            elif setting.name not in _APART:
                marks.append(closure_fingerprint(value))
        return tuple(marks)

    @property
    def finds_modes(self) -> bool:
        """Whether fits end at a zero of the gradient."""
        return False

    @property
    def sums_out(self) -> bool:
        """Whether discrete latents are summed out, and not drawn by a guide."""
        return False

    @property
    def repels(self) -> bool:
        """Whether a step of one member depends on the others."""
        return self.repulsion is not None

    @property
    def placement(self) -> Placement:
        """Where members are computed."""
        return Placement(self.member_batch_size, self.mesh)

    @property
    def places(self) -> int:
        """How many members are computed, equally many on each device."""
        return self.placement.number(self.ensemble_size)

    # One member ---------------------------------------------------------------------------------

    def summed_model(self, guide: Any) -> Callable:
        """Return the model without the discrete latents that are summed out."""
        return self.model

    def weighted(self, guide: Callable, scale: float, step: Any) -> tuple[Callable, Callable]:
        """Return the model and the guide, weighted for one step of one member.

        Args:
            guide: the member's guide.
            scale: weight of the likelihood, which is `N / |B|` for batches.
            step: the optimiser's step.
        """
        return self.reweighted(self.prior_weight, scale), guide

    def reweighted(self, prior: ArrayLike, likelihood: ArrayLike) -> Callable:
        """Return the model with its prior and likelihood weighted."""
        sites = self.prior_sites
        return reweight(self.model, prior=prior, likelihood=likelihood, prior_sites=sites)

    def member_params(self, guide: Callable, params: dict, args: tuple, kwargs: dict) -> dict:
        """Turn one member's `SVI` parameters into those that users see."""
        return params

    def constrains_with_arguments(self, guide: Any) -> bool:
        """Return whether `member_params` reads the arguments of the model."""
        return False

    # Its guide ----------------------------------------------------------------------------------

    def fresh_guide(self, init_params: dict | None, sites: dict) -> tuple[Callable, dict | None]:
        """Return a guide that is not set up, and the start values for `SVI.init`."""
        return fresh(self.guide), init_params

    def distilled_guide(self, guide: Callable, tracer: type) -> tuple[Callable, GuideValues]:
        """Return a guide after its set-up without traced values, and these values."""
        return take_out(guide, tracer)

    def current_guide(self, guide: Callable) -> Callable:
        """Return the guide of a set-up with the settings of this problem."""
        return guide if isinstance(self.guide, AutoGuide) else self.guide

    # Checks -------------------------------------------------------------------------------------

    def check_model(self, sites: dict[str, Site]) -> None:
        """Raise an error where the model cannot be fitted."""

    def check_guide(self, guide: Callable, args: tuple, kwargs: dict) -> None:
        """Raise an error where the guide does not go with the settings."""

    def check_run(self, first: int, num_steps: int) -> None:
        """Raise an error if the steps of a run cannot be taken."""
