"""What the example scripts have in common: an image as a tensor."""

import numpy as np
import torch


def to_pixels(image, resolution):
    """Float32 [3, resolution, resolution] in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB").resize((resolution, resolution)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
