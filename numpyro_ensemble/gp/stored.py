"""Functions in a Zarr store."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from numpyro_ensemble.gp.path_blocks import Functions
from numpyro_ensemble.streaming.blocks import grid_for
from numpyro_ensemble.streaming.options import StoreOptions, argument_digests
from numpyro_ensemble.streaming.writing import write_call


def write_functions(
    pathwise: Any, store: Any, rng_key: jax.Array, args: tuple, kwargs: dict, options: StoreOptions
) -> Any:
    """Write the values of a call of `Pathwise`, and return them as a dataset on disk."""
    pathwise.placement.check_store()
    rows = options.rows_of(pathwise.model, args, kwargs)
    functions = Functions(pathwise, rng_key, args, kwargs, rows)
    outputs = options.named(functions.outputs)
    chains, draws = pathwise.shape
    grid = grid_for(
        chains,
        draws,
        outputs,
        rows=1 if rows is None else rows.total,
        most_rows=None if options.row_batch_size else functions.most_rows,
        most_draws=functions.most_draws,
        row_size=options.row_batch_size,
        draws_at_once=pathwise.batch_size,
        rows_first=False,  # functions are drawn once for all rows
    )
    functions.check(grid)
    fingerprint = functions.fingerprint
    fingerprint["argument"] = argument_digests(pathwise.model, args, kwargs, rows)
    started = functions.started(grid)
    return write_call(store, grid, outputs, started, fingerprint, np.arange(chains), options)
