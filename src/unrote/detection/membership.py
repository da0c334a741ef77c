"""Was an image trained on? A test on the loss, for our runs and any unconditional diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unrote.data.store import ImageStore
from unrote.errors import InputError

LEVELS = (0.05, 0.1, 0.2, 0.3)
"""Noise levels that are looked at, as shares of all timesteps."""


def attacked_timesteps(num_train_timesteps: int) -> tuple[int, ...]:
    """50, 100, 200 and 300 of 1,000."""
    return tuple(sorted({round(level * num_train_timesteps) for level in LEVELS}))


@torch.no_grad()
def pia_scores(
    unet: Any,
    alphas_cumprod: Tensor,
    images: ImageStore,
    *,
    timesteps: Sequence[int] | None = None,
    prediction_type: str = "epsilon",
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """PIA (Kong et al., ICLR 2024, "An Efficient Membership Inference Attack … by Proximal Initialization").

    The noise that the model itself sees in an image at t = 0, ε₀ = ε(x₀, 0), replaces random noise; the score is
    −‖ε₀ − ε(√ᾱ_t x₀ + √(1 − ᾱ_t) ε₀, t)‖₄. Higher: more like a member. The norm is over the mean of pixels instead of
    their sum (the order of images is the same), and is averaged over ``timesteps``; the authors try 10, 20, … 300 and
    report the best, which a bound on the leak may do and an honest test may not. One query more than there are
    timesteps; no randomness.

    Args:
        unet: a UNet2DModel.
        alphas_cumprod: ᾱ of the schedule, [T].
        images: what to judge; their labels are given to a class-conditional model.
        timesteps: noise levels to look at; by default those of :func:`attacked_timesteps`.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        batch_size: images at once.
        device: of the model.

    Returns:
        float64 [N].
    """
    alphas = alphas_cumprod.to(device, torch.float32)
    timesteps = attacked_timesteps(len(alphas)) if timesteps is None else timesteps
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
            difference = own - noise_at(signal * clean + sigma * own, timestep)
            errors += difference.double().pow(4).mean((1, 2, 3)).pow(0.25)
        scores.append((-errors / len(timesteps)).cpu().numpy())
    return np.concatenate(scores)


def labelled_as(others: ImageStore, members: ImageStore) -> ImageStore:
    """``others`` with the classes numbered as among ``members``, for a class-conditional model.

    Raises:
        InputError: others have no labels, or classes that members do not have.
    """
    if others.labels is None or members.labels is None:
        raise InputError(f"the run is class-conditional, but the images of {others.source} have no classes")
    if others.class_names is None or members.class_names is None:
        names = [str(number) for number in np.setdiff1d(others.labels, members.labels).tolist()]
        numbers = others.labels
    else:
        names = sorted(set(others.class_names) - set(members.class_names))
        places = {name: place for place, name in enumerate(members.class_names)}
        numbers = np.array([places.get(name, -1) for name in others.class_names], dtype=np.int64)[others.labels]
    if names:
        raise InputError(f"{others.source} has classes that the run was not trained on, such as {names[0]!r}")
    return replace(others, labels=numbers)


def as_noise(output: Tensor, noisy: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """The predicted noise, whatever the model predicts (Salimans & Ho 2022, §2.4 for the velocity)."""
    if prediction_type == "epsilon":
        return output
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    return (noisy - signal * output) / sigma if prediction_type == "sample" else signal * output + sigma * noisy
