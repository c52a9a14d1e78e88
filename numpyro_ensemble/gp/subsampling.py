"""Subsampled plates around processes and their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger


class KnownRows(Messenger):
    """Give subsampled plates fixed rows, so that NumPy arrays can be indexed inside a trace.

    A subsampled plate takes its first rows.

    Args:
        fn: the model.
        moved: name of a plate that takes its last rows instead.

    Attributes:
        sizes: number of rows, by plate.
        subsampled: number of rows taken, by subsampled plate.
    """

    def __init__(self, fn: Callable, moved: str | None = None) -> None:
        super().__init__(fn)
        self.moved = moved
        self.sizes: dict[str, int] = {}
        self.subsampled: dict[str, int] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the rows of a plate."""
        if msg["type"] != "plate":
            return
        name, (size, batch) = msg["name"], msg["args"]
        self.sizes[name] = size
        number = size if batch is None else min(batch, size)
        if number < size:
            if msg["value"] is not None:  # rows that the user gave
                return
            self.subsampled[name] = number
        start = size - number if name == self.moved else 0
        with jax.ensure_compile_time_eval():
            msg["value"] = jnp.arange(start, start + number)


class Dependents(NamedTuple):
    """Arrays that may depend on the rows that plates take.

    Attributes:
        of_sites: arrays of each process and its values.
        observed: other observed values.
    """

    of_sites: dict[str, list[Any]]
    observed: dict[str, Any]


def check_rows(
    subsampled: dict[str, int],
    sizes: dict[str, int],
    inside: dict[str, set[str]],
    dependents: Callable[[str | None], Dependents],
) -> None:
    """Raise a ValueError for a process whose functions would depend on random rows.

    These are processes whose inputs or observations depend on the rows that a plate takes, and
    latent processes in a plate with data that depend on its rows. Inducing values outside the plate
    of the data do not depend on the rows, and data that are already a batch do not either.

    Args:
        subsampled: how many rows are taken, by plate.
        sizes: how many rows there are, by plate.
        inside: the plates around each latent process.
        dependents: returns the `Dependents` for other rows of the named plate.
    """
    if not subsampled:
        return
    before = _computed(dependents, None)
    for plate, number in subsampled.items():
        after = _computed(dependents, plate)
        data_follow = _differ(before.observed, after.observed)
        for name, parts in before.of_sites.items():
            follows = _differ(parts, after.of_sites[name])
            if follows or (data_follow and plate in inside.get(name, ())):
                raise ValueError(
                    f"the Gaussian process {name!r} follows the rows that the plate {plate!r} "
                    f"takes at random, {number} of {sizes[plate]}: its functions would be those of "
                    f"these rows alone. Give the arguments of the fit without subsampling, "
                    f"subsample_size=None, or write the process with sparse_gp, outside of the "
                    f"plate of its data."
                )


def _computed(dependents: Callable[[str | None], Dependents], moved: str | None) -> Dependents:
    return jax.jit(lambda: dependents(moved))()


def _differ(before: Any, after: Any) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
