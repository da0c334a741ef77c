"""An unconditional or class-conditional denoiser of pixels, trained from fresh weights."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline
from torch import Tensor

from unrote.config import Config
from unrote.data.augmentations import LABELS, augment, mirror
from unrote.data.store import ImageStore
from unrote.models.augmentation_labels import tell_of_augmentation, without_augmentation
from unrote.models.denoiser import (
    DenoisingLoss,
    PerSampleLoss,
    autocast_dtype,
    build_schedule,
    build_unet,
    memory_format,
)
from unrote.models.task import RAW_VARIANT, Condition
from unrote.tensorfiles import weighted_average


class Pixels:
    """A UNet2DModel on pixels in [-1, 1]; see :class:`unrote.models.task.Task`. Weights come from torch's generator.

    Args:
        config: of the run.
        images: the training set.
        device: where to compute.
    """

    def __init__(self, config: Config, images: ImageStore, device: torch.device) -> None:
        self._config, self._images, self._device = config, images, device
        self._memory_format = memory_format(config.training)
        _, height, _, channels = images.images.shape
        num_classes = len(images.class_names or ()) if config.model.class_conditional else None
        self.denoiser = build_unet(config.model, resolution=height, channels=channels, num_classes=num_classes)
        self._told = config.augmentation.enabled and config.augmentation.labels
        if self._told:
            tell_of_augmentation(self.denoiser, len(LABELS))
        # A model that is held in parts may be too large for the device.
        self.denoiser.to("cpu" if config.training.fsdp else device, memory_format=self._memory_format)
        self.trained = self.denoiser
        self.loss: PerSampleLoss = DenoisingLoss(build_schedule(config.model), device, autocast_dtype(config.training))
        self.base: Mapping[str, str] = {}
        self._labels: Tensor | None = None
        if config.model.class_conditional:
            assert images.labels is not None
            self._labels = torch.from_numpy(images.labels.copy())

    def clean(self, indices: Tensor, mirrored: Tensor | None, draw: torch.Generator) -> Tensor:
        """Pixels in [-1, 1]."""
        clean = as_floats(self._images.images[indices.numpy()], self._device, self._memory_format)
        return clean if mirrored is None else mirror(clean, mirrored)

    def augmented(
        self,
        clean: Tensor,
        condition: Condition,
        indices: Tensor,
        mirrored: Tensor | None,
        visits: Tensor,
        strength: Tensor,
        draw: torch.Generator,
    ) -> tuple[Tensor, Condition]:
        """Augmented pixels."""
        view, labels = augment(clean, strength, draw, **self._config.augmentation.ops.model_dump())
        # Picking pixels changes how they lie in memory, and convolutions are slower in another layout than the weights.
        view = view.contiguous(memory_format=self._memory_format)
        if self._told:
            condition = {"class_labels": {**condition["class_labels"], "augmentation": labels}}
        return view, condition

    def condition(self, indices: Tensor, proxy: int, step: int) -> Condition:
        """The labels, for a class-conditional model; and no augmentation, for a model that is told of it."""
        classes = None if self._labels is None else self._labels[indices].to(self._device, non_blocking=True)
        if self._told:
            told = {"augmentation": torch.zeros(len(indices), len(LABELS), device=self._device)}
            return {"class_labels": told if classes is None else told | {"classes": classes}}
        return {} if classes is None else {"class_labels": classes}

    def unsteered(self, condition: Condition) -> Condition:
        """The same: there is no text."""
        return condition

    average = staticmethod(weighted_average)

    def sampled_as(self) -> AbstractContextManager[None]:
        """The context to sample in: without what a model is told of augmentation."""
        return without_augmentation(self.denoiser)

    def save(self, folder: Path) -> None:
        """Write a DDPMPipeline."""
        with without_augmentation(self.denoiser):
            DDPMPipeline(self.denoiser, build_schedule(self._config.model)).save_pretrained(folder)

    def save_raw(self, folder: Path) -> None:
        """Write the UNet's weights as a variant."""
        with without_augmentation(self.denoiser):
            self.denoiser.save_pretrained(folder / "unet", variant=RAW_VARIANT)


def as_floats(rows: np.ndarray, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Images uint8 [B, H, W, C] as float32 [B, C, H, W] in [-1, 1] on ``device``."""
    pixels = torch.from_numpy(rows)
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    moved = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return moved.to(torch.float32, memory_format=layout) / 127.5 - 1
