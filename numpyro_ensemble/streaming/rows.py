"""The arguments of a call that have rows, calls with some of the rows, and their keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from numpyro_ensemble.calls.arguments import BATCH, Arguments, arrange

_FEW = 8  # rows that a model is tried with, and twice as many
REMEDY = "Leave row_args out: the call is then cut by draws alone."


@dataclass(frozen=True)
class Rows:
    """The rows of a call, along the leading axes of some of its arguments.

    Attributes:
        arguments: of the call; those with rows are labelled as batched.
        total: number of rows.
    """

    arguments: Arguments
    total: int

    @classmethod
    def of(
        cls, model: Callable, args: tuple, kwargs: dict, row_args: Iterable[str | int]
    ) -> Rows | None:
        """Return the rows of a call, None if there is only one.

        Raises:
            ValueError: if `row_args` names no argument, or arrays of unequal lengths.
        """
        arguments = arrange(
            model, args, kwargs, batched=True, batch_args=row_args, traced=False, placed=False,
            batch_option="row_args",
        )  # fmt: skip
        lengths = {label: len(leaf) for label, leaf in arguments.labelled(BATCH)}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f"row_args takes names of arguments with the same number of rows along their "
                f"leading axes, at least one row; got {lengths or list(row_args)}."
            )
        total = next(iter(lengths.values()))
        return cls(arguments, total) if total > 1 else None

    @property
    def few(self) -> int:
        """Number of rows that a model is tried with."""
        return min(_FEW, self.total // 2)

    @property
    def tried(self) -> np.ndarray:
        """Indices of twice as many rows, spread over all, since the first rows may be alike."""
        return np.linspace(0, self.total - 1, 2 * self.few).round().astype(int)

    @property
    def labels(self) -> list[str]:
        """The user's names of the arguments with rows."""
        return [label for label, _ in self.arguments.labelled(BATCH)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all arguments."""
        leaves = self.arguments.select(BATCH)
        return sum(int(np.prod(np.shape(x)[1:])) * x.dtype.itemsize for x in leaves)

    def cut(self, call: tuple[tuple, dict], rows: Any) -> tuple[tuple, dict]:
        """Return a call with some of its rows, a slice or places; its arrays may be traced."""
        own = self.arguments._replace(leaves=tuple(jax.tree.leaves(call)))
        return own.rebuild({BATCH: [leaf[rows] for leaf in own.select(BATCH)]})

    def at(self, places: np.ndarray) -> tuple[tuple, dict]:
        """Return the call with the rows at some places."""
        leaves = [leaf[places] for leaf in self.arguments.select(BATCH)]
        return self.arguments.rebuild({BATCH: leaves})

    def block(self, rows: slice, size: int) -> tuple[tuple, dict]:
        """Return the call with the rows of a block, the last one repeated up to a size."""

        def padded(leaf: Any) -> Any:
            part, lacking = leaf[rows], size - (rows.stop - rows.start)
            if not lacking:
                return part
            numbers = jnp if isinstance(leaf, jax.Array) else np
            return numbers.concatenate([part, numbers.repeat(part[-1:], lacking, axis=0)])

        return self.arguments.rebuild({BATCH: [padded(x) for x in self.arguments.select(BATCH)]})

    def places(self, rows: slice, size: int) -> np.ndarray:
        """Return the places of these rows."""
        return np.minimum(np.arange(rows.start, rows.start + size), self.total - 1)


class block_seed(Messenger):  # noqa: N801  # a handler, lowercase as NumPyro's
    """Seed a model as NumPyro's `seed` does, with a new key in each block for sites with rows.

    Sites without rows have equal draws in all blocks, those of one call for all rows.

    Args:
        fn: the model; None for a context.
        rng_key: the key of one draw, the same in all blocks.
        known: names of sites whose values are given.
        drawn: names of the sites that have rows.
        block: number of the block.
    """

    def __init__(
        self,
        fn: Callable | None,
        rng_key: jax.Array,
        known: Collection[str],
        drawn: Collection[str],
        block: Any,
    ) -> None:
        super().__init__(fn)
        self.rng_key, self.known, self.drawn, self.block = rng_key, known, drawn, block
        self._asked: Any = None  # a key that `prng_key` returned and no site has used yet

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        if exc_info[0] is None:
            self._check_asked()

    def process_message(self, msg: Any) -> None:
        """Give a site its key."""
        if msg["type"] not in ("sample", "prng_key", "plate", "control_flow"):
            return
        given = msg["kwargs"].get("rng_key")
        if msg["type"] == "sample" and given is not None and given is self._asked:
            self._asked = None  # NumPyro's `uncondition` asks for the key of a site
            msg["kwargs"]["rng_key"] = self._of_site(msg, given)
            return
        self._check_asked()
        if msg["value"] is not None or given is not None:
            return
        if msg["type"] == "sample" and msg["name"] in self.known:
            return
        self.rng_key, key = jax.random.split(self.rng_key)
        msg["kwargs"]["rng_key"] = self._of_site(msg, key)
        if msg["type"] == "prng_key":
            self._asked = key

    def _of_site(self, msg: Any, key: jax.Array) -> jax.Array:
        # a loop has seeds of its own inside
        anew = msg["type"] == "control_flow" or msg.get("name") in self.drawn
        return jax.random.fold_in(key, self.block) if anew else key

    def _check_asked(self) -> None:
        if self._asked is not None:
            raise ValueError(
                f"the model draws random numbers with numpyro.prng_key, which may belong to all "
                f"rows at once. {REMEDY}"
            )
