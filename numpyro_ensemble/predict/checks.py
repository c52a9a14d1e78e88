"""Whether predictions can be made: samples, parameters and names that are the model's."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from numpyro_ensemble.density import model_sites
from numpyro_ensemble.fit.draws import check_guide
from numpyro_ensemble.fit.slots import filled_guide
from numpyro_ensemble.fit.state import Setup
from numpyro_ensemble.handlers import warn

_DRAWN = ("latent", "discrete")  # kinds of sites


def check_returned(return_sites: Collection[str] | None, names: Iterable[str]) -> None:
    """Raise a ValueError where `return_sites` names what is not returned."""
    missing = sorted(set(return_sites or ()) - set(names))
    if missing:
        raise ValueError(
            f"return_sites names {missing}, which are no sites of the model or the guide."
        )


def check_model(predictive: Any, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError, or warn, where what `EnsemblePredictive` was given is not the model's."""
    setup = predictive.setup
    sites = model_sites(predictive.model, args, kwargs)
    if predictive.given.fitted and not predictive.guide:
        unknown = sorted(predictive.given.fitted - sites.keys())
        if unknown:
            raise ValueError(
                f"the result is of another model, which has {unknown}, or of a variational "
                f"fit: that takes its guide along, guide=runner.guide."
            )
    for name, value in predictive.given.samples.items():
        site, shape = sites.get(name), np.shape(value)[max(predictive.given.ndims, 1) :]
        if site is not None and site.kind == "latent" and len(shape) != len(site.shape):
            raise ValueError(
                f"each of the samples of {name!r} has shape {shape}, and the model's site "
                f"{site.shape}: batch_ndims says how many axes of the samples lead (2 for "
                f"members and draws), got {predictive.given.ndims}."
            )
    known = predictive.given.known
    if known is not None:
        new = [n for n, s in sites.items() if s.kind in _DRAWN and n not in known]
        if new:
            warn(f"{new} were no sites of the fitted model and are drawn from their prior.")
    if predictive.guide is not None:
        guide = predictive.guide
        if setup is not None:
            guide = _first_guide(setup)
        check_guide(guide, predictive.given.params, args, kwargs)
    observed = [
        name
        for name, site in sites.items()
        if site.kind == "observed"
        and (predictive.return_sites is None or name in predictive.return_sites)
    ]
    if observed and not predictive.infer_discrete:
        warn(
            f"{observed} are observed in this call, so that what is returned for them is the "
            f"data. Leave the observed arguments out, y=None say."
        )


def _first_guide(setup: Setup) -> Any:
    """Return the guide of the first member."""
    first = setup.of_members(0).values.guide
    assert setup.template is not None
    return filled_guide(setup.template, first)
