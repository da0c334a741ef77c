"""Precision, recall, density and coverage, from balls around images that reach to their k-th neighbour."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from unrote.auditing.intervals import estimate, fraction, jackknife_spread, mean_spread

PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5
BLOCK = 512
# Distances come from a matrix product in float64. Those that rounding cannot tell from 0 are 0, and a point on the edge
# of a ball is inside: it is often a copy of the very image that makes the edge.
NOISE = 1e-12
EDGE = 1 + 1e-9


def manifold_metrics(generated: np.ndarray, reference: np.ndarray) -> dict[str, dict[str, Any]] | None:
    """Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    - precision: the share of generated images inside the k = 3 ball of any reference image;
    - recall: the share of reference images inside the k = 3 ball of any generated image;
    - density: how many of the k = 5 balls of reference images a generated image is in, over k, on average;
    - coverage: the share of reference images with a generated image in their k = 5 ball.

    Every interval covers which images were generated, with the reference fixed: Wilson for precision, the mean's for
    density, and the jackknife for recall and coverage, exact: which reference images gain or lose their last ball when
    one generated image goes (and, for recall, its neighbours' balls grow) is counted for all images at once.

    Args:
        generated: features [G, D].
        reference: features [M, D]. G · M distances are computed, in blocks.

    Returns:
        ``value`` and ``interval`` of each; None with too few images for a k-th neighbour.
    """
    return Manifold(reference).metrics(generated)


class Manifold:
    """Features [M, D] of reference images, whose balls are found once for several sets."""

    def __init__(self, reference: np.ndarray):
        self.enough = len(reference) > DENSITY_COVERAGE_K
        self.centre = reference.mean(0, dtype=np.float64)
        self.points = reference - self.centre
        squared, _ = nearest_others(self.points, DENSITY_COVERAGE_K)
        self.narrow, self.wide = squared[:, PRECISION_RECALL_K - 1] * EDGE, squared[:, -1] * EDGE

    def metrics(self, generated: np.ndarray) -> dict[str, dict[str, Any]] | None:
        """See :func:`manifold_metrics`."""
        if not self.enough or len(generated) <= DENSITY_COVERAGE_K:
            return None
        return _Balls(generated - self.centre, self).metrics()


class _Balls:
    """Counts of who lies in whose ball, for generated features float64 [G, D]."""

    def __init__(self, generated: np.ndarray, reference: Manifold):
        squared, self.neighbours = nearest_others(generated, PRECISION_RECALL_K + 1)
        own, grown = squared[:, -2, None] * EDGE, squared[:, -1, None] * EDGE
        self.precise = 0
        self.depth = np.empty(len(generated))  # in how many wide balls a generated image is
        self.covered, self.recalled = _Holders(len(reference.points)), _Holders(len(reference.points))
        almost = []  # (generated, reference): inside once the ball grows to the next neighbour
        for where, distances in squared_blocks(generated, reference.points):
            inside = distances <= reference.wide
            self.precise += int((distances <= reference.narrow).any(1).sum())
            self.depth[where] = inside.sum(1)
            self.covered.add(where, inside)
            inside = distances <= own[where]
            self.recalled.add(where, inside)
            rows, columns = np.nonzero(~inside & (distances <= grown[where]))
            almost.append(np.stack([rows + where.start, columns]))
        self.almost = np.concatenate(almost, axis=1)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """``value`` and ``interval`` of each."""
        precision = fraction(self.precise, len(self.depth))
        density = self.depth / DENSITY_COVERAGE_K
        nothing = np.zeros(0, dtype=np.int64)
        return {
            "precision": {"value": precision["fraction"], "interval": precision["interval"]},
            "recall": self._share(self.recalled, *self._grown()),
            "density": estimate(density.mean(), mean_spread(density), low=0.0),
            "coverage": self._share(self.covered, nothing, nothing),
        }

    def _grown(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (generated image that goes, reference image that a neighbour's ball then reaches), each pair once."""
        rows, columns = self.almost
        going = self.neighbours[rows, :PRECISION_RECALL_K].reshape(-1)
        keys = np.unique(np.repeat(columns, PRECISION_RECALL_K) * len(self.depth) + going)
        return keys % len(self.depth), keys // len(self.depth)

    def _share(self, holders: "_Holders", going: np.ndarray, reached: np.ndarray) -> dict[str, Any]:
        total, count = len(holders.counts), len(self.depth)
        gained = np.bincount(going[holders.counts[reached] == 0], minlength=count)
        single = np.flatnonzero(holders.counts == 1)
        only = holders.sums[single]
        kept = np.isin(single * count + only, reached * count + going)
        lost = np.bincount(only[~kept], minlength=count)
        value = np.count_nonzero(holders.counts) / total
        return estimate(value, jackknife_spread(value + (gained - lost) / total), 0.0, 1.0)


class _Holders:
    """How many generated images hold each reference image, and the sum of their positions: which one, if one."""

    def __init__(self, total: int):
        self.counts, self.sums = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)

    def add(self, where: slice, inside: np.ndarray) -> None:
        """Take in bool [b, M] of the generated images ``where``."""
        self.counts += inside.sum(0)
        # Sums of fewer than 2³¹ positions below 2²² are exact in float64, and that product is the fast one.
        self.sums += (np.arange(where.start, where.stop, dtype=np.float64) @ inside).astype(np.int64)


def nearest_others(points: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances float64 and indices int64 [n, num] of each point's nearest others; inf if there are fewer."""
    squared = np.full((len(points), num), np.inf)
    indices = np.zeros((len(points), num), dtype=np.int64)
    found = min(num, len(points) - 1)
    for where, distances in squared_blocks(points, points):
        rows = np.arange(len(distances))
        distances[rows, rows + where.start] = np.inf
        order = np.argpartition(distances, found - 1, axis=1)[:, :found]
        order = np.take_along_axis(order, np.take_along_axis(distances, order, 1).argsort(1, kind="stable"), 1)
        squared[where, :found], indices[where, :found] = np.take_along_axis(distances, order, 1), order
    return squared, indices


def squared_blocks(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of squared distances float64 [b, M] between float64 points [n, D] and [M, D]."""
    norms = np.einsum("ij,ij->i", second, second)
    for start in range(0, len(first), BLOCK):
        where = slice(start, min(start + BLOCK, len(first)))
        block = first[where]
        scale = np.einsum("ij,ij->i", block, block)[:, None] + norms
        distances = block @ second.T
        distances *= -2
        distances += scale
        scale *= NOISE
        distances[distances < scale] = 0.0
        yield where, distances
