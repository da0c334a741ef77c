"""What is compared: every way of fine-tuning, with the same images, optimizer and number of samples seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrote.data import ImageStore
from unrote.models.encoding import LatentEncoder
from unrote.models.pixels import as_floats
from unrote.text.mitigations import prediction_norm

NORM_QUANTILE = 0.9
"""The prediction-norm skip leaves out what the text steers more than this share of training images at first."""


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    epochs: float = 36
    batch_size: int = 32
    learning_rate: float = 5e-4
    snapshots: int = 4
    num_shards: int = 4
    local_epochs: float = 5
    prompts: int = 256
    """Images made from training captions, and as many from held-out ones, per snapshot."""
    looked_at: int = 128
    """How many of the first of these SSCD looks at, once trained: it takes as long as all else of a point."""
    sampler: str = "dpm-solver++"
    steps: int = 8
    guidance_scale: float = 1.5
    seeds: int = 3


SCALES = {
    "full": Scale(),
    "toy": Scale(epochs=1, batch_size=8, snapshots=1, num_shards=2, local_epochs=0.5, prompts=12, steps=2, seeds=1),
}
"""``full`` is meant for two cores (budget: see ``run.py``)."""

_CAPTIONS = {"text.caption": "random"}
_TOKENS = {"text.replace_tokens": 0.2}
_LORA = {"model.train": "lora", "model.lora.rank": 8, "training.learning_rate": 3e-3}

METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "fine-tuning": ("standard", {}),
    "LoRA": ("standard", _LORA),
    "flips": ("standard", {"data.random_flip": True}),
    "several captions": ("standard", _CAPTIONS),
    "random caption": ("standard", {"text.replace_caption": 0.4}),
    "random tokens": ("standard", _TOKENS),
    "added tokens": ("standard", {"text.add_tokens": 2}),
    "word repeat": ("standard", {"text.repeat_words": 0.4}),
    "embedding noise": ("standard", {"text.embedding_noise": 0.1}),
    "prediction norm": ("standard", {"text.max_prediction_norm": "calibrated"}),
    "AGC": ("agc", {}),
    "IET-AGC": ("iet-agc", {}),
    "IET-AGC+": ("iet-agc+", {}),
    "IET-AGC+ & captions": ("iet-agc+", _CAPTIONS),
    "IET-AGC+ & tokens": ("iet-agc+", _TOKENS),
    "LoRA & IET-AGC+": ("iet-agc+", _LORA),
    "gap": ("gap", {}),
}
"""Name → method of ``unrote train`` and its own settings.

All were chosen before any result of this base, but for LoRA's learning rate: of two, by the distance on seed 0.
"""


def slug(name: str) -> str:
    """A method's name as a folder's."""
    return name.lower().replace("+", "-plus").replace(" & ", "-and-").replace(" ", "-")


def settings_of(name: str, scale: Scale, pretrained: str, side: int, seed: int, norm: float) -> dict[str, Any]:
    """What ``unrote train`` is told for the method ``name``; ``norm`` is the calibrated prediction norm."""
    method, own = METHODS[name]
    ensemble = {"ensemble.num_shards": scale.num_shards, "ensemble.local_epochs": scale.local_epochs}
    common = {
        "seed": seed,
        "model.pretrained": pretrained,
        "data.resolution": side,
        "training.epochs": scale.epochs,
        "training.batch_size": scale.batch_size,
        "training.learning_rate": scale.learning_rate,
        "training.lr_warmup_steps": 20,
        "training.ema_decay": 0.995,
        "training.gradient_checkpointing": False,
        "training.mixed_precision": "no",  # so small a model is no faster in bf16
        "training.checkpointing_steps": 100_000,
        "training.snapshots": scale.snapshots,
    }
    common |= ensemble if method.startswith("iet") else {}
    return common | {key: norm if value == "calibrated" else value for key, value in own.items()}


@dataclass(frozen=True)
class Start:
    """What the pretrained model makes of the images that it is to be fine-tuned on, as fine-tuning shows them."""

    loss: float
    """Mean squared error of its velocity, at random timesteps."""
    loss_of_zero: float
    """Of a model that always answers zero. A pretrained one that is no better has never seen the like of this."""
    norm: float
    """What the captions steer a tenth of the images by more than: the threshold of the prediction-norm skip."""


@torch.no_grad()
def start_of(pipeline: Any, images: ImageStore, quantile: float = NORM_QUANTILE, seed: int = 0) -> Start:
    """Measured on ``images``; Wen et al. 2024 leave the choice of the norm's threshold to the model at hand."""
    device, draw = torch.device("cpu"), torch.Generator().manual_seed(seed)
    encoder, captions = LatentEncoder(pipeline.vae, device), [texts[0] for texts in images.every_caption()]
    found: list[Tensor] = []
    for start in range(0, len(images), 64):
        rows = slice(start, start + 64)
        clean = encoder.drawn(encoder.moments(as_floats(images.images[rows], device)), draw)
        timesteps, noise = torch.randint(1000, (len(clean),), generator=draw), torch.randn(clean.shape, generator=draw)
        noisy, target = (
            f(clean, noise, timesteps) for f in (pipeline.scheduler.add_noise, pipeline.scheduler.get_velocity)
        )
        told, untold = (
            pipeline.unet(noisy, timesteps, pipeline.encode_prompt(texts, device, 1, False)[0]).sample
            for texts in (captions[rows], [""] * len(clean))
        )
        losses = [values.square().flatten(1).mean(1) for values in (told - target, target)]
        found.append(torch.stack([*losses, prediction_norm(told, untold)]))
    loss, of_zero, norms = torch.cat(found, 1)
    return Start(loss.mean().item(), of_zero.mean().item(), float(np.quantile(norms.numpy(), quantile)))
