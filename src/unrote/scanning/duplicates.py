"""Duplicates among images: candidates by hash, judged by pixels, joined to clusters."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from unrote.data.store import ImageRows, ImageStore, digests_of
from unrote.scanning.hashing import near_pairs, store_hashes

MAX_BITS = 12
MIN_CORRELATION = 0.94
MIN_COARSE, MIN_FINE = 0.95, 0.85
WORTH_A_LOOK = 0.6
MAX_OFFSET, MAX_GAIN, MIN_CONTRAST = 0.25, 1.5, 0.01
SMALL = 16


def near_clusters(images: ImageStore, *, max_shift: int = 2) -> np.ndarray:
    """The cluster of exact and near duplicates of each image, as the least index in it. int64 [N].

    Args:
        images: N of them.
        max_shift: duplicates may be shifted by up to so many pixels (at most a quarter of the side), and mirrored.
    """
    pairs, _ = duplicate_pairs(images.images, digests_of(images), shift=max_shift)
    return clusters(pairs, len(images))


def shared_clusters(
    images: ImageStore, holdout: ImageStore, *, max_shift: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`near_clusters` of both sets, int64 [N] and [M], and which held-out images are leaks, bool [M].

    A leak is a near-duplicate of a training image, or of another leak.
    """
    own, stores = len(images), [images, holdout]
    digests = np.concatenate([digests_of(store) for store in stores])
    pairs, _ = duplicate_pairs(Joined(stores), digests, shift=max_shift, own=own)
    everywhere = clusters(pairs, len(digests))
    ours, theirs = pairs[(pairs < own).all(1)], pairs[(pairs >= own).all(1)] - own
    return clusters(ours, own), clusters(theirs, len(holdout)), np.isin(everywhere[own:], everywhere[:own])


def largest_shift(shape: tuple[int, ...]) -> int:
    """The largest shift that duplicates [N, H, W, C] are looked for with: more would leave too little to compare."""
    return min(shape[1:3]) // 4


def duplicate_pairs(
    images: Any, digests: np.ndarray, *, shift: int, own: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of duplicates that make up the clusters, int64 [P, 2], and their correlations, float32 [P].

    Of a pair, the correlation of the pixels is the largest over flips and shifts, without the mean of each colour and
    without a border as wide as the largest shift. The pair counts if it is at least 0.94, or at least 0.95 at half the
    size (noise and JPEG change the detail) and 0.85 at full size; if no colour's mean differs by more than 0.25 of the
    range and the contrast by no more than a factor 1.5 (brightness); and if both have a contrast of 0.01 at least.
    Pairs that others have joined already are mostly not looked at, so a cluster of n images costs about n comparisons,
    not n².

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
    chosen = np.sort(first)
    originals = ImageRows(images, chosen)
    pairs, correlations = [exact], [np.ones(len(exact), np.float32)]
    for near, alike in _judged(originals, shift, int((chosen < own).sum())):
        pairs.append(chosen[near])
        correlations.append(alike)
    return np.concatenate(pairs), np.concatenate(correlations)


class Joined:
    """Several stores' images as one, read when indexed."""

    def __init__(self, stores: list[ImageStore]) -> None:
        self._parts = [store.images for store in stores]
        self.shape: tuple[int, ...] = (sum(map(len, self._parts)), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        start = 0
        for part in self._parts:
            here = (rows >= start) & (rows < start + len(part))
            result[here] = part[rows[here] - start]
            start += len(part)
        return result


def _judged(images: ImageRows, shift: int, own: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Near-duplicate pairs and their correlations, part by part; the clusters grow with each part."""
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
            correlations = pair_correlations(images, part, shift)
            alike = ~np.isnan(correlations)
            found = part[alike]
            everywhere = joined(everywhere, found)
            inside = joined(inside, found[found[:, 1] < own])
            refused = np.union1d(refused, part[~alike, 0] * count + part[~alike, 1])
            yield found, correlations[alike]


def pair_correlations(images: Any, pairs: np.ndarray, shift: int) -> np.ndarray:
    """The correlation of each pair, float32 [P]; NaN where the two are not alike. See :func:`duplicate_pairs`."""
    result = np.full(len(pairs), np.nan, dtype=np.float32)
    if len(pairs) == 0:
        return result
    (left, left_mean, left_contrast), (right, right_mean, right_contrast) = (
        _standardised(images[pairs[:, side]]) for side in (0, 1)
    )
    low, high = torch.minimum(left_contrast, right_contrast), torch.maximum(left_contrast, right_contrast)
    possible = (low >= MIN_CONTRAST) & (high <= MAX_GAIN * low)
    possible &= (left_mean - right_mean).abs().amax(1) <= MAX_OFFSET
    chosen = torch.nonzero(possible)[:, 0]
    left, right = left[chosen], right[chosen]
    if min(left.shape[2:]) < SMALL:
        fine = coarse = _correlations(left, right, shift)
    else:
        # A look at half the size leaves few pairs for the full one.
        coarse = _correlations(_halved(left), _halved(right), -(-shift // 2))
        some = torch.nonzero(coarse >= WORTH_A_LOOK)[:, 0]
        chosen, coarse = chosen[some], coarse[some]
        fine = _correlations(left[some], right[some], shift)
    alike = (fine >= MIN_CORRELATION) | ((coarse >= MIN_COARSE) & (fine >= MIN_FINE))
    result[chosen[alike].numpy()] = fine[alike].clamp_max(1).numpy()
    return result


def _standardised(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Planes float32 [B, C, H, W] without their means, the means [B, C] and the RMS of what is left [B]."""
    planes = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    means = planes.mean((2, 3), keepdim=True)
    planes -= means
    return planes, means.flatten(1), planes.square().mean((1, 2, 3)).sqrt()


def _halved(planes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(planes, 2)


def _correlations(left: torch.Tensor, right: torch.Tensor, shift: int) -> torch.Tensor:
    """The largest correlation of left's middle with a window of right, over flips and shifts of [B, C, H, W]. [B]."""
    rows, columns = left.shape[2] - 2 * shift, left.shape[3] - 2 * shift
    middle = left[..., shift : shift + rows, shift : shift + columns]
    middle = (middle - middle.mean((2, 3), keepdim=True)).contiguous()
    norm = middle.square().sum((1, 2, 3)).sqrt()
    best = torch.zeros(len(left))
    for mirrored in (right, right.flip(3)):
        for down in range(2 * shift + 1):
            for along in range(2 * shift + 1):
                window = mirrored[..., down : down + rows, along : along + columns]
                sums, squares = window.sum((2, 3)), window.square().sum((1, 2, 3))
                spread = (squares - sums.square().sum(1) / (rows * columns)).clamp_min(0).sqrt()
                product = (middle * window).sum((1, 2, 3))
                best = torch.maximum(best, product / (norm * spread).clamp_min(1e-9))
    return best


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
