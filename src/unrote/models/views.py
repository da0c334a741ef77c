"""Augmented views of images for a pretrained model: encoded once if a stated budget allows it, or when needed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unrote.config import Config
from unrote.data.augmentations import augment, coin, mirror
from unrote.models.pixels import as_floats
from unrote.seeding import generator

FORMAT = 1
"""Counts up whenever the same images and settings would give other views."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ViewCache:
    """Whether augmented views are encoded once, and why."""

    kept: bool
    bytes: int
    """What the encoded views take, or would take."""
    reason: str

    def __str__(self) -> str:
        return f"{'encoded once' if self.kept else 'encoded at each visit'}: {self.reason}"


def view_cache(config: Config, num_images: int, latent_numbers: int) -> ViewCache | None:
    """How a run on ``num_images`` gets its augmented views; None if it augments none.

    Args:
        config: of the run, which fine-tunes a pretrained model.
        num_images: N.
        latent_numbers: how many numbers the latents of one image have.
    """
    taa = config.augmentation
    if not taa.enabled:
        return None
    need = 8 * latent_numbers * num_images * taa.cached_views
    if taa.policy == "proximity":
        every = "augmentation.policy=proximity needs every strength, and views are kept at full strength"
        return ViewCache(False, need, every)
    if not config.data.cache_latents:
        return ViewCache(False, need, "data.cache_latents=false")
    kept = need <= taa.cache_budget * 2**30
    wanted = f"{taa.cached_views} views of each of {num_images:,} images take {need / 2**30:.3g} GiB"
    relation = "within" if kept else "more than"
    return ViewCache(kept, need, f"{wanted}, {relation} augmentation.cache_budget={taa.cache_budget:g}")


class Views:
    """Views at full strength, float32 [N · V, H, W, C] in [-1, 1], made when they are read.

    View v of image i stands at i · V + v and is a function of (seed, i, v) and the image. Where images are also shown
    mirrored, so is half of the views, before the augmentation.

    Args:
        images: uint8 [N, H, W, C].
        config: of the run.
    """

    def __init__(self, images: Any, config: Config) -> None:
        self.per_image = config.augmentation.cached_views
        self._images, self._seed, self._mirrored = images, config.seed, config.data.random_flip
        self._ops = config.augmentation.ops.model_dump()
        self.shape = (len(images) * self.per_image, *images.shape[1:])

    @property
    def key(self) -> str:
        """What they are, besides the images."""
        return f"{self.per_image} views {FORMAT} {self._seed} {self._mirrored} {sorted(self._ops.items())}"

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.stack([self._view(*divmod(row, self.per_image)) for row in range(len(self))[rows]])

    def _view(self, image: int, number: int) -> np.ndarray:
        draw = generator(self._seed, "view", image, number)
        pixels = as_floats(np.array(self._images[image : image + 1]), CPU)
        pixels = mirror(pixels, coin(1, draw)) if self._mirrored else pixels
        view, _ = augment(pixels, torch.ones(1), draw, **self._ops)
        return view[0].permute(1, 2, 0).numpy()
