"""Where members are computed: side by side on the devices of a mesh, and in groups on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from numpyro_ensemble.calls.arguments import FIXED, MEMBER_AXES, ROW_AXES, TRACED, Arguments
from numpyro_ensemble.calls.arguments import MEMBER as OWN
from numpyro_ensemble.hosts import Told, check_alike, of_all, processes, put_on_hosts

MEMBER, DATA = "member", "data"  # axes of a mesh
_ROW_AXES = {**ROW_AXES, TRACED: 0, OWN: None}  # where rows may stand


def as_mesh(mesh: Any) -> Mesh | None:
    """Return the mesh that `mesh=` means: "all" is one of all devices, with one axis.

    Raises:
        TypeError: for what is no mesh.
        ValueError: if its axes are not "member", or "member" and "data".
    """
    if mesh is None:
        return None
    if isinstance(mesh, str) and mesh == "all":
        return jax.make_mesh((jax.device_count(),), (MEMBER,), axis_types=(AxisType.Auto,))
    if not isinstance(mesh, Mesh):
        raise TypeError(f'mesh takes a jax.sharding.Mesh or "all", got {mesh!r}.')
    names = mesh.axis_names
    if MEMBER not in names or not set(names) <= {MEMBER, DATA}:
        raise ValueError(
            f"mesh has axes {list(names)}, and takes one named 'member', and one named 'data' for "
            f"the rows if they are to be spread too: jax.make_mesh((2, 4), ('member', 'data'))."
        )
    return Mesh(mesh.devices, names)  # whose axes are Auto: models are written for arrays as such


@dataclass(frozen=True)
class Placement:
    """How a function of one member is mapped over all.

    Attributes:
        batch_size: how many members go at once, on each device; None for all of them.
        mesh: devices that members are spread over; None for one.
    """

    batch_size: int | None = None
    mesh: Mesh | None = None

    def number(self, total: int) -> int:
        """Return how many members are computed, so that all devices have equally many.

        The members that are added are copies of the last one.
        """
        devices = 1 if self.mesh is None else self.mesh.shape[MEMBER]
        return -(-total // devices) * devices

    def check(self, total: int, what: str = "members") -> None:
        """Raise a ValueError where devices would have nothing to do."""
        if self.mesh is not None and self.mesh.shape[MEMBER] > total:
            raise ValueError(
                f"mesh spreads {what} over {self.mesh.shape[MEMBER]} devices, and there are "
                f"{total}: take a smaller mesh, or more {what}."
            )

    def map(self, fn: Callable, in_axes: Any, out_axes: Any = 0) -> Callable:
        """Map a function over a leading axis, as `jax.vmap` does; axes are 0 or None."""
        every = jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)
        if self.batch_size is not None:
            every = _in_groups(every, in_axes, out_axes, self.batch_size)
        return self.spread(every, in_axes, out_axes)

    def spread(self, every: Callable, in_axes: Any, out_axes: Any = 0) -> Callable:
        """Let each device call a function of many members for its own members."""
        if self.mesh is None:
            return every
        specs = (jax.tree.map(_spec, axes, is_leaf=_is_axis) for axes in (in_axes, out_axes))
        ways = dict(zip(("in_specs", "out_specs"), specs, strict=True))
        # rows stay with the partitioner, which sums gradients over them
        return jax.shard_map(every, mesh=self.mesh, axis_names={MEMBER}, check_vma=False, **ways)

    def padded(self, every: Callable, in_axes: Any, total: int) -> Callable:
        """Let a function of `number` take `total`, and return results of as many."""
        more = self.number(total) - total
        if not more:
            return every

        def call(*args: Any) -> Any:
            def filled(axis: int | None, part: Any) -> Any:
                return part if axis is None else jax.tree.map(lambda x: _with_last(x, more), part)

            return jax.tree.map(lambda x: x[:total], every(*map_axes(filled, in_axes, args)))

        return call

    def settle(self, tree: Any, total: int) -> Any:
        """Place arrays with a leading axis within a program: spread, if devices divide the axis.

        Each of several hosts has all of them.
        """
        if self.mesh is None:
            return tree
        spread = self.number(total) == total and not self.on_hosts
        where = NamedSharding(self.mesh, PartitionSpec(MEMBER) if spread else PartitionSpec())
        return jax.lax.with_sharding_constraint(tree, where)

    @property
    def on_hosts(self) -> bool:
        """Return whether devices of the mesh belong to several processes."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def speaks(self) -> bool:
        """Return whether this process is the first of the run; it shows bars and writes files."""
        return not self.on_hosts or jax.process_index() == processes(self.mesh)[0]

    def of_all(self, value: Any) -> np.ndarray:
        """Return the values of all processes of this run, `(P, ...)`; all call it together."""
        return of_all(value, self.mesh)

    def check_alike(self, describe: Callable[[], Told]) -> None:
        """Raise a ValueError if the calls of several processes differ."""
        check_alike(self.mesh, describe)

    def check_store(self) -> None:
        """Raise a ValueError where blocks for a store would be spread over several processes."""
        if self.on_hosts:
            raise ValueError(
                "a store is written by one process, and mesh has devices of several. In one of "
                "them (if jax.process_index() == 0) leave mesh out, or take one of "
                "jax.local_devices(): results that were gathered are whole in each process."
            )

    def fill(self, tree: Any, axes: Any) -> Any:
        """Put arrays where they are computed, with as many members as `number` says."""
        if self.mesh is None:
            return tree

        def put(axis: int | None, part: Any) -> Any:
            if axis is None:
                return self._put(part)
            return jax.tree.map(lambda leaf: self._put(self._padded(leaf), MEMBER), part)

        return map_axes(put, axes, tree)

    def _padded(self, leaf: Any) -> Any:
        return _with_last(leaf, self.number(len(leaf)) - len(leaf))

    def _put(self, tree: Any, *axes: str) -> Any:
        assert self.mesh is not None
        where = NamedSharding(self.mesh, PartitionSpec(*axes))
        if not self.on_hosts:
            return jax.device_put(tree, where)
        return jax.tree.map(lambda leaf: put_on_hosts(leaf, where), tree)

    def place(self, arguments: Arguments) -> Arguments:
        """Put the arguments of a model where they are used: members' own, rows, and the others.

        Raises:
            ValueError: where the mesh spreads rows, and does not divide their number.
        """
        if self.mesh is None:
            return arguments
        devices = self.mesh.shape.get(DATA, 1)
        rows = _rows(arguments) if devices > 1 else 0
        if rows % devices:
            raise ValueError(
                f"mesh spreads rows over {devices} devices, and there are {rows}, which {devices} "
                f"does not divide: leave some out, or take a mesh with another 'data' axis."
            )
        leaves = []
        for leaf, kind in zip(arguments.leaves, arguments.kinds, strict=True):
            if kind != FIXED:
                axes = [] if MEMBER_AXES[kind] is None else [MEMBER]
                if axes:
                    leaf = self._padded(leaf)
                axis = _ROW_AXES[kind]
                if rows and axis is not None and jnp.shape(leaf)[axis : axis + 1] == (rows,):
                    axes.append(DATA)  # after the members, if they have rows of their own
                leaf = self._put(leaf, *axes)
            leaves.append(leaf)
        return arguments._replace(leaves=tuple(leaves))

    def with_copies(self, tree: Any) -> Any:
        """Return arrays with copies of the last member for those that are added."""
        return jax.tree.map(self._padded, tree)

    def cut(self, tree: Any, axes: Any, total: int) -> Any:
        """Return arrays without the members that were added."""
        if self.number(total) == total:
            return tree

        def cut(axis: int | None, part: Any) -> Any:
            return part if axis is None else jax.tree.map(lambda leaf: leaf[:total], part)

        return map_axes(cut, axes, tree)


