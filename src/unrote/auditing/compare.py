"""The searches: generated images among training images, and the controls that tell what needs no memorization.

Images of one *cluster* are duplicates of each other. A copy of an image that the training set holds n times has n
equally near neighbours, and so a neighbour ratio near 1, as if it were no copy. Every search is therefore read twice:
``plain``, as the papers define it, and ``distinct``, where every cluster counts once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unrote.auditing.memorization import DEFINITIONS, TrainShare, neighbour_ratio, train_share
from unrote.auditing.quality import subsample
from unrote.data.store import ImageStore
from unrote.neighbours.found import Neighbours
from unrote.neighbours.images import nearest_images
from unrote.neighbours.orbit import Transform

MIN_UNSEEN = 1000  # held-out images (if there are as many) that false alarms and calibrated thresholds rest on


@dataclass(frozen=True)
class References:
    """Images to search among.

    Attributes:
        store: the images.
        clusters: the least index of the duplicates each image belongs to, its own if it has none. int64 [N].
        leaks: of held-out images, which are duplicates of training images. bool [N].
    """

    store: ImageStore
    clusters: np.ndarray
    leaks: np.ndarray | None = None

    def chosen(self, size: int, seed: int, purpose: str) -> "References":
        """``size`` of them by the seed, in their order; all if there are no more."""
        if size >= len(self.store):
            return self
        rows = subsample(len(self.store), size, seed, purpose)
        _, first, inverse = np.unique(self.clusters[rows], return_index=True, return_inverse=True)
        leaks = None if self.leaks is None else self.leaks[rows]
        return References(self.store.subset(rows), first[inverse.reshape(-1)], leaks)


@dataclass(frozen=True)
class Found:
    """Neighbours of each query: ``plain`` among all images; ``distinct`` where every cluster counts once."""

    plain: Neighbours
    distinct: Neighbours

    def ratios(self, *, distinct: bool) -> dict[str, np.ndarray]:
        """Neighbour ratio [G] by definition."""
        neighbours = self.distinct if distinct else self.plain
        return {definition: neighbour_ratio(neighbours, definition) for definition in DEFINITIONS}


@dataclass(frozen=True)
class View:
    """One way to compare images: as they are (``plain``) or up to augmentation (``orbit``).

    Attributes:
        name: ``plain`` or ``orbit``.
        train: generated images among all training images.
        control_train: generated images among as many training images as there are held-out ones (or the reverse).
        control_holdout: generated images among equally many held-out images.
        unseen: held-out images, in place of generated ones, among all training images.
        leaks: which of these are duplicates of training images, bool.
        control_size: how many images either side of the control has.
    """

    name: str
    train: Found
    control_train: Found | None = None
    control_holdout: Found | None = None
    unseen: Found | None = None
    leaks: np.ndarray | None = None
    control_size: int = 0

    def share(self) -> TrainShare | None:
        """Whether the nearest image is a training image, for each generated image."""
        if self.control_train is None or self.control_holdout is None:
            return None
        return train_share(self.control_train.plain, self.control_holdout.plain, self.control_size)

    def curves(self) -> dict[tuple[str, str, str], np.ndarray]:
        """Neighbour ratios [·] by (view, definition, set); the view of distinct ones ends in ``-distinct``."""
        sets = {
            "train": self.train,
            "control-train": self.control_train,
            "holdout": self.control_holdout,
            "unseen": self.unseen,
        }
        return {
            (self.name + "-distinct" * distinct, definition, role): ratios
            for role, found in sets.items()
            if found is not None
            for distinct in (False, True)
            for definition, ratios in found.ratios(distinct=distinct).items()
        }


def compare(
    name: str,
    generated: ImageStore,
    train: References,
    holdout: References | None,
    num: int,
    seed: int,
    transforms: Sequence[Transform],
    *,
    margin: int = 0,
    resume: Path | None = None,
    distributed: bool = False,
) -> View:
    """Neighbours among train, and among equally many training and held-out images."""

    def among(queries: ImageStore, references: References, what: str) -> Found:
        label = f"{name}: {what}"
        return find(
            queries, references, num, transforms, margin=margin, label=label, resume=resume, distributed=distributed
        )

    found = among(generated, train, "generated → train")
    if holdout is None:
        return View(name, found)
    size = min(len(train.store), len(holdout.store))
    control_train = found
    if len(train.store) > size:
        control_train = among(generated, train.chosen(size, seed, "control-train"), "generated → train, subset")
    control = among(generated, holdout.chosen(size, seed, "control-holdout"), "generated → held-out")
    unseen = holdout.chosen(max(len(generated), MIN_UNSEEN), seed, "unseen")
    seen = among(unseen.store, train, "held-out → train")
    return View(name, found, control_train, control, seen, unseen.leaks, size)


def find(
    queries: ImageStore,
    references: References,
    num: int,
    transforms: Sequence[Transform],
    *,
    margin: int = 0,
    label: str | None = None,
    resume: Path | None = None,
    distributed: bool = False,
) -> Found:
    """The ``num`` nearest images of every query.

    Distinct: the nearest image, then the nearest *first* images of other clusters. The first of each cluster and the
    others are searched apart and merged, so both readings cost one search.
    """
    firsts = references.clusters == np.arange(len(references.clusters))
    rows = np.flatnonzero(firsts)

    def among(chosen: np.ndarray, count: int) -> Neighbours:
        images = (
            references.store.images if len(chosen) == len(references.store) else references.store.subset(chosen).images
        )
        found = nearest_images(
            queries.images,
            images,
            count,
            transforms=transforms,
            margin=margin,
            distributed=distributed,
            progress=label,
            resume=resume,
        )
        return _renumbered(found, chosen)

    if firsts.all():
        only = among(rows, num)
        return Found(only, only)
    first, others = among(rows, num + 1), among(np.flatnonzero(~firsts), num)
    plain = _cut(_joined(first, others), min(num, len(firsts)))
    nearest = _cut(plain, 1)
    own = references.clusters[first.indices] == references.clusters[nearest.indices]
    # A stable sort moves the nearest image's own cluster behind the others without changing their order.
    order = np.argsort(own, axis=1, kind="stable")[:, : min(num, len(rows)) - 1]
    return Found(plain, _beside(nearest, _picked(first, order)))


def _renumbered(found: Neighbours, rows: np.ndarray) -> Neighbours:
    return Neighbours(found.squared, rows[found.indices], found.transforms)


def _joined(first: Neighbours, second: Neighbours) -> Neighbours:
    """Both, nearest first; ties go to the lower index."""
    both = _beside(first, second)
    return _picked(both, np.lexsort((both.indices, both.squared), axis=1))


def _beside(first: Neighbours, second: Neighbours) -> Neighbours:
    """The columns of both."""
    return _each(lambda one, other: np.concatenate([one, other], axis=1), first, second)


def _picked(found: Neighbours, order: np.ndarray) -> Neighbours:
    return _each(lambda part: np.take_along_axis(part, order, 1), found)


def _cut(found: Neighbours, num: int) -> Neighbours:
    return _each(lambda part: part[:, :num], found)


def _each(change: Callable[..., np.ndarray], *found: Neighbours) -> Neighbours:
    return Neighbours(
        change(*(one.squared for one in found)),
        change(*(one.indices for one in found)),
        change(*(one.transforms for one in found)),
    )
