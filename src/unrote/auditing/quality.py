"""Quality and variety in a named feature space, so that memorization is never read alone."""

from typing import Any

import numpy as np
import torch

from unrote.encoders.random_conv import RandomConvEncoder
from unrote.neighbours.images import Images
from unrote.seeding import derive_seed

ENCODER = "random-conv-64/1"
RESIZE_RULE = "none (features at the images' own size, averaged over positions)"
PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5
MAX_MANIFOLD = 5000  # images a side for precision, recall, density, coverage: they need all pairwise distances


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two feature sets [N, D] and [M, D] (Dowson & Landau 1982).

    Unbiased covariances. The trace of the square root is taken from the symmetric Σ₁^½ Σ₂ Σ₁^½, which has the
    eigenvalues of Σ₁Σ₂ and, unlike it, real non-negative ones also when there are fewer images than features.
    """
    assert min(len(first), len(second)) >= 2, "a covariance needs two images"
    difference = first.mean(0) - second.mean(0)
    covariance_1, covariance_2 = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_2 @ root), 0)).sum()
    distance = difference @ difference + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross
    return max(0.0, float(distance))


def manifold_metrics(generated: np.ndarray, reference: np.ndarray) -> dict[str, float] | None:
    """Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Features [G, D], [M, D]. None with too few images for a k-th neighbour.
    """
    if min(len(generated), len(reference)) <= DENSITY_COVERAGE_K:
        return None
    between = _pairwise(generated, reference)
    real, fake = np.sort(_pairwise(reference, reference), axis=1), np.sort(_pairwise(generated, generated), axis=1)
    # Column 0 is the image's distance to itself, so column k is its k-th neighbour.
    in_real = between <= real[:, PRECISION_RECALL_K]
    in_fake = between <= fake[:, PRECISION_RECALL_K][:, None]
    in_wider = between <= real[:, DENSITY_COVERAGE_K]
    return {
        "precision": float(in_real.any(1).mean()),
        "recall": float(in_fake.any(0).mean()),
        "density": float(in_wider.sum(1).mean() / DENSITY_COVERAGE_K),
        "coverage": float(in_wider.any(0).mean()),
    }


def _pairwise(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """L2 distances [G, M], by difference rather than by matrix product: exact for duplicates."""
    mode = "donot_use_mm_for_euclid_dist"
    distances: np.ndarray = torch.cdist(torch.from_numpy(first), torch.from_numpy(second), compute_mode=mode).numpy()
    return distances


def subsample(total: int, num: int, seed: int, purpose: str) -> np.ndarray:
    """``num`` of ``total`` indices by a fixed seed, in their original order; all of them if there are no more."""
    if num >= total:
        return np.arange(total)
    chosen = np.random.default_rng(derive_seed(seed, "audit", purpose)).choice(total, num, replace=False)
    return np.sort(chosen)


def quality(generated: Images, train: Images, holdout: Images | None, seed: int) -> dict[str, Any]:
    """Distances of the generated images, and of equally many training images (the floor), to the reference.

    The reference is the held-out set; without one it is the training set, towards which copies are favoured.
    """
    encoder = RandomConvEncoder()
    count = len(generated) if holdout is None else min(len(generated), len(train))
    reference = encoder(train if holdout is None else holdout).astype(np.float64)
    features = encoder(generated[subsample(len(generated), count, seed, "quality-generated")]).astype(np.float64)
    floor = None
    if holdout is not None:
        some_train = encoder(train[subsample(len(train), count, seed, "quality-train")]).astype(np.float64)
        floor = _compare(some_train, reference, seed)
    return {
        "encoder": ENCODER,
        "weights_sha256": encoder.weights_sha256,
        "resize": RESIZE_RULE,
        "reference": "train" if holdout is None else "holdout",
        "num_generated": count,
        "num_reference": len(reference),
        "generated": _compare(features, reference, seed),
        "floor": floor,
    }


def _compare(features: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, float | None]:
    """All metrics of one set against the reference; None where there are too few images."""
    enough = min(len(features), len(reference)) >= 2
    names = ("precision", "recall", "density", "coverage")
    manifold = manifold_metrics(
        features[subsample(len(features), MAX_MANIFOLD, seed, "manifold")],
        reference[subsample(len(reference), MAX_MANIFOLD, seed, "manifold-reference")],
    )
    distance = frechet_distance(features, reference) if enough else None
    return {"frechet_distance": distance, **(manifold or dict.fromkeys(names))}
