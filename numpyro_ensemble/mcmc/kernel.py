"""Base class of the kernels: NumPyro's `MCMCKernel` over all chains at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpyro.infer import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_ensemble.calls.arguments import arrange
from numpyro_ensemble.checkpoint import describe, describe_all, describe_arguments
from numpyro_ensemble.hosts import home
from numpyro_ensemble.mcmc.checks import Survey, check_start, checked_values, is_frozen, survey
from numpyro_ensemble.mcmc.mixing import Advice, CollectedDraws, collected
from numpyro_ensemble.mcmc.positions import Coordinates
from numpyro_ensemble.mcmc.progress import Progress
from numpyro_ensemble.mcmc.searches import STARTS, given
from numpyro_ensemble.mcmc.state import ChainsState, in_rows, in_sites
from numpyro_ensemble.mcmc.target import Target
from numpyro_ensemble.sharding import Placement, as_mesh

_REMEDIES = (  # advice for chains of any kernel
    "hierarchical effects that are decentred (LocScaleReparam), and latents with scales near 1; "
    "double precision (numpyro.enable_x64()); NUTS(model), which adapts each chain alone"
)


class ManyChainKernel(MCMCKernel):
    """A kernel that adapts over all chains at once.

    A subclass checks the number of chains, starts its adaptation, and makes one iteration.
    """

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        start: str | Callable = "nuts",
        init_strategy: Callable = init_to_uniform,
        mesh: Mesh | str | None = None,
    ) -> None:
        self.placement = Placement(mesh=as_mesh(mesh))
        self._target = Target(model, potential_fn, init_strategy, self.placement)
        if not callable(start) and (not isinstance(start, str) or start not in STARTS):
            raise ValueError(
                f"start takes one of {sorted(STARTS)} or a function, got {start!r}; values go to "
                f"mcmc.run(init_params=...)."
            )
        self._start = start
        self._forms: set[tuple] = set()  # forms of states that have been checked
        # MCMC calls init in every run if this is missing; `sample` needs nothing but a state
        self._sample_fn = self.sample

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_sample_fn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sample_fn=self.sample)

    @property
    def model(self) -> Callable | None:
        """The NumPyro model."""
        return self._target.model

    @property
    def sample_field(self) -> str:
        """The field that holds the draws."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The fields that `MCMC` collects by default."""
        return ("z", "diverging")

    @property
    def is_ensemble_kernel(self) -> bool:
        """True: the progress bar shows all chains together."""
        return True

    def postprocess_fn(self, args: tuple, kwargs: dict) -> Callable:
        """Return the map from one chain's unconstrained values to the model's sites."""

        # MCMC calls this outside its program, where an uncompiled model would be slow
        def constrain(z: Any) -> CollectedDraws:
            latents = tuple(z) if self._target.model is not None else ()
            draws = self._target.run("constrain", self._constrain, (z,), args, kwargs)
            start = f"another start ({self._other_start()}); {_REMEDIES}"
            remedies = f"{self._remedies}; {start}"
            advice = Advice(type(self).__name__, latents, remedies, start, self._adapts_alone)
            return collected(draws, advice)

        return constrain

    def _constrain(self, call: tuple[tuple, dict], z: Any) -> Any:
        return self._target.constrain(*call)(z)

    def get_diagnostics_str(self, state: ChainsState) -> str:
        """Return step size, acceptance and divergences over all chains, for the progress bar."""
        step_size = float(np.mean(np.asarray(state.adapt_state.step_size)))
        accepted = float(np.mean(np.asarray(state.mean_accept_prob)))
        steps = int(np.max(np.asarray(state.num_steps)))
        diverged = int(np.sum(np.asarray(state.num_divergences)))
        return (
            f"{steps} steps of size {step_size:.2e}. acc. prob={accepted:.2f}, "
            f"{diverged} divergences in {state.i.shape[0]} chains"
        )

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple = (),
        model_kwargs: dict | None = None,
    ) -> ChainsState:
        """Find the chains' starts, or check the given ones, and return their state.

        Raises:
            ValueError: for chains that cannot be adapted together or cannot start at their
                positions, and for `num_warmup=0`, which needs the state of another run.
        """
        args, kwargs = model_args, model_kwargs or {}
        name = type(self).__name__
        if is_prng_key(rng_key):
            raise ValueError(self._alone())
        if not num_warmup:  # with a post_warmup_state MCMC does not call init
            raise ValueError(
                f"num_warmup=0 leaves {name} unadapted. Give MCMC a num_warmup, or set "
                f"mcmc.post_warmup_state to the state of a run that had one."
            )
        num_chains = rng_key.shape[0]
        self._check_chains(num_chains, num_warmup)
        self.placement.check(num_chains, "chains")
        self._target.latent_names(args, kwargs)
        self.placement.check_alike(lambda: self._called_with(rng_key, init_params, args, kwargs))
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(rng_key)
        remedy = self._remedy(init_params is not None)
        if init_params is None:
            init_params = self._find_start(keys[0, 2], num_chains, args, kwargs)
        else:
            init_params = self._checked_values(init_params, num_chains, args, kwargs)
        first = partial(self._first, num_warmup)
        state, found = self._target.run(
            ("first", num_warmup), first, (init_params, keys), args, kwargs
        )
        coordinates = self._target.coordinates(state.z, args, kwargs)
        with_nan = partial(self._target.with_nan, args=args, kwargs=kwargs)
        check_start(name, coordinates, home(found), remedy, with_nan, self._adapts_alone)
        self._forms.add(Coordinates(state.z).form)
        return state

    def _called_with(
        self, rng_key: jax.Array, init_params: Any, args: tuple, kwargs: dict
    ) -> dict[str, dict[str, str]]:
        """Return what must agree between processes that run chains together."""
        return {
            "argument": describe_arguments(arrange(self.model, args, kwargs)),
            "setting": {"rng_key": describe(rng_key), "init_params": describe_all(init_params)},
        }

    def _alone(self) -> str:
        name = type(self).__name__
        return (
            f"{name} adapts over all chains at once and was given one alone, by num_chains=1 or "
            f"another chain_method. Write "
            f'MCMC({name}(model), num_chains=64, chain_method="vectorized", ...).'
        )

    def _remedy(self, given: bool) -> str:
        """Return the advice for a bad start."""
        if self._target.model is None:
            return f"Give {self._other_start()}."
        if given:
            return (
                f"Leave init_params out, so that {type(self).__name__} finds its start, or take "
                f"them from numpyro_ensemble.mcmc.starts."
            )
        return (
            f"It was found by start={self._start!r}: take {self._other_start()}, and look at the "
            f"data and at init_strategy."
        )

    def _other_start(self) -> str:
        """Return the text that names another start than the kernel's."""
        if self._target.model is None:
            return "other init_params: finite, spread, and where the potential is small"
        other = "pathfinder" if self._start == "nuts" else "nuts"
        return f"start={other!r}, or init_params from numpyro_ensemble.mcmc.starts"

    def _find_start(self, key: jax.Array, num_chains: int, args: tuple, kwargs: dict) -> Any:
        if callable(self._start):
            start_key, move_key = jax.random.split(key)
            z = self._start(start_key, num_chains, *args, **kwargs)
            z = self._checked_values(z, num_chains, args, kwargs)
            return given(self._target, move_key, z, num_chains, args, kwargs)
        if self._target.model is None:
            raise ValueError(
                "A kernel with a potential_fn needs to be told where its chains start: "
                "mcmc.run(key, init_params=...), with a leading axis of num_chains."
            )
        return STARTS[self._start](self._target, key, num_chains, args, kwargs)

    def _checked_values(self, z: Any, num_chains: int, args: tuple, kwargs: dict) -> Any:
        if self._target.model is None:
            return z
        return checked_values(z, self._target.forms(num_chains, args, kwargs))

    def _first(
        self, num_warmup: int, call: tuple[tuple, dict], z: Any, keys: jax.Array
    ) -> tuple[ChainsState, Survey]:
        """Return the state of chains that have not moved, and statistics of their start."""
        z = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, float)), z)
        coordinates = self._target.coordinates(z, *call)
        rows = coordinates.rows(z)
        density = self._target.log_density(*call, coordinates)
        log_density, grad, found = survey(density, rows, self._num_folds)
        num_chains = log_density.shape[0]
        zeros = jnp.zeros_like(log_density)
        state = ChainsState(
            i=jnp.zeros(num_chains, int),
            z=rows,
            z_grad=-grad,
            potential_energy=-log_density,
            energy=-log_density,
            r=None,
            slice=None,
            num_steps=jnp.zeros(num_chains, int),
            accept_prob=zeros,
            mean_accept_prob=zeros,
            diverging=jnp.zeros(num_chains, bool),
            num_divergences=jnp.zeros(num_chains, int),
            iterations_since_move=jnp.zeros(num_chains, int),
            frozen=jnp.zeros(num_chains, bool),
            adapt_state=None,
            rng_key=keys[:, 0],
            density_is_current=jnp.zeros(num_chains, bool),
        )
        progress = Progress.start(num_warmup, num_chains)
        state = self._first_adaptation(keys[:, 1], state, progress, found)
        return self.placement.settle(in_sites(state, coordinates), num_chains), found

    def get_potential_fn(
        self, model_args: tuple = (), model_kwargs: dict | None = None
    ) -> Callable[[Any], jax.Array]:
        """Return the potential energy of one chain's unconstrained values, as HMC's method does."""
        target = Target(self._target.model, self._target.potential_fn)  # without a mesh
        log_density = target.log_density(model_args, model_kwargs or {})
        return lambda z: -log_density(z)

    def refresh(
        self, state: ChainsState, model_args: tuple, model_kwargs: dict | None
    ) -> ChainsState:
        """Return the state with density and gradient for other arguments of the model."""
        call = model_args, model_kwargs or {}
        coordinates = self._target.coordinates(state.z, *call)
        log_density = self._followed(*call, coordinates)
        return in_sites(self._refreshed(in_rows(state, coordinates), log_density), coordinates)

    def _refreshed(self, state: ChainsState, log_density: Callable) -> ChainsState:
        values, grads = jax.vmap(jax.value_and_grad(log_density))(state.z)
        kinetic = state.energy - state.potential_energy
        return state._replace(
            potential_energy=-values,
            z_grad=-grads,
            energy=kinetic - values,
            density_is_current=jnp.ones_like(state.density_is_current),
        )

    def sample(self, state: ChainsState, model_args: tuple, model_kwargs: dict) -> ChainsState:
        """Make one iteration of all chains: one step of the scheme in warm-up, else one draw.

        Raises:
            ValueError: for a state of one chain, of another kernel or of another model.
        """
        if jnp.ndim(state.i) == 0:
            raise ValueError(self._alone())
        self._check_state(state, model_args, model_kwargs)
        progress = state.adapt_state.progress
        coordinates = self._target.coordinates(state.z, model_args, model_kwargs)
        log_density = self._followed(model_args, model_kwargs, coordinates)
        state = in_rows(state, coordinates)
        # a density that belongs to other data might reject every proposal
        state = jax.lax.cond(
            state.density_is_current[0],
            lambda s: s,
            lambda s: self._refreshed(s, log_density),
            state,
        )
        keys = jax.vmap(jax.random.split)(state.rng_key)
        new = self._iterate(keys[:, 1], state, log_density)
        n = jnp.where(progress.warming, progress.iteration, state.i - progress.iteration) + 1
        mean = jnp.where(n == 1, 0.0, state.mean_accept_prob)
        mean = mean + (new.accept_prob - mean) / n
        moved = (new.z != state.z).any(axis=1)
        since = jnp.where(moved, 0, state.iterations_since_move + 1)
        stride = new.adapt_state.step_size * new.num_steps
        new = new._replace(
            i=state.i + 1,
            rng_key=keys[:, 0],
            density_is_current=state.density_is_current,
            mean_accept_prob=mean.astype(state.mean_accept_prob.dtype),
            num_divergences=jnp.where(n == 1, 0, state.num_divergences) + new.num_divergences,
            iterations_since_move=since,
            frozen=is_frozen(since, self._speed(coordinates.size) * stride),
        )
        return self.placement.settle(in_sites(new, coordinates), len(n))

    def _check_state(self, state: ChainsState, args: tuple, kwargs: dict) -> None:
        name, adapted = type(self).__name__, type(state.adapt_state)
        if adapted is not self._adaptation:
            raise ValueError(
                f"the state is of another kernel: it has {adapted.__name__}, and {name} needs "
                f"{self._adaptation.__name__}. Give {name} a warm-up of its own; it may start "
                f"there, mcmc.run(..., init_params=state.z)."
            )
        form = Coordinates(state.z).form
        if self._target.model is None or form in self._forms:
            return
        needed = Coordinates(self._target.forms(len(state.i), args, kwargs)).form
        if form != needed:
            raise ValueError(
                f"the state is of another model: its unconstrained values have the shapes "
                f"{dict(form)}, and this model has {dict(needed)}."
            )
        self._forms.add(form)

    # For subclasses -----------------------------------------------------------------------

    _adaptation: type  # of the states' `adapt_state`
    _num_folds = 1
    _remedies = ""  # advice for chains of this kernel that have not mixed
    _adapts_alone = False  # whether each chain is adapted alone, and may stay in its own mode

    def _speed(self, size: int) -> float:
        """Return the speed of each of `size` coordinates, in scales per unit of time."""
        return 1.0

    def _followed(self, args: tuple, kwargs: dict, coordinates: Coordinates) -> Any:
        """Return the log density of a row, which `_refreshed` and `_iterate` take."""
        return self._target.log_density(args, kwargs, coordinates)

    @abstractmethod
    def _check_chains(self, num_chains: int, num_warmup: int) -> None:
        """Raise a ValueError if these chains cannot be adapted in `num_warmup` iterations."""

    @abstractmethod
    def _first_adaptation(
        self, keys: jax.Array, state: ChainsState, progress: Progress, found: Survey
    ) -> ChainsState:
        """Return the state, in rows, with its first momentum and adaptation."""

    @abstractmethod
    def _iterate(self, keys: jax.Array, state: ChainsState, log_density: Callable) -> ChainsState:
        """Make one iteration of a state in rows, and count the divergences of this iteration."""
