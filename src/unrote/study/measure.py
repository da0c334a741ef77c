"""What is measured of the samples of one snapshot: what they copy, and how good they are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unrote.auditing.frechet import Moments, frechet_with_influence
from unrote.auditing.intervals import exceeding, fraction, mean_spread, squared_estimate, threshold_at
from unrote.auditing.manifold import Manifold
from unrote.auditing.memorization import neighbour_ratio, train_share
from unrote.auditing.searching import References, find, find_once
from unrote.data.store import ImageStore, in_memory_store
from unrote.encoders import Encoder, features
from unrote.encoders.cache import pixels_digest
from unrote.neighbours.orbit import IDENTITY, Transform, orbit
from unrote.scanning.duplicates import shared_clusters
from unrote.study.subjects import Subjects

VERSION = 2
"""Of everything below: another one measures the samples again."""
NUM_NEIGHBORS = 50
HEADLINE = 0.5
"""Of the neighbour ratio by L2 (Carlini et al. 2023)."""
FALSE_POSITIVE_RATE = 0.01
"""Of the calibrated threshold, on the control."""
MAX_SHIFT = 2
CLOSEST = 8
"""Pairs of a sample and the training image it is nearest to that are named."""
MANIFOLD_IMAGES = 2000
"""Images of reference that precision and recall look at."""


@dataclass(frozen=True)
class Control:
    """What the control says, found once for a training set.

    Attributes:
        clusters: the least index of the near-duplicates each distinct training image belongs to. int64 [N].
        control_clusters: likewise of the control. int64 [M].
        unseen: neighbour ratio over the orbit of each control image among the training images. float64 [M].
        leaks: which control images are near-duplicates of training images. bool [M].
    """

    clusters: np.ndarray
    control_clusters: np.ndarray
    unseen: np.ndarray
    leaks: np.ndarray

    @property
    def threshold(self) -> float | None:
        """The ratio that at most 1 % of the control falls below, leaks apart; None with fewer than 100 images."""
        real = self.unseen[~self.leaks]
        return -threshold_at(-real, FALSE_POSITIVE_RATE) if exceeding(FALSE_POSITIVE_RATE, len(real)) else None

    @property
    def unseen_below(self) -> dict[str, Any]:
        """The share of the control below 0.5: what needs no memorization."""
        real = self.unseen[~self.leaks]
        return fraction(int((real < HEADLINE).sum()), len(real))


class Yardstick:
    """Measures samples against the images of one regime and seed.

    Args:
        subjects: the images.
        encoders: feature spaces; the first one is primary.
        cache: folder that keeps features and what the control says.
    """

    def __init__(self, subjects: Subjects, encoders: Sequence[Encoder], cache: Path) -> None:
        self.subjects, self.encoders, self.cache = subjects, tuple(encoders), cache
        _, height, width, _ = subjects.train.images.shape
        shift = min(MAX_SHIFT, (min(height, width) - 1) // 2)
        self.shift = shift
        self.transforms = orbit(flip=True, max_shift=shift, height=height, width=width)

    @cached_property
    def key(self) -> str:
        """Hex digest of everything that a measurement depends on, but for the samples."""
        sets = (self.subjects.train, self.subjects.control, self.subjects.reference)
        spaces = [f"{encoder.name}:{encoder.weights_sha256}" for encoder in self.encoders]
        parts = (VERSION, *(store.fingerprint for store in sets), *spaces)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def measure(self, samples: np.ndarray) -> dict[str, Any]:
        """``memorization``, ``closest`` pairs and ``quality`` of samples uint8 [G, H, W, C]; JSON-able."""
        store = in_memory_store(samples, source="samples")
        return {**self._memorization(store), "quality": self._quality(store)}

    @cached_property
    def control(self) -> Control:
        """What the control says; searched for once, then read."""
        distinct, control = self.subjects.distinct, self.subjects.control
        ours, theirs, leaks = shared_clusters(distinct, control)
        asked = (control, References(distinct, ours), NUM_NEIGHBORS, self.transforms)
        found = find_once(*asked, margin=self.shift, cache=self.cache)
        return Control(ours, theirs, neighbour_ratio(found.distinct, "l2"), leaks)

    @cached_property
    def floor(self) -> dict[str, Any]:
        """What real images score: the control as if it were samples, and the training images as if all were copied."""
        return {
            "control": self._quality(self.subjects.control),
            "train": self._quality(self.subjects.distinct),
            "unseen_below": self.control.unseen_below,
            "leaks": int(self.control.leaks.sum()),
            "threshold": self.control.threshold,
            "classifier_accuracy": next((one.accuracy for one in self.encoders if hasattr(one, "accuracy")), None),
        }

    def _memorization(self, samples: ImageStore) -> dict[str, Any]:
        distinct, control = self.subjects.distinct, self.control
        references = References(distinct, control.clusters)
        held_out = References(self.subjects.control, control.control_clusters)

        def among(images: References, transforms: Sequence[Transform], margin: int) -> Any:
            return find(samples, images, NUM_NEIGHBORS, transforms, margin=margin)

        over_orbit = among(references, self.transforms, self.shift)
        plain = among(references, (IDENTITY,), 0)
        ratios, nearest = neighbour_ratio(over_orbit.distinct, "l2"), over_orbit.plain.indices[:, 0]
        plain_ratios = neighbour_ratio(plain.distinct, "l2")
        size = min(len(distinct), len(held_out.store))
        few, many = (one.chosen(size, 0, "control") for one in (references, held_out))
        ours = over_orbit if few is references else among(few, self.transforms, self.shift)
        theirs = among(many, self.transforms, self.shift)
        found: dict[str, Any] = {
            "orbit": self._copies(ratios, nearest, HEADLINE),
            "plain": self._copies(plain_ratios, plain.plain.indices[:, 0], HEADLINE),
            "calibrated": None,
            "train_share": train_share(ours.plain, theirs.plain, size).summary(),
        }
        if control.threshold is not None:
            found["calibrated"] = {
                "threshold": control.threshold,
                **self._copies(ratios, nearest, control.threshold),
            }
        return {"memorization": found, "closest": self._closest(ratios, nearest)}

    def _closest(self, ratios: np.ndarray, nearest: np.ndarray) -> list[dict[str, Any]]:
        """The samples of least ratio, each of another training image."""
        order = np.argsort(ratios, kind="stable")
        _, first = np.unique(self.control.clusters[nearest[order]], return_index=True)
        chosen = order[np.sort(first)[:CLOSEST]]
        return [{"sample": int(i), "train": int(nearest[i]), "ratio": float(ratios[i])} for i in chosen]

    def _copies(self, ratios: np.ndarray, nearest: np.ndarray, threshold: float) -> dict[str, Any]:
        """Samples below ``threshold``, and how many distinct training images they copy; of repeated images apart."""
        copies = ratios < threshold
        row = fraction(int(copies.sum()), len(copies)) | {"distinct": self._distinct(nearest[copies])}
        repeated = self.subjects.repeated
        if repeated.any():
            of_repeated = copies & repeated[nearest]
            row["repeated"] = fraction(int(of_repeated.sum()), len(copies)) | {
                "distinct": self._distinct(nearest[of_repeated]),
                "of": int(repeated.sum()),
            }
            row["single"] = fraction(int((copies & ~of_repeated).sum()), len(copies)) | {
                "distinct": self._distinct(nearest[copies & ~of_repeated])
            }
        return row

    def _distinct(self, indices: np.ndarray) -> int:
        return len(np.unique(self.control.clusters[indices]))

    def _quality(self, samples: ImageStore) -> dict[str, Any]:
        quality: dict[str, Any] = {"primary": self.encoders[0].key}
        for encoder in self.encoders:
            rows = np.asarray(encoder(np.asarray(samples.images)), dtype=np.float32)
            moments, manifold = self._reference[encoder.key]
            distance, influence = frechet_with_influence(rows, moments)
            balls = manifold.metrics(rows) or {}
            quality[encoder.key] = {
                "frechet_distance": squared_estimate(distance, mean_spread(influence)),
                "precision": balls.get("precision"),
                "recall": balls.get("recall"),
            }
        return quality

    @cached_property
    def _reference(self) -> dict[str, tuple[Moments, Manifold]]:
        reference, found = self.subjects.reference, {}
        for encoder in self.encoders:
            rows = features(encoder, reference.images, digest=pixels_digest(reference), cache=self.cache / "features")
            found[encoder.key] = (Moments.of(rows), Manifold(np.asarray(rows[:MANIFOLD_IMAGES])))
        return found
