"""A Zarr store that one call fills block after block, and continues after it was stopped."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from numpyro_ensemble.storage import first_difference, lock, unlock

# attributes of the store: its call, its number of blocks, and the number of whole blocks
_CALL, _BLOCKS, _WRITTEN = "call", "blocks", "blocks_written"


def import_zarr() -> Any:
    """Return the package `zarr`.

    Raises:
        ImportError: if it is not installed, or too old.
    """
    try:
        import zarr

        if int(zarr.__version__.partition(".")[0]) < 3:
            raise ImportError(f"this is zarr {zarr.__version__}")
    except ImportError as error:
        raise ImportError(
            "Zarr stores need zarr 3 or later: pip install 'numpyro_ensemble[zarr]'."
        ) from error
    return zarr


def local_path(store: Any) -> Path | None:
    """Return the directory of a store on disk, None for one elsewhere."""
    if isinstance(store, os.PathLike):
        return Path(store)
    if isinstance(store, str):
        return None if "://" in store else Path(store)
    root = getattr(store, "root", None)
    return root if isinstance(root, Path) else None


class BlockStore:
    """A store that is open for the blocks of one call, which are written in their order.

    A block counts once all of its arrays are written. A block that was written in part is written
    again.

    Args:
        store: a path, or a store of Zarr's.
        fingerprint: digests that identify the call, by name in named groups.
        blocks: number of blocks.

    Attributes:
        written: number of blocks that are whole.

    Raises:
        ValueError: if the store is finished, or another call owns or writes it.
    """

    def __init__(
        self, store: Any, fingerprint: Mapping[str, Mapping[str, str]], blocks: int
    ) -> None:
        self._zarr, self._path = import_zarr(), local_path(store)
        self._lock: Any = None
        self.store = store
        if getattr(store, "read_only", False):
            raise ValueError(f"{self.name} was opened read-only: open it for writing.")
        if getattr(store, "supports_deletes", True) is False:
            raise ValueError(
                f"{self.name} cannot overwrite values: write to a directory, and pack it then."
            )
        if self._path is not None:
            self._path.mkdir(parents=True, exist_ok=True)
            self.store = self._zarr.storage.LocalStore(self._path)
        self._lock = None if self._path is None else lock(self._path)
        if self._lock is False:
            raise ValueError(
                f"another call writes {self.name}: give this call another store. If several "
                f"processes run one script, let one of them write: if jax.process_index() == 0."
            )
        try:
            self._root = self._opened(fingerprint, blocks)
        except BaseException:
            unlock(self._lock)
            raise

    @property
    def name(self) -> str:
        """What messages call the store."""
        return str(self._path or self.store)

    def _opened(self, fingerprint: Mapping[str, Mapping[str, str]], blocks: int) -> Any:
        try:
            root = self._zarr.open_group(self.store, mode="r+", zarr_format=3)
        except (FileNotFoundError, KeyError):
            if self._path is not None and any(self._path.iterdir()):
                raise self._foreign() from None
            attributes = {_CALL: json.dumps(fingerprint), _BLOCKS: blocks, _WRITTEN: 0}
            return self._zarr.create_group(self.store, attributes=attributes, zarr_format=3)
        except self._zarr.errors.ContainsArrayError:
            raise self._foreign() from None
        if _CALL not in root.attrs:
            raise self._foreign()
        difference = first_difference(json.loads(root.attrs[_CALL]), fingerprint)
        if difference:
            raise ValueError(
                f"the store exists: {self.name} is of another call, {difference}. Give this call "
                f"another store, or remove that one."
            )
        consolidated = root.metadata.consolidated_metadata is not None
        if consolidated and root.attrs[_WRITTEN] == root.attrs[_BLOCKS]:
            raise ValueError(
                f"the store exists: {self.name} holds all of this call, and xarray.open_zarr reads "
                f"it. Remove it to write it again."
            )
        if self._path is not None:  # files that were being written when their process ended
            for part in self._path.rglob("*.partial"):
                part.unlink()
        return root

    def _foreign(self) -> ValueError:
        return ValueError(
            f"the store exists: {self.name} was not written by this package. Give this call "
            f"another store."
        )

    @property
    def written(self) -> int:
        """Number of blocks that are whole."""
        return self._root.attrs[_WRITTEN]

    def describe(self, group: str, attributes: Mapping[str, Any]) -> None:
        """Give a group attributes; "" is the store itself."""
        plain = {name: _plain(value) for name, value in attributes.items()}
        (self._root.require_group(group) if group else self._root).attrs.update(plain)

    def create(
        self,
        path: str,
        dims: Iterable[str],
        shape: tuple[int, ...],
        dtype: Any,
        chunks: tuple[int, ...] | None = None,
    ) -> Any:
        """Make an array without values, replacing one of its name. Missing values are NaN."""
        group, _, name = path.rpartition("/")
        dtype = stored_dtype(dtype)
        # random numbers do not compress: compressing them takes longer than writing them
        packed = self._zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle")
        return (self._root.require_group(group) if group else self._root).create_array(
            name,
            shape=shape,
            chunks=chunks or tuple(max(n, 1) for n in shape),
            dtype="string" if dtype.kind in "OSU" else dtype,
            compressors=packed if dtype.kind in "iub" else None,
            fill_value=np.nan if dtype.kind in "fc" else None,
            dimension_names=tuple(dims),
            overwrite=True,
            config={"write_empty_chunks": True},  # False would search each chunk for values
        )

    def put(self, path: str, dims: Iterable[str], values: Any) -> None:
        """Write a whole array; times are stored as xarray reads them."""
        values, attributes = np.asarray(values), {}
        if values.dtype.kind in "mM":
            import xarray

            encoded = xarray.conventions.encode_cf_variable(xarray.Variable(tuple(dims), values))
            values, attributes = np.asarray(encoded.values), encoded.attrs
        array = self.create(path, dims, values.shape, values.dtype)
        array[...] = values.astype(stored_dtype(values.dtype), copy=False)
        array.attrs.update({n: _plain(x) for n, x in attributes.items() if n != "_FillValue"})

    def write(self, path: str, region: tuple[slice, ...], values: np.ndarray) -> None:
        """Write a part of an array."""
        self._root[path][region] = values.astype(stored_dtype(values.dtype), copy=False)

    def read(self, path: str, region: Any = ...) -> np.ndarray:
        """Return an array, or a part of it."""
        return self._root[path][region]

    def has(self, path: str) -> bool:
        """Return whether an array is there."""
        return path in self._root

    def delete(self, path: str) -> None:
        """Remove an array, if it is there."""
        if self.has(path):
            del self._root[path]

    def advance(self) -> None:
        """Count one more block as whole."""
        self._root.attrs[_WRITTEN] = self.written + 1

    def finish(self) -> None:
        """Gather all metadata in one file, which readers use."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
            self._zarr.consolidate_metadata(self.store, zarr_format=3)

    def close(self) -> None:
        """Let other calls write the store."""
        unlock(self._lock)


def stored_dtype(dtype: Any) -> np.dtype:
    """Return the form in which numbers are stored: single precision for those of fewer bits."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.kind == "V" else dtype  # bfloat16 and the like


def _plain(value: Any) -> Any:
    """Return what JSON can hold of an attribute."""
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__jax_array__"):
        return np.asarray(value).tolist()
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
