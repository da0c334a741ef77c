"""Augmentations of image batches: per sample, scaled by a strength, the identity at strength 0."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """An augmented view of each image.

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
        float32 [B, C, H, W] in [-1, 1]; images of strength 0 are untouched.
    """

    def uniform(limit: float) -> Tensor:
        """Per sample in ±limit · strength, shape [B, 1, 1, 1]."""
        u = torch.rand(len(images), generator=draw, device=images.device) * 2 - 1
        return (u * strength * limit).view(-1, 1, 1, 1)

    out = images
    if flip or shift:
        out = _flip_and_shift(out, strength if flip else 0 * strength, strength * shift, draw)
    if rotate or scale:
        out = _rotate_and_scale(out, uniform(math.radians(rotate)).flatten(), 1 + uniform(scale).flatten())
    if brightness:
        out = out + uniform(2 * brightness)
    if contrast:
        mean = out.mean((1, 2, 3), keepdim=True)
        out = mean + (out - mean) * (1 + uniform(contrast))
    if saturation and images.shape[1] > 1:
        grey = out.mean(1, keepdim=True)
        out = grey + (out - grey) * (1 + uniform(saturation))
    if cutout:
        out = torch.where(_squares(images, strength * cutout, draw), 0.0, out)
    return torch.where(strength.view(-1, 1, 1, 1) > 0, out.clamp(-1, 1), images)


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """``images`` [B, C, H, W] with those of ``which`` (bool [B]) mirrored horizontally."""
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


def coin(count: int, draw: torch.Generator) -> Tensor:
    """A fair coin for each of ``count`` samples, bool [count] on the device of ``draw``."""
    return torch.rand(count, generator=draw, device=draw.device) < 0.5


def _flip_and_shift(images: Tensor, flip_strength: Tensor, reach: Tensor, draw: torch.Generator | None) -> Tensor:
    batch, _, height, width = images.shape
    coin, down, right = torch.rand(3, batch, generator=draw, device=images.device)
    rows = _reflected(height, ((down * 2 - 1) * reach * height).round().long())
    columns = _reflected(width, ((right * 2 - 1) * reach * width).round().long())
    columns = torch.where((coin < flip_strength / 2).unsqueeze(1), columns.flip(1), columns)
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


def _squares(images: Tensor, share: Tensor, draw: torch.Generator | None) -> Tensor:
    """Mask [B, 1, H, W] of one square per image whose side is ``share`` [B] of the image's."""
    batch, _, height, width = images.shape
    centre = torch.rand(2, batch, 1, generator=draw, device=images.device)
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    inside_rows = (rows - centre[0]).abs() < share.unsqueeze(1) / 2
    inside_columns = (columns - centre[1]).abs() < share.unsqueeze(1) / 2
    return (inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1)
