"""Duplicates among images: candidates by hash, judged by pixels, joined to clusters."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from unrote.data.store import ImageStore, image_digests
from unrote.scanning.hashing import near_pairs, store_hashes

MAX_BITS = 12
MAX_RMS, MAX_RELATIVE = 0.08, 0.35
COARSE_RELATIVE = 0.7


def near_clusters(images: ImageStore, *, max_shift: int = 2) -> np.ndarray:
    """The cluster of exact and near duplicates of each image, as the least index in it. int64 [N].

    Args:
        images: N of them.
        max_shift: duplicates may be shifted by up to so many pixels (at most a quarter of the side), and mirrored.
    """
    pairs, _ = duplicate_pairs(images.images, digests_of(images), shift=max_shift)
    return clusters(pairs, len(images))


def digests_of(images: ImageStore) -> np.ndarray:
    """SHA-256 of each image's pixels, uint8 [N, 32]."""
    return image_digests(images.images) if images.digests is None else np.asarray(images.digests)


def largest_shift(shape: tuple[int, ...]) -> int:
    """The largest shift that duplicates [N, H, W, C] are looked for with: more would leave too little to compare."""
    return min(shape[1:3]) // 4


def duplicate_pairs(
    images: Any, digests: np.ndarray, *, shift: int, own: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of duplicates that make up the clusters, int64 [P, 2], and how far apart they are, float32 [P].

    A distance is the root mean square over pixels in [0, 1], 0 for the same pixels. A pair counts if, over flips and
    shifts, that is at most 0.08 and at most 0.35 of the two images' contrast (their correlation is then above about
    0.94). The part that a shift pushed out is not compared. Pairs that others have joined already are mostly not
    looked at, so a cluster of n images costs about n comparisons, not n².

    Args:
        images: uint8 [N, H, W, C], or rows that read when indexed.
        digests: uint8 [N, 32], equal where pixels are equal.
        shift: look for shifts of up to so many pixels.
        own: the first so many images are the training images (all by default). Two of them are joined by being
            alike, never only through another image.
    """
    count, shift = len(digests), min(shift, largest_shift(images.shape))
    own = count if own is None else own
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    same = np.flatnonzero(np.diff(inverse.reshape(-1)[order]) == 0)
    exact = np.stack([order[same], order[same + 1]], axis=1).astype(np.int64)
    originals = _Chosen(images, np.sort(first))
    pairs, distances = [exact], [np.zeros(len(exact), np.float32)]
    for near, apart in _judged(originals, shift, int((originals.chosen < own).sum())):
        pairs.append(originals.chosen[near])
        distances.append(apart)
    return np.concatenate(pairs), np.concatenate(distances)


class _Chosen:
    """Rows of a store, read when indexed."""

    def __init__(self, images: Any, chosen: np.ndarray) -> None:
        self._images, self.chosen = images, chosen
        self.shape = (len(chosen), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self._images[self.chosen[rows]])


def _judged(images: _Chosen, shift: int, own: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Near-duplicate pairs and their distances, part by part; the clusters grow with each part."""
    count = len(images)
    everywhere, inside = np.arange(count), np.arange(count)  # clusters of all, and by pairs of training images alone
    refused = np.zeros(0, dtype=np.int64)
    step = max(1, (1 << 22) // int(np.prod(images.shape[1:])))
    for candidates in near_pairs(store_hashes(images, shift), MAX_BITS):
        keys = candidates[:, 0] * count + candidates[:, 1]
        todo = candidates[~np.isin(keys, refused, assume_unique=True)]
        while len(todo):
            both_own = todo[:, 1] < own
            labels = np.where(both_own[:, None], inside[todo], everywhere[todo])
            todo = todo[labels[:, 0] != labels[:, 1]]
            part, todo = todo[:step], todo[step:]
            distances = pair_distances(images, part, shift)
            alike = np.isfinite(distances)
            found = part[alike]
            everywhere = joined(everywhere, found)
            inside = joined(inside, found[found[:, 1] < own])
            refused = np.union1d(refused, part[~alike, 0] * count + part[~alike, 1])
            yield found, distances[alike]


def pair_distances(images: Any, pairs: np.ndarray, shift: int) -> np.ndarray:
    """Least RMS difference over flips and shifts, float32 [P]; infinite where the pair is not alike."""
    result = np.full(len(pairs), np.inf, dtype=np.float32)
    if len(pairs) == 0:
        return result
    left, right = (_planes(images[pairs[:, side]]) for side in (0, 1))
    contrast = torch.minimum(_contrast(left), _contrast(right))
    # A look at half the size leaves few pairs for the full one.
    coarse = _least_rms(_halved(left), _halved(right), -(-shift // 2))
    chosen = torch.nonzero(coarse <= COARSE_RELATIVE * contrast)[:, 0]
    best = _least_rms(left[chosen], right[chosen], shift)
    alike = (best <= MAX_RMS) & (best <= MAX_RELATIVE * contrast[chosen])
    result[chosen[alike].numpy()] = best[alike].numpy()
    return result


def _planes(images: np.ndarray) -> torch.Tensor:
    """float32 [B, C, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)


def _halved(planes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(planes, 2, ceil_mode=True)


def _contrast(planes: torch.Tensor) -> torch.Tensor:
    """RMS deviation from the mean of each colour. [B]."""
    return (planes - planes.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt()


def _least_rms(left: torch.Tensor, right: torch.Tensor, shift: int) -> torch.Tensor:
    """Least RMS difference over flips and shifts of planes [B, C, H, W], over the pixels that both have. [B]."""
    best = torch.full((len(left),), torch.inf)
    height, width = left.shape[2:]
    for mirrored in (right, right.flip(3)):
        for down in range(-shift, shift + 1):
            for along in range(-shift, shift + 1):
                here = left[..., max(0, down) : height + min(0, down), max(0, along) : width + min(0, along)]
                there = mirrored[..., max(0, -down) : height + min(0, -down), max(0, -along) : width + min(0, -along)]
                best = torch.minimum(best, (here - there).square_().mean((1, 2, 3)))
    return best.sqrt()


def clusters(pairs: np.ndarray, count: int) -> np.ndarray:
    """The least index that each of ``count`` images is joined with by pairs. int64 [N]."""
    return joined(np.arange(count), pairs)


def joined(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Clusters ``labels`` (the least index in each) after joining ``pairs`` of images. int64 [N]."""
    labels = labels.copy()
    while True:
        ends = labels[pairs]
        apart = ends[:, 0] != ends[:, 1]
        if not apart.any():
            return labels
        np.minimum.at(labels, ends[apart].max(1), ends[apart].min(1))
        while (labels != (above := labels[labels])).any():
            labels = above
