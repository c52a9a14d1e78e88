"""Ctrl-C and SIGTERM, handled between the chunks of a run, so that no step is lost."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from jax.sharding import Mesh

from numpyro_ensemble.hosts import of_all


class Interrupts:
    """Notes the first Ctrl-C, or SIGTERM if the run has checkpoints; a second ends the process.

    Handlers that the user's program has set are left in place, and threads set none. If one of
    several processes is interrupted, all end their runs together.
    """

    def __init__(self, saves: bool, mesh: Mesh | None = None) -> None:
        self.came: int | None = None
        self._mesh, self._elsewhere = mesh, False
        self._saves = saves
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
            if self._saves:
                usual[signal.SIGTERM] = signal.SIG_DFL
            for number, handler in usual.items():
                if signal.getsignal(number) is handler:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came is not None:
            self.__exit__()
            os.kill(os.getpid(), number)
        self.came = number

    def ended(self) -> bool:
        """Return whether the run ends now. On several hosts, all of them ask together."""
        self._elsewhere = bool(of_all(self.came is not None, self._mesh).any())
        return self._elsewhere

    @property
    def ended_a_run(self) -> bool:
        """Return whether a signal ended the run, in this process or in another one of the run."""
        return self.came is not None or self._elsewhere

    def end_process(self) -> None:
        """Let a SIGTERM that was noted do what it usually does."""
        if self.came == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
