"""Direct distances in float64 between pairs of rows, and the nearest of them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from unrote.neighbours.streaming import Rows, release

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # query int64, squared distance float64, reference int64; each [m]
PAIR_BYTES = 1 << 20  # float64 differences that a thread works on at a time: they stay in the processor's cache
READS = 32  # pieces read before a memory map is released, which costs as much as several of them


def squared_distances(queries: np.ndarray, references: Rows, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """‖queries[rows] − references[indices]‖² directly in float64 [m]; the same whatever else is in the lists."""
    squared = np.empty(len(rows))
    order = np.argsort(indices, kind="stable")  # references that several queries share are then read once
    step = max(1, PAIR_BYTES // (8 * queries.shape[1]))
    # Every array made from a memory map would be one, too, which costs threads more than the work.
    read = np.asarray(references) if isinstance(references, np.ndarray) else references

    def compute(part: np.ndarray) -> None:
        for place, start in enumerate(range(0, len(part), step)):
            if place % READS == READS - 1:
                release(references)  # scattered reads map far more of a file than they use
            chunk = part[start : start + step]
            differences = read[indices[chunk]].astype(np.float64)
            differences -= queries[rows[chunk]].astype(np.float64)  # to subtract float32 takes twice as long
            squared[chunk] = (differences[:, None] @ differences[:, :, None])[:, 0, 0]

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compute, np.array_split(order, 4 * threads)))
    release(references)
    return squared


def least(lists: Lists, more: Lists, num: int) -> Lists:
    """The ``num`` least (squared distance, reference) of each query in either list, in order."""
    rows, squared, indices = (np.concatenate(pair) for pair in zip(lists, more, strict=True))
    order = np.lexsort((indices, squared, rows))
    rows, squared, indices = rows[order], squared[order], indices[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    places = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    kept = places < num
    return rows[kept], squared[kept], indices[kept]
