"""Checks of discrete latents that a fit of modes sums out."""

from __future__ import annotations

from collections.abc import Mapping

from numpyro_ensemble.density import Site
from numpyro_ensemble.enumeration import check_funsor

_MARK = (
    'mark it infer={"enumerate": "parallel"}, or the model by '
    "numpyro.contrib.funsor.config_enumerate, to have it summed out"
)


def check_sums(sites: Mapping[str, Site]) -> None:
    """Raise where discrete latents of a model cannot be summed out.

    Raises:
        ImportError: without funsor.
        ValueError: for a site that is not marked or cannot be enumerated, a model that has no
            other latent, or a plate that takes rows at random.
    """
    discrete = [site for site in sites.values() if site.kind == "discrete"]
    for site in discrete:
        if site.not_summed or not site.marked:
            raise ValueError(
                f"latent site {site.name!r} is discrete ({site.distribution}), and EnsembleMAP "
                f"optimises continuous latents only: {site.not_summed or _MARK}. Or sum it out "
                f"of the model (MixtureSameFamily, for example), observe it, or use EnsembleVI "
                f"with TraceEnum_ELBO."
            )
    if not discrete:
        return
    names = [site.name for site in discrete]
    check_funsor(names)
    if not any(site.kind in ("latent", "param") for site in sites.values()):
        raise ValueError(
            f"the latent sites {names} are all discrete, and once they are summed out there is "
            f"nothing to fit: numpyro.contrib.funsor.infer_discrete draws them."
        )
    for site in sites.values():
        if site.drawn_from is not None:
            raise ValueError(
                f"plate {site.name!r} takes {site.shape[0]} of its {site.drawn_from} rows at "
                f"random, and the model sums {names} out: NumPyro's scale of the rows would stand "
                f"inside of these sums. Leave subsample_size out, and pass batch_size= to run."
            )
