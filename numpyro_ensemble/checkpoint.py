"""Checkpoints of runs, written by Orbax: the same call goes on from the newest one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ensemble.calls.arguments import FIXED, MEMBER_AXES, Arguments
from numpyro_ensemble.calls.identity import contents
from numpyro_ensemble.density import Site
from numpyro_ensemble.handlers import check_count, warn
from numpyro_ensemble.hosts import is_far, processes
from numpyro_ensemble.sharding import Placement
from numpyro_ensemble.storage import (
    Leaves,
    first_difference,
    lock,
    unlock,
    with_key,
    without_key,
)

_FORMAT = 2
_LOCK = "in_use"


@dataclass(frozen=True)
class Checkpoint:
    """Folder and interval of a run's checkpoints; the same call made again goes on from them.

    A resumed run ends with the numbers of a run that was never stopped. They are equal bit for bit
    on the same machine with the same `PYTHONHASHSEED`: otherwise NumPyro's ELBO adds its terms in
    another order in each process. Checkpoints of another model, data or settings are an error.

    Args:
        directory: a folder for the checkpoints of this run alone.
        every: number of steps between two checkpoints.
        keep: number of checkpoints that are kept, the newest ones.
        on_error: what to do when a checkpoint cannot be written: "warn" and go on, or "raise".

    Example:
        >>> from numpyro_ensemble import Checkpoint
        >>> Checkpoint("fits/radon", every=5000).keep
        2
    """

    directory: str | os.PathLike
    every: int = 1000
    keep: int = 2
    on_error: str = "warn"

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            check_count(name, getattr(self, name))
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f'on_error takes "warn" or "raise", got {self.on_error!r}.')


class Keeper:
    """Reads the newest checkpoint of a run, and writes new ones.

    Args:
        checkpoint: the user's settings.
        fingerprint: texts that identify the run, by name in named groups.
        placement: where the run is computed; the first of its processes writes.

    Raises:
        ValueError: if another run uses the directory, or some processes have no part in the run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        fingerprint: Mapping[str, Mapping[str, str]],
        placement: Placement,
    ) -> None:
        try:
            from orbax.checkpoint.experimental import v1 as ocp
        except ImportError as error:
            raise ImportError(
                "checkpoint= needs Orbax: pip install 'numpyro_ensemble[checkpoint]'."
            ) from error
        if len(processes(placement.mesh)) != jax.process_count():  # Orbax waits for all of them
            raise ValueError(
                f"checkpoint= needs a mesh with devices of all {jax.process_count()} processes, "
                f'mesh="all" for example: they write together.'
            )
        self.checkpoint, self.fingerprint, self._placement = checkpoint, fingerprint, placement
        self.path = Path(checkpoint.directory).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path / _LOCK) if placement.speaks else None
        if placement.of_all(self._lock is False).any():
            unlock(self._lock)
            raise ValueError(
                f"another run uses {self.path} for its checkpoints: give this one a directory of "
                f"its own."
            )
        training = ocp.training
        self._orbax = training.Checkpointer(
            self.path,
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(checkpoint.keep),
            cleanup_tmp_directories=True,
        )

    def newest(self) -> Leaves | None:
        """Return the leaves of the last tree that was kept whole, None without one.

        Raises:
            ValueError: if it is of another run, or a later format.
        """
        of_all = self._placement.of_all
        while True:
            steps = sorted(found.step for found in self._orbax.checkpoints)
            # all processes use the step that the first one finds
            step = int(of_all(np.int32(steps[-1] if steps else -1))[0])
            if step < 0:
                return None
            leaves, error = self._tried(step)
            failed = of_all(error is not None)
            if not failed.any():
                return leaves
            if not failed[0]:
                raise ValueError(
                    f"some processes cannot read the checkpoint of step {step} in {self.path}, "
                    f"which the first of them can: they need one directory that all of them see."
                ) from error
            reason = f" {type(error).__name__}: {str(error)[:200]}" if error else ""
            warn(
                f"the checkpoint of step {step} in {self.path} is damaged and set aside, and the "
                f"one before it is used, if there is one.{reason}"
            )
            if self._placement.speaks:
                self._set_aside(step)
            of_all(True)  # the others look only after it was moved
            self._orbax.reload()

    def _tried(self, step: int) -> tuple[Leaves | None, Exception | None]:
        """Return the leaves of a checkpoint, or what is wrong with it.

        Raises:
            ValueError: if it is of another run, or a later format.
        """
        try:
            return self._read(step), None
        except _OfAnotherRunError:
            raise
        except Exception as error:  # whatever a damaged file makes Orbax raise
            return None, error

    def _read(self, step: int) -> Leaves:
        told = self._orbax.metadata(step).custom_metadata
        if not isinstance(told, dict) or told.get("digest") != _digest_of(told):
            raise ValueError("its description is incomplete")
        if told["format"] != _FORMAT:
            raise _OfAnotherRunError(
                f"the checkpoints in {self.path} are of format {told['format']}, and this version "
                f"reads format {_FORMAT}."
            )
        self._compare(told["fingerprint"])
        arrays = self._orbax.load(step)
        for name, (dtype, shape) in told["empty"].items():
            arrays[name] = np.empty(shape, dtype)
        leaves = [np.asarray(arrays[f"leaf_{i}"]) for i in range(len(told["paths"]))]
        for path, leaf, form in zip(told["paths"], leaves, told["forms"], strict=True):
            if describe(leaf) != form:
                raise ValueError(f"{path} is not what was written")
        return Leaves(told["paths"], map(jnp.asarray, map(with_key, leaves, told["keys"])))

    def _compare(self, other: Mapping[str, Mapping[str, str]]) -> None:
        """Raise a ValueError that names what differs from another fingerprint."""
        difference = first_difference(other, self.fingerprint)
        if difference:
            raise self._of_another_run(difference)

    def compare_numbers(self, what: str, before: Any, now: Any, *tolerances: float) -> None:
        """Raise a ValueError where numbers of this run differ from those of the saved run.

        Args:
            what: the name of the numbers.
            before: their values in the saved run.
            now: their values in this run.
            *tolerances: relative tolerances in double and in single precision.
        """
        before, now = np.asarray(before), np.asarray(now)
        double, single = tolerances
        tolerance = double if now.dtype == np.float64 else single
        close = np.isclose(now, before, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not close.all():
            place = tuple(np.argwhere(~close)[0])
            raise self._of_another_run(
                f"{what} was {before[place]:.8g}, and is {now[place]:.8g}: a number in the model, "
                f"the guide or the optimiser has changed, or the version of a package"
            )

    def _of_another_run(self, difference: str) -> ValueError:
        return _OfAnotherRunError(
            f"the checkpoints in {self.path} are of another run: {difference}. Give this run "
            f"another directory, or remove that one."
        )

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint in the background, once the one before it is written."""
        leaves = Leaves.of(tree)
        plain = [without_key(leaf) for leaf in leaves.leaves]
        arrays = [np.array(array) for array, _ in plain]  # the next steps reuse the buffers
        named = {f"leaf_{i}": array for i, array in enumerate(arrays)}
        empty = {k: [v.dtype.name, list(v.shape)] for k, v in named.items() if not v.size}
        told = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "paths": list(leaves.paths),
            "forms": [describe(array) for array in arrays],
            "keys": [kind for _, kind in plain],
            "empty": empty,
        }
        told["digest"] = _digest_of(told)
        try:
            full = {k: v for k, v in named.items() if k not in empty}  # Orbax takes no empty arrays
            self._orbax.save_async(step, full, force=True, custom_metadata=told)
        except Exception as error:  # from this checkpoint, or from the one before it
            self._failed(f"the checkpoint of step {step}", error)

    def _failed(self, which: str, error: Exception) -> None:
        message = (
            f"{which} in {self.path} could not be written: "
            f"{type(error).__name__}: {str(error)[:200]}"
        )
        if self.checkpoint.on_error == "raise":
            raise OSError(message) from error
        warn(f"{message}. The run goes on without it.")

    def _set_aside(self, step: int) -> None:
        """Rename the folder of a damaged checkpoint, so that the run can write this step again."""
        aside = self.path / f"damaged_{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.path / str(step)).rename(aside)

    def close(self) -> None:
        """Wait until the last checkpoint is written, and release the directory."""
        try:
            self._orbax.close()
        except Exception as error:
            self._failed("the last checkpoint", error)
        finally:
            unlock(self._lock)


class _OfAnotherRunError(ValueError):
    """An intact checkpoint that belongs to another run."""


def _digest_of(told: dict[str, Any]) -> str:
    """Return a digest of a checkpoint's description."""
    text = json.dumps({k: v for k, v in told.items() if k != "digest"}, sort_keys=True)
    return contents(np.frombuffer(text.encode(), np.uint8))


def describe_sites(sites: Mapping[str, Site]) -> dict[str, str]:
    """Return a text for each site of a model."""
    return {
        name: f"{site.kind} {site.distribution}".rstrip() + f" of shape {tuple(site.shape)}"
        for name, site in sites.items()
    }


def describe_arguments(arguments: Arguments) -> dict[str, str]:
    """Return a text for each argument of a model, and for each array in it."""
    return {label: describe(leaf) for label, leaf in arguments.labelled(FIXED, *MEMBER_AXES)}


def describe_all(tree: Any) -> str:
    """Return a text for all leaves of a tree."""
    return " ".join(map(describe, jax.tree.leaves(tree))) or "none"


def describe(value: Any) -> str:
    """Return a text that tells an array, or a plain value, from others."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        if is_far(value):
            return f"{value.dtype}{list(value.shape)} spread over processes"
        array, _ = without_key(value)
        return f"{array.dtype}{list(array.shape)} {contents(array)}"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    return type(value).__name__
