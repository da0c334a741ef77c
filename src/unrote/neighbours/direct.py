"""Direct distances in float64 between pairs of rows, and the nearest of them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from unrote.neighbours.streaming import Rows, release

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # query int64, squared distance float64, reference int64; each [m]
PAIR_BYTES = 1 << 20  # float64 differences that a thread works on at a time: they stay in the processor's cache
READS = 32  # pieces read before a memory map is released, which costs as much as several of them


def squared_distances(
    queries: np.ndarray,
    references: Rows,
    rows: np.ndarray,
    indices: np.ndarray,
    dtype: type[np.float32] | type[np.float64] = np.float64,
) -> np.ndarray:
    """‖queries[rows] − references[indices]‖² directly in ``dtype`` [m]; the same whatever else is in the lists.

    See :func:`rounding` for how far float32, three times as fast, is off.
    """
    squared = np.empty(len(rows), dtype)
    order = np.argsort(indices, kind="stable")  # references that several queries share are then read once
    step = max(1, PAIR_BYTES // (np.dtype(dtype).itemsize * queries.shape[1]))
    # Every array made from a memory map would be one, too, which costs threads more than the work.
    read = np.asarray(references) if isinstance(references, np.ndarray) else references

    @np.errstate(over="ignore")
    def compute(part: np.ndarray) -> None:
        for place, start in enumerate(range(0, len(part), step)):
            if place % READS == READS - 1:
                release(references)  # scattered reads map far more of a file than they use
            chunk = part[start : start + step]
            differences = read[indices[chunk]].astype(dtype, copy=False)
            differences -= queries[rows[chunk]].astype(
                dtype, copy=False
            )  # to subtract another type takes twice as long
            squared[chunk] = (differences[:, None] @ differences[:, :, None])[:, 0, 0]

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compute, np.array_split(order, 4 * threads)))
    release(references)
    return squared


def rounding(squared: np.ndarray, values: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the squared distances of rows of ``values`` numbers lie, computed directly in float32: low and high.

    Each difference and each square is rounded once, and a sum of D squares in any order is off by at most D · 2⁻²³ of
    itself; what underflows is less than D · 2⁻¹²⁵.
    """
    share, least = (values + 4) * 2.0**-23, values * 2.0**-125
    wide = squared.astype(np.float64)
    return np.nan_to_num(wide * (1 - share) - least, posinf=2.0**127), wide * (1 + 2 * share) + least


def least(lists: Lists, more: Lists, num: int) -> Lists:
    """The ``num`` least (squared distance, reference) of each query in either list, in order."""
    rows, squared, indices = (np.concatenate(pair) for pair in zip(lists, more, strict=True))
    order = np.lexsort((indices, squared, rows))
    rows, squared, indices = rows[order], squared[order], indices[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    places = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    kept = places < num
    return rows[kept], squared[kept], indices[kept]
