"""Images that are never trained on, so that it can be seen what a loss is that owes nothing to memorization."""

import numpy as np
import torch
from torch import Tensor

from unrote.config import Config
from unrote.data.store import ImageStore, digests_of
from unrote.errors import InputError
from unrote.seeding import generator


def reference_of(config: Config, images: ImageStore) -> Tensor:
    """A random share ``gate.reference`` of the images, the same for all methods of a seed: sorted int64 [M].

    Empty where the share is 0 or nothing reads the bank. An image that is in the set twice is not taken: its other copy
    would be trained on.

    Raises:
        InputError: too few images are in the set only once, or none would be left to train on.
    """
    share = config.gate.reference if config.gate.enabled or config.augmentation.enabled else 0.0
    if share == 0:
        return torch.empty(0, dtype=torch.int64)
    _, first, copies = np.unique(digests_of(images), axis=0, return_index=True, return_counts=True)
    single = torch.from_numpy(np.sort(first[copies == 1]))
    count = max(1, round(share * len(images)))
    if count > len(single):
        raise InputError(
            f"gate.reference: {share:g} of {len(images):,} images are {count:,}, and only {len(single):,} are there "
            "once; remove duplicates (`unrote scan` lists them), lower it, or choose a method that needs no unseen "
            "images, such as --method agc"
        )
    if count == len(images):
        raise InputError(
            f"gate.reference: {share:g} of {len(images):,} images leaves none to train on; add images, lower it, or "
            "choose a method that needs no unseen images, such as --method agc"
        )
    order = torch.randperm(len(single), generator=generator(config.seed, "reference"))
    return single[order[:count]].sort().values
