"""Groups of arrays as data of the installed line of ArviZ."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from numpyro_ensemble.predict.collect import Draws
from numpyro_ensemble.streaming.writing import library_attributes

_LATER_GROUPS = ("log_prior", "unconstrained_posterior")  # not known to every `from_dict`

# groups whose chains are those of the draws
OF_MEMBERS = (
    "posterior", "posterior_predictive", "log_likelihood", "sample_stats", "predictions",
    *_LATER_GROUPS,
)  # fmt: skip


def assemble(groups: dict[str, dict[str, Any]], draws: Draws, dims: dict, coords: dict) -> Any:
    """Make data of the installed line of ArviZ of the groups."""
    import arviz as az  # NumPyro has been imported by now: the other order breaks ArviZ's adapter

    attrs: dict[str, Any] = dict(library_attributes())
    if draws.seconds is not None:
        attrs["sampling_time"] = draws.seconds
    attrs["ensemble_size"] = draws.ensemble_size
    attrs["num_chains"] = len(draws.members)  # those that are not left out
    attrs.update(draws.attrs)
    # a slash in a name, from a scope, would be a path in a tree, and files do not allow it
    groups = {
        name: {site.replace("/", "."): np.asarray(value) for site, value in group.items()}
        for name, group in groups.items()
        if group
    }
    dims = {
        site.replace("/", "."): [dim.replace("/", ".") for dim in names]
        for site, names in dims.items()
    }
    coords = {"chain": draws.members, **coords}
    with warnings.catch_warnings():
        for text in ("More chains", "Found chain dimension"):  # there are many members on purpose
            warnings.filterwarnings("ignore", text)
        later = {name: groups[name] for name in _LATER_GROUPS if name in groups}
        first = {name: group for name, group in groups.items() if name not in later}
        if makes_inference_data():
            data = az.from_dict(**first, coords=coords, dims=dims)  # type: ignore[arg-type]
        else:
            data = az.from_dict(first, coords=coords, dims=dims)
        for name, group in later.items():
            own = az.dict_to_dataset(group, coords=coords, dims=dims, skip_event_dims=True)
            _add_group(data, name, own)
    for name in groups:
        data[name].attrs.update(attrs)
        if draws.origins is not None and name in OF_MEMBERS:
            data[name].coords["member"] = ("chain", draws.origins)
    if draws.losses is not None:
        _add_training(data, draws, attrs)
    return data


def single_group(
    name: str, values: dict[str, Any], dims: dict[str, list[str]], attrs: dict[str, Any]
) -> Any:
    """Make ArviZ data of one group, of arrays with leading axes `(chain, draw)`."""
    import arviz as az
    import xarray as xr

    named = {site: dims[site] for site in values if site in dims}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "More chains")
        dataset = az.dict_to_dataset(values, dims=named, skip_event_dims=True)
    dataset.attrs.update(library_attributes() | attrs)
    data = az.InferenceData() if makes_inference_data() else xr.DataTree()
    _add_group(data, name, dataset)
    return data


def makes_inference_data() -> bool:
    """Return whether the installed ArviZ is of the line below 1.0, which has its own data class."""
    import arviz as az

    return int(az.__version__.partition(".")[0]) < 1


def _add_training(data: Any, draws: Draws, attrs: dict) -> None:
    """Add the losses of each member at each step."""
    import xarray as xr

    losses = xr.Dataset(
        {"loss": (("chain", "step"), draws.losses)}, coords={"chain": draws.members}, attrs=attrs
    )
    _add_group(data, "training", losses)


def _add_group(data: Any, name: str, dataset: Any) -> None:
    """Add a group to ArviZ data of either line."""
    import xarray as xr

    if hasattr(data, "add_groups"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"The group {name} is not defined")
            data.add_groups({name: dataset})
    else:
        data[name] = xr.DataTree(dataset)


def read_arviz(store: Any) -> Any:
    """Return the data of a Zarr store, read lazily."""
    import arviz as az
    import xarray as xr

    tree = xr.open_datatree(store, engine="zarr", consolidated=True)
    if not makes_inference_data():
        return tree
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is not defined in the InferenceData scheme")
        return az.InferenceData.from_datatree(tree)
