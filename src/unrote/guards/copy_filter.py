"""The copy filter: generate, check against the training images, make copies again, at bounded cost."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unrote.errors import InputError
from unrote.guards.index import TrainingIndex, is_copy, names_of

Make = Callable[[Sequence[int], int], np.ndarray]
"""Images uint8 [B, H, W, C] of ``indices`` [B] at attempt 0, 1, …: another attempt is another seed."""


class CopyFilter:
    """Makes images that are copies of training images again, with the next seed, at most ``tries`` times in all.

    An image that is a copy every time keeps the attempt that is least alike, and is flagged. Image i then depends on
    what it depended on before, on the training images and on the threshold, and not on how many images are made.

    Args:
        index: the training images, with the threshold.
        tries: attempts per image, the first included; at most so many times the cost of sampling.

    Raises:
        InputError: ``tries`` is no positive number.
    """

    name = "copy-filter"

    def __init__(self, index: TrainingIndex, *, tries: int = 4) -> None:
        if tries < 1:
            raise InputError(f"--guard copy-filter: tries must be at least 1, not {tries}")
        self.index, self.tries = index, tries

    def __call__(self, make: Make, indices: Sequence[int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Make the images ``indices``, and again those that are copies.

        Returns:
            The images uint8 [B, H, W, C], and what is known of each: ``attempt`` (0-based, which one was kept),
            ``tries``, the index's ``ratio`` or ``similarity``, ``nearest`` (name of the training image it is most like)
            and ``copy``, whether it is one although every try was used.
        """
        images = np.array(make(indices, 0))
        values, nearest = self.index(images)
        kept, tries = np.zeros(len(images), dtype=np.int64), np.ones(len(images), dtype=np.int64)
        for attempt in range(1, self.tries):
            again = np.flatnonzero(is_copy(self.index, values))
            if len(again) == 0:
                break
            fresh = make([indices[row] for row in again.tolist()], attempt)
            fresh_values, fresh_nearest = self.index(fresh)
            tries[again] += 1
            less = self.index.alike(fresh_values) < self.index.alike(values[again])
            better = again[less]
            images[better], values[better], nearest[better] = fresh[less], fresh_values[less], fresh_nearest[less]
            kept[better] = attempt
        columns = (kept, tries, values, names_of(self.index, nearest), is_copy(self.index, values))
        keys = ("attempt", "tries", self.index.key, "nearest", "copy")
        plain = [part.tolist() if isinstance(part, np.ndarray) else part for part in columns]
        return images, [dict(zip(keys, row, strict=True)) for row in zip(*plain, strict=True)]

    def settings(self) -> dict[str, Any]:
        """What the images depend on, JSON-able."""
        return {"guard": self.name, "tries": self.tries, **self.index.settings()}
