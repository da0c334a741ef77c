"""The searches: generated images among training images, and the controls that tell what needs no memorization."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unrote.auditing.memorization import TrainShare, train_share
from unrote.auditing.searching import Found, References, find, find_once
from unrote.data.store import ImageStore
from unrote.neighbours.orbit import Transform

MIN_UNSEEN = 1000  # held-out images (if there are as many) that false alarms and calibrated thresholds rest on


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
    cache: Path | None = None,
    distributed: bool = False,
) -> View:
    """Neighbours among train, and among equally many training and held-out images.

    What is found of held-out images does not depend on the generated ones and is kept in the folder ``cache``.
    """
    shared: dict[str, Any] = {"margin": margin, "resume": resume, "distributed": distributed}

    def among(references: References, what: str) -> Found:
        return find(generated, references, num, transforms, label=f"{name}: generated → {what}", **shared)

    found = among(train, "train")
    if holdout is None:
        return View(name, found)
    size = min(len(train.store), len(holdout.store))
    control_train = found
    if len(train.store) > size:
        control_train = among(train.chosen(size, seed, "control-train"), "train, subset")
    control = among(holdout.chosen(size, seed, "control-holdout"), "held-out")
    unseen = holdout.chosen(max(len(generated), MIN_UNSEEN), seed, "unseen")
    label = f"{name}: held-out → train"
    seen = find_once(unseen.store, train, num, transforms, cache=cache, label=label, **shared)
    return View(name, found, control_train, control, seen, unseen.leaks, size)
