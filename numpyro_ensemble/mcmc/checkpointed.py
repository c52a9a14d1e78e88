"""`MCMC.run` in pieces, with a checkpoint after each, so that a stopped run can continue."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ensemble._compat import collect_nothing, collected_by, set_outcome
from numpyro_ensemble.calls.arguments import arrange
from numpyro_ensemble.checkpoint import (
    Checkpoint,
    Keeper,
    describe,
    describe_all,
    describe_arguments,
    describe_sites,
)
from numpyro_ensemble.density import model_sites
from numpyro_ensemble.handlers import one_key, warn
from numpyro_ensemble.hosts import home
from numpyro_ensemble.interrupts import Interrupts
from numpyro_ensemble.mcmc.mixing import finished, run_unchecked
from numpyro_ensemble.mcmc.state import ChainsState, Resumed
from numpyro_ensemble.sharding import Placement
from numpyro_ensemble.storage import restored

_SETTINGS = ("num_warmup", "num_samples", "num_chains", "thinning")


class _Run:
    """One run, with the arguments of `MCMC.run`."""

    def __init__(
        self,
        mcmc: MCMC,
        rng_key: jax.Array,
        args: tuple,
        kwargs: dict[str, Any],
        extra_fields: Sequence[str],
        init_params: Any,
    ) -> None:
        self.mcmc, self.rng_key, self.args, self.kwargs = mcmc, rng_key, args, kwargs
        self.extra_fields, self.init_params = tuple(extra_fields), init_params
        # MCMC compiles its loop in every run; inside this program, once for each piece's length
        self._program: Callable = self._outcome
        if mcmc.num_chains == 1 or mcmc.chain_method == "vectorized":
            self._program = jax.jit(self._outcome, static_argnums=(1, 2))

    def start(self) -> tuple[Any, Any]:
        """Start the chains; return their state, and zeros in the shapes of what is collected."""
        self.mcmc.post_warmup_state = None
        collect_nothing(self.mcmc)
        return self._run(self.rng_key)

    def go_on(self, state: Any, length: int, thinning: int) -> tuple[Any, Any]:
        """Make `length` iterations; return the state after them, and what was collected."""
        return self._program(state, length, thinning)

    def _outcome(self, state: Any, length: int, thinning: int) -> tuple[Any, Any]:
        """Call `MCMC.run` for `length` iterations from a state, with the keys of that state."""
        key = state.rng_key
        if isinstance(state, ChainsState):
            state, key = Resumed(*state), key[:1]
        elif self.mcmc.sampler.is_ensemble_kernel:  # MCMC gives these the first of many keys
            key = jnp.broadcast_to(key, (self.mcmc.num_chains, *key.shape))
        self.mcmc.post_warmup_state = state
        self.mcmc.num_samples, self.mcmc.thinning = length, thinning
        return self._run(key)

    def _run(self, key: jax.Array) -> tuple[Any, Any]:
        options = {"extra_fields": self.extra_fields, "init_params": self.init_params}
        run_unchecked(self.mcmc, key, *self.args, **options, **self.kwargs)
        return self.mcmc.last_state, collected_by(self.mcmc)


def run_checkpointed(
    mcmc: MCMC,
    checkpoint: Checkpoint,
    rng_key: jax.Array,
    *args: Any,
    extra_fields: Sequence[str] = (),
    init_params: Any = None,
    **kwargs: Any,
) -> None:
    """Run `mcmc.run` with checkpoints: after a stop, the same call continues.

    Works with NumPyro's kernels and those of this package, warm-up included. The draws are those of
    `mcmc.run` with the same key up to rounding, and do not depend on where the run was stopped.
    Every checkpoint holds all draws so far, so choose `Checkpoint(directory, every=...)` by their
    size.

    After Ctrl-C, `mcmc` holds the draws so far. SIGTERM writes a checkpoint before the process
    ends.

    Args:
        mcmc: a NumPyro `MCMC`.
        checkpoint: where and how often, in iterations; warm-up counts.
        rng_key: one key.
        *args: arguments of the model.
        extra_fields: as in `MCMC.run`.
        init_params: as in `MCMC.run`.
        **kwargs: keyword arguments of the model.

    Raises:
        TypeError: if `mcmc` is no `MCMC`, or `checkpoint` no `Checkpoint`.
        ValueError: for checkpoints of another run, or a directory that another run uses.
        KeyboardInterrupt: after Ctrl-C in warm-up, when there are no draws.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_ensemble import Checkpoint
        >>> from numpyro_ensemble.mcmc import run_checkpointed
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
        >>> kept = Checkpoint(tempfile.mkdtemp(), every=50)
        >>> run_checkpointed(mcmc, kept, jax.random.key(0), jnp.ones(3))
        >>> mcmc.get_samples()["mu"].shape
        (50,)
    """
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"mcmc takes a numpyro.infer.MCMC, got {mcmc!r}.")
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint takes a Checkpoint, got {checkpoint!r}.")
    if mcmc.post_warmup_state is not None:
        raise ValueError(
            "mcmc has a post_warmup_state, and run_checkpointed makes the warm-up too: set "
            "mcmc.post_warmup_state = None, or call mcmc.run."
        )
    run = _Run(mcmc, one_key(rng_key), args, kwargs, extra_fields, init_params)
    number, thinning, shows = mcmc.num_samples, mcmc.thinning, mcmc.progress_bar
    placement = getattr(mcmc.sampler, "placement", Placement())
    interrupts = Interrupts(saves=True, mesh=placement.mesh)
    fingerprint = _fingerprint(run)
    placement.check_alike(lambda: fingerprint)
    keeper = Keeper(checkpoint, fingerprint, placement)
    mcmc.progress_bar = False  # one bar for all pieces
    try:
        with interrupts, tqdm.tqdm(disable=not (shows and placement.speaks)) as bar:
            state, draws, done = _pieces(run, number, keeper, interrupts, bar)
    finally:
        keeper.close()
        mcmc.num_samples, mcmc.thinning, mcmc.progress_bar = number, thinning, shows
        mcmc.post_warmup_state = None
        set_outcome(mcmc, None, None)  # drop the results of an unfinished piece
    interrupts.end_process()
    set_outcome(mcmc, draws, state)
    ended = done < mcmc.num_warmup + number
    if ended and draws is None:
        raise KeyboardInterrupt(f"interrupted in warm-up, after {done} iterations.")
    if ended:
        warn(f"interrupted: {done} of {mcmc.num_warmup + number} iterations were made.")
    set_outcome(mcmc, finished(draws), state)


def _pieces(
    run: _Run, number: int, keeper: Keeper, interrupts: Interrupts, bar: Any
) -> tuple[Any, Any, int]:
    """Make the remaining pieces; return state, draws, and how many iterations were made.

    The draws are None if the run stopped before the first one.
    """
    mcmc, warmup, thinning = run.mcmc, run.mcmc.num_warmup, run.mcmc.thinning
    leaves = keeper.newest()  # refuses another run's checkpoints before anything is computed
    state, draws = run.start()
    done = 0
    if leaves is not None:
        kept = restored(leaves, {"state": state, "draws": draws, "done": np.zeros(())})
        state, draws, done = kept["state"], kept["draws"], int(kept["done"])
        _check_same(run, state, keeper)
    bar.reset(total=warmup + number)
    bar.update(done)
    for end in _ends(warmup, number, keeper.checkpoint.every, thinning):
        if end <= done:
            continue
        if interrupts.ended():
            break
        state, part = run.go_on(state, end - done, thinning if end > warmup else 1)
        held, part = home(state), jax.tree.map(np.asarray, home(part))
        if done > warmup:
            draws = jax.tree.map(_joined, draws, part)
        else:  # a checkpoint of warm-up holds one iteration in the shapes of draws
            draws = part if end > warmup else jax.tree.map(lambda x: x[:, -1:], part)
        bar.update(end - done)
        if not bar.disable:
            bar.set_description("warmup" if end <= warmup else "sample", refresh=False)
            bar.set_postfix_str(_diagnostics_text(mcmc, held), refresh=False)
        done = end
        keeper.save(done, {"state": held, "draws": draws, "done": np.asarray(done)})
    return state, (draws if done > warmup else None), done


def _check_same(run: _Run, state: Any, keeper: Keeper) -> None:
    """Raise a ValueError if the chains' potential energies differ from those of the checkpoint."""
    before = getattr(state, "potential_energy", None)
    potential_of = getattr(run.mcmc.sampler, "get_potential_fn", None)
    if before is None or potential_of is None:  # the kernel has no potential energy
        return
    energy = potential_of(run.args, run.kwargs)
    now = jax.jit(energy if run.mcmc.num_chains == 1 else jax.vmap(energy))(state.z)
    keeper.compare_numbers("a potential energy", before, now, 1e-9, 1e-4)


