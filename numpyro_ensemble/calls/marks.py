"""Marks of values whose contents are not compared."""

from __future__ import annotations

from typing import Any

import numpy as np

BY_VALUE = (type(None), type(...), bool, int, float, complex, str, bytes, np.dtype)


class Unknown:
    """A value that cannot be compared; it equals only itself."""


class Hashed:
    """A hashable value that is hashed once."""

    __slots__ = ("value", "_hash")

    def __init__(self, value: Any) -> None:
        self.value, self._hash = value, hash(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Hashed) and self.value == other.value)

    def __hash__(self) -> int:
        return self._hash


class ByIdentity:
    """Equal to another one of the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
