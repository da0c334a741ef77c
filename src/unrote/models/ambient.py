"""Ambient-style targets at high noise: there, only one fixed noisy version of each image is ever seen.

Daras et al. 2024, "Consistent Diffusion Meets Tweedie" (arXiv 2404.10177), §3; as a mitigation of memorization, Shah et
al. 2025, "Does Generation Require Memorization?" (arXiv 2502.21278). `docs/method.md` derives the targets.
"""

import torch
from torch import Tensor

from unrote.models.denoiser import DenoisingLoss
from unrote.seeding import generator


class Ambient:
    """Noise and loss at timesteps t ≥ n; below n both are the ordinary ones.

    With a, s the signal and noise levels, ``x_n = a_n x_0 + s_n e`` with the image's own fixed noise e, and
    ``x_t = r x_n + q z`` with fresh z, ``r = a_t / a_n``, ``q² = 1 − r²``.

    Args:
        loss: the ordinary loss.
        timestep: n, in 0..T-1.
        seed: of the fixed noise.
    """

    def __init__(self, loss: DenoisingLoss, timestep: int, seed: int) -> None:
        self._loss, self._timestep, self._seed = loss, timestep, seed

    def fixed_noise(self, indices: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
        """e of the images ``indices`` (int64 [B]), float32 [B, C, H, W]: a function of seed and index alone."""
        draws = [generator(self._seed, "ambient", index) for index in indices.tolist()]
        return torch.stack([torch.randn(shape[1:], generator=draw) for draw in draws]).to(device)

    def noise(self, fresh: Tensor, fixed: Tensor, timesteps: Tensor) -> Tensor:
        """The noise ε that makes ``a_t x_0 + s_t ε = r x_n + q z``; ``fresh`` itself below n. All [B, C, H, W]."""
        _, sigma = self._loss.levels(timesteps)
        r, q, _, s_n = self._ratios(timesteps)
        return torch.where(self._is_high(timesteps), (r * s_n * fixed + q * fresh) / sigma, fresh)

    def errors(self, prediction: Tensor, clean: Tensor, fresh: Tensor, fixed: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of each sample, float32 [B].

        From t = n on ``|c prediction − target|²`` with ``c = q / s_t``, where the target depends on x_n and z only. The
        prediction that minimizes it is the ordinary one: noise, velocity or image expected given x_t. At n itself there
        is nothing to predict: the loss does not depend on the prediction.
        """
        _, sigma = self._loss.levels(timesteps)
        r, q, a_n, s_n = self._ratios(timesteps)
        kept = a_n * clean + s_n * fixed
        match self._loss.prediction_type:
            case "epsilon":
                target = fresh
            case "sample":
                target = (q * kept - r * s_n.square() * fresh) / (sigma * a_n)
            case _:
                target = (r * fresh - q * kept) / a_n
        high = (q / sigma * prediction.float() - target).square().mean((1, 2, 3))
        return torch.where(
            self._is_high(timesteps).flatten(), high, self._loss.errors(prediction, clean, fresh, timesteps)
        )

    def _ratios(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, q [B, 1, 1, 1] and a_n, s_n [1, 1, 1, 1]; r and q mean nothing below n."""
        signal, _ = self._loss.levels(timesteps)
        a_n, s_n = self._loss.levels(torch.full_like(timesteps[:1], self._timestep))
        r = signal / a_n
        return r, (1 - r.square()).clamp(min=0).sqrt(), a_n, s_n

    def _is_high(self, timesteps: Tensor) -> Tensor:
        return (timesteps >= self._timestep).view(-1, 1, 1, 1)
