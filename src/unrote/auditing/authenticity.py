"""AuthPct: how many generated images are not closer to a training image than that image's own neighbours are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unrote.auditing.intervals import fraction
from unrote.auditing.rows import Chosen
from unrote.neighbours.features import nearest_features
from unrote.neighbours.found import MEMORY_BYTES
from unrote.neighbours.streaming import Rows

SEARCHED_FOR = 33  # neighbours of an image that are looked at before its whole cluster is left out


@dataclass(frozen=True)
class Search:
    """How to search: the memory it may use, where, the label of its progress bar (None: none), in several processes."""

    memory_bytes: int = MEMORY_BYTES
    device: str | torch.device = "cpu"
    progress: str | None = None
    distributed: bool = False

    def nearest(self, queries: Rows, references: Rows, num: int = 1, what: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Squared distances float64 and indices int64 [G, num], exact."""
        label = None if self.progress is None else f"{self.progress}: {what}"
        found = nearest_features(
            queries,
            references,
            num,
            memory_bytes=self.memory_bytes,
            device=self.device,
            distributed=self.distributed,
            progress=label,
        )
        return found.squared, found.indices


def nearest_other(
    rows: Rows, identity: np.ndarray, queries: np.ndarray, search: Search, what: str = "train → other train"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of another cluster than one's own, exactly: squared distances float64 and indices int64, [n].

    Args:
        rows: features float32 [N, D].
        identity: least index of the cluster of duplicates each row belongs to, int64 [N]; at least two clusters.
        queries: which rows to ask for, int64 [n].
        search: how to search.
        what: label of the search.
    """
    own = identity[queries]
    largest = int(np.bincount(identity)[own].max(initial=1))
    squared, indices = search.nearest(Chosen(rows, queries), rows, min(largest + 1, SEARCHED_FOR), what)
    other = identity[indices] != own[:, None]
    column = other.argmax(1)[:, None]
    squared, indices = (np.take_along_axis(found, column, 1)[:, 0] for found in (squared, indices))
    for cluster in np.unique(own[~other.any(1)]):
        mine = np.flatnonzero(~other.any(1) & (own == cluster))
        rest = np.flatnonzero(identity != cluster)
        again, places = search.nearest(Chosen(rows, queries[mine]), Chosen(rows, rest), 1, what)
        squared[mine], indices[mine] = again[:, 0], rest[places[:, 0]]
    return squared, indices


def authentic(squared: np.ndarray, nearest: np.ndarray, rows: Rows, identity: np.ndarray, search: Search) -> np.ndarray:
    """Which images are authentic (Alaa et al. 2022, "How Faithful is your Synthetic Data?"). bool [G].

    With y the training image nearest to x: x is authentic if it is farther from y than y is from the training image
    nearest to it. Of y's duplicates none is "another training image": they would make every copy authentic.

    Args:
        squared: squared distance of each image to its nearest training image [G].
        nearest: which training image that is, int64 [G].
        rows: features of the training images, float32 [N, D].
        identity: least index of the cluster of duplicates each training image belongs to; at least two clusters.
        search: how to search.
    """
    asked, place = np.unique(nearest, return_inverse=True)
    others, _ = nearest_other(rows, identity, asked, search)
    result: np.ndarray = squared > others[place.reshape(-1)]
    return result


def authenticity(generated: np.ndarray, unseen: np.ndarray | None) -> dict[str, Any]:
    """``authpct`` of the generated images, and ``unseen`` of held-out ones in their place; from bools [G], [M]."""
    return {
        "authpct": fraction(int(generated.sum()), len(generated)),
        "unseen": None if unseen is None else fraction(int(unseen.sum()), len(unseen)),
    }
