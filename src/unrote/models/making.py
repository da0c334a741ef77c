"""Which task a configuration asks for."""

import torch

from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.models.pixels import Pixels
from unrote.models.task import Task


def make_task(config: Config, images: ImageStore, device: torch.device) -> Task:
    """The model that ``config`` trains on ``images``; fresh weights come from torch's global generator."""
    if config.model.pretrained is not None:
        from unrote.models.text_to_image import TextToImage  # imports transformers

        return TextToImage(config, images, device)
    return Pixels(config, images, device)
