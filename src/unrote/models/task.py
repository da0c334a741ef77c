"""What differs between kinds of models in the one training loop."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unrote.models.denoiser import PerSampleLoss

RAW_VARIANT = "raw"
"""The diffusers variant under which the weights without averaging are saved beside the averaged ones."""

Condition = Mapping[str, Any]
"""What a denoiser is told of each sample besides the noisy image, as its arguments: (mappings of) tensors [B, …]."""


def rows_of(condition: Condition, rows: Tensor | slice) -> Condition:
    """The condition of the samples at ``rows`` of a batch."""
    return {name: v[rows] if isinstance(v, Tensor) else rows_of(v, rows) for name, v in condition.items()}


class Task(Protocol):
    """A model and what a batch of it is made of. The loop, the gate, the ensemble and the checkpoints know no more.

    Attributes:
        denoiser: the whole network, on the device.
        trained: the parameters that are trained, averaged over the proxies and saved: the denoiser, or its adapters.
        loss: the noise process and the loss of each sample.
        base: SHA-256 of each network of the pretrained model, by its name; empty for a new one.
    """

    denoiser: nn.Module
    trained: nn.Module
    loss: PerSampleLoss
    base: Mapping[str, str]

    def clean(self, indices: Tensor, mirrored: Tensor | None, draw: torch.Generator) -> Tensor:
        """The images ``indices`` (int64 [B], on the CPU) without noise, as the denoiser takes them, [B, C, H, W].

        Args:
            indices: positions in the training set.
            mirrored: bool [B] on the device, which are shown mirrored; None for none.
            draw: where randomness comes from, on the device.
        """

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
        """``clean`` with the images of ``strength`` > 0 (float32 [B]) in an augmented view; see :meth:`clean`.

        ``visits`` (int64 [B]) says how often each image was visited before, and so which of the views it is that are
        kept. And ``condition``, to which a model that is told of augmentation gets that added.
        """

    def condition(self, indices: Tensor, proxy: int, step: int) -> Condition:
        """What the denoiser is told of the images ``indices`` (int64 [B], on the CPU) in this step of this proxy."""

    def unsteered(self, condition: Condition) -> Condition:
        """The same with the empty text."""

    def average(self, states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
        """The average of the proxies' tensors by name under ``weights``; of some of them at a time."""

    def sampled_as(self) -> AbstractContextManager[None]:
        """The context in which ``denoiser`` is sampled from, as the model that :meth:`save` writes."""

    def save(self, folder: Path) -> None:
        """Write the model, with the weights that it has now, so that diffusers loads it without this package."""

    def save_raw(self, folder: Path) -> None:
        """Write the weights that it has now beside those of :meth:`save`, named :data:`RAW_VARIANT`."""
