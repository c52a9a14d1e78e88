"""Strict JAX for every test.

Tests run in float64 unless `JAX_ENABLE_X64=0` is set, and promoting ranks is an error unless a
test is marked `promotes_ranks` (NumPyro's own `Normal(loc, scale).sample(key, (5,))` does).
"""

import gc
import itertools
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import jax
import pytest

if "JAX_ENABLE_X64" not in os.environ:
    jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _rank_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    allowed = request.node.get_closest_marker("promotes_ranks")
    with jax.numpy_rank_promotion("allow" if allowed else "raise"):
        yield


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C interrupt the tests, also if they run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _may_promote_ranks(run: Callable[[], None]) -> Callable[[], None]:
    def promoting() -> None:
        with jax.numpy_rank_promotion("allow"):
            run()

    return promoting


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark doctests as core, let these promote ranks as users may, and keep this turn's tests."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("core")
            item.runtest = _may_promote_ranks(item.runtest)  # type: ignore[method-assign]
    others = {item for item in items if not _has_its_turn(item)}
    config.hook.pytest_deselected(items=list(others))
    items[:] = [item for item in items if item not in others]


def _has_its_turn(item: pytest.Item) -> bool:
    """Return whether this run includes a test.

    `LONG_TURN` selects one of 24 parts of the long tests, and `QUICK_TURN` one of 6 of the others.
    All cases of a test belong to the same turn.
    """
    is_long = item.get_closest_marker("long") is not None
    name, number = ("LONG_TURN", 24) if is_long else ("QUICK_TURN", 6)
    turn = os.environ.get(name)
    place = zlib.crc32(getattr(item, "originalname", item.name).encode())
    return turn is None or place % number == int(turn)


def pytest_collection_finish() -> None:
    """Freeze the objects that exist once tests are collected, and collect garbage less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


_MAPPINGS = Path("/proc/self/maps")
_MOST_MAPPINGS = 15_000  # each program has a few, and Linux ends a process that has 65,530
_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _programs_are_dropped() -> Iterator[None]:
    """Drop compiled programs before a process reaches its limit of memory mappings."""
    yield
    due = next(_tests_run) % 10 == 0 and _MAPPINGS.exists()
    if due and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    """Return the key that tests start from."""
    return jax.random.key(0)


class Compilations:
    """The XLA programs compiled (or read from the persistent cache) in a `compile_count` block."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)


_counting: list[Compilations] = []


def _on_duration(event: str, duration: float, **details: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for compilations in _counting:
            compilations.names.append(str(details.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(_on_duration)


@contextmanager
def _count_compilations() -> Iterator[Compilations]:
    compilations = Compilations()
    _counting.append(compilations)
    try:
        yield compilations
    finally:
        _counting.remove(compilations)


@pytest.fixture
def compile_count() -> Callable[[], AbstractContextManager[Compilations]]:
    """Count compilations: `with compile_count() as c: ...; assert c.count == 0, c.names`."""
    return _count_compilations
