"""What a fit returns: an ensemble of single fits, stacked."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_ensemble import storage
from numpyro_ensemble.fit.state import FitState, GuideValues, Setup, SetupValues, setup_of
from numpyro_ensemble.handlers import warn
from numpyro_ensemble.hosts import home, is_far
from numpyro_ensemble.primitives import is_inexact

_RANKED_LOSSES = 100
# attributes of a result besides its fields
_REPORTED = ("stopped", "completed_steps", "seconds", "gradient_norm")
TRUSTED_K = 0.7  # above this Pareto k a few draws have most of the weight (Vehtari et al. 2024)
LEAST_DRAWS = 25  # fewer leave no tail that a Pareto distribution could be fitted to
SAME_RATIOS = 1e-2  # log ratios that differ by less at the top are those of one distribution


class _Fields(NamedTuple):
    params: dict[str, Any]
    state: SVIState
    losses: jax.Array


def converged(state: SVIState) -> Any:
    """Return whether the optimiser's criterion is met, None where it has none.

    Args:
        state: of one member or of all.
    """
    return getattr(state.optim_state[1], "converged", None)


class EnsembleResult(_Fields):
    """The outcome of a fit: `SVIRunResult`'s three fields, with a leading member axis on each.

    Attributes:
        params: fitted values by name, each leaf `(E,) + shape`.
        state: the last `SVIState`, to go on from with `init_state=`.
        losses: `(E, num_steps)`; NaN after a member's early stop.
        stopped: which members `(E,)` stopped early; None if the result does not know.
        gradient_norm: for `EnsembleMAP`, the length `(E,)` of each member's gradient of the loss
            over all data, in unconstrained space. None for other runners, and under `jit`.
        completed_steps: how many of the steps were taken before the run ended; None under `jit`.
        seconds: how long the run took, compilation included; None if the result does not know.

    The example of `EnsembleVI` makes one.
    """

    stopped: np.ndarray | None = None
    completed_steps: int | None = None
    seconds: float | None = None
    gradient_norm: np.ndarray | None = None

    @property
    def converged(self) -> Any:
        """Which members `(E,)` met the criterion of their minimiser; None for other optimisers."""
        ended = home(converged(self.state))
        return ended if ended is None or isinstance(ended, jax.core.Tracer) else np.asarray(ended)

    @property
    def ensemble_size(self) -> int:
        """Number of members E."""
        return self.losses.shape[0]

    @property
    def finite(self) -> jax.Array:
        """Which members `(E,)` have finite parameters, mutable state and last loss.

        The NaN losses that follow an early stop do not count.
        """
        stopped = self.stopped
        xp = jnp if isinstance(self.losses, jax.core.Tracer) else np
        leaves = jax.tree.leaves((self.params, self.state.mutable_state))
        flags = [xp.isfinite(a).reshape(len(a), -1).all(1) for a in home(list(_inexact(leaves)))]
        reached = ~xp.isnan(self.losses)
        last = self.losses.shape[1] - 1 - xp.argmax(reached[:, ::-1], axis=1)
        final = xp.take_along_axis(xp.asarray(self.losses), last[:, None], axis=1)[:, 0]
        ended = self.converged  # before this run, where there is no loss
        known = xp.isfinite(final) if ended is None else xp.isfinite(final) | ended
        flags.append(known)
        if stopped is not None:  # otherwise a run of NaN at the end is taken for a stop
            flags.append(stopped | reached[:, -1])
        return jax.device_put(xp.stack(flags).all(0))

    def ranking(self) -> np.ndarray:
        """Return the finite members, best first, by the mean of their last 100 finite losses.

        Members that a minimiser has fitted are ranked by their last loss.
        """
        losses = np.asarray(self.losses)
        score = np.full(self.ensemble_size, np.inf)
        exact = home(getattr(self.state.optim_state[1], "loss", None))
        for e in np.flatnonzero(np.asarray(self.finite)):
            score[e] = last_losses(losses[e]) if exact is None else exact[e]
        order = np.argsort(score, kind="stable")
        return order[np.isfinite(score[order])]

    def best(self, rank: int = 0) -> SVIRunResult:
        """Return the best member (or the one of the given rank) as a single NumPyro fit.

        Raises:
            ValueError: if fewer finite members exist.
        """
        ranking = self.ranking()
        if not 0 <= rank < len(ranking):
            raise ValueError(
                f"rank takes 0 to the number of finite members less 1, got {rank}; "
                f"{len(ranking)} of {self.ensemble_size} members are finite."
            )
        return self.member(int(ranking[rank]))

    def member(self, index: int) -> SVIRunResult:
        """Return one member in the form of a single NumPyro fit.

        Raises:
            IndexError: if there is no such member.
        """
        size = self.ensemble_size
        if not -size <= index < size:
            raise IndexError(f"index takes {-size} to {size - 1}, got {index}.")
        params = jax.tree.map(lambda leaf: leaf[index] if is_inexact(leaf) else leaf, self.params)
        state = jax.tree.map(lambda leaf: leaf[index], SVIState(*self.state))
        return SVIRunResult(params, state, self.losses[index])

    def save(self, path: str | os.PathLike) -> None:
        """Write the result into a file of plain arrays and JSON, which `load` reads.

        NumPy reads it too: `numpy.load(path)["params/w"]`. It holds neither model nor guide.

        Raises:
            TypeError: if the parameters are no arrays in dicts, lists and tuples.
        """
        setup, (step, optimiser) = setup_of(self.state), self.state.optim_state
        tree = {
            "params": self.params,
            "losses": self.losses,
            "step": step,
            "optimiser": storage.Leaves.of(optimiser),
            "mutable_state": self.state.mutable_state,
            "rng_key": self.state.rng_key,
            "constraints": None if setup is None else list(setup.values.constraints),
            "guide": None if setup is None else list(setup.values.guide),
            **{name: getattr(self, name) for name in _REPORTED},
        }
        storage.write(path, "EnsembleResult", tree)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EnsembleResult:
        """Return the result that `save` wrote; nothing in the file is run as code.

        It serves predictions, exports and starts, and a runner of the same model goes on from its
        state: `init_state=result.state`.

        Raises:
            ValueError: if the file is damaged, or holds something else.
        """
        tree = storage.read(path, "EnsembleResult")
        wide = [leaf for leaf in jax.tree.leaves(tree) if _is_wide(leaf)]
        if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            warn(
                f"{path} holds numbers in double precision, which jax_enable_x64 is off for: they "
                f"are rounded."
            )
        reported = {name: tree.pop(name) for name in _REPORTED}
        tree = jax.tree.map(lambda x: x if isinstance(x, str) else jax.device_put(x), tree)
        setup = None
        if tree["guide"] is not None:
            setup = Setup(SetupValues(tree["constraints"], GuideValues(*tree["guide"]), {}), None)
        optim_state = (tree["step"], tree["optimiser"])
        state = FitState(optim_state, tree["mutable_state"], tree["rng_key"], setup)
        result = cls(tree["params"], state, tree["losses"])
        vars(result).update(reported)
        return result


class PathfinderResult(NamedTuple):
    """Draws, weights and paths of a run of `Pathfinder`.

    Attributes:
        samples: constrained draws by site name, `(S, ...)`, with those of deterministic sites.
        pareto_k: shape of the tail of the importance ratios of all draws. Above 0.7 the samples
            are not the posterior.
        elbo: `(P,)`, the evidence lower bound of the best approximation on each path, minus
            infinity where there is none.
        log_weights: `(S,)`, logarithms of the samples' weights, which add up to 1: equal where
            these were resampled, otherwise importance weights smoothed by PSIS.
        path: `(S,)`, the path that each sample is from, -1 for draws of refits.
        num_points: `(P,)`, the number of points on each path.
        converged: `(P,)`, whether a path has come to a mode.
        pool: all N draws, from which the samples were chosen: unconstrained values by site name,
            `(N, ...)`.
        pool_log_weights: `(N,)`, logarithms of their weights, smoothed by PSIS.

    The example of `Pathfinder` makes one.
    """

    samples: dict[str, Any]
    pareto_k: Any
    elbo: Any
    log_weights: Any
    path: Any
    num_points: Any
    converged: Any
    pool: dict[str, Any]
    pool_log_weights: Any


def _is_wide(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) in ("float64", "int64", "complex128")


def check_gathered(result: EnsembleResult) -> None:
    """Raise a ValueError for a result of which each of several processes has a part."""
    if is_far((result.params, result.state.mutable_state)):
        raise ValueError(
            "the result is left on the devices of several processes, by gather=False: go on from "
            "result.state in a run without it, so that each process has all members."
        )


def _inexact(leaves: list[Any]) -> list[Any]:
    return [leaf for leaf in leaves if is_inexact(leaf)]


def last_losses(losses: np.ndarray) -> float:
    """Return the mean of one member's last 100 finite losses."""
    return losses[np.isfinite(losses)][-_RANKED_LOSSES:].mean()


def name_members(flags: Any, limit: int = 10) -> str:
    """Write the indices of the flagged members as a short list."""
    indices = np.flatnonzero(np.asarray(flags))
    shown = ", ".join(str(i) for i in indices[:limit])
    return shown + (f" and {len(indices) - limit} more" if len(indices) > limit else "")
