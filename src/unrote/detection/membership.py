"""Was an image trained on? A test on the loss, for our runs and any unconditional diffusers pipeline."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unrote.data.store import ImageStore

TIMESTEPS = (50, 100, 200, 300)


@torch.no_grad()
def pia_scores(
    unet: Any,
    alphas_cumprod: Tensor,
    images: ImageStore,
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    prediction_type: str = "epsilon",
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """PIA (Kong et al., "An Efficient Membership Inference Attack for the Diffusion Model by Proximal Initialization").

    The noise that the model itself sees in an image at t = 0, ε₀ = ε(x₀, 0), replaces random noise; the score is
    −‖ε₀ − ε(√ᾱ_t x₀ + √(1 − ᾱ_t) ε₀, t)‖² (mean over pixels), averaged over ``timesteps``. Higher: more like a member.
    One query more than there are timesteps; no randomness.

    Args:
        unet: a UNet2DModel.
        alphas_cumprod: ᾱ of the schedule, [T].
        images: what to judge; their labels are given to a class-conditional model.
        timesteps: noise levels to look at.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        batch_size: images at once.
        device: of the model.

    Returns:
        float64 [N].
    """
    alphas = alphas_cumprod.to(device, torch.float32)
    conditional = getattr(unet.config, "num_class_embeds", None) is not None
    scores = []
    for start in tqdm(range(0, len(images), batch_size), unit="batch", desc="membership", leave=False, disable=None):
        part = slice(start, start + batch_size)
        clean = torch.from_numpy(np.array(images.images[part])).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = None
        if conditional and images.labels is not None:
            labels = torch.from_numpy(images.labels[part].copy()).to(device)

        def noise_at(noisy: Tensor, timestep: int, labels: Tensor | None = labels) -> Tensor:
            steps = torch.full((len(noisy),), timestep, device=device)
            output = unet(noisy, steps, class_labels=labels).sample.float()
            return as_noise(output, noisy, alphas[timestep], prediction_type)

        own = noise_at(clean, 0)
        errors = torch.zeros(len(clean), dtype=torch.float64, device=device)
        for timestep in timesteps:
            signal, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
            errors += (own - noise_at(signal * clean + sigma * own, timestep)).double().square().mean((1, 2, 3))
        scores.append((-errors / len(timesteps)).cpu().numpy())
    return np.concatenate(scores)


def as_noise(output: Tensor, noisy: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """The predicted noise, whatever the model predicts (Salimans & Ho 2022, §2.4 for the velocity)."""
    if prediction_type == "epsilon":
        return output
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    return (noisy - signal * output) / sigma if prediction_type == "sample" else signal * output + sigma * noisy
