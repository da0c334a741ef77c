"""Quality and variety in a named feature space, so that memorization is never read alone."""

from typing import Any

import numpy as np

from unrote.auditing.frechet import Moments, frechet_distance, frechet_with_spread
from unrote.auditing.intervals import estimate, jackknife_spread, squared_estimate
from unrote.auditing.manifold import Manifold, manifold_metrics
from unrote.auditing.rows import Chosen
from unrote.neighbours.streaming import Rows
from unrote.seeding import derive_seed

__all__ = ["frechet_distance", "kernel_distance", "manifold_metrics", "measure_quality", "mifid", "subsample"]

MIN_IMAGES = 10  # a side; below it there is no number
MAX_PAIRWISE = 5000  # images a side for what needs all pairs: KID, precision, recall, density, coverage
PAIR_BLOCK = 512
MIFID_THRESHOLD = 0.1
METRICS = ("frechet_distance", "kid", "precision", "recall", "density", "coverage", "mifid")


def kernel_distance(
    generated: np.ndarray, reference: np.ndarray, within_reference: float | None = None
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): unbiased MMD² with the kernel (x·y / D + 1)³, and its standard error.

    All pairs at once, where the paper averages over random blocks: the same expectation, less noise, no draw. The error
    is the jackknife's over which images were generated (exact: a U-statistic without one image has a closed form).
    Can be negative: it is unbiased.

    Args:
        generated: features [G, D], G ≥ 3.
        reference: features [M, D], M ≥ 2.
        within_reference: :func:`mean_kernel` of the reference, if it is known.
    """
    generated, reference = (np.asarray(features, dtype=np.float64) for features in (generated, reference))
    if within_reference is None:
        within_reference = mean_kernel(reference)
    within, between = _mean_kernel_to_others(generated), np.empty(len(generated))
    for start in range(0, len(generated), PAIR_BLOCK):
        where = slice(start, start + PAIR_BLOCK)
        between[where] = _kernel(generated[where] @ reference.T, generated.shape[1]).mean(1)
    n = len(generated)
    left_out = (n * within.mean() - 2 * within) / (n - 2) - 2 * (n * between.mean() - between) / (n - 1)
    return float(within.mean() - 2 * between.mean() + within_reference), jackknife_spread(left_out)


def mean_kernel(features: np.ndarray) -> float:
    """The mean kernel between different images, of features [n, D]."""
    return float(_mean_kernel_to_others(np.asarray(features, dtype=np.float64)).mean())


def _mean_kernel_to_others(features: np.ndarray) -> np.ndarray:
    means = np.empty(len(features))
    for start in range(0, len(features), PAIR_BLOCK):
        block = features[start : start + PAIR_BLOCK]
        own = _kernel(np.einsum("ij,ij->i", block, block), features.shape[1])
        sums = _kernel(block @ features.T, features.shape[1]).sum(1)
        means[start : start + PAIR_BLOCK] = (sums - own) / (len(features) - 1)
    return means


def _kernel(products: np.ndarray, dimensions: int) -> np.ndarray:
    kernel = products / dimensions
    kernel += 1
    result: np.ndarray = kernel * kernel * kernel
    return result


def mifid(distance: float, spread: float, similarity: np.ndarray) -> dict[str, Any] | None:
    """MiFID (Bai et al. 2021): the Fréchet distance over the memorization distance, if that is below 0.1.

    The memorization distance is the mean over generated images of 1 − |cosine| to the nearest training image; at 0.1
    and above it counts as 1, so MiFID is then the Fréchet distance. The threshold is the competition's, for the FID
    Inception. None if the distance is 0 (all are copies: MiFID is infinite).

    Args:
        distance: Fréchet distance of the generated images.
        spread: its standard error.
        similarity: highest |cosine| of each generated image to a training image [G].
    """
    memorization = float((1 - similarity).mean())
    if memorization <= 0:
        return None
    if memorization >= MIFID_THRESHOLD:
        return {**squared_estimate(distance, spread), "memorization_distance": memorization}
    relative = (1 - similarity).std(ddof=1) / np.sqrt(len(similarity)) / memorization
    # The two errors are added as if they always went the same way: their correlation is not known.
    whole = spread / memorization + distance / memorization * relative
    return {**squared_estimate(distance / memorization, whole), "memorization_distance": memorization}


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
        "num_resamples": 0,
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
            self.reference = reference[subsample(len(reference), MAX_PAIRWISE, seed, "pairwise-reference")]
            self.within_reference, self.manifold = mean_kernel(self.reference), Manifold(self.reference)

    def metrics(self, features: Rows, similarity: np.ndarray | None) -> dict[str, dict[str, Any] | None]:
        """All of METRICS, None with too few images."""
        found: dict[str, dict[str, Any] | None] = dict.fromkeys(METRICS)
        if not self.enough or len(features) < MIN_IMAGES:
            return found
        distance, spread = frechet_with_spread(features, self.moments)
        found["frechet_distance"] = squared_estimate(distance, spread)
        some = features[subsample(len(features), MAX_PAIRWISE, self.seed, "pairwise")]
        found["kid"] = estimate(*kernel_distance(some, self.reference, self.within_reference))
        found |= self.manifold.metrics(some) or {}
        if similarity is not None:
            found["mifid"] = mifid(distance, spread, similarity)
        return found


def subsample(total: int, num: int, seed: int, purpose: str) -> np.ndarray:
    """``num`` of ``total`` indices by a fixed seed, in their original order; all of them if there are no more."""
    if num >= total:
        return np.arange(total)
    chosen = np.random.default_rng(derive_seed(seed, "audit", purpose)).choice(total, num, replace=False)
    return np.sort(chosen)
