"""Positions of all chains as one array `(C, D)`, which kernels move and adapt from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Coordinates:
    """The order of a model's unconstrained values in the D coordinates of a chain's row.

    Kernels work on rows, not on a model's sites. BlackJAX's adaptation takes the first axis of a
    leaf as chains and the last one as coordinates, and is wrong for leaves of any other shape.

    Args:
        z: unconstrained values with a leading chain axis.
        names: latent sites in the model's order, since JAX's transformations sort the keys of a
            dictionary. Empty if `z` is no dictionary of sites.
    """

    def __init__(self, z: Any, names: Sequence[str] = ()) -> None:
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(z)
        found = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        rank = {name: i for i, name in enumerate(names)}
        # sorted keeps the tree's order among leaves that have no rank
        self._order = sorted(range(len(found)), key=lambda i: rank.get(found[i], len(rank)))
        self._names = [found[i] for i in self._order]
        leaves = [paths[i][1] for i in self._order]
        self._shapes = [jnp.shape(leaf)[1:] for leaf in leaves]
        self._dtypes = [jnp.result_type(leaf) for leaf in leaves]
        self._ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes]).tolist()
        self.num_chains = jnp.shape(leaves[0])[0]

    @property
    def form(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the name and the shape of each leaf, without the chain axis."""
        return tuple(zip(self._names, self._shapes, strict=True))

    @property
    def size(self) -> int:
        """The number D of coordinates."""
        return self._ends[-1]

    def rows(self, tree: Any) -> Any:
        """Lay values or gradients of all chains side by side, `(C, D)`; None stays None."""
        if tree is None:
            return None
        leaves = jax.tree.leaves(tree)
        # sizes are written out, since reshape cannot infer -1 for an empty site
        parts = [
            jnp.reshape(leaves[i], (jnp.shape(leaves[i])[0], int(np.prod(shape))))
            for i, shape in zip(self._order, self._shapes, strict=True)
        ]
        return jnp.concatenate(parts, axis=1)

    def tree(self, rows: Any) -> Any:
        """Undo `rows`, for rows `(C, D)` or for the one row `(D,)` of a chain; None stays None."""
        if rows is None:
            return None
        leaves: list[Any] = [None] * len(self._order)
        pieces = jnp.split(rows, self._ends[:-1], axis=-1)  # its transpose is one concatenation
        parts = zip(self._order, pieces, self._shapes, self._dtypes, strict=True)
        for i, piece, shape, dtype in parts:
            leaves[i] = piece.reshape(*rows.shape[:-1], *shape).astype(dtype)
        return self._treedef.unflatten(leaves)

    def site_of(self, coordinate: int) -> str:
        """Return the name of the site that a coordinate belongs to."""
        return self._names[int(np.searchsorted(self._ends, coordinate, "right"))] or "the position"
