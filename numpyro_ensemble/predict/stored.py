"""Predictions in a Zarr store."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from numpyro_ensemble.predict.blocks import Predictions
from numpyro_ensemble.streaming.blocks import grid_for
from numpyro_ensemble.streaming.options import StoreOptions, argument_digests
from numpyro_ensemble.streaming.writing import write_call


def write_predictions(
    predictive: Any,
    store: Any,
    rng_key: jax.Array,
    args: tuple,
    kwargs: dict,
    options: StoreOptions,
) -> Any:
    """Write the predictions of an `EnsemblePredictive`, and return them as a dataset on disk."""
    predictive.placement.check_store()
    rows = options.rows_of(predictive.model, args, kwargs)
    predictions = Predictions(predictive, rng_key, args, kwargs, rows)
    outputs = options.named(predictions.outputs)
    chains, draws = predictions.places.index.shape
    grid = grid_for(
        chains,
        draws,
        outputs,
        rows=1 if rows is None else rows.total,
        most_rows=None if options.row_batch_size else predictions.most_rows,
        most_draws=predictions.most_draws,
        row_size=options.row_batch_size,
        draws_at_once=predictive.batch_size,
    )
    mixed = predictive.weights is not None
    members = np.arange(1) if mixed else np.flatnonzero(predictive.given.finite)
    fingerprint = predictions.fingerprint
    fingerprint["argument"] = argument_digests(predictive.model, args, kwargs, rows)
    return write_call(
        store, grid, outputs, predictions.started(grid), fingerprint, members, options
    )