def map_axes(fn: Callable, axes: Any, tree: Any) -> Any:
    """Map `fn(axis, part)` over the parts of a tree that have an axis, 0 or None, of their own."""
    return jax.tree.map(fn, axes, tree, is_leaf=_is_axis)


def _is_axis(axis: Any) -> bool:
    return axis is None or isinstance(axis, int)


def _rows(arguments: Arguments) -> int:
    """Return the number of rows: the greatest length of the axes that may hold them."""
    lengths = [
        jnp.shape(leaf)[axis]
        for leaf, kind in zip(arguments.leaves, arguments.kinds, strict=True)
        if kind != FIXED and (axis := _ROW_AXES[kind]) is not None and jnp.ndim(leaf) > axis
    ]
    return max(lengths, default=0)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(MEMBER)


def _with_last(leaf: Any, number: int) -> Any:
    """Append so many copies of the last entry."""
    if not number:
        return leaf
    leaf = jnp.asarray(leaf)
    return jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (number, *leaf.shape[1:]))])


def _in_groups(every: Callable, in_axes: Any, out_axes: Any, most: int) -> Callable:
    """Call a function of all members for groups of them, one group after another."""

    def call(*args: Any) -> Any:
        mapped: list[Any] = []
        map_axes(
            lambda axis, part: mapped.extend([] if axis is None else jax.tree.leaves(part)),
            in_axes,
            args,
        )
        total = len(mapped[0])
        number = -(-total // most)
        size = -(-total // number)  # groups are of one size, so that they share a program
        if number == 1:
            return every(*args)

        def group(leaf: jax.Array) -> jax.Array:
            leaf = _with_last(jnp.asarray(leaf), number * size - total)
            return leaf.reshape(number, size, *leaf.shape[1:])

        def one(groups: list[jax.Array]) -> Any:
            parts = iter(groups)

            def filled(axis: int | None, part: Any) -> Any:
                return part if axis is None else jax.tree.map(lambda _: next(parts), part)

            return every(*map_axes(filled, in_axes, args))

        def joined(axis: int | None, part: Any) -> Any:
            if axis is None:
                return jax.tree.map(lambda leaf: leaf[0], part)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], part)

        groups = jax.lax.map(one, [group(leaf) for leaf in mapped])
        return map_axes(joined, out_axes, groups)

    return call
