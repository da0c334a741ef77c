"""The per-sample loss of flow matching models, such as Stable Diffusion 3 and FLUX."""

import math
from typing import Any

import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.models.denoiser import Network, PerSampleLoss, unet_prediction


def shift_of(schedule: Any, tokens: int) -> float:
    """How strongly the schedule leads to more noise: s in σ' = s σ / (1 + (s − 1) σ) (Esser et al. 2024, Eq. 23).

    Args:
        schedule: the configuration of a flow matching scheduler of diffusers.
        tokens: image tokens that the transformer sees; a dynamic shift grows with them.
    """
    if not schedule.get("use_dynamic_shifting"):
        return float(schedule.get("shift", 1.0))
    shortest, longest = schedule.get("base_image_seq_len", 256), schedule.get("max_image_seq_len", 4096)
    low, high = schedule.get("base_shift", 0.5), schedule.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - shortest) / (longest - shortest)
    return float(mu) if schedule.get("time_shift_type") == "linear" else math.exp(mu)


class FlowLoss(PerSampleLoss):
    """Rectified flow: x_σ = (1 − σ) x + σ ε, and the velocity ε − x is what is predicted (Esser et al. 2024, §2).

    σ is continuous and logit-normal, sigmoid of a standard normal number (Eq. 19), and then shifted as for sampling. A
    timestep is T σ, as the transformer is told it.

    Args:
        num_timesteps: T.
        shift: s of :func:`shift_of`.
        device: of the images.
        dtype: of the forward pass under autocast; None for none.
        network: calls the denoiser.
    """

    def __init__(
        self,
        num_timesteps: int,
        shift: float,
        device: torch.device,
        dtype: torch.dtype | None = None,
        network: Network = unet_prediction,
    ) -> None:
        super().__init__(num_timesteps, device, dtype, network)
        self._shift = shift

    def draw(self, count: int, draw: torch.Generator) -> Tensor:
        """Continuous timesteps, float32 [count] in (0, T)."""
        sigma = torch.randn(count, generator=draw, device=self._device).sigmoid()
        shifted: Tensor = self._shift * sigma / (1 + (self._shift - 1) * sigma)
        # Rounding must not lead to T itself, which is no timestep of the bank.
        return (self.num_timesteps * shifted).clamp(max=self.num_timesteps * (1 - 1e-6))

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """1 − σ and σ."""
        sigma = (timesteps / self.num_timesteps).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The velocity."""
        return noise - clean

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """There are none: logit-normal timesteps already stand for them."""
        raise InputError("training.min_snr_gamma: flow matching has no such weights; leave it out")
