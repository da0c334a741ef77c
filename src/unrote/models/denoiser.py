"""The denoiser and its per-sample loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from unrote.config import ModelConfig, TrainingConfig


def build_unet(config: ModelConfig, *, resolution: int, channels: int, num_classes: int | None) -> UNet2DModel:
    """A UNet with fresh weights, drawn from torch's global generator.

    Args:
        config: the architecture.
        resolution: height and width of the images in pixels; must be divisible by 2^(levels-1).
        channels: of the images.
        num_classes: of the labels; None for an unconditional model.

    Raises:
        ValueError: if the resolution can't be halved often enough.
    """
    levels = len(config.block_out_channels)
    if resolution % 2 ** (levels - 1):
        raise ValueError(
            f"data.resolution: {resolution} can't be halved {levels - 1} times, as model.block_out_channels asks; "
            f"use a multiple of {2 ** (levels - 1)}"
        )
    attends = [level in config.attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=config.attention_head_dim,
        # The timestep is added to whole channels: in a group of one channel the normalization would take it out again.
        norm_num_groups=min(32, min(config.block_out_channels) // 4),
        dropout=config.dropout,
        num_class_embeds=num_classes,
        add_attention=bool(config.attention_levels),
    )


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of any denoiser of diffusers, which it keeps in lists."""
    lists = (child for child in denoiser.children() if isinstance(child, nn.ModuleList))
    return [block for blocks in lists for block in blocks]


def build_schedule(config: ModelConfig) -> DDPMScheduler:
    """The noise schedule, as diffusers saves it with the model.

    ``trailing`` spacing makes every sampler start at the last timestep, where the image is pure noise.
    """
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        clip_sample=True,
    )


def autocast_dtype(config: TrainingConfig) -> torch.dtype | None:
    """What the forward pass computes in under autocast; None for the weights' own type."""
    # What is still auto was not given to a device: as much memory as it can take.
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)


def memory_format(config: TrainingConfig) -> torch.memory_format:
    """How weights and images lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


Network = Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]
"""Calls a denoiser on noisy images at timesteps under a condition, and gives its prediction."""


def unet_prediction(denoiser: Any, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """What a diffusers UNet predicts."""
    prediction: Tensor = denoiser(noisy, timesteps, **condition).sample
    return prediction


class PerSampleLoss(ABC):
    """The loss of each sample: the mean over C, H, W of (prediction − target)², in fp32.

    What is noised how, and what the target is, subclasses say.

    Args:
        num_timesteps: T.
        device: of the images.
        dtype: of the forward pass under autocast; None for none.
        network: calls the denoiser.
    """

    def __init__(
        self, num_timesteps: int, device: torch.device, dtype: torch.dtype | None, network: Network = unet_prediction
    ) -> None:
        self.num_timesteps = num_timesteps
        self._device, self._dtype, self._network = device, dtype, network

    def __call__(
        self, denoiser: Any, clean: Tensor, noise: Tensor, timesteps: Tensor, condition: Mapping[str, Any] | None
    ) -> Tensor:
        """Noise the images and judge the prediction: :meth:`predict`, then :meth:`errors`."""
        prediction = self.predict(denoiser, clean, noise, timesteps, condition or {})
        return self.errors(prediction, clean, noise, timesteps)

    def predict(
        self, denoiser: Any, clean: Tensor, noise: Tensor, timesteps: Tensor, condition: Mapping[str, Any]
    ) -> Tensor:
        """What the model predicts of the noised images.

        Args:
            denoiser: the model, or what torch.compile made of it.
            clean: float32 [B, C, H, W], pixels in [-1, 1] or scaled latents.
            noise: float32 [B, C, H, W], standard normal.
            timesteps: [B], as :meth:`draw` gives them.
            condition: further arguments of the denoiser.

        Returns:
            [B, C, H, W], in the precision of the forward pass.
        """
        signal, sigma = self.levels(timesteps)
        noisy = signal * clean + sigma * noise
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            return self._network(denoiser, noisy, timesteps, condition)

    def errors(self, prediction: Tensor, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of each sample, float32 [B]."""
        error = prediction.float() - self.target(clean, noise, *self.levels(timesteps))
        return error.square().mean((1, 2, 3))

    @abstractmethod
    def draw(self, count: int, draw: torch.Generator) -> Tensor:
        """Random timesteps [count] to train at, int64 or continuous, in 0 ≤ t < T."""

    @abstractmethod
    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the clean image and of the noise there is, float32 [B, 1, 1, 1] both."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """What is to be predicted, [B, C, H, W]."""

    @abstractmethod
    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights that make the loss on the clean image count min(SNR, γ) (Hang et al. 2023, Eq. 9), float32 [B]."""


class DenoisingLoss(PerSampleLoss):
    """Denoising diffusion at whole timesteps (Ho et al. 2020, Eq. 14).

    Args:
        schedule: the noise schedule; its prediction type says what the target is.
        device: of the images.
        dtype: of the forward pass under autocast; None for none.
    """

    def __init__(self, schedule: DDPMScheduler, device: torch.device, dtype: torch.dtype | None = None) -> None:
        alphas = schedule.alphas_cumprod.to(device, torch.float32)
        super().__init__(len(alphas), device, dtype)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.prediction_type: str = schedule.config.prediction_type

    def draw(self, count: int, draw: torch.Generator) -> Tensor:
        """Uniform timesteps, int64 [count]."""
        return torch.randint(self.num_timesteps, (count,), generator=draw, device=self._device)

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ)."""
        return self._signal[timesteps].view(-1, 1, 1, 1), self._noise[timesteps].view(-1, 1, 1, 1)

    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Noise, clean image or velocity."""
        match self.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return clean
            case _:
                return signal * noise - sigma * clean  # velocity: Salimans & Ho 2022, §2.4

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """As the prediction type asks."""
        snr: Tensor = (self._signal[timesteps] / self._noise[timesteps]).square()
        match self.prediction_type:
            case "epsilon":
                return (gamma / snr).clamp(max=1)
            case "sample":
                return snr.clamp(max=gamma)
            case _:
                return snr.clamp(max=gamma) / (snr + 1)
