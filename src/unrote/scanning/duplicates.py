"""Duplicates among images: candidates by hash, judged by pixels, joined to clusters."""

from typing import Any

import numpy as np
import torch

from unrote.scanning.hashing import near_pairs, store_hashes

MAX_BITS = 12
MAX_RMS, MAX_RELATIVE = 0.08, 0.35


def duplicate_pairs(images: Any, digests: np.ndarray, *, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of duplicates, int64 [P, 2], and how far apart they are, float32 [P]: root mean square, 0 = same pixels.

    A pair counts if, over flips and shifts, the RMS difference of pixels in [0, 1] is at most 0.08 and at most 0.35 of
    the two images' contrast (their correlation is then above about 0.94). The part that a shift pushed out is not
    compared. Images with the same pixels are chained (first with second, second with third), not paired all with all.

    Args:
        images: uint8 [N, H, W, C], or rows that read when indexed.
        digests: uint8 [N, 32], equal where pixels are equal.
        shift: look for shifts of up to so many pixels.
    """
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    originals = np.sort(first)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    same = np.flatnonzero(np.diff(inverse.reshape(-1)[order]) == 0)
    exact = np.stack([order[same], order[same + 1]], axis=1).astype(np.int64)
    candidates = near_pairs(store_hashes(_Chosen(images, originals), shift), MAX_BITS)
    near = originals[candidates]
    distances = pair_distances(images, near, shift)
    kept = np.isfinite(distances)
    pairs = np.concatenate([exact, near[kept]])
    return pairs, np.concatenate([np.zeros(len(exact), np.float32), distances[kept]])


class _Chosen:
    """Rows of a store, read when sliced."""

    def __init__(self, images: Any, chosen: np.ndarray) -> None:
        self._images, self._chosen = images, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self._images[self._chosen[rows]])


def pair_distances(images: Any, pairs: np.ndarray, shift: int) -> np.ndarray:
    """Least RMS difference over flips and shifts, float32 [P]; infinite where the pair is not alike."""
    result = np.full(len(pairs), np.inf, dtype=np.float32)
    values = int(np.prod(images.shape[1:]))
    step = max(1, (1 << 22) // values)
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        left, right = (torch.from_numpy(np.asarray(images[part[:, side]])).float().div_(255) for side in (0, 1))
        contrast = torch.minimum(left.std((1, 2, 3)), right.std((1, 2, 3)))
        best = torch.full((len(part),), torch.inf)
        for mirrored in (right, right.flip(2)):
            for down in range(-shift, shift + 1):
                for along in range(-shift, shift + 1):
                    best = torch.minimum(best, _shifted_rms(left, mirrored, down, along))
        alike = (best <= MAX_RMS) & (best <= MAX_RELATIVE * contrast)
        result[start : start + step] = torch.where(alike, best, torch.inf).numpy()
    return result


def _shifted_rms(left: torch.Tensor, right: torch.Tensor, down: int, along: int) -> torch.Tensor:
    """RMS over the pixels that both have when ``right`` is moved ``down`` and ``along``. [B]."""
    height, width = left.shape[1:3]
    here = left[:, max(0, down) : height + min(0, down), max(0, along) : width + min(0, along)]
    there = right[:, max(0, -down) : height + min(0, -down), max(0, -along) : width + min(0, -along)]
    return (here - there).square().mean((1, 2, 3)).sqrt()


def clusters(pairs: np.ndarray, count: int) -> np.ndarray:
    """The least index that each of ``count`` images is joined with by pairs, int64 [N] (union-find)."""
    parents = list(range(count))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for left, right in pairs.tolist():
        low, high = sorted((root(left), root(right)))
        parents[high] = low
    return np.array([root(index) for index in range(count)], dtype=np.int64)
