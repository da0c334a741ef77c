"""The training ledger joined to the audit: what happened in training to the images that came back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unrote.auditing.extracted import near_copies
from unrote.errors import InputError

MOST_SKIPPED = 48


def check_ledger(ledger: Mapping[str, np.ndarray] | None, num_train: int) -> None:
    """Refuse a ledger of another training set.

    Raises:
        InputError: a column's length is not ``num_train``.
    """
    for column, values in (ledger or {}).items():
        if len(values) != num_train:
            raise InputError(
                f"ledger column {column!r} has {len(values)} entries for {num_train} training images: "
                "audit against the same images, in the same order, as the run was trained on"
            )


def skip_rate(ledger: Mapping[str, np.ndarray]) -> np.ndarray:
    """Skips over visits of each training image; 0 where it was never visited. float64 [N]."""
    visits = ledger["visits"].astype(np.float64)
    rate: np.ndarray = np.divide(ledger["skips"], visits, out=np.zeros_like(visits), where=visits > 0)
    return rate


def times_copied(pairs: Mapping[str, np.ndarray], num_train: int) -> np.ndarray:
    """How many generated images are near-copies of each training image [N]."""
    counts: np.ndarray = np.bincount(pairs["orbit_train_index"][near_copies(pairs)], minlength=num_train)
    return counts


def most_skipped(ledger: Mapping[str, np.ndarray], num: int = MOST_SKIPPED) -> np.ndarray:
    """Indices of ``num`` training images or fewer, skipped most often (then: at the highest rate, then: in order)."""
    order = np.lexsort((-skip_rate(ledger), -ledger["skips"]))[:num]
    chosen: np.ndarray = order[ledger["skips"][order] > 0]
    return chosen


def join_ledger(
    ledger: Mapping[str, np.ndarray] | None, pairs: Mapping[str, np.ndarray], clusters: np.ndarray
) -> dict[str, Any] | None:
    """Totals, and the means of copied against other training images; None without a ledger.

    Duplicates count as copied together, whichever of them is named as the nearest.
    """
    if not ledger or "visits" not in ledger or "skips" not in ledger:
        return None
    copies = times_copied(pairs, len(clusters))
    copied = np.isin(clusters, clusters[copies > 0])
    groups = {"copied": copied, "others": ~copied}
    visits = int(ledger["visits"].sum())
    return {
        "visits": visits,
        "skips": int(ledger["skips"].sum()),
        "skip_rate": float(ledger["skips"].sum() / visits) if visits else 0.0,
        **{column: int(ledger[column].sum()) for column in ("augmented", "moves") if column in ledger},
        **{group: _means(ledger, members) for group, members in groups.items()},
        "most_skipped": most_skipped(ledger).tolist(),
    }


def _means(ledger: Mapping[str, np.ndarray], members: np.ndarray) -> dict[str, Any]:
    """Mean skip rate and loss ratio of some training images; None where nothing was measured."""
    means: dict[str, Any] = {"images": int(members.sum()), "skip_rate": None, "mean_ratio": None}
    if members.any():
        means["skip_rate"] = float(skip_rate(ledger)[members].mean())
    if "mean_ratio" in ledger and np.isfinite(ledger["mean_ratio"][members]).any():
        means["mean_ratio"] = float(np.nanmean(ledger["mean_ratio"][members].astype(np.float64)))
    return means
