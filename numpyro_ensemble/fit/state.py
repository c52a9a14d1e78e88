"""The state of a fit, which carries the values of the guide's set-up."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import GetAttrKey
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import MEMBER_AXES
from numpyro_ensemble.sharding import map_axes


class GuideValues(NamedTuple):
    """The values that a guide's set-up computed; None for those that no later call reads."""

    supports: list[Any]  # values that the support of a latent depends on, per member
    own: list[Any]  # other values of each member
    shared: list[Any]  # values that all members share: arguments, and values computed from these


class SetupValues(NamedTuple):
    """The values that the start of a fit computed and that later steps need."""

    constraints: list[Any]  # leaves of the parameters' transforms, per member
    guide: GuideValues
    arguments: dict[str, list[Any]]  # of the start, where constraining a parameter reads them

    def without_arguments(self) -> SetupValues:
        """Return the values that the steps of a fit need."""
        return self._replace(arguments={})


VALUE_AXES = SetupValues(0, GuideValues(0, 0, None), {})  # type: ignore[arg-type]
STATE_AXES = (0, VALUE_AXES, MEMBER_AXES)  # of a state, its values, and the arguments


def _dumped(structure: Any) -> bytes | None:
    """Pickle a structure, None if pickle fails: it takes no closures, cloudpickle does."""
    for module in (pickle, sys.modules.get("cloudpickle")):
        if module is not None:
            with contextlib.suppress(Exception):  # which depends on what cannot be pickled
                return module.dumps(structure)
    return None


def _loaded(values: SetupValues, structure: bytes | None) -> Setup:
    return Setup(values, *((None, None) if structure is None else pickle.loads(structure)))


class Setup:
    """The set-up of a fit, which its states carry: values, and the structure that holds them.

    Attributes:
        values: arrays, `SetupValues`.
        template: the structure, a `SetupTemplate`; None once a state was saved, or was pickled and
            its model could not be.
        call: the arguments of the start as a `CallForm`, where `values.arguments` has the arrays.
    """

    def __init__(self, values: SetupValues, template: Any, call: Any = None) -> None:
        self.values, self.template, self.call = values, template, call

    def mapped(self, put: Callable[[Any, Any], Any]) -> Setup:
        """Return the set-up with what `put(values, axes)` makes of its values."""
        arguments: Any = MEMBER_AXES if self.values.arguments else {}
        axes = VALUE_AXES._replace(arguments=arguments)
        return Setup(put(self.values, axes), self.template, self.call)

    def of_members(self, members: Any) -> Setup:
        """Return the set-up of some members."""

        def take(axis: int | None, part: Any) -> Any:
            return part if axis is None else jax.tree.map(lambda leaf: leaf[members], part)

        return self.mapped(lambda values, axes: map_axes(take, axes, values))

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
    """NumPyro's `SVIState` of all members, with the set-up of the fit.

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


def plain(state: SVIState) -> SVIState:
    """Return NumPyro's own state, without a set-up."""
    return SVIState(*state)


def with_setup(state: SVIState, setup: Setup | None) -> FitState:
    """Return a state with another set-up."""
    return FitState(state.optim_state, state.mutable_state, state.rng_key, setup)


def mapped_state(state: SVIState, put: Callable[[Any, Any], Any]) -> SVIState:
    """Return a state with what `put(arrays, axes)` makes of its arrays and its set-up's."""
    setup, moved = setup_of(state), put(plain(state), 0)
    return moved if setup is None else with_setup(moved, setup.mapped(put))


def setup_of(state: SVIState) -> Setup | None:
    """Return the set-up that a state carries, None for NumPyro's own states."""
    return getattr(state, "setup", None)


def agree(first: SetupValues, second: SetupValues) -> bool:
    """Return whether two starts have the same set-up values, for all members of both."""
    forms = (first.constraints, first.guide.supports, first.guide.own)
    others = (second.constraints, second.guide.supports, second.guide.own)
    pairs = zip(jax.tree.leaves(forms), jax.tree.leaves(others), strict=True)
    return all(
        (np.asarray(a) == np.asarray(a)[:1]).all() and (np.asarray(a) == np.asarray(b)).all()
        for a, b in pairs
    )


def check_state(state: Any, wanted: SVIState, ensemble_size: int) -> None:
    """Raise where a state to go on from is of another ensemble size or another model."""
    expected, given = ((s.optim_state, s.mutable_state) for s in (wanted, state))
    if jax.tree.structure(expected) != jax.tree.structure(given):
        raise _other_state(wanted, state)
    check_size(state, ensemble_size)
    for want, leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(given), strict=True):
        if want.shape != np.shape(leaf):
            raise ValueError(
                f"init_state is of another model: a leaf has shape {np.shape(leaf)} where "
                f"{want.shape} is expected."
            )


def _other_state(wanted: SVIState, state: SVIState) -> ValueError:
    """Return the error for a state of another form, with the names that differ if some do."""

    def names(state: SVIState) -> set[str]:
        # the states of some optimisers keep the names in the structure, as text here
        text = str(jax.tree.structure((state.optim_state, state.mutable_state)))
        return set(re.findall(r"'([^']+)': ", text))

    expected, given = names(wanted), names(state)
    if expected == given:
        return ValueError("init_state is of another optimiser: the fields of its state differ.")
    lacks, more = sorted(expected - given), sorted(given - expected)
    said = [f"it lacks {lacks}"] * bool(lacks)
    said += [f"it has {more}, which this fit does not know"] * bool(more)
    return ValueError(f"init_state is of another model or guide: {' and '.join(said)}.")


def check_size(state: SVIState, ensemble_size: int) -> None:
    """Raise where a state is none, or of another ensemble size."""
    if not isinstance(state, SVIState):
        raise TypeError(
            f"state takes what init, update or run of a runner returned; got "
            f"{type(state).__name__}."
        )
    leading = np.shape(state.optim_state[0])
    if leading != (ensemble_size,):
        raise ValueError(
            f"the state is of another ensemble size: its leaves lead with {leading}, and "
            f"ensemble_size={ensemble_size}."
        )
