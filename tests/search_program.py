"""A search in a process of its own, for test_search_processes: alone or as one of several, resumable, and killable.

Usage: search_program.py images|features|reduced OUT RESUME KILL_AT. Kills itself (SIGKILL) at the KILL_AT-th read of
the last process; 0 for never. Writes the result and the number of reads of every process.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from unrote.neighbours import streaming
from unrote.neighbours.features import nearest_features
from unrote.neighbours.images import nearest_images
from unrote.neighbours.orbit import orbit
from unrote.neighbours.passes import Passes


class Rows:
    """Rows that count how often they are read."""

    def __init__(self, array: np.ndarray, kill_at: int):
        self.array, self.kill_at, self.reads, self.shape = array, kill_at, 0, array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows):
        self.reads += 1
        if self.reads == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.array[rows]


def data(kind: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    if kind == "images":
        return (random.integers(0, 256, (n, 6, 6, 1), dtype=np.uint8) for n in (40, 1000))
    queries, references = (random.normal(size=(n, 24)).astype(np.float32) for n in (40, 1000))
    if kind == "reduced":
        basis = random.normal(size=(24, 300)).astype(np.float32)
        queries, references = queries @ basis, references @ basis
    references[300:600] = queries[3]  # more copies than the fast pass keeps: this query is searched again
    references[900] = queries[4] + np.float32(1e-6)
    return queries, references


def main() -> None:
    kind, out, resume, kill_at = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    streaming.SAVE_SECONDS = 0.0
    distributed = "WORLD_SIZE" in os.environ
    if distributed:
        dist.init_process_group("gloo")
    last = not distributed or dist.get_rank() == dist.get_world_size() - 1
    queries, references = data(kind)
    rows = Rows(references, kill_at if last else 0)
    kwargs = {
        "memory_bytes": 1 << (16 if kind == "images" else 17),
        "distributed": distributed,
        "resume": None if resume == "-" else Path(resume),
    }
    if kind == "images":
        views = orbit(flip=True, max_shift=1, height=6, width=6)
        found = nearest_images(queries, rows, 20, transforms=views, **kwargs)
    else:
        if kind == "reduced":
            Passes.fastest = lambda _: "reduced"
            kwargs["memory_bytes"] = 1 << 21
        found = nearest_features(queries, rows, 20, **kwargs)
    rank = dist.get_rank() if distributed else 0
    np.savez(
        out / f"{rank}.npz",
        squared=found.squared,
        indices=found.indices,
        transforms=found.transforms,
        again=found.searched_again,
        reads=rows.reads,
    )
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
