"""Does the model copy instead of generalize? C_T, and the gap of the Feature Likelihood Divergence."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from unrote.auditing.intervals import Z, estimate, mean_spread
from unrote.auditing.manifold import squared_blocks
from unrote.auditing.quality import subsample
from unrote.auditing.rows import blocks
from unrote.neighbours.streaming import Rows
from unrote.seeding import derive_seed

MAX_CELLS = 10
MIN_IN_CELL = 20  # images of either set; Meehan et al. ask it of the generated ones
PER_CELL = 100  # images of the smaller set for which another cell is made
MAX_CLUSTERED = 5000  # training images the cells are found from
MAX_MIXTURE = 2000  # images a side of the FLD: it needs all pairs, 50 times
EM_STEPS = 50
LEAST_VARIANCE = float(np.exp(-10.0))  # of features of variance 1: a copy would have 0, and a likelihood without bound


@dataclass(frozen=True)
class Cells:
    """A k-means partition of feature space: centres float64 [k, D]."""

    centres: np.ndarray

    @staticmethod
    def of(train: Rows, num: int, seed: int) -> "Cells":
        """Of features [N, D]: at most 5,000 by the seed; k-means++ (Arthur & Vassilvitskii 2007), 20 rounds."""
        some = train[subsample(len(train), MAX_CLUSTERED, seed, "cells")].astype(np.float64)
        random = np.random.default_rng(derive_seed(seed, "audit", "cell-centres"))
        centres = some[random.integers(len(some))][None]
        while len(centres) < num:
            squared = Cells(centres).squared(some).min(1)
            if not squared.any():
                break  # there are no more different images
            centres = np.vstack([centres, some[random.choice(len(some), p=squared / squared.sum())]])
        for _ in range(20):
            cell = Cells(centres).of_each(some)
            there = np.bincount(cell, minlength=len(centres)) > 0
            means = [some[cell == i].mean(0) if there[i] else centres[i] for i in range(len(centres))]
            centres = np.stack(means)
        return Cells(centres)

    def squared(self, features: np.ndarray) -> np.ndarray:
        """Squared distances float64 [n, k] to the centres."""
        return np.concatenate([distances for _, distances in squared_blocks(features, self.centres)])

    def of_each(self, rows: Rows) -> np.ndarray:
        """The cell int64 [n] of each row."""
        return np.concatenate([self.squared(block).argmin(1) for _, block in blocks(rows)])


def c_t(
    generated: np.ndarray, unseen: np.ndarray, generated_cells: np.ndarray, unseen_cells: np.ndarray
) -> dict[str, Any] | None:
    """C_T (Meehan, Chaudhuri & Dasgupta 2020): are generated images nearer to train than held-out ones are?

    In every cell of a partition, Z of the Mann-Whitney test on distances to the nearest training image; their average
    weighted with the held-out images of the cell. Far below 0: data copying. Far above 0: worse than real images.
    Cells with fewer than 20 images of either set are left out.

    Args:
        generated: distance (or its square) of each generated image to its nearest training image [G].
        unseen: the same of held-out images [M].
        generated_cells: cell of each generated image, int64 [G].
        unseen_cells: cell of each held-out image, int64 [M].

    Returns:
        ``value``; its ``interval`` over which images were generated and held out (DeLong et al. 1988); the
        ``null_interval`` that chance gives if both distances have one distribution; ``cells`` compared, and the share
        of held-out images in them. None without such a cell.
    """
    rows = []
    for cell in np.unique(unseen_cells):
        ours, theirs = generated[generated_cells == cell], unseen[unseen_cells == cell]
        if min(len(ours), len(theirs)) >= MIN_IN_CELL:
            rows.append((len(theirs), *mann_whitney(ours, theirs)))
    if not rows:
        return None
    sizes, scores, spreads = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    weights = sizes / sizes.sum()
    null = float(Z * np.sqrt((weights**2).sum()))
    return {
        **estimate(weights @ scores, float(np.sqrt((weights**2) @ spreads**2))),
        "null_interval": [-null, null],
        "cells": len(rows),
        "covered": float(sizes.sum() / len(unseen)),
    }


def mann_whitney(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Z of U = #{(i, j): first_i > second_j} (ties count half), below 0 if ``first`` is smaller; its standard error."""
    n, m = len(first), len(second)
    over, under = _placements(first, second), 1 - _placements(second, first)
    unit = n * m / np.sqrt(n * m * (n + m + 1) / 12)
    spread = np.sqrt(mean_spread(over) ** 2 + mean_spread(under) ** 2)
    return float((over.mean() - 0.5) * unit), float(spread * unit)


