"""How a call is cut into blocks: rectangles of chains, draws and rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numpyro_ensemble.mapping import ROOM, platform_of

# Three blocks are alive at once: one is computed, one is written, and one is copied by the writer.
# glibc reuses buffers of up to 32 MiB. The system maps larger ones again, page by page, and blocks
# of 64 MiB took 1.5 times as long.
BLOCK_BYTES = 24 << 20
_TEMPORARY_BYTES = 16 << 20
_LEAST_ROWS = 1024  # with fewer, starting the program takes longer than its work


def room_in_block(*trees: Any) -> int:
    """Return how many bytes may be alive at once while a block is computed where arrays are."""
    return _TEMPORARY_BYTES if platform_of(*trees) == "cpu" else ROOM


class Output(NamedTuple):
    """An array that the blocks of a call fill.

    Attributes:
        path: its name, after the name of its group if there are groups.
        dims: names of the axes of one draw.
        shape: of one draw, with all rows.
        dtype: of its numbers.
        axis: of the rows. None if it has no rows: then the first block of rows has all of it.
        sums: whether each block of rows gives one number, along this axis.
        drawn: whether it has leading axes of chains and draws.
    """

    path: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int | None = None
    sums: bool = False
    drawn: bool = True

    @property
    def row_bytes(self) -> int:
        """Bytes of one draw, or of one row of it where it has rows."""
        others = [n for i, n in enumerate(self.shape) if i != self.axis]
        return int(np.prod(others)) * self.dtype.itemsize


class Block(NamedTuple):
    """A rectangle of chains, draws and rows, and the number of these rows' block."""

    chains: slice
    draws: slice
    rows: slice
    number: int


@dataclass(frozen=True)
class Grid:
    """The blocks of a call.

    Attributes:
        chains: number of chains.
        draws: number of draws from each.
        rows: number of rows, 1 where rows are not cut.
        chain_size: chains of a block.
        draw_size: draws of a block.
        row_size: rows of a block.
        rows_first: whether all draws of some rows follow each other, or all rows of some draws.
    """

    chains: int
    draws: int
    rows: int
    chain_size: int
    draw_size: int
    row_size: int
    rows_first: bool = True

    def __len__(self) -> int:
        return len(self._samples) * self.row_blocks

    @property
    def row_blocks(self) -> int:
        """Number of blocks of rows."""
        return len(self.row_cuts)

    @property
    def row_cuts(self) -> list[slice]:
        """The blocks of rows."""
        return _cuts(self.rows, self.row_size)

    @property
    def _samples(self) -> list[tuple[slice, slice]]:
        chains, draws = _cuts(self.chains, self.chain_size), _cuts(self.draws, self.draw_size)
        return [(own, some) for own in chains for some in draws]

    def __iter__(self) -> Iterator[Block]:
        samples = self._samples
        rows = list(enumerate(self.row_cuts))
        if self.rows_first:
            yield from (Block(*at, cut, number) for number, cut in rows for at in samples)
        else:
            yield from (Block(*at, cut, number) for at in samples for number, cut in rows)

    def members(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return chain and draw of each prediction of a block; the last ones fill it up."""
        chains = np.arange(block.chains.start, block.chains.start + self.chain_size)
        draws = np.arange(block.draws.start, block.draws.start + self.draw_size)
        chain, draw = np.meshgrid(
            np.minimum(chains, self.chains - 1), np.minimum(draws, self.draws - 1), indexing="ij"
        )
        return chain, draw

    def region(self, block: Block, output: Output) -> tuple[slice, ...] | None:
        """Return where an output takes the numbers of a block, None where it takes none."""
        if output.axis is None and block.number:
            return None
        if not output.drawn and (block.chains.start or block.draws.start):
            return None
        where = [slice(0, n) for n in output.shape]
        if output.axis is not None:
            one = slice(block.number, block.number + 1)
            where[output.axis] = one if output.sums else block.rows
        return (*((block.chains, block.draws) if output.drawn else ()), *where)

    def chunks(self, output: Output) -> tuple[int, ...]:
        """Return the shape of the chunks of an output: no two blocks share one."""
        shape = list(output.shape)
        if output.axis is not None:
            shape[output.axis] = 1 if output.sums else self.row_size
        whole = [self.chain_size, self.draw_size, *shape] if output.drawn else shape
        first = 2 if output.drawn else 0
        while np.prod(whole) * output.dtype.itemsize > ROOM:  # codecs take less than 2 GiB
            longest = max(range(first, len(whole)), key=whole.__getitem__, default=0)
            if first == len(whole) or whole[longest] == 1 or longest - first == output.axis:
                break
            whole[longest] = -(-whole[longest] // 2)
        return tuple(max(n, 1) for n in whole)


def _cuts(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _even(total: int, most: int) -> int:
    """Return the size of the parts if a total is cut into few equal parts of at most a size."""
    most = min(max(most, 1), total)
    return -(-total // -(-total // most))


def grid_for(
    chains: int,
    draws: int,
    outputs: list[Output],
    *,
    rows: int = 1,
    most_rows: int | None = None,
    most_draws: int | None = None,
    row_size: int | None = None,
    draws_at_once: int | None = None,
    rows_first: bool = True,
) -> Grid:
    """Return the blocks of a call, of 24 MiB by default.

    Args:
        chains: number of chains.
        draws: number of draws from each.
        outputs: what the blocks fill.
        rows: number of rows, 1 where rows are not cut.
        most_rows: rows of a block at most, by what they need besides the outputs.
        most_draws: draws of a block at most, by what they need besides the outputs.
        row_size: rows of a block, set by the user.
        draws_at_once: draws of a block, set by the user.
        rows_first: whether all draws of some rows follow each other, or all rows of some draws.
    """
    fixed = sum(output.row_bytes for output in outputs if output.axis is None)
    per_row = sum(o.row_bytes for o in outputs if o.axis is not None and not o.sums)
    most_draws = min(chains * draws, most_draws or chains * draws)
    if row_size is None:
        fits = BLOCK_BYTES // max(per_row * min(most_draws, draws_at_once or most_draws), 1)
        fits = min(max(fits, _LEAST_ROWS), most_rows or rows)
        row_size = _even(rows, fits)
    row_size = min(row_size, rows)
    if draws_at_once is None:
        draws_at_once = min(most_draws, BLOCK_BYTES // max(fixed + per_row * row_size, 1))
    if draws_at_once >= draws:
        chain_size, draw_size = _even(chains, draws_at_once // draws), draws
    else:
        chain_size, draw_size = 1, _even(draws, draws_at_once)
    return Grid(chains, draws, rows, chain_size, draw_size, row_size, rows_first)
