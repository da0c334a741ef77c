"""Similarity of copy-detection features: the highest cosine to a training image, and what is high in this data."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from unrote.auditing.authenticity import Search, nearest_other
from unrote.auditing.intervals import bootstrap_mean, exceeding, fraction, threshold_at
from unrote.auditing.rows import BLOCK, UnitRows
from unrote.neighbours.streaming import Rows

THRESHOLDS = (0.5, 0.75)  # SSCD's for large photographs (Pizzi et al. 2022; Somepalli et al. 2023)
QUANTILES = (0.5, 0.75, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Similar:
    """Highest cosine of each image to a training image, float64 [G], and which one that is, int64 [G]."""

    values: np.ndarray
    indices: np.ndarray


def most_similar(queries: Rows, train: Rows, search: Search, what: str) -> Similar:
    """The training image with the highest cosine similarity to each query: features float32 [G, D] and [N, D].

    The search among unit vectors is exact; they are rounded to float32, so similarities that differ by 1e-7 may be
    taken for each other. The similarity itself is computed in float64. A row of zeros is similar to nothing (0).
    """
    _, indices = search.nearest(UnitRows(queries), UnitRows(train), 1, what)
    return Similar(cosines(queries, np.arange(len(queries)), train, indices[:, 0]), indices[:, 0])


def highest_absolute(similar: Similar, queries: Rows, train: Rows, search: Search) -> np.ndarray:
    """The highest |cosine| to a training image [G], which MiFID is defined with; searches again for negative ones."""
    if not (_any_negative(queries) or _any_negative(train)):
        return similar.values
    _, indices = search.nearest(UnitRows(queries, -1.0), UnitRows(train), 1, "generated → train, opposite")
    opposite = cosines(queries, np.arange(len(queries)), train, indices[:, 0])
    highest: np.ndarray = np.maximum(np.abs(similar.values), np.abs(opposite))
    return highest


def _any_negative(rows: Rows) -> bool:
    return any(bool((rows[start : start + BLOCK] < 0).any()) for start in range(0, len(rows), BLOCK))


def background(train: Rows, identity: np.ndarray, chosen: np.ndarray, search: Search) -> Similar:
    """Highest cosine of training images (``chosen``, int64 [n]) to a training image that is no duplicate of them."""
    _, indices = nearest_other(UnitRows(train), identity, chosen, search, "train → other train, similarity")
    return Similar(cosines(train, chosen, train, indices), indices)


def cosines(first: Rows, rows: np.ndarray, second: Rows, indices: np.ndarray) -> np.ndarray:
    """Cosine between first[rows] and second[indices], int64 [n] each; float64 [n], 0 where a row is zero."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        where = slice(start, start + BLOCK)
        left, right = first[rows[where]].astype(np.float64), second[indices[where]].astype(np.float64)
        norms = np.sqrt(np.einsum("ij,ij->i", left, left) * np.einsum("ij,ij->i", right, right))
        products = np.einsum("ij,ij->i", left, right)
        result[where] = np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
    return result.clip(-1.0, 1.0)


def similarity_table(similar: Similar, identity: np.ndarray, *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Mean with a bootstrap interval, quantiles, and how many lie strictly above 0.5 and 0.75."""
    return {
        **distribution(similar.values, num_resamples=num_resamples, seed=seed),
        "above": [above(similar, threshold, identity) for threshold in THRESHOLDS],
    }


def distribution(values: np.ndarray, *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Mean of similarities [n] with a bootstrap interval, and their quantiles."""
    return {
        "mean": bootstrap_mean(values, num_resamples, seed),
        "quantiles": {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES},
    }


def above(similar: Similar, threshold: float, identity: np.ndarray) -> dict[str, Any]:
    """How many are strictly more similar than ``threshold``, and to how many distinct training images."""
    which = similar.values > threshold
    distinct = len(np.unique(identity[similar.indices[which]]))
    return {"threshold": threshold, **fraction(int(which.sum()), len(which)), "distinct": distinct}


def calibrated(
    similar: Similar, unseen: Similar, leaks: np.ndarray, rate: float, identity: np.ndarray
) -> dict[str, Any] | None:
    """The lowest threshold that at most the share ``rate`` of held-out images exceeds, and what exceeds it.

    Held-out images that duplicate training images (``leaks``, bool [M]) do not count for the threshold, but do in
    ``unseen``, which says how many of all held-out images exceed it. Of the M others at most floor(rate · M) lie
    strictly above it. None with fewer than 1 / rate of them: then not one may exceed it, and the rate is not known to
    be kept.
    """
    real = unseen.values[~leaks]
    if exceeding(rate, len(real)) < 1:
        return None
    threshold = max(-1.0, threshold_at(real, rate))
    return {
        "false_positive_rate": rate,
        "threshold": threshold,
        "num_holdout": len(real),
        "above": above(similar, threshold, identity),
        "unseen": above(unseen, threshold, identity),
    }