def _placements(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of ``others`` below each value, equal ones counting half."""
    ordered = np.sort(others)
    places: np.ndarray = ordered.searchsorted(values, "left") + ordered.searchsorted(values, "right")
    return places / (2 * len(others))


def measure_c_t(
    generated: Rows, train: Rows, unseen: Rows, distances: tuple[np.ndarray, np.ndarray], *, seed: int
) -> dict[str, Any] | None:
    """:func:`c_t` in cells found among the training features; one per 100 images, at most 10.

    Args:
        generated: features float32 [G, D].
        train: features float32 [N, D].
        unseen: features of held-out images, float32 [M, D].
        distances: to the nearest training image, of generated images [G] and of held-out ones [M].
        seed: of the cells.
    """
    num = min(MAX_CELLS, max(1, min(len(generated), len(unseen)) // PER_CELL))
    cells = Cells.of(train, num, seed)
    return c_t(*distances, cells.of_each(generated), cells.of_each(unseen))


def likelihood_gap(generated: Rows, train: Rows, holdout: Rows, *, seed: int) -> dict[str, Any] | None:
    """Feature Likelihood Divergence of train and of held-out images, and its gap (Jiralerspong et al. 2023).

    Around every generated image stands a Gaussian with a variance of its own, fitted to the likelihood of training
    images (:func:`fit_variances`). The divergence is −100 / D times the mean log-likelihood (the paper's constant is
    left out; it cancels). gap = train − holdout: below 0, training images are likelier than others of their kind.

    A variance fitted to training images favours them also when nothing was copied. ``control`` is therefore the gap
    with the roles of train and held-out swapped, and ``excess`` = gap − control is 0 on average for a model that
    favours neither. Features are scaled to variance 1 by both sets together, which are cut to equal size.

    Args:
        generated: features float32 [G, D]; at most 2,000 are used.
        train: features float32 [N, D]; as many as there are held-out images, at most 2,000: of a larger training set
            most copies have their original outside of these, and don't show.
        holdout: features float32 [M, D].
        seed: of the subsets.

    Returns:
        ``train``, ``holdout``, and with intervals over which real images were drawn ``gap``, ``control``, ``excess``;
        None with fewer than 10 images of a set.
    """
    size = min(len(train), len(holdout), MAX_MIXTURE)
    if min(size, len(generated)) < 10:
        return None
    chosen = subsample(len(train), size, seed, "likelihood-train")
    real = np.concatenate([train[chosen], holdout[subsample(len(holdout), size, seed, "likelihood-holdout")]])
    centres = generated[subsample(len(generated), MAX_MIXTURE, seed, "likelihood-generated")].astype(np.float64)
    mean, scale = real.mean(0, dtype=np.float64), real.std(0, dtype=np.float64)
    scale[scale == 0] = 1.0
    points, centres = (real - mean) / scale, (centres - mean) / scale
    squared = np.concatenate([distances for _, distances in squared_blocks(points, centres)])
    dimensions = points.shape[1]
    to_train = -100 / dimensions * log_likelihood(squared, fit_variances(squared[:size], dimensions), dimensions)
    to_holdout = -100 / dimensions * log_likelihood(squared, fit_variances(squared[size:], dimensions), dimensions)
    return {
        "train": float(to_train[:size].mean()),
        "holdout": float(to_train[size:].mean()),
        "gap": _difference(to_train[:size], to_train[size:]),
        "control": _difference(to_holdout[size:], to_holdout[:size]),
        "excess": _difference((to_train + to_holdout)[:size], (to_train + to_holdout)[size:]),
        "num_real": size,
        "num_generated": len(centres),
    }


def _difference(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    return estimate(first.mean() - second.mean(), float(np.hypot(mean_spread(first), mean_spread(second))))


def fit_variances(squared: np.ndarray, dimensions: int) -> np.ndarray:
    """Variances [G] of an even mixture of isotropic Gaussians that maximise the likelihood of points.

    The authors climb with Adam; expectation maximisation has no step size and never descends: each variance becomes the
    mean squared distance per dimension of the points, weighted by how much the Gaussian is responsible for them. Starts
    from the distance to the nearest point, as theirs.

    Args:
        squared: squared distances of the points to the centres, float64 [n, G].
        dimensions: D.
    """
    variances: np.ndarray = np.maximum(squared.min(0) / dimensions, LEAST_VARIANCE)
    for _ in range(EM_STEPS):
        weights = _log_densities(squared, variances, dimensions)
        weights -= weights.max(1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(1, keepdims=True)
        total = weights.sum(0)
        fitted = np.einsum("ij,ij->j", weights, squared) / (dimensions * np.maximum(total, 1e-300))
        # A Gaussian that is responsible for nothing keeps its variance.
        variances = np.where(total > 1e-12, np.maximum(fitted, LEAST_VARIANCE), variances)
    return variances


def log_likelihood(squared: np.ndarray, variances: np.ndarray, dimensions: int) -> np.ndarray:
    """Log-likelihood [n] of points at ``squared`` distances [n, G] of the centres under the even mixture."""
    densities = _log_densities(squared, variances, dimensions)
    highest = densities.max(1)
    result: np.ndarray = highest + np.log(np.exp(densities - highest[:, None]).mean(1))
    return result


def _log_densities(squared: np.ndarray, variances: np.ndarray, dimensions: int) -> np.ndarray:
    densities: np.ndarray = squared * (-0.5 / variances)
    densities -= dimensions / 2 * np.log(2 * np.pi * variances)
    return densities
