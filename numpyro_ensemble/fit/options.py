"""The options of `run`, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpyro.infer.svi import SVIState

from numpyro_ensemble.calls.arguments import MEMBER_BATCH, ROW_AXES, Arguments
from numpyro_ensemble.checkpoint import Checkpoint
from numpyro_ensemble.fit.batches import Batches
from numpyro_ensemble.fit.stopping import EarlyStopping
from numpyro_ensemble.handlers import check_count, warn


class RunOptions(NamedTuple):
    """The keyword options of `run`, with their defaults."""

    progress_bar: bool = True
    stable_update: bool = False
    forward_mode_differentiation: bool = False
    init_state: SVIState | None = None
    init_params: Any = None
    batch_size: int | None = None
    batch_args: Iterable[str | int] | None = None
    shared_batches: bool = True
    early_stopping: EarlyStopping | None = None
    callback: Callable | None = None
    jit_model_args: bool | None = None
    member_args: Iterable[str | int] | None = None
    chunk_size: int | None = None
    checkpoint: Checkpoint | None = None
    gather: bool = True

    def check(self, num_steps: int) -> None:
        """Raise where an option is out of range."""
        check_count("num_steps", num_steps)
        for name in ("batch_size", "chunk_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.early_stopping is not None:
            if not isinstance(self.early_stopping, EarlyStopping):
                raise TypeError(
                    f"early_stopping takes an EarlyStopping, got {self.early_stopping!r}."
                )
            self.early_stopping.check()
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback takes a callable, got {self.callback!r}.")
        if self.checkpoint is not None and not isinstance(self.checkpoint, Checkpoint):
            raise TypeError(f"checkpoint takes a Checkpoint, got {self.checkpoint!r}.")
        if self.batch_args is not None and self.batch_size is None:
            raise ValueError("batch_args was given without batch_size.")
        if not isinstance(self.init_state, SVIState | None):
            raise TypeError(
                f"init_state takes the state of an earlier run, result.state; got "
                f"{type(self.init_state).__name__}."
            )
        if self.init_state is not None and self.init_params is not None:
            raise ValueError(
                "give either init_state, to go on, or init_params, to begin; not both."
            )

    def batches(self, arguments: Arguments, ensemble_size: int) -> Batches | None:
        """Return how the data are cut into batches, None for all rows at each step.

        Raises:
            ValueError: if numbers of rows differ, or leading lengths of member_args are not the
                ensemble size.
        """
        arguments.check_members(ensemble_size)
        if self.batch_size is None:
            return None
        lengths = {
            label: np.shape(leaf)[axis]
            for kind, axis in ROW_AXES.items()
            for label, leaf in arguments.labelled(kind)
        }
        if not lengths:
            raise ValueError(
                "batch_size found no array to batch: a list counts as no array (numpy.asarray "
                "makes one), and what member_args names is cut along its second axis."
            )
        if len(set(lengths.values())) != 1:
            own = [label for label, _ in arguments.labelled(MEMBER_BATCH)]
            second = f" (of {own}, which member_args names, the second length)" if own else ""
            raise ValueError(
                f"batch_size needs arguments of one leading length{second}, got {lengths}; "
                f"name what is batched in batch_args=."
            )
        (total,) = set(lengths.values())
        if self.batch_size > total:
            warn(
                f"batch_size={self.batch_size} is more than the {total} rows there are; every "
                f"step takes all of them."
            )
        return Batches(min(self.batch_size, total), total, self.shared_batches)
