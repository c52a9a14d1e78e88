"""The user's options of a store, and digests that identify its call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ensemble.calls.arguments import FIXED, arrange
from numpyro_ensemble.calls.keywords import check_call
from numpyro_ensemble.checkpoint import describe
from numpyro_ensemble.handlers import check_count
from numpyro_ensemble.streaming.blocks import Grid, Output
from numpyro_ensemble.streaming.rows import Rows


class StoreOptions(NamedTuple):
    """The user's options of how a call is cut and stored."""

    row_args: Iterable[str | int] | None
    row_batch_size: int | None
    coords: Mapping[str, Any]
    dims: Mapping[str, list[str]]
    progress_bar: bool

    def rows_of(self, model: Callable, args: tuple, kwargs: dict) -> Rows | None:
        """Return the rows of a call, None if they are not cut.

        Raises:
            ValueError: for options that contradict each other or the arguments.
        """
        check_call(model, args, kwargs)
        if self.row_batch_size is not None:
            check_count("row_batch_size", self.row_batch_size)
            if self.row_args is None:
                raise ValueError(
                    "row_batch_size needs row_args, the names of the arguments with rows."
                )
        if self.row_args is None:
            return None
        return Rows.of(model, args, kwargs, self.row_args)

    def named(self, outputs: list[Output]) -> list[Output]:
        """Return outputs with the dimensions that the user names.

        Raises:
            ValueError: for dimensions of a site that is not among them or has fewer axes, and for
                coordinates of a dimension that none has.
        """
        given = {name.replace("/", "."): list(names) for name, names in self.dims.items()}
        known = {output.path: output for output in outputs}
        for name, names in given.items():
            if name not in known:
                raise ValueError(f"dims names {name!r}, which is none of {sorted(known)}.")
            shape = known[name].shape
            if len(names) > len(shape):
                raise ValueError(
                    f"dims names {names} for {name!r}, which has shape {shape} in one draw."
                )
            rest = known[name].dims[len(names) :]
            known[name] = known[name]._replace(dims=(*names, *rest))
        dims = {"chain", "draw"}.union(*(output.dims for output in known.values()))
        unknown = sorted(self.coords.keys() - dims)
        if unknown:
            raise ValueError(f"coords names {unknown}; the dimensions are {sorted(dims)}.")
        return list(known.values())

    def fingerprint(self, grid: Grid, outputs: Iterable[Output]) -> dict[str, dict[str, str]]:
        """Return digests that identify outputs, blocks and coordinates."""
        sites = {o.path: f"{o.dtype} {list(o.shape)} {list(o.dims)}" for o in outputs}
        blocks = {
            "row_batch_size": str(grid.row_size if grid.row_blocks > 1 else None),
            "chains": f"{grid.chain_size} of {grid.chains}",
            "draws": f"{grid.draw_size} of {grid.draws}",
        }
        return {"site": sites, "block": blocks, "coordinate": tree_digests(self.coords)}


def argument_digests(
    model: Callable, args: tuple, kwargs: dict, rows: Rows | None
) -> dict[str, str]:
    """Return digests of the arguments of a call, by the user's names."""
    arguments = arrange(model, args, kwargs, traced=False, placed=False)
    cut = [] if rows is None else rows.labels
    digests = {label: describe(leaf) for label, leaf in arguments.labelled(FIXED)}
    return {k: f"{v} cut by rows" if k in cut else v for k, v in digests.items()}


def call_digests(
    rng_key: Any, samples: Any, params: Any, model: Callable, args: tuple, kwargs: dict
) -> dict[str, dict[str, str]]:
    """Return digests of everything that a call with draws depends on."""
    return {
        "setting": {"rng_key": describe(rng_key)},
        "sample": tree_digests(samples),
        "parameter": tree_digests(params),
        "argument": argument_digests(model, args, kwargs, None),
    }


def tree_digests(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return digests of the arrays of a tree, by their paths."""
    paths = jax.tree_util.tree_leaves_with_path(dict(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): describe(
            leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        )
        for path, leaf in paths
    }
