"""Batches of the data: epochs of all rows without replacement, drawn on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ensemble.calls.arguments import MEMBER_AXES, ROW_AXES
from numpyro_ensemble.density import Site

_STREAM = 0x62617463  # folds a key into one that no split of it yields: "batc" in ASCII


class Batches(NamedTuple):
    """How an epoch is cut: `size` of `total` rows per step, and the rest in the last batch."""

    size: int
    total: int
    shared: bool = True

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch, including a smaller last one."""
        return -(-self.total // self.size)

    @property
    def ragged(self) -> int:
        """Number of rows in the last batch of an epoch, 0 where all are full."""
        return self.total % self.size


class Order(NamedTuple):
    """The shuffled rows of the current epoch."""

    epoch: jax.Array
    rows: jax.Array  # (N,), or (E, N) where each member has its own


def batch_keys(keys: jax.Array, rng_key: jax.Array, shared: bool) -> jax.Array:
    """Derive the key, or the keys of the members, that the shuffles come from."""
    if shared:
        return jax.random.fold_in(rng_key, _STREAM)
    return jax.vmap(lambda key: jax.random.fold_in(key, _STREAM))(keys)


def first_order(batches: Batches, ensemble_size: int) -> Order:
    """Return an order of no epoch, which the first step replaces."""
    shape = (batches.total,) if batches.shared else (ensemble_size, batches.total)
    return Order(jnp.asarray(-1, jnp.int32), jnp.zeros(shape, jnp.int32))


def draw(
    batches: Batches, order: Order, step: jax.Array, keys: jax.Array, update: Callable
) -> tuple[Order, Any]:
    """Make one step on the batch of a step, reshuffling where an epoch begins.

    Args:
        batches: how an epoch is cut.
        order: the rows of the current epoch.
        step: the optimiser's step; epoch and batch depend on it alone.
        keys: what `batch_keys` returned.
        update: takes the rows of the batch, `(B,)` or `(E, B)`; called once for each batch size.
    """
    epoch, position = step // batches.per_epoch, step % batches.per_epoch
    order = lax.cond(epoch == order.epoch, lambda: order, lambda: _shuffle(batches, epoch, keys))

    def full() -> Any:
        start = position * batches.size
        return update(lax.dynamic_slice_in_dim(order.rows, start, batches.size, axis=-1))

    def rest() -> Any:
        return update(order.rows[..., -batches.ragged :])

    if not batches.ragged:
        return order, full()
    return order, lax.cond(position == batches.per_epoch - 1, rest, full)


def _shuffle(batches: Batches, epoch: jax.Array, keys: jax.Array) -> Order:
    def rows(key: jax.Array) -> jax.Array:
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), batches.total)
        return shuffled.astype(jnp.int32)

    return Order(epoch.astype(jnp.int32), rows(keys) if batches.shared else jax.vmap(rows)(keys))


