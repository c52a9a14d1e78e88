"""Trees of arrays on disk: `.npz` files with a description in JSON, and no code to run."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1
_HEADER = "numpyro_ensemble"  # the name of the description among the arrays
_PLAIN = (bool, int, float, str)
_PACKAGES = ("numpyro_ensemble", "numpyro", "jax", "optax")


class Leaves:
    """The leaves of a tree that was saved without its structure, by their paths.

    It takes the structure of another tree with the same paths: `restored`.
    """

    def __init__(self, paths: Iterable[str], leaves: Iterable[Any]) -> None:
        self.paths, self.leaves = tuple(paths), list(leaves)

    @classmethod
    def of(cls, tree: Any) -> Leaves:
        """Return the leaves of a tree, which may have been saved without structure itself."""
        if isinstance(tree, cls):
            return tree
        pairs = jax.tree_util.tree_leaves_with_path(tree)
        return cls((jax.tree_util.keystr(path) for path, _ in pairs), (leaf for _, leaf in pairs))

    def __getattr__(self, name: str) -> Any:
        """Return a leaf that was a field of the tree's outermost object."""
        paths = self.__dict__.get("paths", ())
        if f".{name}" in paths:
            return self.leaves[paths.index(f".{name}")]
        raise AttributeError(name)


jax.tree_util.register_pytree_node(
    Leaves, lambda saved: (saved.leaves, saved.paths), lambda paths, leaves: Leaves(paths, leaves)
)


def restored(saved: Leaves, like: Any) -> Any:
    """Return the tree whose leaves were saved, in the structure of another.

    Raises:
        ValueError: if that has other leaves.
    """
    wanted, given = Leaves.of(like).paths, saved.paths
    if wanted != given:
        lacks, more = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        raise ValueError(f"what was saved lacks {lacks[:5]}, and has {more[:5]} instead.")
    return jax.tree.unflatten(jax.tree.structure(like), saved.leaves)


def without_key(array: Any) -> tuple[np.ndarray, str | None]:
    """Return an array as NumPy's, and which kind of random keys it holds, None for numbers."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(array)), str(jax.random.key_impl(array))
    return np.asarray(array), None


def with_key(array: np.ndarray, kind: str | None) -> Any:
    """Return the array that `without_key` has taken apart."""
    return array if kind is None else jax.random.wrap_key_data(jnp.asarray(array), impl=kind)


class _Writer(NamedTuple):
    arrays: dict[str, np.ndarray]

    def describe(self, tree: Any, path: str) -> Any:
        """Return a description of a tree in JSON's terms, and note its arrays by their paths."""
        if tree is None:
            return None
        if isinstance(tree, Leaves):
            each = [
                self.describe(x, path + p) for p, x in zip(tree.paths, tree.leaves, strict=True)
            ]
            return {"leaves": each, "paths": list(tree.paths)}
        if isinstance(tree, dict) and all(isinstance(name, str) for name in tree):
            return {"dict": {name: self.describe(x, f"{path}/{name}") for name, x in tree.items()}}
        if type(tree) in (list, tuple):
            each = [self.describe(x, f"{path}/{i}") for i, x in enumerate(tree)]
            return {"list" if type(tree) is list else "tuple": each}
        if isinstance(tree, _PLAIN):
            return {"value": tree}
        if isinstance(tree, np.ndarray | np.generic | jax.Array):
            return self._array(tree, path)
        raise TypeError(
            f"{path} holds a {type(tree).__name__}, which is neither an array nor a dict, list or "
            f"tuple of arrays. Orbax and pickle save such trees."
        )

    def _array(self, array: Any, path: str) -> dict[str, Any]:
        described: dict[str, Any] = {"array": path}
        array, kind = without_key(array)
        if kind is not None:
            described["key"] = kind
        if array.dtype.kind == "V":  # bfloat16 and the like, which NumPy's files do not know
            described["dtype"] = array.dtype.name
            array = array.view(f"u{array.dtype.itemsize}")
        self.arrays[path] = array
        return described


def write(path: str | os.PathLike, kind: str, tree: dict[str, Any]) -> None:
    """Write a tree into a file, which is there whole or not at all."""
    path, writer = Path(path), _Writer({})
    content = {name: writer.describe(part, name) for name, part in tree.items()}
    versions = {package: version(package) for package in _PACKAGES}
    header = {"format": FORMAT, "kind": kind, "versions": versions, "content": content}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            np.savez(file, **{_HEADER: text}, **writer.arrays)  # type: ignore[arg-type]
            file.close()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Return the tree that was written into a file.

    Raises:
        ValueError: if the file is of another kind or a later format, or damaged.
    """
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged, or no file that save wrote.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(bytes(arrays[_HEADER]))
            if header["format"] > FORMAT:
                raise ValueError(
                    f"{path} is of format {header['format']}, written by numpyro_ensemble "
                    f"{header['versions']['numpyro_ensemble']}; this version reads up to {FORMAT}."
                )
            if header["kind"] != kind:
                raise ValueError(f"{path} holds a {header['kind']}, not a {kind}.")
            return {name: _built(part, arrays) for name, part in header["content"].items()}
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no file that save wrote: {error}") from error


def _built(described: Any, arrays: Any) -> Any:
    if described is None:
        return None
    ((first, content), *_) = described.items()
    if first == "dict":
        return {name: _built(part, arrays) for name, part in content.items()}
    if first in ("list", "tuple", "leaves"):
        each = [_built(part, arrays) for part in content]
        if first == "leaves":
            return Leaves(described["paths"], each)
        return each if first == "list" else tuple(each)
    if first == "value":
        return content
    array = arrays[content]
    if "dtype" in described:
        array = array.view(jnp.dtype(described["dtype"]))
    return with_key(array, described.get("key"))


def first_difference(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> str | None:
    """Name the first thing in which two fingerprints differ, texts by name in named groups."""
    for group, mine in now.items():
        theirs = before.get(group, {})
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return (
                    f"{group} {name!r} was {theirs.get(name, 'not there')}, and is "
                    f"{mine.get(name, 'not there')}"
                )
    return None


def lock(path: Path) -> int | Literal[False] | None:
    """Lock a directory, or a file that is made if need be, for as long as this process lives.

    Returns:
        What `unlock` takes; False where another process has the lock, and None where the system or
        the file system knows no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return False if isinstance(error, BlockingIOError) else None
    return handle


def unlock(handle: int | Literal[False] | None) -> None:
    """Give a lock back."""
    if handle is not None and handle is not False:
        os.close(handle)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
