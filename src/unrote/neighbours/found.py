"""What a neighbour search finds."""

from dataclasses import dataclass

import numpy as np

MEMORY_BYTES = 1 << 29


@dataclass(frozen=True)
class Neighbours:
    """The nearest references of each query, nearest first; all arrays [G, n].

    Attributes:
        squared: squared L2 distance. Of images in pixel levels (0..255), exact integers, int64; of features float64.
        indices: positions among the references. int64.
        transforms: positions in the orbit of the transform that brings the reference nearest. int16.
        unit: what a distance is divided by: 255 for images.
        searched_again: how many queries the fast pass over features could not settle; they were searched again.
    """

    squared: np.ndarray
    indices: np.ndarray
    transforms: np.ndarray
    unit: float = 255.0
    searched_again: int = 0

    @property
    def distances(self) -> np.ndarray:
        """L2 distances, of images with pixels in [0, 1]. float64 [G, n]."""
        distances: np.ndarray = np.sqrt(self.squared) / self.unit
        return distances
