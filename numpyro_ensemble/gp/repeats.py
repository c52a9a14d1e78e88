"""How often inputs stood before in the blocks of one call."""

from __future__ import annotations

import numpy as np


def counted_before(parts: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Return for each input how many equal ones stand in the parts before its own.

    Args:
        parts: inputs `(N, D)` of each part.
        size: what counts are filled up to, by the last one of each part.
    """
    whole = np.ascontiguousarray(np.concatenate(parts)) + 0.0  # one zero, not two
    row = np.dtype((np.void, whole.dtype.itemsize * whole.shape[1]))
    _, codes = np.unique(whole.view(row).ravel(), return_inverse=True)
    seen = np.zeros(codes.max() + 1, np.uint32)
    counts, start = [], 0
    for part in parts:
        own = codes[start : start + len(part)]
        counts.append(np.pad(seen[own], (0, size - len(part)), "edge"))
        np.add.at(seen, own, 1)
        start += len(part)
    return counts
