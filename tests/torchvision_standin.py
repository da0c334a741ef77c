"""What ``denoising-diffusion-pytorch`` asks of torchvision, which does not go with a torch for CPUs, by Pillow."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageOps


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, image):
        for step in self.steps:
            image = step(image)
        return image


def resize(size):
    return lambda image: image.resize(tuple(reversed(size)), Image.Resampling.BILINEAR)


def center_crop(size):
    return lambda image: ImageOps.fit(image, tuple(reversed(size)))


def random_flip():
    return lambda image: ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


def to_tensor():
    return lambda image: torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside the block, whoever imports torchvision gets this."""
    module, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    transforms.Compose, transforms.Lambda = Compose, lambda function: function
    transforms.Resize, transforms.CenterCrop = resize, center_crop
    transforms.RandomHorizontalFlip, transforms.ToTensor = random_flip, to_tensor
    module.transforms, module.utils = transforms, ModuleType("torchvision.utils")
    sys.modules["torchvision"] = module
    try:
        yield
    finally:
        del sys.modules["torchvision"]
