"""The augmentation orbit: the views of a training image that a model may have copied instead of the image itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unrote.errors import InputError

SCALES = (0.9, 1.1)
BRIGHTNESS = (0.85, 1.15)
WEIGHT_BITS = 11  # of the bilinear weights of one axis: 255 · 2²² and the rounding fit int32
ZOOM_VALUES = 1 << 17  # how many values are zoomed at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Transform:
    """A view of an image: zoomed, brightened, mirrored or not, then moved by whole pixels. Always 8 bits again.

    Everything is computed in integers, so a view is the same to the last bit on every machine and in every batch.

    Attributes:
        flip: mirrored horizontally.
        down: pixels; the vacated border is filled as ``torch.nn.functional.pad(mode="reflect")`` does.
        right: pixels, likewise.
        scale: zoom about the centre, bilinear (weights in steps of 2⁻¹¹), rounded; 1.1 shows 1/1.1 of each side. Below
            1 the border is filled by the same reflection. 0.5 to 2.
        brightness: factor of every value, rounded and cut at 255. Above 0.
    """

    flip: bool = False
    down: int = 0
    right: int = 0
    scale: float = 1.0
    brightness: float = 1.0

    @property
    def label(self) -> str:
        """In words: ``identity``, or what is done joined by ``+``, e.g. ``flip + shift (+1, -2)`` (down, right)."""
        parts = ["flip"] if self.flip else []
        if self.down or self.right:
            parts.append(f"shift ({self.down:+d}, {self.right:+d})")
        if self.scale != 1:
            parts.append(f"scale {self.scale:g}")
        if self.brightness != 1:
            parts.append(f"brightness {self.brightness:g}")
        return " + ".join(parts) or "identity"

    @property
    def unmoved(self) -> "Transform":
        """What is left without mirroring and moving; it comes first in the view."""
        return Transform(scale=self.scale, brightness=self.brightness)

    def source_pixels(self, height: int, width: int, channels: int) -> np.ndarray:
        """For each value of the flattened view, the index of the value of the flattened ``unmoved`` view it shows."""
        rows = _reflect(np.arange(height) - self.down, height)
        columns = _reflect(np.arange(width) - self.right, width)
        if self.flip:
            columns = width - 1 - columns
        flat = np.arange(height * width * channels).reshape(height, width, channels)
        source: np.ndarray = flat[rows][:, columns].reshape(-1)
        return source

    def apply(self, images: np.ndarray) -> np.ndarray:
        """The views of ``images`` uint8 [N, H, W, C]."""
        if self.scale != 1:
            images = _zoomed(images, self.scale)
        if self.brightness != 1:
            images = np.minimum(np.rint(np.arange(256) * self.brightness), 255).astype(np.uint8)[images]
        if self == self.unmoved:
            return images
        flat = images.reshape(len(images), -1)
        return flat[:, self.source_pixels(*images.shape[1:])].reshape(images.shape)


IDENTITY = Transform()


def orbit(
    *,
    flip: bool,
    max_shift: int,
    scales: Sequence[float] = SCALES,
    brightness: Sequence[float] = BRIGHTNESS,
    height: int,
    width: int,
) -> tuple[Transform, ...]:
    """Shifts up to ``max_shift`` pixels either way, brightnesses and scales, each mirrored too if ``flip``.

    One of the three at a time, not their product. The gentlest come first: identity, flip, shifts by their length, then
    brightnesses and scales by their ratio to 1. The order decides ties: of two equally near views the one named
    first is reported.

    Raises:
        InputError: the images are too small to be shifted that far, or a factor is out of range.
    """
    largest = (min(height, width) - 1) // 2
    if not 0 <= max_shift <= largest:
        raise InputError(
            f"max_shift is {max_shift}, but of images of {width}×{height} pixels something is left to compare after "
            f"shifts of 0 to {largest} pixels only: choose a smaller max_shift"
        )
    for factor in scales:
        if not 0.5 <= factor <= 2:
            raise InputError(f"scales has {factor:g}: choose factors from 0.5 to 2, or none")
    for factor in brightness:
        if not 0 < factor <= 255:
            raise InputError(f"brightness has {factor:g}: choose factors above 0, or none")
    flips = (False, True) if flip else (False,)
    reach = range(-max_shift, max_shift + 1)
    moves = sorted(
        (abs(down) + abs(right), mirrored, down, right) for mirrored in flips for down in reach for right in reach
    )
    views = [Transform(mirrored, down, right) for _, mirrored, down, right in moves]
    views += [Transform(mirrored, brightness=factor) for factor in _gentlest(brightness) for mirrored in flips]
    views += [Transform(mirrored, scale=factor) for factor in _gentlest(scales) for mirrored in flips]
    return tuple(dict.fromkeys(views))


def _gentlest(factors: Sequence[float]) -> list[float]:
    return sorted(factors, key=lambda factor: max(factor, 1 / factor))


def _reflect(positions: np.ndarray, size: int) -> np.ndarray:
    """Positions outside 0..size-1 mirrored at the edge pixel, which is not repeated."""
    inside: np.ndarray = (size - 1) - np.abs((size - 1) - np.abs(positions))
    return inside


def _zoomed(images: np.ndarray, scale: float) -> np.ndarray:
    (top, bottom, down), (left, right, across) = (_bilinear(size, scale) for size in images.shape[1:3])
    down, across = down[:, None, None], across[:, None]
    zoomed = np.empty_like(images)
    step = max(1, ZOOM_VALUES // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, len(images), step):
        piece = images[start : start + step].astype(np.int32)
        piece = piece[:, top] * ((1 << WEIGHT_BITS) - down) + piece[:, bottom] * down
        piece = piece[:, :, left] * ((1 << WEIGHT_BITS) - across) + piece[:, :, right] * across
        zoomed[start : start + step] = (piece + (1 << (2 * WEIGHT_BITS - 1))) >> (2 * WEIGHT_BITS)
    return zoomed


def _bilinear(size: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pixel of a zoomed axis: the two source pixels it lies between, and the weight int32 of the second."""
    centre = (size - 1) / 2
    positions = (np.arange(size) - centre) / scale + centre
    below = np.floor(positions)
    weights = np.rint((positions - below) * (1 << WEIGHT_BITS)).astype(np.int32)
    first = below.astype(np.int64)
    return _reflect(first, size), _reflect(first + 1, size), weights
