"""How well a score tells members from others: AUC and the true-positive rate at a false-positive rate."""

from typing import Any

import numpy as np

from unrote.auditing.intervals import threshold_at, wilson_interval


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P(member's score > other's) + ½ P(equal): the Mann–Whitney statistic over n·m. Scores [n], [m]."""
    both = np.concatenate([members, others])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mid-ranks, from 1
    n, m = len(members), len(others)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float) -> tuple[float, float]:
    """The share of members that score strictly above a threshold, and the threshold.

    The threshold is the smallest observed score of others that at most ``fpr`` of them exceed.
    """
    threshold = threshold_at(others, fpr)
    return float((members > threshold).mean()), threshold


def separation(members: np.ndarray, others: np.ndarray, *, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """AUC with its 95 % bootstrap interval (members and others drawn apart), TPR at 1 % FPR with its Wilson interval.

    The interval of the TPR takes the threshold as given; with fewer than 100 others none may be exceeded (FPR 0).
    """
    random = np.random.default_rng(seed)
    drawn = [auc(random.choice(members, len(members)), random.choice(others, len(others))) for _ in range(draws)]
    rate, threshold = tpr_at_fpr(members, others, 0.01)
    count = int((members > threshold).sum())
    return {
        "members": len(members),
        "others": len(others),
        "auc": auc(members, others),
        "auc_interval": [float(value) for value in np.quantile(drawn, [0.025, 0.975])],
        "tpr_at_1_percent_fpr": rate,
        "tpr_interval": list(wilson_interval(count, len(members))),
        "threshold": threshold,
    }
