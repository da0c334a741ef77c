"""The images of a regime: what a seed trains on, its control, the reference, and what the classifier learns from."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from unrote.data import ImageStore, open_images
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.seeding import derive_seed
from unrote.study.plan import ImagesPlan

REFERENCE_SHARE, SUBJECTS_SHARE = 0.1, 0.4
"""Of a source, by a fixed shuffle: reference first, then the pool that seeds choose from; the rest is for encoders."""


@dataclass(frozen=True)
class Subjects:
    """The images of a regime and seed. No image of the source is in two of them.

    Attributes:
        train: what is trained on, repeated images as often as they are there.
        distinct: the training images, each once: N of them.
        repeated: which of ``distinct`` are repeated. bool [N].
        control: N images of the same kind that were not trained on (fewer if there are not so many).
        reference: images that quality is measured against, the same for all seeds.
    """

    train: ImageStore
    distinct: ImageStore
    repeated: np.ndarray
    control: ImageStore
    reference: ImageStore


def choose_subjects(plan: ImagesPlan, seed: int) -> Subjects:
    """The images of ``plan`` for ``seed``.

    Raises:
        InputError: the sources can't be opened, or have too few images.
    """
    source = _open(plan, plan.source)
    count = plan.train
    if plan.held_out is None:
        pools = partition(source)
        reference, pool = source.subset(_first(pools[0], plan.reference, plan.source, "reference")), pools[1]
        _enough(len(pool), 2 * count, f"{plan.source}: to train on {count:,} and hold out as many")
        chosen = _shuffled(pool, seed, "subjects")
        trained, control = source.subset(np.sort(chosen[:count])), source.subset(np.sort(chosen[count : 2 * count]))
    else:
        others = _open(plan, plan.held_out)
        order = _shuffled(np.arange(len(others)), 0, "held-out")
        reference = others.subset(_first(order, plan.reference, plan.held_out, "reference"))
        rest = order[plan.reference :]
        _enough(len(rest), 1, f"{plan.held_out}: besides {plan.reference:,} images of reference, for the control,")
        _enough(len(source), count, f"{plan.source}: to train on")
        trained = source.subset(np.sort(_shuffled(np.arange(len(source)), seed, "subjects")[:count]))
        control = others.subset(np.sort(_shuffled(rest, seed, "control")[:count]))
    repeated = np.zeros(count, dtype=bool)
    if plan.repeats is None:
        return Subjects(trained, trained, repeated, control, reference)
    many = max(1, math.floor(plan.repeats.share * count + 0.5))
    repeated[_shuffled(np.arange(count), seed, "repeated")[:many]] = True
    times = np.where(repeated, plan.repeats.times, 1)
    return Subjects(_repeated(trained, times), trained, repeated, control, reference)


def encoder_images(plan: ImagesPlan) -> ImageStore | None:
    """Labelled images that no seed of any regime trains on, holds out or refers to; None if there are none."""
    if plan.labelled is None and plan.held_out is not None:
        return None
    source = _open(plan, plan.labelled or plan.source)
    return None if source.labels is None else source.subset(np.sort(partition(source)[2]))


def partition(source: ImageStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices for the reference, for the seeds to choose from, and for encoders: the same in every study."""
    order = _shuffled(np.arange(len(source)), 0, "pools")
    first, second = (round(share * len(order)) for share in (REFERENCE_SHARE, REFERENCE_SHARE + SUBJECTS_SHARE))
    return order[:first], order[first:second], order[second:]


def _open(plan: ImagesPlan, source: str) -> ImageStore:
    return _opened(source, plan.resolution, plan.channels)


@lru_cache
def _opened(source: str, resolution: int, channels: int) -> ImageStore:
    """Opened once, however many seeds and regimes choose from it."""
    return open_images(source, resolution=resolution, channels=channels)


def _shuffled(indices: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "study", purpose)).permutation(indices)


def _first(order: np.ndarray, count: int, source: str, role: str) -> np.ndarray:
    _enough(len(order), count, f"{source}: as {role}")
    return np.sort(order[:count])


def _enough(there: int, wanted: int, what: str) -> None:
    if there < wanted:
        raise InputError(f"{what} {wanted:,} images are needed, and there are {there:,}; ask for fewer")


def _repeated(store: ImageStore, times: np.ndarray) -> ImageStore:
    """Each image ``times`` times, the second and later ones under names of their own."""
    rows = np.repeat(np.arange(len(store)), times)
    copy = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
    several = store.subset(rows)
    names = [name if n == 0 else f"{name} ({n + 1})" for name, n in zip(several.names, copy.tolist(), strict=True)]
    return in_memory_store(
        np.asarray(several.images),
        source=store.source,
        names=names,
        labels=several.labels,
        class_names=several.class_names,
        captions=several.captions,
    )
