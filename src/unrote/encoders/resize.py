"""Resizing that all encoders share: Pillow's bilinear filter, antialiased, rounded to 8 bits as image files are."""

import numpy as np
from PIL import Image

RULE = "bilinear with antialiasing (Pillow), rounded to 8 bits"


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images of another size. uint8 [n, H, W, 3] → uint8 [n, height, width, 3].

    Pillow widens the filter when it shrinks, so nothing aliases; most published encoders were trained and are evaluated
    with it (Parmar et al. 2022, "On aliased resizing", measure what other resizing does to an FID).
    """
    if images.shape[1:3] == (height, width):
        return images
    resized = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        resized[index] = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return resized


def resize_short_side(images: np.ndarray, side: int) -> np.ndarray:
    """Images whose shorter side is ``side`` and whose shape stays. uint8 [n, H, W, 3] → uint8 [n, h, w, 3]."""
    height, width = images.shape[1:3]
    shorter = min(height, width)
    return resize(images, round(height * side / shorter), round(width * side / shorter))


def rgb(images: np.ndarray) -> np.ndarray:
    """Grey images as three equal channels. uint8 [n, H, W, 1 or 3] → uint8 [n, H, W, 3], a writable copy."""
    return np.array(np.broadcast_to(images, (*images.shape[:3], 3)), order="C")
