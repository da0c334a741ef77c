"""Quality and variety in a named feature space, so that memorization is never read alone."""

from typing import Any

import numpy as np

from unrote.auditing.frechet import Moments, frechet_with_influence
from unrote.auditing.intervals import mean_spread, squared_estimate
from unrote.auditing.kernel import KernelDistance
from unrote.auditing.manifold import Manifold
from unrote.auditing.rows import Chosen
from unrote.neighbours.streaming import Rows
from unrote.seeding import derive_seed

MIN_IMAGES = 10  # a side; below it there is no number
MAX_PAIRWISE = 5000  # images a side for what needs all pairs: KID, precision, recall, density, coverage
MIFID_THRESHOLD = 0.1
METRICS = ("frechet_distance", "kid", "precision", "recall", "density", "coverage", "mifid")


def mifid(distance: float, influence: np.ndarray, similarity: np.ndarray) -> dict[str, Any] | None:
    """MiFID (Bai et al. 2021): the Fréchet distance over the memorization distance, if that is below 0.1.

    The memorization distance is the mean over generated images of 1 − |cosine| to the nearest training image; at 0.1
    and above it counts as 1, so MiFID is then the Fréchet distance. The threshold is the competition's, for the FID
    Inception. None if the distance is 0 (all are copies: MiFID is infinite).

    Args:
        distance: Fréchet distance of the generated images.
        influence: of each image on it [G].
        similarity: highest |cosine| of each generated image to a training image [G].
    """
    own = 1 - similarity
    memorization = float(own.mean())
    if memorization <= 0:
        return None
    if memorization < MIFID_THRESHOLD:
        influence = influence / memorization - distance / memorization**2 * (own - memorization)
        distance /= memorization
    return {**squared_estimate(distance, mean_spread(influence)), "memorization_distance": memorization}


def measure_quality(
    generated: Rows, train: Rows, holdout: Rows | None, similarity: np.ndarray, *, seed: int
) -> dict[str, Any]:
    """Distances of the generated images, and of equally many training images (the floor), to the reference.

    The reference is the held-out set; without one it is the training set, towards which copies are favoured. Intervals
    cover which images were generated, with the reference fixed; not which were trained on, nor the training run.

    Args:
        generated: features float32 [G, D].
        train: features float32 [N, D].
        holdout: features float32 [M, D].
        similarity: highest |cosine| of each generated image to a training image [G].
        seed: of the subsets.

    Returns:
        ``generated`` and ``floor``: ``value`` and ``interval`` of each of :data:`METRICS`, None where there are too
        few images; the floor has no MiFID, as training images are at distance 0 of themselves.
    """
    count = len(generated) if holdout is None else min(len(generated), len(train))
    reference = train if holdout is None else holdout
    chosen = subsample(len(generated), count, seed, "quality-generated")
    comparison = _Comparison(reference, seed)
    floor = None
    if holdout is not None:
        floor = comparison.metrics(Chosen(train, subsample(len(train), count, seed, "quality-train")), None)
    return {
        "reference": "train" if holdout is None else "holdout",
        "num_generated": count,
        "num_reference": len(reference),
        "num_pairwise": [min(count, MAX_PAIRWISE), min(len(reference), MAX_PAIRWISE)],
        "interval_method": "jackknife over generated images, reference fixed",
        "generated": comparison.metrics(Chosen(generated, chosen), similarity[chosen]),
        "floor": floor,
    }


class _Comparison:
    """A reference that several sets are compared with."""

    def __init__(self, reference: Rows, seed: int):
        self.seed = seed
        self.enough = len(reference) >= MIN_IMAGES
        if self.enough:
            self.moments = Moments.of(reference)
            some = reference[subsample(len(reference), MAX_PAIRWISE, seed, "pairwise-reference")]
            self.kernel, self.manifold = KernelDistance(some), Manifold(some)

    def metrics(self, features: Rows, similarity: np.ndarray | None) -> dict[str, dict[str, Any] | None]:
        """All of METRICS, None with too few images."""
        found: dict[str, dict[str, Any] | None] = dict.fromkeys(METRICS)
        if not self.enough or len(features) < MIN_IMAGES:
            return found
        distance, influence = frechet_with_influence(features, self.moments)
        found["frechet_distance"] = squared_estimate(distance, mean_spread(influence))
        some = features[subsample(len(features), MAX_PAIRWISE, self.seed, "pairwise")]
        found["kid"] = self.kernel.to(some)
        found |= self.manifold.metrics(some) or {}
        if similarity is not None:
            found["mifid"] = mifid(distance, influence, similarity)
        return found


def subsample(total: int, num: int, seed: int, purpose: str) -> np.ndarray:
    """``num`` of ``total`` indices by a fixed seed, in their original order; all of them if there are no more."""
    if num >= total:
        return np.arange(total)
    chosen = np.random.default_rng(derive_seed(seed, "audit", purpose)).choice(total, num, replace=False)
    return np.sort(chosen)
