"""The structure of the set-up of a fit."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ensemble.density import Site
from numpyro_ensemble.fit.state import GuideValues


class SetupTemplate:
    """The structure of a set-up fit, without any value that was traced.

    Two templates are equal if they were made from equal values, so that states of two fits of one
    model can be combined.

    Attributes:
        key: what the template was made from: model, settings and arguments, as a hashable.
        model: the model that was fitted.
        guide: the guide after its set-up, with a slot for each value.
        guide_forms: shapes and dtypes of one member's `GuideValues`.
        transforms: tree of the transforms of the parameters.
        leaves: leaves of that tree, None for those in `SetupValues.constraints`.
        sites: the model's sites.
        undeclared: shapes of the parameters that are declared without a value.
        member_ranks: number of axes, by name, of the arguments with a leading member axis.
    """

    def __init__(
        self,
        key: Hashable,
        model: Callable,
        guide: Callable,
        guide_forms: GuideValues,
        transforms: Any,
        leaves: tuple[Any, ...],
        sites: dict[str, Site],
        undeclared: dict[str, Any],
        member_ranks: dict[str, int],
    ) -> None:
        self.key = key
        self.model, self.guide, self.guide_forms = model, guide, guide_forms
        self.transforms, self.leaves = transforms, leaves
        self.sites, self.undeclared, self.member_ranks = sites, undeclared, member_ranks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetupTemplate) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple:
        """Leave out the key, which holds code: an unpickled template equals only itself."""
        leaves = [_HOLE if leaf is None else leaf for leaf in self.leaves]
        transforms = jax.tree.unflatten(self.transforms, leaves)
        fields = (self.model, self.guide, self.guide_forms, transforms)
        return _template, (*fields, self.sites, self.undeclared, self.member_ranks)

    def fill_values(self, values: GuideValues) -> GuideValues:
        """Return a value for each slot: zeros where only the shape is ever read."""

        def fill(form: Any, value: Any) -> Any:
            return jnp.zeros(form.shape, form.dtype) if value is None else value

        pairs = zip(self.guide_forms, values, strict=True)
        return GuideValues(*([fill(*p) for p in zip(f, v, strict=True)] for f, v in pairs))


class _Hole(enum.Enum):
    """Stands for a value in the transforms of a pickled template."""

    VALUE = 0


_HOLE = _Hole.VALUE


def _template(
    model: Callable, guide: Callable, guide_forms: GuideValues, transforms: Any, *others: Any
) -> SetupTemplate:
    leaves, tree = jax.tree.flatten(transforms)
    known = tuple(None if leaf is _HOLE else leaf for leaf in leaves)
    return SetupTemplate(object(), model, guide, guide_forms, tree, known, *others)


class Static:
    """A value that a traced function returns beside its arrays; compared by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(Static, lambda s: ((), s), lambda static, _: static)
