"""Pixels as they are."""

import numpy as np


class PixelsEncoder:
    """Flattened pixels in [0, 1]: no resizing, no weights. Distances are those of the audit's neighbour search."""

    key = "pixels"
    name = "pixels"
    weights_sha256 = "none"
    preprocessing = "none (pixels / 255, flattened)"
    copy_detection = False
    is_fid_inception = False

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, H·W·C] of uint8 images [n, H, W, C]."""
        pixels = np.asarray(images).reshape(len(images), -1)
        features: np.ndarray = np.divide(pixels, 255, dtype=np.float32)
        return features
