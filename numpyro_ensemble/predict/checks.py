"""Checks that samples, parameters and names fit the model, before predictions are made."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from numpyro_ensemble.density import Site, model_sites, unchecked_trace
from numpyro_ensemble.fit.draws import check_guide
from numpyro_ensemble.fit.slots import filled_guide
from numpyro_ensemble.fit.state import Setup
from numpyro_ensemble.handlers import warn

_DRAWN = ("latent", "discrete")  # kinds of sites


def check_returned(return_sites: Collection[str] | None, names: Iterable[str]) -> None:
    """Raise a ValueError if `return_sites` names a site that is not returned."""
    missing = sorted(set(return_sites or ()) - set(names))
    if missing:
        raise ValueError(
            f"return_sites names {missing}, which are no sites of the model or the guide."
        )


def check_model(predictive: Any, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError, or warn, if arguments of `EnsemblePredictive` do not fit the model."""
    setup = predictive.setup
    sites = model_sites(predictive.model, args, kwargs)
    if predictive.given.fitted and not predictive.guide:
        unknown = sorted(predictive.given.fitted - sites.keys())
        if unknown:
            raise ValueError(
                f"the result has {unknown}, which are no sites of this model. If it is of a "
                f"variational fit, pass guide=runner.guide and num_samples too; otherwise pass "
                f"the model of the fit."
            )
    for name, value in predictive.given.samples.items():
        site, shape = sites.get(name), np.shape(value)[max(predictive.given.ndims, 1) :]
        if site is not None and site.kind == "latent" and len(shape) != len(site.shape):
            raise ValueError(
                f"each sample of {name!r} has shape {shape}, and the model's site {site.shape}, "
                f"with batch_ndims={predictive.given.ndims}: batch_ndims is the number of leading "
                f"axes of the samples, 1 for members, 2 for members and draws."
            )
    if not predictive.given.fitted and predictive.guide is None:
        _warn_of_misspelt(predictive, sites, args, kwargs)
    known = predictive.given.known
    if known is not None:
        new = [n for n, s in sites.items() if s.kind in _DRAWN and n not in known]
        if new:
            warn(
                f"{new} were no sites of the fitted model and are drawn from their prior: pass "
                f"the model of the fit, if that is not intended."
            )
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
            f"data. For predictions leave the observed arguments out, y=None for example."
        )


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like another one; names of a series do not count."""
    stem = name.rstrip("0123456789")
    others = [n for n in names if n.rstrip("0123456789") != stem]
    return next(iter(difflib.get_close_matches(name, others, 1, cutoff=0.8)), None)


def _warn_of_misspelt(
    predictive: Any, sites: Mapping[str, Site], args: tuple, kwargs: dict
) -> None:
    """Warn of samples whose name is none of the model's, and nearly that of a site without any.

    Other names without a site are no sign of an error, as in samples of a larger model.
    """
    given = set(predictive.given.samples) | set(predictive.given.params)
    missing = [n for n, site in sites.items() if site.kind in _DRAWN and n not in given]
    meant = {n: _nearest(n, missing) for n in sorted(given - sites.keys())}
    if not any(meant.values()):
        return
    known = unchecked_trace(predictive.model, args, kwargs).keys()  # deterministic sites too
    for name, near in meant.items():
        if near is not None and name not in known:
            warn(
                f"the samples have {name!r}, which is no site of the model, and lack {near!r}, "
                f"which is drawn from its prior. If {name!r} is meant to be {near!r}, rename it."
            )


def _first_guide(setup: Setup) -> Any:
    """Return the guide of the first member."""
    first = setup.of_members(0).values.guide
    assert setup.template is not None
    return filled_guide(setup.template, first)
