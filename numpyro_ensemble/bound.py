"""A runner bound to one set of model arguments: its checks and its compiled programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ensemble.arguments import (
    BATCH,
    MEMBER,
    NO_ARGUMENTS,
    TRACED,
    Arguments,
    has_tracers,
    traces,
)
from numpyro_ensemble.batching import Batches
from numpyro_ensemble.density import Site
from numpyro_ensemble.fingerprints import captured
from numpyro_ensemble.guides import Filling, fill, is_set_up, set_up
from numpyro_ensemble.member import Member
from numpyro_ensemble.preflight import (
    STEM_AXES,
    Anatomy,
    Stems,
    model_sites,
    refuse_line_searches,
    without_value,
)
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.starts import all_alike, check_kept, check_starts, kept
from numpyro_ensemble.training import make_chunk

if TYPE_CHECKING:
    from numpyro_ensemble.engine import Ensemble
    from numpyro_ensemble.options import RunOptions

_QUICK = {"xla_backend_optimization_level": "0"}  # halves the time that starts take to compile
ARGUMENT_AXES = {TRACED: None, BATCH: None, MEMBER: 0}


class Bound:
    """The programs of one runner for one set of arguments, each compiled when first needed."""

    def __init__(
        self,
        engine: Ensemble,
        arguments: Arguments,
        batches: Batches | None,
        starts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.engine = engine
        self.starts = starts  # for parameters that are declared without a value
        self.arguments = arguments
        self.batches = batches if batches is None or batches.size < batches.total else None
        self.compiles = True
        self._programs: dict[Any, Callable] = {}
        self.stems: Stems | None = None
        self.ambiguous = False
        self.leader: Bound | None = None  # whose fit these arguments make a step of
        self._seen: tuple[Any, ...] = ()

    def without_arguments(self) -> Bound:
        """Return a copy that knows its anatomy alone, for use after a transformation has ended."""
        known = Bound(self.engine, NO_ARGUMENTS, None, self.bare)
        known.anatomy = self.anatomy
        return known

    # What is known before anything runs ---------------------------------------------------------

    @cached_property
    def _checked(self) -> tuple[dict[str, Site], dict[str, Any]]:
        return model_sites(self.engine, self.arguments, self.batches, self.starts)

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of the model, checked."""
        return self._checked[0]

    @property
    def bare(self) -> dict[str, Any]:
        """The shapes of the parameters that are declared without a value."""
        return self._checked[1]

    @cached_property
    def anatomy(self) -> Anatomy:
        """What tracing a start, abstractly, tells of guide, transforms and state."""
        _ = self.sites
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self._size))
        axes = jax.tree.map(lambda _: None, self.bare)
        start = self._start(None, axes or None)
        traced = start.trace(keys, self.bare or None, self.arguments.dynamic)
        state, stems, *_ = traced.out_info
        refuse_line_searches(state)
        guide, transforms, leaves = self._seen
        return Anatomy(guide, transforms, leaves, state, stems)

    @property
    def _size(self) -> int:
        return self.engine.ensemble_size

    # Starts -------------------------------------------------------------------------------------

    def start(self, keys: jax.Array, init_params: Any) -> tuple[SVIState, Stems]:
        """Return the members' initial state, and what else stems from the start."""
        _ = self.anatomy
        axes = maker = None
        if self.bare and init_params is None:
            raise without_value(self.bare)
        if callable(init_params):
            maker = init_params
            check_starts(jax.eval_shape(lambda k: maker(k[0]), keys), self._form, None)
            init_params = None
        elif init_params is not None:
            init_params, axes = check_starts(init_params, self._form, self._size)
        dynamic = self.arguments.dynamic
        once = not traces((keys, init_params, self.arguments.leaves))
        start = self._start(maker, axes, once)
        state, stems, alike, inside = start(keys, init_params, dynamic)
        if not has_tracers((state, stems)):
            check_kept(inside)
            self._remember(stems)
            if not is_set_up(self.engine.guide):
                set_up(self.engine.guide, self._first_guide(stems))
            if self._size > 1 and bool(alike):
                warnings.warn(
                    f"All {self._size} members start at the same values: pass init_params= with a "
                    f"leading axis of {self._size}, or a callable of a member's key.",
                    stacklevel=4,
                )
        return state, stems

    def _first_guide(self, stems: Stems) -> Callable:
        """Return the guide as the first member's start has set it up, with concrete values."""
        dynamic = self._cut(self.arguments.dynamic)
        dynamic = {**dynamic, MEMBER: [leaf[0] for leaf in dynamic[MEMBER]]}
        supports, own, first = stems.guide
        filling = Filling([leaf[0] for leaf in supports], [leaf[0] for leaf in own], first)
        return fill(self.anatomy.guide, filling, dynamic)

    @cached_property
    def _form(self) -> dict[str, Any]:
        """The shapes and dtypes of one member's parameters, as users see them."""
        forms = (self.anatomy.state, self.anatomy.stems, self.arguments.dynamic)
        stacked = jax.eval_shape(self._over_members("params"), *forms)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)

    @property
    def names(self) -> set[str]:
        """The names of the parameters."""
        return set(self._form)

    def _start(self, maker: Callable | None, axes: Any, once: bool = True) -> Any:
        leaves, treedef = jax.tree.flatten(axes, is_leaf=lambda x: x is None)
        key = ("start", captured(maker), treedef, tuple(leaves), once)
        return self._program(key, lambda: self._start_all(maker, axes), once=once)

    def _start_all(self, maker: Callable | None, axes: Any) -> Callable:
        def one(key: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            if maker is not None:
                init_params, _ = check_starts(maker(key), self._form, None)
            dynamic = self._cut(dynamic)
            args, kwargs = self.arguments.rebuild(dynamic)
            guide, given = self.engine.fresh_guide(init_params, self.sites)
            svi = SVI(self.engine.model, guide, self.engine.optim, self.engine.loss)
            state = svi.init(key, *args, init_params=given, **kwargs)
            self.engine.check_guide(guide, args, kwargs)
            guide, filling = self.engine.distilled_guide(guide, dynamic)
            leaves, tree = jax.tree.flatten(svi.constrain_fn.args[0])
            stem = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
            known = tuple(None if s else leaf for leaf, s in zip(leaves, stem, strict=True))
            self._seen = (guide, tree, known)
            constraints = [leaf for leaf, s in zip(leaves, stem, strict=True) if s]
            inside = {}
            if init_params:
                reached = self.engine.member_params(guide, svi.get_params(state), args, kwargs)
                inside = kept(init_params, reached)
            return state, Stems(constraints, filling), inside

        def every(keys: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            members = jax.vmap(one, in_axes=(0, axes, ARGUMENT_AXES))
            state, stems, inside = members(keys, init_params, dynamic)
            filling = stems.guide._replace(first=[leaf[0] for leaf in stems.guide.first])
            alike = all_alike(jax.vmap(self.engine.optim.get_params)(state.optim_state))
            return state, Stems(stems.constraints, filling), alike, inside

        return every

    def _cut(self, dynamic: dict) -> dict:
        """Return the arguments that a start sees: the first rows where there are batches."""
        if self.batches is None:
            return dynamic
        return {**dynamic, BATCH: [leaf[: self.batches.size] for leaf in dynamic[BATCH]]}

    def known_stems(self, state: SVIState) -> Stems:
        """Return what stems from the last start with these arguments.

        Where there was none, a start with the state's keys stands in, which has the same form.
        """
        if self.leader is not None:
            return self.leader.known_stems(state)
        if self.ambiguous:
            raise RuntimeError(
                "some constraints depend on where a fit starts, and these arguments have seen more "
                "than one start: make a new runner for each fit, and use its result.params."
            )
        if self.stems is not None:
            return self.stems
        wanted = self.anatomy.stems
        if not jax.tree.leaves(wanted):
            return wanted
        dynamic = self.arguments.dynamic
        bare = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.bare) or None
        axes = jax.tree.map(lambda _: None, bare)
        stems = self._start(None, axes, False)(state.rng_key, bare, dynamic)[1]
        if not has_tracers(stems) and not stems.agrees(None):
            raise RuntimeError(
                "some constraints depend on where the fit started: go on with the runner that made "
                "the state."
            )
        return stems

    def _remember(self, stems: Stems) -> None:
        """Keep what stems from a start, and note where another start had other constraints."""
        if self.stems is not None and not self.stems.agrees(stems):
            self.ambiguous = True
        self.stems = stems

    def adopt(self, other: Bound | None) -> None:
        """Take what a guide's set-up with other arguments has left, if it is of the same form.

        Constraints are taken along inside a transformation alone, where they cannot be compared.
        """
        if self.stems is not None or other is None or other.stems is None or other.ambiguous:
            return
        wanted = self.anatomy.stems
        if (wanted.constraints or wanted.guide.supports) and not traces(self.arguments.leaves):
            return
        forms = [
            jax.tree.map(lambda x: (x.shape, str(x.dtype)), stems)
            for stems in (self.anatomy.stems, other.stems)
        ]
        if forms[0] == forms[1]:
            self.stems = other.stems

    def leads(self, state: SVIState) -> bool:
        """Say whether a state is of the form that a start with these arguments has."""
        if "anatomy" not in vars(self) or self.arguments.dynamic != NO_ARGUMENTS.dynamic:
            return False  # what the guide holds of traced arguments is gone
        if self.arguments is NO_ARGUMENTS and jax.tree.leaves(self.anatomy.stems):
            return False
        ours, theirs = ((s.optim_state, s.mutable_state) for s in (self.anatomy.state, state))
        return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
            a.shape == jnp.shape(b)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        )

    def follow(self, leader: Bound) -> None:
        """Take another fit's guide and constraints, of which these arguments make a step."""
        self.anatomy, self.leader = leader.anatomy, leader
        _ = self.sites  # checked with these arguments as well

    # Steps --------------------------------------------------------------------------------------

    def step(self, state: SVIState, stable: bool, forward: bool) -> tuple[SVIState, jax.Array]:
        """Take one step with every member."""
        stems = self.known_stems(state)
        program = self._program(("step", stable, forward), lambda: self._updates(stable, forward))
        return program(state, stems, self.arguments.dynamic, None)

    def chunk(self, capacity: int, options: RunOptions, *, consume: bool = True) -> Callable:
        """Return the compiled loop of `training.make_chunk`, which may consume its carry."""
        stable, forward = options.stable_update, options.forward_mode_differentiation
        rule = options.early_stopping
        _ = self.anatomy

        def build() -> Callable:
            update = self._updates(stable, forward)
            return make_chunk(update, self._size, capacity, self.batches, rule)

        key = ("chunk", capacity, stable, forward, rule, consume)
        return self._program(key, build, donate=(0,) if consume else ())

    def _updates(self, stable: bool, forward: bool) -> Callable:
        shared = self.batches is None or self.batches.shared

        def one(state: SVIState, stems: Stems, dynamic: dict, rows: Any) -> tuple:
            return self.member.update(state, stems, dynamic, rows, stable, forward)

        return jax.vmap(one, in_axes=(0, STEM_AXES, ARGUMENT_AXES, None if shared else 0))

    def evaluate(self, state: SVIState) -> jax.Array:
        """Return the members' losses."""
        stems = self.known_stems(state)
        program = self._program("evaluate", lambda: self._over_members("loss"))
        return program(state, stems, self.arguments.dynamic)

    # Outcomes -----------------------------------------------------------------------------------

    def params(self, state: SVIState) -> dict[str, Any]:
        """Return the members' parameters."""
        return self.outcome(state, self.known_stems(state))[0]

    def outcome(self, state: SVIState, stems: Stems) -> tuple[dict[str, Any], jax.Array]:
        """Return the members' parameters, and which members have nothing but finite values."""

        def final(state: SVIState, stems: Stems, dynamic: dict) -> tuple:
            params = self._over_members("params")(state, stems, dynamic)
            leaves = [x for x in jax.tree.leaves((params, state.mutable_state)) if is_inexact(x)]
            flags = [jnp.isfinite(x).reshape(self._size, -1).all(axis=1) for x in leaves]
            return params, jnp.stack([*flags, jnp.ones(self._size, bool)]).all(axis=0)

        dynamic = self.arguments.dynamic
        once = not traces((state, stems, self.arguments.leaves))
        return self._program(("outcome", once), lambda: final, once=once)(state, stems, dynamic)

    # Parts --------------------------------------------------------------------------------------

    @property
    def member(self) -> Member:
        """One member's functions, of the arguments as they are now."""
        return Member(self.engine, self.arguments, self.batches, self.anatomy)

    def _over_members(self, name: str) -> Callable:
        # `member` is asked for when traced: arrays of an earlier call may have changed since
        def one(*given: Any) -> Any:
            return getattr(self.member, name)(*given)

        return jax.vmap(one, in_axes=(0, STEM_AXES, ARGUMENT_AXES))

    def _program(
        self, key: Any, build: Callable, *, donate: tuple[int, ...] = (), once: bool = False
    ) -> Any:
        """Return a compiled function, made when first asked for.

        Args:
            key: what tells it from the others.
            build: makes the function.
            donate: positions of the arguments that it consumes.
            once: it runs once in a fit, so that a fast compilation counts for more than fast code.
        """
        if key not in self._programs:
            fn = build()
            options = _QUICK if once and jax.default_backend() == "cpu" else None
            if self.compiles or once:
                fn = jax.jit(fn, donate_argnums=donate, compiler_options=options)
            self._programs[key] = fn
        return self._programs[key]
