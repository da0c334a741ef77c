"""The augmentation orbit: the views of a training image that a model may have copied instead of the image itself."""

from dataclasses import dataclass

import numpy as np

from unrote.errors import InputError


@dataclass(frozen=True)
class Transform:
    """A view of an image: mirrored or not, then moved by whole pixels with reflection at the border.

    ``down`` and ``right`` are pixels; the vacated border is filled as ``torch.nn.functional.pad(mode="reflect")`` does.
    """

    flip: bool = False
    down: int = 0
    right: int = 0

    @property
    def label(self) -> str:
        """In words: ``identity``, ``flip``, ``shift (+1, -2)`` (down, right) or both."""
        parts = ["flip"] if self.flip else []
        if self.down or self.right:
            parts.append(f"shift ({self.down:+d}, {self.right:+d})")
        return " + ".join(parts) or "identity"

    def source_pixels(self, height: int, width: int, channels: int) -> np.ndarray:
        """For each value of the flattened view, the index of the value of the flattened image it comes from."""
        rows = _reflect(np.arange(height) - self.down, height)
        columns = _reflect(np.arange(width) - self.right, width)
        if self.flip:
            columns = width - 1 - columns
        flat = np.arange(height * width * channels).reshape(height, width, channels)
        source: np.ndarray = flat[rows][:, columns].reshape(-1)
        return source

    def apply(self, images: np.ndarray) -> np.ndarray:
        """The views of ``images`` [N, H, W, C]."""
        flat = images.reshape(len(images), -1)
        return flat[:, self.source_pixels(*images.shape[1:])].reshape(images.shape)


IDENTITY = Transform()


def orbit(*, flip: bool, max_shift: int, height: int, width: int) -> tuple[Transform, ...]:
    """All transforms up to ``max_shift`` pixels either way, mirrored too if ``flip``; the gentlest first.

    The order decides ties: of two equally near views the one named first is reported.

    Raises:
        InputError: the images are too small to be shifted that far by reflection.
    """
    if max_shift < 0 or (max_shift and max_shift >= min(height, width)):
        raise InputError(
            f"max_shift is {max_shift}, but images of {width}×{height} pixels can be shifted by reflection by "
            f"0 to {min(height, width) - 1} pixels: choose a smaller max_shift"
        )
    shifts = range(-max_shift, max_shift + 1)
    flips = (False, True) if flip else (False,)
    views = [Transform(mirrored, down, right) for mirrored in flips for down in shifts for right in shifts]
    return tuple(sorted(views, key=lambda view: (abs(view.down) + abs(view.right), view.flip, view.down, view.right)))


def _reflect(positions: np.ndarray, size: int) -> np.ndarray:
    """Positions outside 0..size-1 mirrored at the edge pixel, which is not repeated."""
    inside: np.ndarray = (size - 1) - np.abs((size - 1) - np.abs(positions))
    return inside
