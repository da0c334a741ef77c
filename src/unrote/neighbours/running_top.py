"""The least keys of each query while blocks of scores stream by."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unrote.errors import InputError

EMPTY = torch.iinfo(torch.int64).max
SEGMENT = 16


class RunningTop:
    """The ``slots`` least keys per row seen so far. A key is one int64 that orders (value, index): no ties to break.

    Attributes:
        keys: int64 [rows, slots], ascending; ``EMPTY`` where fewer were seen.
    """

    def __init__(self, rows: int, slots: int, device: torch.device):
        self.keys = torch.full((rows, slots), EMPTY, dtype=torch.int64, device=device)

    @staticmethod
    def parts(rows: slice, scores: Tensor) -> Iterator[slice]:
        """``rows`` in parts whose keys take no more memory than the scores [t, b] of all of them."""
        step = max(1, len(scores) // 8)
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))

    def add_all(self, rows: slice, keys: Tensor) -> None:
        """Merge a whole tile of keys [t, b]; needs no word from the device."""
        fresh = keys.topk(min(self.keys.shape[1], keys.shape[1]), dim=1, largest=False).values
        self._merge(rows, fresh)

    def add_some(self, rows: Tensor, keys: Tensor) -> None:
        """Merge single keys [m] of ``rows`` [m], which ascend."""
        if len(rows) == 0:
            return
        touched, counts = torch.unique_consecutive(rows, return_counts=True)
        places = torch.arange(len(rows), device=rows.device)
        places -= (counts.cumsum(0) - counts).repeat_interleave(counts)
        fresh = torch.full((len(touched), int(counts.max())), EMPTY, dtype=torch.int64, device=rows.device)
        fresh[torch.arange(len(touched), device=rows.device).repeat_interleave(counts), places] = keys
        self._merge(touched, fresh)

    def _merge(self, rows: slice | Tensor, fresh: Tensor) -> None:
        merged = torch.cat([self.keys[rows], fresh], dim=1)
        self.keys[rows] = merged.topk(self.keys.shape[1], dim=1, largest=False).values


class FloatTop(RunningTop):
    """The least non-negative float32 numbers of ``count`` references: their bits order like an integer."""

    def __init__(self, rows: int, slots: int, count: int, device: torch.device):
        if count > 2**32:
            raise InputError(f"{count} references are more than one search numbers: search parts of them")
        super().__init__(rows, slots, device)
        self.count = count

    def keys_of(self, squared: Tensor, indices: Tensor) -> Tensor:
        """Keys of numbers and of the references that have them."""
        keys: Tensor = squared.float().view(torch.int32).long().mul_(self.count).add_(indices)
        return keys

    def squared(self, keys: Tensor) -> Tensor:
        """The numbers in keys: float64; infinite where there is none."""
        bits = torch.where(keys == EMPTY, 0, keys // self.count).to(torch.int32)
        squared: Tensor = bits.view(torch.float32).double().masked_fill_(keys == EMPTY, torch.inf)
        return squared

    def indices(self) -> Tensor:
        """The references kept, int64 [rows, slots]; any where fewer were seen."""
        return self.keys % self.count


def below(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows (ascending) and columns of the scores [t, b] below the ``limits`` [t] of their rows.

    None when that is no small part of them, or when to look would make the host wait for another device.
    """
    if scores.device.type != "cpu":
        return None
    count, total = scores.shape
    if total % SEGMENT == 0:
        # An elementwise search of the whole tile costs as much as a short matrix product; minima of every
        # (total / SEGMENT)-th column are nearly free.
        segments = scores.view(count, SEGMENT, -1)
        rows, parts = _where(segments.amin(1) < limits[:, None])
        if 4 * SEGMENT * len(rows) < scores.numel():
            within, places = _where(segments[rows, :, parts] < limits[rows, None])
            return rows[within], parts[within] + places * (total // SEGMENT)
    rows, columns = _where(scores < limits[:, None])
    return None if 8 * len(rows) > scores.numel() and len(rows) > 8 * count else (rows, columns)


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is true; numpy finds it several times faster than torch."""
    places = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return places // mask.shape[1], places % mask.shape[1]
