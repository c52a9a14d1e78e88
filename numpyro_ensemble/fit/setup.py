"""What the start of a fit sets up, and the state that carries it."""

from __future__ import annotations

import contextlib
import copy
import enum
import pickle
import sys
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import CallForm
from numpyro_ensemble.density import Site


class GuideValues(NamedTuple):
    """The values that a guide's set-up computed; None for those that no later call reads."""

    supports: list[Any]  # what the support of a latent depends on, per member
    own: list[Any]  # everything else of the member's own
    shared: list[Any]  # what all members share: arguments, and what was computed from these


class SetupValues(NamedTuple):
    """The values that the start of a fit computed and that later steps need."""

    constraints: list[Any]  # leaves of the parameters' transforms, per member
    guide: GuideValues
    arguments: dict[str, list[Any]]  # of the start, where constraining a parameter reads them

    def without_arguments(self) -> SetupValues:
        """Return the values that the steps of a fit need."""
        return self._replace(arguments={})


VALUE_AXES = SetupValues(0, GuideValues(0, 0, None), {})  # type: ignore[arg-type]


class SetupTemplate:
    """The structure of a set-up fit, without any value that was traced.

    Two are equal where everything that they were made from is, so that states of two fits of one
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
        member_labels: names of the arguments that each member has its own of.
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
        member_labels: tuple[str, ...],
    ) -> None:
        self.key = key
        self.model, self.guide, self.guide_forms = model, guide, guide_forms
        self.transforms, self.leaves = transforms, leaves
        self.sites, self.undeclared, self.member_labels = sites, undeclared, member_labels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetupTemplate) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple:
        """Leave out the key, which holds code: a template from elsewhere equals itself alone."""
        leaves = [_HOLE if leaf is None else leaf for leaf in self.leaves]
        transforms = jax.tree.unflatten(self.transforms, leaves)
        fields = (self.model, self.guide, self.guide_forms, transforms)
        return _template, (*fields, self.sites, self.undeclared, self.member_labels)

    def fill_values(self, values: GuideValues) -> GuideValues:
        """Return a value for each slot: zeros where no call reads more than the shape."""

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


def _dumped(structure: Any) -> bytes | None:
    """Pickle a structure, None where that cannot be: pickle knows no closures, cloudpickle does."""
    for module in (pickle, sys.modules.get("cloudpickle")):
        if module is not None:
            with contextlib.suppress(Exception):  # which depends on what cannot be pickled
                return module.dumps(structure)
    return None


def _loaded(values: SetupValues, structure: bytes | None) -> Setup:
    return Setup(values, *((None, None) if structure is None else pickle.loads(structure)))


class Setup:
    """What a state carries from the start of its fit: values, and the structure that holds them.

    Attributes:
        values: arrays, `SetupValues`.
        template: the structure, None once a state was pickled whose model cannot be.
        call: the arguments of the start without its arrays, where `values.arguments` has these.
    """

    def __init__(
        self, values: SetupValues, template: SetupTemplate | None, call: CallForm | None = None
    ) -> None:
        self.values, self.template, self.call = values, template, call

    def of_members(self, members: Any) -> Setup:
        """Return the set-up of some members."""

        def take(leaf: Any) -> Any:
            return leaf[members]

        constraints, guide, arguments = self.values
        supports, own = jax.tree.map(take, guide[:2])
        values = SetupValues(
            jax.tree.map(take, constraints), GuideValues(supports, own, guide.shared), arguments
        )
        return Setup(values, self.template, self.call)

    def __reduce__(self) -> tuple:
        structure = _dumped((self.template, self.call))
        values = self.values if structure is not None else self.values.without_arguments()
        return _loaded, (values, structure)

    def __deepcopy__(self, memo: dict) -> Setup:
        return Setup(copy.deepcopy(self.values, memo), self.template, self.call)


jax.tree_util.register_pytree_with_keys(
    Setup,
    lambda s: (((GetAttrKey("values"), s.values),), (s.template, s.call)),
    lambda static, children: Setup(children[0], *static),
)


class FitState(SVIState):
    """NumPyro's `SVIState` of all members, with what the start of the fit has set up.

    It unpacks into the three fields of `SVIState`; each of their leaves leads with `(E,)`.
    """

    setup: Setup | None

    def __new__(
        cls, optim_state: Any, mutable_state: Any, rng_key: Any, setup: Setup | None = None
    ) -> FitState:
        """Make a state of `SVIState`'s three fields."""
        state = super().__new__(cls, optim_state, mutable_state, rng_key)
        state.setup = setup
        return state

    def _replace(self, **fields: Any) -> FitState:  # type: ignore[override]
        return with_setup(plain(self)._replace(**fields), self.setup)

    def __reduce__(self) -> tuple:
        return FitState, (*self, self.setup)


jax.tree_util.register_pytree_with_keys(
    FitState,
    lambda s: (
        tuple((GetAttrKey(n), getattr(s, n)) for n in (*SVIState._fields, "setup")),
        None,
    ),
    lambda _, children: FitState(*children),
)


class Static:
    """A value that a traced function returns beside its arrays; compared by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(Static, lambda s: ((), s), lambda static, _: static)


def plain(state: SVIState) -> SVIState:
    """Return NumPyro's own state, without a set-up."""
    return SVIState(*state)


def with_setup(state: SVIState, setup: Setup | None) -> FitState:
    """Return a state with another set-up."""
    return FitState(state.optim_state, state.mutable_state, state.rng_key, setup)


def setup_of(state: SVIState) -> Setup | None:
    """Return the set-up that a state carries, None for NumPyro's own states."""
    return getattr(state, "setup", None)


def agree(first: SetupValues, second: SetupValues) -> bool:
    """Return whether two starts lead to the same values, for all members of both."""
    forms = (first.constraints, first.guide.supports, first.guide.own)
    others = (second.constraints, second.guide.supports, second.guide.own)
    pairs = zip(jax.tree.leaves(forms), jax.tree.leaves(others), strict=True)
    return all(
        (np.asarray(a) == np.asarray(a)[:1]).all() and (np.asarray(a) == np.asarray(b)).all()
        for a, b in pairs
    )
