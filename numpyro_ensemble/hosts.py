"""Values of several processes that share a mesh: collected, and checked to agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from numpyro_ensemble.calls.identity import contents


def processes(mesh: Mesh | None) -> list[int]:
    """Return the numbers of the processes whose devices a mesh has; without one, this one."""
    if mesh is None:
        return [jax.process_index()]
    return sorted({device.process_index for device in mesh.devices.flat})


def of_all(value: Any, mesh: Mesh | None) -> np.ndarray:
    """Return the values of all processes of a mesh, `(P, ...)`; all of them call it together."""
    value = np.asarray(value)
    if mesh is None or not mesh.is_multi_process:
        return value[None]
    devices = mesh.devices.ravel()
    where = NamedSharding(Mesh(devices, ("all",)), PartitionSpec("all"))
    shape = (len(devices), *value.shape)
    each = jax.make_array_from_callback(shape, where, lambda _: value[None])
    owners = [device.process_index for device in devices]
    return np.asarray(home([each])[0])[[owners.index(p) for p in processes(mesh)]]


Told = Mapping[str, Mapping[str, str]]  # texts by name in named groups


def check_alike(mesh: Mesh | None, describe: Callable[[], Told]) -> None:
    """Raise a ValueError in all processes of a mesh if their calls differ.

    Args:
        mesh: its processes call this function together.
        describe: returns texts of what this process was called with. It is called only where
            there are several processes.
    """
    if mesh is None or not mesh.is_multi_process:
        return
    texts = {(group, name): text for group, of in describe().items() for name, text in of.items()}
    names = sorted(texts)
    if _differ(of_all(_digest("".join(map(repr, names))), mesh)):
        raise ValueError(
            "processes call this with different models or arguments: their names differ. Run the "
            "same script in all processes."
        )
    digests = of_all(np.stack([_digest(texts[name]) for name in names]), mesh)
    for i, (group, name) in enumerate(names):
        if _differ(digests[:, i]):
            other = processes(mesh)[int((digests[:, i] != digests[0, i]).any(axis=1).argmax())]
            raise ValueError(
                f"{group} {name!r} differs between processes {processes(mesh)[0]} and {other}: "
                f"pass the same data, keys and settings in all of them; the mesh spreads them."
            )


def _differ(values: np.ndarray) -> bool:
    return bool((values != values[:1]).any())


def _digest(text: str) -> np.ndarray:
    named = contents(np.frombuffer(text.encode(), np.uint8))
    return np.frombuffer(bytes.fromhex(named), np.uint8)


def home(tree: Any) -> Any:
    """Return arrays that this process has whole, where some were spread over processes."""
    leaves, treedef = jax.tree.flatten(tree)
    far = [i for i, leaf in enumerate(leaves) if _is_far(leaf)]
    if not far:
        return tree
    kinds = [jax.random.key_impl(leaves[i]) if _is_key(leaves[i]) else None for i in far]
    plain: list[Any] = [
        leaves[i] if kind is None else jax.random.key_data(leaves[i])
        for i, kind in zip(far, kinds, strict=True)
    ]
    everywhere = [NamedSharding(leaf.sharding.mesh, PartitionSpec()) for leaf in plain]
    whole = jax.jit(_same, out_shardings=everywhere)(plain)
    for i, kind, leaf in zip(far, kinds, whole, strict=True):
        local = leaf.addressable_data(0)
        leaves[i] = local if kind is None else jax.random.wrap_key_data(local, impl=kind)
    return jax.tree.unflatten(treedef, leaves)


def _same(tree: Any) -> Any:
    """Return a tree as it is: one function, so that a program that moves arrays is found again."""
    return tree


def is_far(tree: Any) -> bool:
    """Return whether arrays are spread over several processes."""
    return any(map(_is_far, jax.tree.leaves(tree)))


def _is_far(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return is_array and not leaf.is_fully_addressable


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def put_on_hosts(leaf: Any, where: NamedSharding) -> Any:
    """Put an array that each process has, or that is spread over all, where it belongs."""
    if _is_key(leaf):
        data = put_on_hosts(jax.random.key_data(leaf), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if _is_far(leaf):
        return jax.jit(_same, out_shardings=where)(leaf)
    local = np.asarray(leaf)
    return jax.make_array_from_callback(local.shape, where, lambda index: local[index])
