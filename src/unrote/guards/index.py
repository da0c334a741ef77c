"""The training images that generated images are checked against, by pixels or by features of copy detection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unrote.auditing.authenticity import Search
from unrote.auditing.compare import MIN_UNSEEN
from unrote.auditing.intervals import exceeding, threshold_at
from unrote.auditing.memorization import HEADLINE, Definition, neighbour_ratio
from unrote.auditing.quality import subsample
from unrote.auditing.searching import References, find
from unrote.auditing.similarity import most_similar
from unrote.data.store import ImageStore, in_memory_store
from unrote.encoders import Encoder, features
from unrote.encoders.cache import pixels_digest
from unrote.errors import InputError
from unrote.neighbours.orbit import BRIGHTNESS, SCALES, orbit
from unrote.scanning.duplicates import near_clusters, shared_clusters

DEFAULT_RATIO = HEADLINE["squared-l2"]
MAX_SHIFT = 2


class TrainingIndex(Protocol):
    """Training images to compare with.

    Attributes:
        train: the images.
        key: what its values are called: ``ratio`` (the lower, the more alike) or ``similarity`` (the higher).
        threshold: what lies beyond it (below, or above) is a copy.
    """

    train: ImageStore
    key: str
    threshold: float

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values float64 [B] of uint8 images [B, H, W, C], and the nearest training image of each, int64 [B]."""

    def alike(self, values: np.ndarray) -> np.ndarray:
        """The values with the sign that makes the greater the more alike, [B]; its own inverse."""

    def settings(self) -> dict[str, Any]:
        """What the verdicts depend on, JSON-able."""


class PixelIndex:
    """The audit's measure of near-copies: the neighbour ratio over the augmentation orbit, clusters counting once.

    The ratio is ``squared-l2``, 0 for an exact copy (:func:`unrote.auditing.memorization.neighbour_ratio`).

    Args:
        train: the training images.
        threshold: below this ratio an image is a copy; by default 0.33, below which the audit counts near-copies.
        num_neighbors: n of the ratio.
        flip: mirrored training images count too.
        max_shift: shifted ones, by up to so many pixels; less where the images are too small for it.
    """

    key = "ratio"

    def __init__(
        self,
        train: ImageStore,
        *,
        threshold: float = DEFAULT_RATIO,
        num_neighbors: int = 50,
        flip: bool = True,
        max_shift: int = MAX_SHIFT,
    ) -> None:
        if not 0 < threshold <= 1:
            raise InputError(f"threshold of a copy filter: a ratio lies in (0, 1], not at {threshold:g}")
        height, width = train.images.shape[1:3]
        self.train, self.threshold, self.num_neighbors = train, threshold, num_neighbors
        self.margin = min(max_shift, (min(height, width) - 1) // 2)
        shape = {"height": height, "width": width}
        self.views = orbit(flip=flip, max_shift=self.margin, scales=SCALES, brightness=BRIGHTNESS, **shape)
        self.references = References(train, near_clusters(train))

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared-L2 ratios of the images, and their nearest training images; see :class:`TrainingIndex`."""
        ratios, nearest = self.ratios(images)
        return ratios["squared-l2"], nearest

    def ratios(self, images: np.ndarray) -> tuple[dict[Definition, np.ndarray], np.ndarray]:
        """Ratios of both definitions, float64 [B] each, and the nearest training images, int64 [B]."""
        queries = in_memory_store(images, source="generated")
        found = find(queries, self.references, self.num_neighbors, self.views, margin=self.margin).distinct
        both: tuple[Definition, ...] = ("l2", "squared-l2")
        return {definition: neighbour_ratio(found, definition) for definition in both}, found.indices[:, 0]

    def alike(self, values: np.ndarray) -> np.ndarray:
        """The negative ratio."""
        return -values

    def settings(self) -> dict[str, Any]:
        """Measure, threshold and training images."""
        return {
            "measure": "ratio",
            "threshold": self.threshold,
            "num_neighbors": self.num_neighbors,
            "num_transforms": len(self.views),
            "train_fingerprint": self.train.fingerprint,
        }


class FeatureIndex:
    """The highest cosine similarity to a training image in the features of copy detection, such as SSCD.

    Args:
        train: the training images.
        encoder: of copy detection.
        threshold: above this similarity an image is a copy; it belongs to the encoder and the kind of images.
        cache: folder that keeps the features of the training images; None computes them again.
    """

    key = "similarity"

    def __init__(self, train: ImageStore, encoder: Encoder, *, threshold: float, cache: Path | None = None) -> None:
        if not encoder.copy_detection:
            raise InputError(f"encoder {encoder.key}: its similarity does not say what is a copy; use sscd")
        self.train, self.threshold, self.encoder = train, threshold, encoder
        digest = pixels_digest(train)
        self._features = features(encoder, train.images, digest=digest, cache=cache, progress="training images")

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Similarities of the images, and their most similar training images; see :class:`TrainingIndex`."""
        found = most_similar(self.encoder(images), self._features, Search(), "generated → train")
        return found.values, found.indices

    def alike(self, values: np.ndarray) -> np.ndarray:
        """The similarity."""
        return values

    def settings(self) -> dict[str, Any]:
        """Measure, threshold, encoder and training images."""
        return {
            "measure": f"{self.encoder.key} similarity",
            "threshold": self.threshold,
            "weights_sha256": self.encoder.weights_sha256,
            "train_fingerprint": self.train.fingerprint,
        }


def is_copy(index: TrainingIndex, values: np.ndarray) -> np.ndarray:
    """Which values lie strictly beyond the threshold. bool [B]."""
    copies: np.ndarray = index.alike(values) > index.alike(np.float64(index.threshold))  # type: ignore[arg-type]
    return copies


def calibrate(index: TrainingIndex, holdout: ImageStore, rate: float, seed: int = 0) -> None:
    """Set the threshold that at most the share ``rate`` of real images that were not trained on lies beyond.

    A threshold found on some images means nothing on others. At most 1,000 held-out images are looked at, chosen by the
    seed; those that are duplicates of training images do not count.

    Raises:
        InputError: the images have another shape, or are fewer than 1 / rate.
    """
    if holdout.images.shape[1:] != index.train.images.shape[1:]:
        raise InputError(f"{holdout.source}: held-out images must have the size and channels of the training images")
    if not 0 < rate < 1:
        raise InputError(f"rate of a copy filter: must lie between 0 and 1, not at {rate:g}")
    chosen = holdout.subset(subsample(len(holdout), MIN_UNSEEN, seed, "guard-calibration"))
    leaks = shared_clusters(index.train, chosen)[2]
    alike = index.alike(index(np.asarray(chosen.images[:]))[0])[~leaks]
    if exceeding(rate, len(alike)) < 1:
        raise InputError(
            f"{holdout.source}: to calibrate at rate {rate:g} takes {1 / rate:.0f} held-out images or more"
        )
    index.threshold = float(index.alike(np.float64(threshold_at(alike, rate))))  # type: ignore[arg-type]


def names_of(index: TrainingIndex, nearest: np.ndarray) -> Sequence[str]:
    """Names of training images, int64 [B]."""
    return [index.train.names[int(row)] for row in nearest]
