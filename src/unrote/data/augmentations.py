"""Augmentations of image batches: per sample, scaled by a strength, the identity at strength 0."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = (
    "flip", "shift_y", "shift_x", "rotate", "scale", "brightness", "contrast", "saturation", "cutout", "cutout_y",
    "cutout_x",
)  # fmt: skip
"""What :func:`augment` tells of each view, in this order."""


def augment(
    images: Tensor,
    strength: Tensor,
    draw: torch.Generator | None,
    *,
    flip: bool = False,
    shift: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    cutout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """An augmented view of each image, and what was done to it.

    Args:
        images: float32 [B, C, H, W] in [-1, 1].
        strength: float32 [B] in [0, 1]; scales every range below, and the chance of a flip.
        draw: where the randomness comes from, on the images' device; None is torch's own.
        flip: mirror horizontally, half of the time at full strength.
        shift: largest shift as a share of the side; whole pixels, reflected at the border, so nothing is blurred.
        rotate: largest rotation in degrees.
        scale: largest relative change of size, in [0, 1).
        brightness: largest change as a share of the range.
        contrast: largest relative change around the image's mean.
        saturation: largest relative change around the pixel's grey; none for one channel.
        cutout: side of the square that becomes mid-grey, as a share of the image's side.

    Returns:
        The views, float32 [B, C, H, W] in [-1, 1], images of strength 0 untouched; and the labels, float32
        [B, len(LABELS)], each the share of its range that was used, about -1 to 1, and 0 where nothing was done
        (Karras et al. 2022, Table 6).
    """
    done: dict[str, Tensor] = {}

    def uniform(name: str, limit: float) -> Tensor:
        """Per sample in ±limit · strength, shape [B, 1, 1, 1]."""
        share = (torch.rand(len(images), generator=draw, device=images.device) * 2 - 1) * strength
        if limit:
            done[name] = share
        return (share * limit).view(-1, 1, 1, 1)

    out = images
    if flip or shift:
        out = _flip_and_shift(out, strength if flip else 0 * strength, strength * shift, draw, done)
        for name, side in (("shift_y", images.shape[2]), ("shift_x", images.shape[3])):
            done[name] = done[name] / (shift * side or 1.0)
    if rotate or scale:
        angle, size = uniform("rotate", math.radians(rotate)).flatten(), 1 + uniform("scale", scale).flatten()
        out = _rotate_and_scale(out, angle, size)
    if brightness:
        out = out + uniform("brightness", 2 * brightness)
    if contrast:
        mean = out.mean((1, 2, 3), keepdim=True)
        out = mean + (out - mean) * (1 + uniform("contrast", contrast))
    if saturation and images.shape[1] > 1:
        grey = out.mean(1, keepdim=True)
        out = grey + (out - grey) * (1 + uniform("saturation", saturation))
    if cutout:
        out = torch.where(_squares(images, strength * cutout, draw, done), 0.0, out)
        for name in ("cutout", "cutout_y", "cutout_x"):
            done[name] = done[name] * strength
    view = torch.where(strength.view(-1, 1, 1, 1) > 0, out.clamp(-1, 1), images)
    nothing = torch.zeros_like(strength)
    return view, torch.stack([done.get(name, nothing) for name in LABELS], 1)


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """``images`` [B, C, H, W] with those of ``which`` (bool [B]) mirrored horizontally."""
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


def coin(count: int, draw: torch.Generator) -> Tensor:
    """A fair coin for each of ``count`` samples, bool [count] on the device of ``draw``."""
    return torch.rand(count, generator=draw, device=draw.device) < 0.5


def _flip_and_shift(
    images: Tensor, flip_strength: Tensor, reach: Tensor, draw: torch.Generator | None, done: dict[str, Tensor]
) -> Tensor:
    """The views; ``done`` gets what was flipped, 1 or 0, and the shifts in pixels."""
    batch, _, height, width = images.shape
    coin, down, right = torch.rand(3, batch, generator=draw, device=images.device)
    shift_y, shift_x = ((down * 2 - 1) * reach * height).round(), ((right * 2 - 1) * reach * width).round()
    rows, columns = _reflected(height, shift_y.long()), _reflected(width, shift_x.long())
    flipped = coin < flip_strength / 2
    columns = torch.where(flipped.unsqueeze(1), columns.flip(1), columns)
    done |= {"flip": flipped.float(), "shift_y": shift_y, "shift_x": shift_x}
    samples = torch.arange(batch, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[samples, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _reflected(size: int, shift: Tensor) -> Tensor:
    """Source positions [B, size] of a row shifted by ``shift`` [B], mirrored at its ends without repeating them."""
    position = torch.arange(size, device=shift.device) - shift.unsqueeze(1)
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    return torch.minimum(position, period - position) if size > 1 else position * 0


def _rotate_and_scale(images: Tensor, angle: Tensor, size: Tensor) -> Tensor:
    cos, sin, zero = angle.cos() / size, angle.sin() / size, torch.zeros_like(angle)
    # The grid runs from -1 to 1 on both sides whatever their lengths, so a rotation must undo their ratio.
    ratio = images.shape[2] / images.shape[3]
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _squares(images: Tensor, share: Tensor, draw: torch.Generator | None, done: dict[str, Tensor]) -> Tensor:
    """Mask [B, 1, H, W] of one square per image whose side is ``share`` [B] of the image's; ``done`` gets where."""
    batch, _, height, width = images.shape
    centre = torch.rand(2, batch, 1, generator=draw, device=images.device)
    done |= {"cutout": torch.ones_like(share), "cutout_y": 2 * centre[0, :, 0] - 1, "cutout_x": 2 * centre[1, :, 0] - 1}
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    inside_rows = (rows - centre[0]).abs() < share.unsqueeze(1) / 2
    inside_columns = (columns - centre[1]).abs() < share.unsqueeze(1) / 2
    return (inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1)
