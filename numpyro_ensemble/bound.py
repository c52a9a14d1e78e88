"""A runner bound to one set of model arguments: its checks and its compiled programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.infer.util import transform_fn

from numpyro_ensemble.arguments import BATCH, MEMBER, NO_ARGUMENTS, TRACED, Arguments, has_tracers
from numpyro_ensemble.batching import Batches
from numpyro_ensemble.density import Site
from numpyro_ensemble.preflight import Anatomy, model_sites, refuse_line_searches
from numpyro_ensemble.primitives import is_inexact
from numpyro_ensemble.starts import check_starts
from numpyro_ensemble.training import keep_good, make_chunk

if TYPE_CHECKING:
    from numpyro_ensemble.engine import Ensemble
    from numpyro_ensemble.options import RunOptions

_QUICK = {"xla_backend_optimization_level": "0"}  # halves the time that starts take to compile
_AXES = {TRACED: None, BATCH: None, MEMBER: 0}


class Bound:
    """The programs of one runner for one set of arguments, each compiled when first needed."""

    def __init__(self, engine: Ensemble, arguments: Arguments, batches: Batches | None) -> None:
        self.engine = engine
        self.arguments = arguments
        self.batches = batches if batches is None or batches.size < batches.total else None
        self.compiles = True
        self._programs: dict[Any, Callable] = {}
        self._constraints: list[jax.Array] | None = None
        self._seen: tuple[Any, ...] = ()

    def without_arguments(self) -> Bound:
        """Return a copy that knows its anatomy alone, for use after a transformation has ended."""
        known = Bound(self.engine, NO_ARGUMENTS, None)
        known.anatomy = self.anatomy
        return known

    # What is known before anything runs ---------------------------------------------------------

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites of the model, checked."""
        return model_sites(self.engine, self.arguments, self.batches)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What tracing a start, abstractly, tells of guide, transforms and state."""
        _ = self.sites
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self._size))
        traced = self._start(None, None).trace(keys, None, self.arguments.dynamic)
        state, constraints, _ = traced.out_info
        guide, transforms, leaves = self._seen
        refuse_line_searches(state)
        return Anatomy(guide, transforms, leaves, state, constraints)

    @property
    def _size(self) -> int:
        return self.engine.ensemble_size

    # Starts -------------------------------------------------------------------------------------

    def start(self, keys: jax.Array, init_params: Any) -> tuple[SVIState, list[jax.Array]]:
        """Return the members' initial state and the leaves of transforms that stem from it."""
        _ = self.anatomy
        axes = maker = None
        if callable(init_params):
            maker = init_params
            check_starts(jax.eval_shape(lambda k: maker(k[0]), keys), self._form, None)
            init_params = None
        elif init_params is not None:
            init_params, axes = check_starts(init_params, self._form, self._size)
        dynamic = self.arguments.dynamic
        once = not has_tracers((keys, init_params, self.arguments.leaves))
        state, constraints, alike = self._start(maker, axes, once)(keys, init_params, dynamic)
        if not isinstance(alike, jax.core.Tracer):
            self._constraints = constraints
            if self._size > 1 and bool(alike):
                warnings.warn(
                    f"All {self._size} members start at the same values: pass init_params= with a "
                    f"leading axis of {self._size}, or a callable of a member's key.",
                    stacklevel=4,
                )
        return state, constraints

    @cached_property
    def _form(self) -> dict[str, Any]:
        """The shapes and dtypes of one member's parameters, as users see them."""
        anatomy = self.anatomy
        stacked = jax.eval_shape(
            self._params_of, anatomy.state, anatomy.constraints, self.arguments.dynamic
        )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)

    def _start(self, maker: Callable | None, axes: Any, once: bool = True) -> Any:
        leaves, treedef = jax.tree.flatten(axes, is_leaf=lambda x: x is None)
        key = ("start", maker, treedef, tuple(leaves), once)
        return self._program(key, lambda: self._start_all(maker, axes), once=once)

    def _start_all(self, maker: Callable | None, axes: Any) -> Callable:
        def one(key: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            if maker is not None:
                init_params, _ = check_starts(maker(key), self._form, None)
            if self.batches is not None:
                rows = self.batches.size
                dynamic = {**dynamic, BATCH: [leaf[:rows] for leaf in dynamic[BATCH]]}
            args, kwargs = self.arguments.rebuild(dynamic)
            guide, given = self.engine.fresh_guide(init_params, self.sites)
            svi = self._svi(guide)
            state = svi.init(key, *args, init_params=given, **kwargs)
            leaves, tree = jax.tree.flatten(svi.constrain_fn.args[0])
            stems = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
            known = tuple(None if s else leaf for leaf, s in zip(leaves, stems, strict=True))
            self._seen = (self.engine.distilled_guide(guide), tree, known)
            return state, [leaf for leaf, s in zip(leaves, stems, strict=True) if s]

        def every(keys: jax.Array, init_params: Any, dynamic: dict) -> tuple:
            state, leaves = jax.vmap(one, in_axes=(0, axes, _AXES))(keys, init_params, dynamic)
            return state, leaves, _alike(self.engine.optim.get_params(state.optim_state))

        return every

    # Steps --------------------------------------------------------------------------------------

    def step(self, state: SVIState, stable: bool, forward: bool) -> tuple[SVIState, jax.Array]:
        """Take one step with every member."""
        constraints = self.known_constraints()
        program = self._program(("step", stable, forward), lambda: self._updates(stable, forward))
        return program(state, constraints, self.arguments.dynamic, None)

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
        def one(state: SVIState, constraints: list, dynamic: dict, rows: Any) -> tuple:
            scale = 1.0
            if rows is not None and self.batches is not None:
                scale = self.batches.total / rows.shape[-1]
                taken = [leaf.at[rows].get(mode="promise_in_bounds") for leaf in dynamic[BATCH]]
                dynamic = {**dynamic, BATCH: taken}
            args, kwargs = self.arguments.rebuild(dynamic)
            svi = self._svi(self.anatomy.guide, scale, constraints)
            if not stable:
                return svi.update(state, *args, forward_mode_differentiation=forward, **kwargs)
            new, loss = svi.stable_update(
                state, *args, forward_mode_differentiation=forward, **kwargs
            )
            return keep_good(state, new, loss, new.rng_key)

        shared = self.batches is None or self.batches.shared
        return jax.vmap(one, in_axes=(0, 0, _AXES, None if shared else 0))

    def evaluate(self, state: SVIState) -> jax.Array:
        """Return the members' losses."""

        def one(state: SVIState, constraints: list, dynamic: dict) -> jax.Array:
            args, kwargs = self.arguments.rebuild(dynamic)
            svi = self._svi(self.anatomy.guide, 1.0, constraints)
            key = jax.random.split(state.rng_key)[1]  # as SVI.evaluate
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            return svi.loss.loss(key, params, svi.model, svi.guide, *args, **kwargs)

        constraints = self.known_constraints()
        program = self._program("evaluate", lambda: jax.vmap(one, in_axes=(0, 0, _AXES)))
        return program(state, constraints, self.arguments.dynamic)

    # Outcomes -----------------------------------------------------------------------------------

    def params(self, state: SVIState) -> dict[str, Any]:
        """Return the members' parameters."""
        return self.outcome(state, self.known_constraints())[0]

    def outcome(
        self, state: SVIState, constraints: list[jax.Array]
    ) -> tuple[dict[str, Any], jax.Array]:
        """Return the members' parameters, and which members have nothing but finite values."""

        def final(state: SVIState, constraints: list, dynamic: dict) -> tuple:
            params = self._params_of(state, constraints, dynamic)
            leaves = [x for x in jax.tree.leaves((params, state.mutable_state)) if is_inexact(x)]
            flags = [jnp.isfinite(x).reshape(self._size, -1).all(axis=1) for x in leaves]
            return params, jnp.stack([*flags, jnp.ones(self._size, bool)]).all(axis=0)

        dynamic = self.arguments.dynamic
        once = not has_tracers((state, constraints, self.arguments.leaves))
        return self._program(("outcome", once), lambda: final, once=once)(
            state, constraints, dynamic
        )

    def _params_of(self, state: SVIState, constraints: list, dynamic: dict) -> dict[str, Any]:
        def one(state: SVIState, constraints: list, dynamic: dict) -> dict:
            svi = self._svi(self.anatomy.guide, 1.0, constraints)
            args, kwargs = self.arguments.rebuild(dynamic)
            return self.engine.member_params(svi.guide, svi.get_params(state), args, kwargs)

        return jax.vmap(one, in_axes=(0, 0, _AXES))(state, constraints, dynamic)

    # Parts --------------------------------------------------------------------------------------

    def _svi(self, guide: Callable, scale: float = 1.0, constraints: list | None = None) -> SVI:
        """Return one member's plain SVI; with constraints given it is past its `init`."""
        engine = self.engine
        svi = SVI(engine.weighted_model(scale), guide, engine.optim, engine.loss)
        if constraints is not None:
            stems = iter(constraints)
            leaves = [next(stems) if leaf is None else leaf for leaf in self.anatomy.leaves]
            transforms = jax.tree.unflatten(self.anatomy.transforms, leaves)
            svi.constrain_fn = partial(transform_fn, transforms)
        return svi

    def known_constraints(self) -> list[jax.Array]:
        """Return the leaves of transforms that stem from the last start."""
        if None not in self.anatomy.leaves:
            return []
        if self._constraints is None:
            raise RuntimeError(
                "the constraints of some parameters depend on the start of the fit: call init or "
                "run with these arguments, outside of jit, before going on from a state."
            )
        return self._constraints

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
            if self.compiles:
                fn = jax.jit(fn, donate_argnums=donate, compiler_options=options)
            self._programs[key] = fn
        return self._programs[key]


def _alike(params: dict[str, Any]) -> jax.Array:
    """Say whether all members agree in every parameter, or in all of those of one module."""

    def same(tree: Any) -> jax.Array:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
        return jnp.stack([(leaf == leaf[:1]).all() for leaf in leaves]).all()

    def is_module(name: str) -> bool:
        # the parameters of a random module serve as shapes only: latents stand in for them
        stem = name.removesuffix("$params")
        latents = any(other.startswith(stem) and other != name for other in params)
        return not isinstance(params[name], jax.Array) and not latents

    filled = {k: v for k, v in params.items() if any(map(is_inexact, jax.tree.leaves(v)))}
    if not filled:
        return jnp.asarray(False)
    modules = [same(v) for k, v in filled.items() if is_module(k)]
    return jnp.stack([same(filled), *modules]).any()
