"""The fast part of an audit, for looks at samples while training: copies by pixels, and a Fréchet distance."""

import math
from typing import Any

import numpy as np
import torch

from unrote.auditing.frechet import Moments, frechet_with_influence
from unrote.auditing.intervals import fraction
from unrote.auditing.limits import MEASURES
from unrote.auditing.memorization import HEADLINE, neighbour_ratio
from unrote.auditing.searching import find
from unrote.data.store import ImageStore, in_memory_store
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.guards.index import PixelIndex
from unrote.neighbours.orbit import IDENTITY

SIDE = 64
"""Larger images are compared at this height or width: a search among them as they are takes longer than sampling."""


class QuickAudit:
    """Few samples against all training images. The same numbers as an audit of these samples would find.

    Those of images larger than 64×64 are those of an audit of the images made smaller.

    Args:
        train: the training images; their clusters of near-duplicates are found once.
        holdout: images that were not trained on, for the Fréchet distance in random convolutions; None for none. With
            few samples it is biased upward: compare looks at equally many samples only.

    Raises:
        InputError: the held-out images have another shape, or there are fewer than two.
    """

    def __init__(self, train: ImageStore, holdout: ImageStore | None = None) -> None:
        self.index = PixelIndex(_smaller(train))
        self._encoder, self._reference = RandomConvEncoder(), None
        if holdout is not None:
            self._reference = Moments.of(self._encoder(np.asarray(_smaller(holdout).images[:])))

    def __call__(
        self, images: np.ndarray, measure: str, threshold: float | None
    ) -> tuple[dict[str, Any], float | None]:
        """What is found in uint8 images [n, H, W, C].

        Args:
            images: the samples.
            measure: one of :data:`unrote.limits.MONITORED`.
            threshold: of the neighbour ratio; None for ``exact``.

        Returns:
            ``copied`` (near-copies as the audit counts them), the measure, each a count with its interval; and the
            Fréchet distance, None without held-out images.
        """
        images = smaller(images)
        queries, index = in_memory_store(images, source="samples"), self.index
        orbit = find(queries, index.references, index.num_neighbors, index.views, margin=index.margin)
        if measure == "exact":
            beyond = orbit.plain.squared[:, 0] == 0
        else:
            view, definition = MEASURES[measure]
            plain = find(queries, index.references, index.num_neighbors, (IDENTITY,)) if view == "plain" else orbit
            beyond = neighbour_ratio(plain.plain, definition) < threshold
        copied = neighbour_ratio(orbit.distinct, "squared-l2") < HEADLINE["squared-l2"]
        distance = None
        if self._reference is not None and len(images) > 1:
            distance = frechet_with_influence(self._encoder(images), self._reference)[0]
        counts = {"copied": copied, "measured": beyond}
        return {name: fraction(int(found.sum()), len(images)) for name, found in counts.items()}, distance


def smaller(images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, C], the longer side at most :data:`SIDE`: each pixel the mean of those it stands for."""
    height, width = images.shape[1:3]
    share = SIDE / max(height, width)
    if share >= 1:
        return images
    size = (max(1, math.floor(height * share + 0.5)), max(1, math.floor(width * share + 0.5)))
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    means = torch.nn.functional.adaptive_avg_pool2d(pixels, size).round()
    return means.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _smaller(store: ImageStore) -> ImageStore:
    """A store as it is if its images are small; else one in memory of 12 KiB an image."""
    if max(store.images.shape[1:3]) <= SIDE:
        return store
    parts = [smaller(np.asarray(store.images[start : start + 256])) for start in range(0, len(store), 256)]
    return in_memory_store(np.concatenate(parts), source=store.source, names=store.names)
