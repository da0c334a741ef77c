"""Feeding references to a scan: blocks within a memory budget, rows split over processes, progress kept on disk."""

import hashlib
import io
import mmap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from unrote.files import write_bytes
from unrote.neighbours.scans import Scan
from unrote.ranks import Ranks

MAX_BLOCK = 4096
FIRST_BLOCK = 512
SAVE_SECONDS = 30.0


class Rows(Protocol):
    """Images [N, H, W, C] or features [N, D]: an array, a memory map, or a view that reads rows when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> np.ndarray: ...


@dataclass(frozen=True)
class Blocks:
    """How many queries are searched for at once, how many references are read at once, and the tile they meet in."""

    group: int
    block: int
    tile: int

    @staticmethod
    def within(memory_bytes: int, values: int, slots: int, query_bytes: int, reference_bytes: int) -> "Blocks":
        """Half of the memory for queries and what is kept for them, a quarter each for the references and the tile.

        ``query_bytes`` and ``reference_bytes`` are per value, with all copies that exist at one time.
        """
        group = memory_bytes // 2 // (values * query_bytes + 64 * slots)
        block = _even(min(MAX_BLOCK, memory_bytes // 4 // (values * reference_bytes)))
        tile = _even(min(MAX_BLOCK, memory_bytes // 4 // (16 * block)))
        return Blocks(max(1, group), block, tile)


def _even(size: int) -> int:
    """A multiple of 64 if there is room: matrix products are up to a fifth faster."""
    return max(1, size // 64 * 64 or size)


@dataclass(frozen=True)
class Saved:
    """Where the progress of scans is kept, in a folder named by the content searched; nowhere if ``folder`` is None."""

    folder: Path | None
    ranks: Ranks

    @staticmethod
    def keyed(resume: Path | None, ranks: Ranks, queries: Rows, references: Rows, *settings: object) -> "Saved":
        """The folder of exactly these queries, this process's references, and settings."""
        if resume is None:
            return Saved(None, ranks)
        digest = hashlib.sha256(repr((ranks, settings)).encode())
        for rows, span in ((queries, range(len(queries))), (references, ranks.span(len(references)))):
            digest.update(content_digest(rows, span))
        return Saved(resume / digest.hexdigest()[:32], ranks)

    def path(self, stage: str) -> Path | None:
        """The file of one scan."""
        return None if self.folder is None else self.folder / f"{stage}.npz"

    def load(self, stage: str, scan: Scan, first: int) -> int:
        """Give ``scan`` what was saved; the index of the next row to read."""
        path = self.path(stage)
        if path is None or not path.exists():
            return first
        with np.load(path, allow_pickle=False) as saved:
            scan.merge({name: saved[name] for name in saved.files if name != "next"})
            return int(saved["next"])

    def save(self, stage: str, scan: Scan, following: int) -> None:
        """Replace the file atomically. What a killed process left half written is removed."""
        path = self.path(stage)
        if path is None:
            return
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"next": np.int64(following), **scan.state()}
        np.savez(buffer, **arrays)
        write_bytes(path, buffer.getvalue())
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


@dataclass
class Stream:
    """Drives scans over all references."""

    references: Rows
    block: int
    ranks: Ranks
    saved: Saved
    bar: "tqdm[Any]"
    _since: float = field(default_factory=time.monotonic)

    def run(self, stage: str, scan: Scan) -> None:
        """Feed this process's references, or those that are missing, to ``scan``; then it knows all processes'."""
        span = self.ranks.span(len(self.references))
        position = self.saved.load(stage, scan, span.start)
        self.bar.update(position - span.start)
        while position < span.stop:
            # Of the first rows all are kept: few, so that the scan soon has a limit.
            size = min(self.block, FIRST_BLOCK) if position == span.start else self.block
            stop = min(position + size, span.stop)
            scan.add(position, self.references[position:stop])
            release(self.references)
            self.bar.update(stop - position)
            position = stop
            if position == span.stop or time.monotonic() - self._since > SAVE_SECONDS:
                self.saved.save(stage, scan, position)
                self._since = time.monotonic()
        for rank, share in enumerate(self.ranks.shares(scan.state())):
            if rank != self.ranks.rank:
                scan.merge(share)


def release(rows: Rows) -> None:
    """Give the pages of a read-only memory map back: they would count as this process's memory as long as it runs."""
    rows = getattr(rows, "rows", rows)  # a view of one
    if isinstance(rows, np.memmap) and rows.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        base = rows.base
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)


def content_digest(rows: Rows, span: range) -> bytes:
    """SHA-256 of the shape and of the rows in ``span``; reads them once."""
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    for start in range(span.start, span.stop, MAX_BLOCK):
        part = np.ascontiguousarray(rows[start : min(start + MAX_BLOCK, span.stop)])
        digest.update(part.dtype.str.encode())
        digest.update(part.data)
        release(rows)
    return digest.digest()
