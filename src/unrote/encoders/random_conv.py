"""Fixed random convolutions: a feature space that needs no download and no training."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class RandomConvEncoder:
    """Four layers of fixed random 3×3 convolutions, 64 features: no download, no training, the same everywhere.

    Random embeddings order distributions usefully (Naeem et al. 2020, "Reliable fidelity and diversity metrics").
    This one was chosen by measurement, see docs/audit.md. It is no Inception: a distance in it is not an FID.
    """

    key = "random-conv"
    name = "random-conv-64/1"
    preprocessing = "none (features at the images' own size, averaged over positions); grey as three equal channels"
    copy_detection = False
    is_fid_inception = False

    widths = (32, 64, 64, 64)

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        random = np.random.Generator(np.random.PCG64(0))
        self.weights: list[Tensor] = []
        inputs = 3
        for outputs in self.widths:
            kernel = random.standard_normal((outputs, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
            self.weights.append(torch.from_numpy(kernel.astype(np.float32)).to(self.device))
            inputs = outputs
        self.weights[-1] *= 10  # only the unit: distances between sets of real images are then of the order of 10

    @property
    def weights_sha256(self) -> str:
        """Hex SHA-256 of the float32 weights."""
        return hashlib.sha256(b"".join(kernel.cpu().numpy().tobytes() for kernel in self.weights)).hexdigest()

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, 64] of uint8 images [n, H, W, C], C = 1 or 3."""
        batch = max(1, (1 << 19) // int(np.prod(images.shape[1:3])))
        features = [self._forward(images[start : start + batch]) for start in range(0, len(images), batch)]
        return np.concatenate(features) if features else np.zeros((0, self.widths[-1]), np.float32)

    def _forward(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.array(images, dtype=np.float32)).to(self.device).permute(0, 3, 1, 2).div(255.0)
        hidden = pixels.expand(-1, 3, -1, -1).sub(0.5).mul(4.0)
        for kernel in self.weights[:-1]:
            hidden = F.avg_pool2d(F.conv2d(hidden, kernel, padding=1).relu(), 2, ceil_mode=True)
        features: np.ndarray = F.conv2d(hidden, self.weights[-1], padding=1).mean((2, 3)).cpu().numpy()
        return features
