"""Searches among images of which some are duplicates, and those that every audit of the same two sets needs.

Images of one *cluster* are duplicates of each other. A copy of an image that the training set holds n times has n
equally near neighbours, and so a neighbour ratio near 1, as if it were no copy. Every search is therefore read twice:
``plain``, as the papers define it, and ``distinct``, where every cluster counts once.
"""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unrote.auditing.memorization import DEFINITIONS, neighbour_ratio
from unrote.auditing.quality import subsample
from unrote.data.store import ImageStore
from unrote.encoders.cache import pixels_digest
from unrote.errors import InputError
from unrote.files import atomic_write
from unrote.neighbours.found import Neighbours
from unrote.neighbours.images import nearest_images
from unrote.neighbours.orbit import Transform
from unrote.ranks import Ranks

KEPT_FORMAT = 1
"""Counts up whenever the same images would be kept as another file."""
ARRAYS = ("squared", "indices", "transforms")


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


def find_once(
    queries: ImageStore,
    references: References,
    num: int,
    transforms: Sequence[Transform],
    *,
    cache: Path | None,
    margin: int = 0,
    distributed: bool = False,
    **more: Any,
) -> Found:
    """What :func:`find` finds, kept in the folder ``cache``, which all processes see; None searches each time.

    Raises:
        InputError: the cache cannot be written.
    """

    def searched() -> Found:
        return find(queries, references, num, transforms, margin=margin, distributed=distributed, **more)

    if cache is None:
        return searched()
    clusters = hashlib.sha256(references.clusters.tobytes()).hexdigest()
    sets = (pixels_digest(queries), pixels_digest(references.store), clusters)
    identity = repr((KEPT_FORMAT, *sets, num, tuple(transforms), margin)).encode()
    file = cache / f"search-{hashlib.sha256(identity).hexdigest()[:40]}.npz"
    ranks, found = Ranks.here(distributed=distributed), _read(file, len(queries))
    there = [share["there"].all() for share in ranks.shares({"there": np.array([found is not None])})]
    if found is not None and all(there):
        return found
    found = searched()
    if ranks.rank == 0:
        _write(file, found)
    return found


def _read(file: Path, count: int) -> Found | None:
    """None if it is not there or damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            both = [Neighbours(*(arrays[f"{kind}_{name}"] for name in ARRAYS)) for kind in ("plain", "distinct")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Found(*both) if all(len(one.squared) == count for one in both) else None


def _write(file: Path, found: Found) -> None:
    kinds = {"plain": found.plain, "distinct": found.distinct}
    arrays = {f"{kind}_{name}": getattr(one, name) for kind, one in kinds.items() for name in ARRAYS}
    try:
        with atomic_write(file) as stream:
            np.savez(stream, **arrays)
    except OSError as error:
        raise InputError(f"cannot keep {file} ({error.strerror or error}): make room or set UNROTE_CACHE") from error
