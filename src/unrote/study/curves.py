"""Curves in (Fréchet distance, memorization): what a method attains if training stops at the right moment.

Both are the better, the lower. Between two measured points of a curve, the distance is interpolated linearly and the
memorization linearly in its logarithm, half a count added so that nothing is -infinity: it grows by factors, not terms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# The 97.5 % points of Student's t with 1 to 30 degrees of freedom (Gosset 1908).
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
GRID = 500
"""Distances that an area is summed over."""


@dataclass(frozen=True)
class Curve:
    """The points of one method on one seed, earliest first.

    Attributes:
        distance: Fréchet distance of each. float64 [P].
        memorized: share, or count, of each. float64 [P].
        half: half a count in the unit of ``memorized``: 0.5 / G for shares of G samples. Above 0.
    """

    distance: np.ndarray
    memorized: np.ndarray
    half: float

    @property
    def best_distance(self) -> float:
        """Of the best point."""
        return float(self.distance.min())

    @property
    def at_best(self) -> float:
        """Memorization of the point of the best distance."""
        return float(self.memorized[self.distance.argmin()])

    def memorized_at(self, distance: float) -> float | None:
        """The least memorization with a Fréchet distance of at most ``distance``; None if it is never reached."""
        reached = self.distance <= distance
        found = [*self.memorized[reached]]
        found += [self._memorized_between(*place) for place in _crossings(self.distance, distance)]
        return float(min(found)) if found else None

    def distance_at(self, memorized: float) -> float | None:
        """The least Fréchet distance with a memorization of at most ``memorized``; None if it is always above."""
        reached = self.memorized <= memorized
        found = [*self.distance[reached]]
        for index, part in _crossings(self._logarithm(self.memorized), float(self._logarithm(memorized))):
            found.append((1 - part) * self.distance[index] + part * self.distance[index + 1])
        return float(min(found)) if found else None

    def area(self, distance: float, memorized: float) -> float:
        """The share of the box [0, distance] x [0, memorized] that the curve dominates (hypervolume), in [0, 1].

        A point of the box is dominated if the curve attains its distance, or a lower one, with at most its
        memorization.
        """
        steps = (np.arange(GRID) + 0.5) * distance / GRID
        attained = [self.memorized_at(float(step)) for step in steps]
        gained = [max(0.0, memorized - value) for value in attained if value is not None]
        return sum(gained) / (GRID * memorized) if memorized > 0 else 0.0

    def _memorized_between(self, index: int, part: float) -> float:
        ends = self._logarithm(self.memorized[index : index + 2])
        return float(np.exp((1 - part) * ends[0] + part * ends[1]) - self.half)

    def _logarithm(self, memorized: np.ndarray | float) -> np.ndarray:
        logarithm: np.ndarray = np.log(np.asarray(memorized) + self.half)
        return logarithm


def _crossings(values: np.ndarray, level: float) -> list[tuple[int, float]]:
    """Where the line through ``values`` crosses ``level``: index of the point before, and the part of the way."""
    found = []
    for index, (before, after) in enumerate(pairwise(values)):
        if (before - level) * (after - level) < 0:
            found.append((index, float((level - before) / (after - before))))
    return found


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t); the interval is None for a single seed."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        interval = None if self.low is None else [self.low, self.high]
        return {"value": self.value, "interval": interval, "seeds": self.seeds}


def mean_over_seeds(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> Estimate | None:
    """The mean with Student's interval, cut to the range of values; None without values."""
    if not values:
        return None
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, None, None, 1)
    half = student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, max(low, mean - half), min(high, mean + half), count)


def ratio_over_seeds(pairs: Sequence[tuple[float, float]], half: float = 0.0) -> Estimate | None:
    """The geometric mean of (a + half) / (b + half) over paired seeds, with Student's interval of its logarithm.

    Args:
        pairs: a and b of each seed, a method's and the baseline's.
        half: half a count, added to both so that 0 has a logarithm.
    """
    logs = [math.log((a + half) / (b + half)) for a, b in pairs if min(a, b) + half > 0]
    found = mean_over_seeds(logs)
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Estimate(math.exp(found.value), low, high, found.seeds)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t; above 30 degrees of freedom by its expansion (Abramowitz & Stegun 26.7.5)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def dominates(ours: Sequence[Curve], theirs: Sequence[Curve], distances: Sequence[Sequence[float]]) -> bool:
    """Whether ``ours`` is nowhere worse than ``theirs`` and somewhere better, on average over seeds.

    Compared at the Fréchet distances [seed][i] that ``theirs`` reaches on every seed: there ours must be reached on
    every seed too, and the mean logarithm of memorization must not be higher. False if theirs reaches none.

    Args:
        ours: one curve per seed.
        theirs: likewise, of the same seeds.
        distances: for each seed, equally many Fréchet distances that correspond to each other.
    """
    differences = []
    for levels in zip(*distances, strict=True):
        own = [curve.memorized_at(level) for curve, level in zip(ours, levels, strict=True)]
        other = [curve.memorized_at(level) for curve, level in zip(theirs, levels, strict=True)]
        if any(value is None for value in other):
            continue
        if any(value is None for value in own):
            return False
        halves = [curve.half for curve in ours]
        differences.append(_mean_log(own, halves) - _mean_log(other, halves))
    return bool(differences) and max(differences) <= 0 and min(differences) < 0


def _mean_log(values: Sequence[float | None], halves: Sequence[float]) -> float:
    return float(np.mean([math.log(v + half) for v, half in zip(values, halves, strict=True) if v is not None]))