def _ends(warmup: int, number: int, every: int, thinning: int) -> list[int]:
    """Return the iterations after which pieces end.

    All pieces have one length, except the last of warm-up and the first and last of the draws. If
    `thinning` does not divide `number`, the remainder is left out at the beginning, as in MCMC.
    """
    first, step = warmup + number % thinning, -(-every // thinning) * thinning
    ends = [*range(every, warmup, every), *([warmup] if warmup else [])]
    return [*ends, *range(first + step, warmup + number, step), warmup + number]


def _joined(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.concatenate([before, after], axis=1)


def _diagnostics_text(mcmc: MCMC, state: Any) -> str:
    """Return the kernel's text for the progress bar, or "" if each chain has its own text."""
    if mcmc.num_chains == 1 or mcmc.sampler.is_ensemble_kernel:
        return mcmc.sampler.get_diagnostics_str(state)
    return ""


def _fingerprint(run: _Run) -> dict[str, dict[str, str]]:
    """Return the description that tells the checkpoints of one run from those of another."""
    mcmc, model = run.mcmc, getattr(run.mcmc.sampler, "model", None)
    settings = {name: str(getattr(mcmc, name)) for name in _SETTINGS}
    settings |= {
        "extra_fields": str(tuple(run.extra_fields)),
        "rng_key": describe(run.rng_key),
        "init_params": describe_all(run.init_params),
    }
    return {
        "site": {} if model is None else describe_sites(model_sites(model, run.args, run.kwargs)),
        "argument": describe_arguments(arrange(model, run.args, run.kwargs)),
        "setting": settings,
        "kernel": _described(mcmc.sampler),
    }


def _described(kernel: MCMCKernel, prefix: str = "") -> dict[str, str]:
    """Return the constructor's arguments of a kernel, as far as they are known."""
    found = {f"{prefix}kernel": type(kernel).__name__}
    for name in inspect.signature(type(kernel)).parameters:
        value = getattr(kernel, f"_{name}", getattr(kernel, name, None))
        if isinstance(value, MCMCKernel):
            found |= _described(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            found[prefix + name] = repr(value)
        elif value is not None:
            found[prefix + name] = getattr(value, "__name__", describe(value))
    scheme = getattr(kernel, "_scheme", None)  # the kernels of this package have one
    return found if scheme is None else found | {f"{prefix}scheme": repr(scheme)}
