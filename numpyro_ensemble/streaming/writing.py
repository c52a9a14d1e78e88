"""Blocks that are computed while the blocks before them are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import numpyro
import tqdm

from numpyro_ensemble.streaming.blocks import Block, Grid, Output
from numpyro_ensemble.streaming.options import StoreOptions
from numpyro_ensemble.streaming.store import BlockStore, import_zarr

LEAD = ("chain", "draw")


def write_call(
    store: Any,
    grid: Grid,
    outputs: Sequence[Output],
    compute: Callable[[Block], Callable[[], Mapping[str, Any]]],
    fingerprint: Mapping[str, Mapping[str, str]],
    members: np.ndarray,
    options: StoreOptions,
) -> Any:
    """Write all blocks of a call to a store, and return it as an `xarray.Dataset` on disk.

    Args:
        store: a path, or a store of Zarr's.
        grid: the blocks.
        outputs: the arrays that they fill.
        compute: as in `write_blocks`.
        fingerprint: digests that identify the call, besides its outputs and blocks.
        members: coordinates of the chains.
        options: the user's options.
    """
    import_zarr()
    import xarray

    coords = coords_of(outputs, members, grid.draws, options.coords)
    identity = {**fingerprint, **options.fingerprint(grid, outputs)}
    opened = BlockStore(store, identity, len(grid))
    try:
        if not opened.written:
            opened.describe("", library_attributes())
            for dim, values in coords.items():
                opened.put(dim, (dim,), values)
        write_blocks(opened, grid, outputs, compute, progress_bar=options.progress_bar)
        opened.finish()
    finally:
        opened.close()
    return xarray.open_zarr(opened.store, consolidated=True)


def write_blocks(
    store: BlockStore,
    grid: Grid,
    outputs: Sequence[Output],
    compute: Callable[[Block], Callable[[], Mapping[str, Any]]],
    *,
    progress_bar: bool = True,
) -> None:
    """Compute and write the blocks that a store lacks, one while the one before it is written.

    Args:
        store: where they go.
        grid: the blocks.
        outputs: the arrays that they fill.
        compute: starts the computation of a block, and returns a function that waits for its
            arrays, by path, with leading axes of the chains and draws of a whole block.
        progress_bar: show how many blocks are written.
    """
    if not store.written:
        for output in outputs:
            dims = (*(LEAD if output.drawn else ()), *output.dims)
            shape = (*((grid.chains, grid.draws) if output.drawn else ()), *output.shape)
            store.create(output.path, dims, shape, output.dtype, grid.chunks(output))

    def write(block: Block, wait: Callable[[], Mapping[str, Any]]) -> None:
        values = wait()
        for output in outputs:
            region = grid.region(block, output)
            if region is not None:
                value = np.asarray(values[output.path])
                store.write(output.path, region, value[_real(region)])
        store.advance()
        bar.update()

    done = store.written
    if done:
        last = list(grid)[done - 1]
        _check_goes_on(store, grid, outputs, last, compute(last)())
    hidden = not progress_bar or jax.process_index() != 0
    with (
        tqdm.tqdm(total=len(grid), initial=done, disable=hidden, unit="block") as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        ahead: Future | None = None
        for block in list(grid)[done:]:
            wait = compute(block)
            if ahead is not None:
                ahead.result()
            ahead = writer.submit(write, block, wait)
            del wait  # so that its arrays are freed before those of the next block
        if ahead is not None:
            ahead.result()


def _real(region: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return the slices of a region's numbers in its block, which is padded to its size."""
    return tuple(slice(0, part.stop - part.start) for part in region)


def _check_goes_on(
    store: BlockStore,
    grid: Grid,
    outputs: Sequence[Output],
    block: Block,
    values: Mapping[str, Any],
) -> None:
    """Raise a ValueError if the last written block has other numbers when computed again.

    A fingerprint does not contain the computations of the model. Up to 1 % of the numbers may
    differ, since the rounding of another machine can change a draw of whole numbers.
    """
    for output in outputs:
        region = grid.region(block, output)
        if region is None or not store.has(output.path):
            continue
        before = store.read(output.path, region)
        now = np.asarray(values[output.path])[_real(region)]
        scale = np.abs(before[np.isfinite(before)]).max(initial=0.0)
        equal = np.isclose(now, before, rtol=1e-3, atol=1e-5 * scale, equal_nan=True)
        if (~equal).mean() > 0.01:
            raise ValueError(
                f"the store exists: {store.name} is of another call, whose {output.path!r} has "
                f"other numbers: another model, or other versions of packages. Give this call "
                f"another store, or remove that one."
            )


def coords_of(
    outputs: Sequence[Output], members: np.ndarray, draws: int, coords: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the coordinates of a group: those given, and numbers for the other dimensions.

    A dimension of rows has only given coordinates, because readers hold coordinates in memory.

    Raises:
        ValueError: for a dimension of two lengths, and coordinates of another length.
    """
    sizes: dict[str, int] = {"chain": len(members), "draw": draws}
    with_rows: set[str] = set()
    for output in outputs:
        lengths = zip(output.dims, output.shape, strict=True)
        for axis, (dim, length) in enumerate(lengths):
            if sizes.setdefault(dim, length) != length:
                raise ValueError(
                    f"dimension {dim!r} has length {sizes[dim]} in one site, and {length} in "
                    f"{output.path!r}: rename one of them by dims=."
                )
            if axis == output.axis:
                with_rows.add(dim)
    values = {dim: np.arange(n) for dim, n in sizes.items() if dim not in with_rows}
    values["chain"] = members
    for dim, given in coords.items():
        if dim in sizes and np.shape(given) != (sizes[dim],):
            raise ValueError(
                f"coords gives values of shape {np.shape(given)} for {dim!r}, which has length "
                f"{sizes[dim]}."
            )
    return values | {dim: given for dim, given in coords.items() if dim in sizes}


def library_attributes() -> dict[str, str]:
    """Return attributes with the versions of the libraries that wrote a group."""
    import numpyro_ensemble

    return {
        "inference_library": "numpyro_ensemble",
        "inference_library_version": numpyro_ensemble.__version__,
        "numpyro_version": numpyro.__version__,
    }
