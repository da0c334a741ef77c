"""Views of features [N, D] that make rows only when they are read, so that a memory map is never copied whole."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unrote.neighbours.streaming import Rows, release

BLOCK = 2048  # rows worked on at a time


class Chosen:
    """Some rows, in the order of ``indices`` int64 [n]."""

    def __init__(self, rows: Rows, indices: NDArray[np.int64]):
        self.rows, self.indices = rows, indices
        self.shape = (len(indices), *rows.shape[1:])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> np.ndarray:
        chosen: np.ndarray = self.rows[self.indices[rows]]
        release(self.rows)
        return chosen


class UnitRows:
    """Rows scaled to length 1, times ``sign``: for unit vectors the nearest by L2 is the one of highest cosine.

    A row of zeros has no direction. It is put far from all others, so that it is nobody's nearest.
    """

    def __init__(self, rows: Rows, sign: float = 1.0):
        self.rows, self.sign = rows, np.float32(sign)
        self.shape = rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> np.ndarray:
        chosen = np.array(self.rows[rows], dtype=np.float64)
        release(self.rows)
        norms = np.linalg.norm(chosen, axis=1, keepdims=True)
        units: np.ndarray = np.divide(chosen, norms, out=np.zeros_like(chosen), where=norms > 0).astype(np.float32)
        units *= self.sign
        units[norms[:, 0] == 0, 0] = 10.0
        return units


def blocks(rows: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive blocks of rows in float64 with where they are."""
    for start in range(0, len(rows), BLOCK):
        where = slice(start, min(start + BLOCK, len(rows)))
        yield where, np.array(rows[where], dtype=np.float64)
        release(rows)
