"""The Fréchet distance of two feature sets, with what each image adds to it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unrote.auditing.rows import blocks
from unrote.neighbours.streaming import Rows


@dataclass(frozen=True)
class Moments:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric root of the covariance, float64 [D, D]."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        return root

    @staticmethod
    def of(rows: Rows) -> "Moments":
        """Of features [n, D], n ≥ 2, read twice in blocks: memory does not grow with n."""
        assert len(rows) >= 2, "a covariance needs two images"
        mean, covariance = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
        for _, block in blocks(rows):
            mean += block.sum(0)
        mean /= len(rows)
        for _, block in blocks(rows):
            block -= mean
            covariance += block.T @ block
        return Moments(mean, covariance / (len(rows) - 1))


def frechet_distance(first: Rows, second: Rows) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two feature sets [N, D] and [M, D] (Dowson & Landau 1982).

    Unbiased covariances. The trace of the square root is taken from the symmetric Σ₂^½ Σ₁ Σ₂^½, which has the
    eigenvalues of Σ₁Σ₂ and, unlike it, real non-negative ones also when there are fewer images than features.
    """
    generated, reference = Moments.of(first), Moments.of(second)
    root = reference.root
    return _distance(generated, reference, np.linalg.eigvalsh(root @ generated.covariance @ root))


def frechet_with_influence(generated: Rows, reference: Moments) -> tuple[float, np.ndarray]:
    """The Fréchet distance to a fixed reference, and how much each generated image moves it, to first order [n].

    The standard error of their mean is that of the distance, over which images were generated (the limit law of Rippl,
    Munk & Sturm 2016). With ∇ = I − T and T = Σ₂^½ (Σ₂^½ Σ₁ Σ₂^½)^(−½) Σ₂^½, the linear optimal transport map, the
    influence of x is 2 (μ₁ − μ₂)·(x − μ₁) + (x − μ₁)ᵀ ∇ (x − μ₁) − tr(∇ Σ₁). It costs one more pass and no more
    eigenvalues, where a bootstrap costs an eigendecomposition per resample, and adds its own bias: the distance grows
    like 1/n for few images, and a resample has fewer different ones.
    """
    moments = Moments.of(generated)
    root = reference.root
    values, vectors = np.linalg.eigh(root @ moments.covariance @ root)
    there = values > values[-1] * len(values) * np.finfo(np.float64).eps
    transport = (root @ vectors[:, there]) * values[there] ** -0.25  # T is this times its transpose
    influence = np.empty(len(generated))
    for where, block in blocks(generated):
        block -= moments.mean
        quadratic = (block**2).sum(1) - ((block @ transport) ** 2).sum(1)
        influence[where] = 2 * block @ (moments.mean - reference.mean) + quadratic
    return _distance(moments, reference, values), influence - influence.mean()


def _distance(first: Moments, second: Moments, eigenvalues: np.ndarray) -> float:
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return max(0.0, float(difference @ difference + traces - 2 * cross))
