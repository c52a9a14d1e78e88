"""How often inputs occurred in the earlier blocks of one call."""

from __future__ import annotations

import numpy as np


def counted_before(parts: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Return, for each input, how many equal inputs are in the parts before its own.

    Args:
        parts: inputs `(N, D)` of each part.
        size: length to which the counts of a part are padded, with its last count.
    """
    whole = np.ascontiguousarray(np.concatenate(parts)) + 0.0  # turn -0.0 into 0.0
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
