"""Which training images came back: by cluster of duplicates, so that an image counts once however often it is there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unrote.auditing.memorization import HEADLINE

MAX_LISTED = 1000


def near_copies(pairs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which generated images are near-copies: distinct squared-L2 ratio over the orbit below 0.33. bool [G]."""
    copies: np.ndarray = pairs["orbit_ratio_distinct"] < HEADLINE["squared-l2"]
    return copies


def extracted_images(pairs: Mapping[str, np.ndarray], clusters: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """``distinct``: how many distinct training images came back; ``images``: which, most often first (at most 1,000).

    Args:
        pairs: columns of the audit [G].
        clusters: the least index of the duplicates each training image belongs to, int64 [N].
        names: of the training images.
    """
    copies = near_copies(pairs)
    found = clusters[pairs["orbit_train_index"][copies]]
    ratios, exact = pairs["orbit_ratio_distinct"][copies], pairs["orbit_distance"][copies] == 0
    members = np.bincount(clusters, minlength=len(clusters))
    distinct, place, times = np.unique(found, return_inverse=True, return_counts=True)
    best = np.full(len(distinct), np.inf)
    np.minimum.at(best, place, ratios)
    exactly = np.bincount(place, weights=exact, minlength=len(distinct)).astype(np.int64)
    order = np.lexsort((distinct, best, -times))[:MAX_LISTED]
    images = [
        {
            "cluster": int(distinct[i]),
            "name": str(names[int(distinct[i])]),
            "members": int(members[distinct[i]]),
            "times": int(times[i]),
            "ratio": float(best[i]),
            "exact": int(exactly[i]),
        }
        for i in order.tolist()
    ]
    return {"distinct": len(distinct), "images": images}


def duplicate_facts(clusters: np.ndarray, *, near: bool) -> dict[str, Any]:
    """How many clusters of duplicates the training set has, how many images are in them, and the largest."""
    sizes = np.bincount(clusters)
    sizes = sizes[sizes > 1]
    return {
        "method": "near" if near else "pixels",
        "clusters": len(sizes),
        "images": int(sizes.sum()),
        "largest": int(sizes.max(initial=1)),
    }
