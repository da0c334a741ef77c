"""Exact nearest neighbours among images: a blocked matrix product with a running top-n.

8-bit pixels are integers, and that makes a *float32* matrix product exact. Centred pixels lie in [-128, 127], so a
dot product over at most 1,024 of them is an integer of magnitude ≤ 2²⁴, and so is every partial sum in whatever order
the BLAS adds them: float32 holds all of them without rounding (bfloat16 and TF32 products, which round only their
inputs, too). The pieces are added as integers. Hence ‖x‖² + ‖y‖² − 2x·y has no cancellation error here: a copy is at
distance exactly 0, and no block size, thread count or order of summation can change a result. Ties go to the lower
index.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from unrote.auditing.orbit import IDENTITY, Transform

EXACT_CHUNK = 1024  # 1,024 · 128² = 2²⁴: the longest dot product of centred pixels that float32 always holds exactly
MAX_BLOCK = 2048


class Images(Protocol):
    """Rows of uint8 images [N, H, W, C]: an array, a memory map, or a view that reads rows when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> np.ndarray: ...


@dataclass(frozen=True)
class Neighbours:
    """The nearest references of each query, nearest first; all arrays [G, n].

    Attributes:
        squared: squared L2 distance in pixel levels (0..255), exact integers. int64.
        indices: positions among the references. int64.
        transforms: positions in the orbit of the transform that brings the reference nearest. int16.
    """

    squared: np.ndarray
    indices: np.ndarray
    transforms: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """L2 distances with pixels in [0, 1]. float64 [G, n]."""
        distances: np.ndarray = np.sqrt(self.squared) / 255.0
        return distances


@torch.no_grad()
def nearest_images(
    queries: Images,
    references: Images,
    num: int,
    *,
    transforms: Sequence[Transform] = (IDENTITY,),
    memory_bytes: int = 1 << 29,
    progress: str | None = None,
) -> Neighbours:
    """The ``num`` nearest references of every query, exactly: min over transforms g of ‖query − g(reference)‖.

    Args:
        queries: uint8 [G, H, W, C].
        references: uint8 [N, H, W, C]; streamed once per block of queries.
        num: how many neighbours; at most N are returned.
        transforms: the orbit of each reference; of equally near transforms the first counts.
        memory_bytes: bound on the working memory (on top of the result); decides the block sizes, never the result.
        progress: label of a progress bar on stderr; None for no bar.

    Returns:
        Neighbours with arrays [G, min(num, N)].
    """
    assert queries.shape[1:] == references.shape[1:] and len(references) > 0 and num > 0
    num = min(num, len(references))
    values = int(np.prod(references.shape[1:]))
    block = max(1, min(MAX_BLOCK, memory_bytes // (32 * values), int((memory_bytes / 64) ** 0.5)))
    sources = torch.from_numpy(np.stack([view.source_pixels(*references.shape[1:]) for view in transforms]))
    total = -(-len(queries) // block) * len(references)
    found = []
    with tqdm(total=total, desc=progress, unit="img", leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(queries), block):
            centred = _centred(queries[start : start + block])
            nearest = _RunningTop(num, len(references))
            for first, squared, which in _distance_blocks(centred, references, sources, block):
                nearest.add(first, squared, which)
                bar.update(squared.shape[1])
            found.append(nearest.result())
    if not found:
        empty = np.zeros((0, num), dtype=np.int64)
        return Neighbours(empty, empty, empty.astype(np.int16))
    squared_all, indices, transforms_all = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Neighbours(squared_all, indices, transforms_all)


def _centred(images: np.ndarray) -> torch.Tensor:
    """Pixels minus 128, flattened: float32 [n, D]."""
    flat = torch.from_numpy(np.array(images, dtype=np.float32)).reshape(len(images), -1)
    return flat.sub_(128.0)


def _distance_blocks(
    queries: torch.Tensor, references: Images, sources: torch.Tensor, block: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Per block of references: its first index, squared distances [g, b] (least over the orbit), which transform."""
    exact = torch.int32 if queries.shape[1] * 255**2 < 2**31 else torch.int64
    query_norms = queries.double().square_().sum(1).to(exact)
    # Reflection repeats some pixels and drops others, so each view has its own norm: a count of each pixel's uses.
    uses = torch.stack([torch.bincount(source, minlength=queries.shape[1]) for source in sources]).double()
    for first in range(0, len(references), block):
        pixels = _centred(references[first : first + block]).T.contiguous()  # [D, b]: a view is then a row gather
        norms = (uses @ pixels.double().square_()).to(exact)
        best = torch.empty((len(queries), pixels.shape[1]), dtype=exact)
        which = torch.zeros(best.shape, dtype=torch.int16)
        for index, source in enumerate(sources):
            squared = _dot(queries, pixels if len(sources) == 1 else pixels[source], exact)
            squared.mul_(-2).add_(norms[index]).add_(query_norms[:, None])
            if index == 0:
                best.copy_(squared)
                continue
            which.masked_fill_(squared < best, index)
            torch.minimum(best, squared, out=best)
        yield first, best, which


def _dot(queries: torch.Tensor, columns: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """Exact dot products [g, b] of centred pixels [g, D] and [D, b], as integers."""
    total = torch.zeros((len(queries), columns.shape[1]), dtype=exact)
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(columns), EXACT_CHUNK):
            chunk = slice(start, start + EXACT_CHUNK)
            total += (queries[:, chunk] @ columns[chunk]).to(exact)
    return total


class _RunningTop:
    """The ``num`` least (distance, index) pairs per row, seen so far.

    Both are packed into one integer, distance · N + index: comparing keys is comparing pairs, so ties need no care.
    """

    def __init__(self, num: int, num_references: int):
        self.num, self.num_references = num, num_references
        self.keys: torch.Tensor | None = None
        self.which: torch.Tensor | None = None

    def add(self, first: int, squared: torch.Tensor, which: torch.Tensor) -> None:
        """Merge a block [g, b] whose first reference has index ``first``."""
        keys = squared.to(torch.int64).mul_(self.num_references)
        keys += torch.arange(first, first + keys.shape[1])
        keys, columns = keys.topk(min(self.num, keys.shape[1]), dim=1, largest=False)
        which = which.gather(1, columns)
        if self.keys is not None and self.which is not None:
            keys, which = torch.cat([self.keys, keys], dim=1), torch.cat([self.which, which], dim=1)
            keys, columns = keys.topk(min(self.num, keys.shape[1]), dim=1, largest=False)
            which = which.gather(1, columns)
        self.keys, self.which = keys, which

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squared distances, indices, transforms; each [g, num], nearest first."""
        assert self.keys is not None and self.which is not None
        keys, order = self.keys.sort(dim=1)
        which = self.which.gather(1, order)
        return (keys // self.num_references).numpy(), (keys % self.num_references).numpy(), which.numpy()