def first_member(dynamic: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Return the inputs of a program as the first member sees them."""
    return {
        kind: leaves if MEMBER_AXES[kind] is None else [leaf[0] for leaf in leaves]
        for kind, leaves in dynamic.items()
    }


def first_rows(
    dynamic: Mapping[str, Sequence[Any]], number: int | None
) -> dict[str, Sequence[Any]]:
    """Return the inputs of a program, for all members, with the first rows of what is batched."""
    cuts = {kind: (slice(None),) * axis + (slice(number),) for kind, axis in ROW_AXES.items()}
    return {
        kind: [leaf[cuts[kind]] for leaf in leaves] if kind in cuts else leaves
        for kind, leaves in dynamic.items()
    }


_REMEDY = (
    "Leave batch_size out and write the model with numpyro.plate(..., subsample_size=...) instead."
)


def check_follows(
    full: dict[str, Site],
    part: dict[str, Site],
    batches: Batches,
    declared: Collection[str],
    sums_out: bool = False,
) -> None:
    """Check that a model traced with a batch is the same model on fewer observations.

    Args:
        full: the sites with all the data.
        part: the sites with one batch.
        batches: how an epoch is cut.
        declared: factors that were said to be likelihood.
        sums_out: discrete latents are summed out, row by row.

    Raises:
        ValueError: if a latent or parameter changes shape, an observed site or the plate around it
            stays as it was, or a factor was not said to be prior or likelihood.
    """
    if full.keys() != part.keys():
        names = sorted(full.keys() ^ part.keys())
        raise ValueError(f"batch_size={batches.size} changes which sites exist: {names}. {_REMEDY}")
    for name, whole in full.items():
        piece = part[name]
        if whole.kind == "discrete" and sums_out:
            if piece.plates == whole.plates:
                raise ValueError(
                    f"batch_size={batches.size} does not go with discrete site {name!r}, which is "
                    f"in no plate of the rows: what all rows share is summed out over all of them "
                    f"at once. Put it in a plate of the rows, or leave batch_size out."
                )
        elif whole.kind in ("latent", "discrete", "param") and _sizes(whole) != _sizes(piece):
            raise ValueError(
                f"batch_size={batches.size} changes the shape of {whole.kind} site {name!r} from "
                f"{whole.shape} to {piece.shape}; it belongs to single rows. {_REMEDY}"
            )
        if whole.kind == "factor" and whole.role == "likelihood" and name not in declared:
            raise ValueError(
                f"batch_size={batches.size} rescales the likelihood, and factor {name!r} was not "
                f"said to be prior or likelihood: name it in prior_sites= or likelihood_sites=."
            )
        if whole.kind == "observed":
            _check_observed(whole, piece, batches)


def _sizes(site: Site) -> list[int]:
    """Return the lengths of all axes: trees of Flax NNX modules are equal to themselves alone."""
    return jax.tree.leaves(site.shape)


def _check_observed(whole: Site, piece: Site, batches: Batches) -> None:
    if isinstance(whole.shape, list):
        raise ValueError(
            f"observed site {whole.name!r} has a list as its data, which batch_size="
            f"{batches.size} cannot cut: pass an array, numpy.asarray(...)."
        )
    for (plate, before), (_, after) in zip(whole.plates, piece.plates, strict=True):
        if before == after == batches.total:
            raise ValueError(
                f"plate {plate!r} around observed site {whole.name!r} keeps its size {before} when "
                f"batch_size={batches.size}: it does not follow the batch, and its terms would be "
                f"broadcast. Give it the batch's own length, len(y) say. {_REMEDY}"
            )
    if isinstance(whole.scale, int | float | None) and whole.scale != piece.scale:
        raise rescaled(whole.name, whole.scale, piece.scale, batches)
    changed = [i for i, (a, b) in enumerate(zip(whole.shape, piece.shape, strict=True)) if a != b]
    if not changed:
        fixed = "If it is a latent that handlers.condition fixes, fix it by handlers.do. "
        raise ValueError(
            f"observed site {whole.name!r} keeps its shape {whole.shape} when "
            f"batch_size={batches.size}: it does not follow the batch, and rescaling the "
            f"likelihood would count it {batches.total / batches.size:g} times. "
            f"{'' if whole.shape else fixed}Name its data in batch_args=. {_REMEDY}"
        )
    for axis in changed:
        lengths = (whole.shape[axis], piece.shape[axis])
        if lengths != (batches.total, batches.size) or axis >= len(whole.shape) - whole.event_dim:
            raise ValueError(
                f"observed site {whole.name!r} ({whole.distribution}) has shape {whole.shape} with "
                f"all {batches.total} rows and {piece.shape} with batch_size={batches.size}: its "
                f"values depend on several rows at once, which batches would separate. Leave "
                f"batch_size out."
            )


def rescaled(name: str, whole: Any, piece: Any, batches: Batches) -> ValueError:
    """Return the error that names a site whose scale changes with the batch."""
    before, after = (1.0 if scale is None else float(scale) for scale in (whole, piece))
    return ValueError(
        f"observed site {name!r} is scaled by {before:g} with all rows and by {after:g} with "
        f"batch_size={batches.size}: the model rescales itself, and batch_size would do it once "
        f"more. Leave out one of the two."
    )
