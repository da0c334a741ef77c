"""Memorization from nearest neighbours: neighbour ratio, MQ, held-out control (Carlini et al. 2023; IET-AGC's code)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unrote.auditing.intervals import exceeding, fraction, threshold_at
from unrote.neighbours.found import Neighbours

Definition = Literal["l2", "squared-l2"]
DEFINITIONS: tuple[Definition, ...] = ("l2", "squared-l2")
THRESHOLDS = (0.15, 0.2, 0.3, 0.33, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HEADLINE: dict[Definition, float] = {"l2": 0.5, "squared-l2": 0.33}


def neighbour_ratio(neighbours: Neighbours, definition: Definition) -> np.ndarray:
    """Distance to the nearest image over the mean distance to the n nearest (the nearest included). float64 [G].

    ``l2`` uses distances (Carlini et al. 2023), ``squared-l2`` squared distances (the code behind IET-AGC's MQ): for
    the same neighbours the second is smaller, so thresholds do not transfer. 0 is an exact copy, 1 means that all n
    neighbours are equally far. An exact copy has ratio 0 also where the mean is 0 (all n neighbours are the same
    image). With n = 1 the ratio is 0 or 1 and says nothing else.
    """
    values = neighbours.squared.astype(np.float64)
    if definition == "l2":
        values = np.sqrt(values)
    mean = values.mean(axis=1)
    ratio: np.ndarray = np.divide(values[:, 0], mean, out=np.zeros_like(mean), where=values[:, 0] > 0)
    return ratio


def memorization_quantity(
    ratios: np.ndarray, originals: np.ndarray | None = None, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, Any]]:
    """MQ: how many samples have a ratio strictly below each threshold.

    Args:
        ratios: neighbour ratio of each sample [G].
        originals: identity of each sample's nearest image [G]; given, the distinct images copied are counted too.
        thresholds: which thresholds.
    """
    rows = []
    for threshold in thresholds:
        below = ratios < threshold
        row = {"threshold": threshold, **fraction(int(below.sum()), len(ratios))}
        if originals is not None:
            row["distinct"] = len(np.unique(originals[below]))
        rows.append(row)
    return rows


def calibrated(
    ratios: np.ndarray, unseen: np.ndarray, leaks: np.ndarray, rate: float, originals: np.ndarray
) -> dict[str, Any] | None:
    """The threshold that at most the share ``rate`` of real held-out images falls below, and what falls below it.

    A threshold found on some data means nothing on other data: 0.33 was chosen for small photographs, and icons or
    series of variants resemble each other far more. Held-out images that duplicate training images (``leaks``) would
    drag it down to where only copies as good as these pass, so they do not count; ``unseen`` of the result does count
    them, as a model that copies nothing makes such images too. Of the M others floor(rate · M) lie strictly below; None
    if M is too small for a single one, as the rate is then not known to be kept.

    Args:
        ratios: of the generated images [G].
        unseen: of the held-out images [M].
        leaks: which of these are duplicates of training images, bool [M].
        rate: false-positive rate, in (0, 1).
        originals: identity of each generated image's nearest training image [G].
    """
    real = unseen[~leaks]
    if exceeding(rate, len(real)) < 1:
        return None
    threshold = -threshold_at(-real, rate)
    return {
        "false_positive_rate": rate,
        "threshold": threshold,
        "num_holdout": len(real),
        "below": memorization_quantity(ratios, originals, (threshold,))[0],
        "unseen": memorization_quantity(unseen, None, (threshold,))[0],
    }


def at_threshold(table: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """The row of an MQ table for ``threshold``."""
    return next(row for row in table if row["threshold"] == threshold)


@dataclass(frozen=True)
class TrainShare:
    """Whose nearest neighbour in train ∪ held-out (equally many of each) is a training image.

    Attributes:
        wins: 1.0 nearest in train, 0.0 nearest in held-out, 0.5 equally near to both. float64 [G].
        null_spread: standard deviation of the share if it were chance which of these images were trained on.
    """

    wins: np.ndarray
    null_spread: float

    def summary(self) -> dict[str, Any]:
        """The share (a tie counts as half) with its interval, and the 95 % range without memorization around 0.5.

        The interval covers which images were generated; ``null_interval`` covers which real images happened to be
        on which side, and is the wider one when a few images are near to many samples.
        """
        null = [max(0.0, 0.5 - 1.96 * self.null_spread), min(1.0, 0.5 + 1.96 * self.null_spread)]
        ties = int((self.wins == 0.5).sum())
        return {**fraction(float(self.wins.sum()), len(self.wins)), "ties": ties, "null_interval": null}


def train_share(train: Neighbours, holdout: Neighbours, size: int) -> TrainShare:
    """Compare nearest distances to ``size`` training and ``size`` held-out images.

    If it were chance which half of these M = 2·size images was trained on, and image j is the nearest of c_j of the G
    samples, the share would be a mean over half of them drawn without replacement, of variance
    M / (M − 1) · (Σ c_j² − G² / M) / (4 G²).
    """
    wins = (1.0 + np.sign(holdout.squared[:, 0] - train.squared[:, 0])) / 2.0
    winner = np.where(wins >= 0.5, train.indices[:, 0], -1 - holdout.indices[:, 0])
    counts = np.unique(winner, return_counts=True)[1].astype(np.float64)
    samples, pool = len(wins), 2 * size
    spread = (counts**2).sum() - samples**2 / pool
    return TrainShare(wins, float(np.sqrt(pool / (pool - 1) * max(0.0, spread)) / (2 * samples)))


def image_identity(digests: np.ndarray) -> np.ndarray:
    """For each image the index of the first one with the same pixels, from digests [N, B]. int64 [N]."""
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    identity: np.ndarray = first[inverse.reshape(-1)]
    return identity
