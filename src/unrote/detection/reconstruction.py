"""Reconstruction from partial noise: what a model makes of an image that was noised and not lost.

At noise level t an image is still partly there. A model that has learned it by rote brings it back from more noise than
it brings back an image of the same kind that it has never seen. The difference to such controls is what counts: at low
noise every model brings everything back.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unrote.auditing.quality import subsample
from unrote.data.store import ImageStore, in_memory_store
from unrote.detection.membership import labelled_as
from unrote.errors import InputError
from unrote.guards.index import PixelIndex, is_copy
from unrote.models.pixels import as_floats
from unrote.sampling import denoised, to_uint8
from unrote.scanning.duplicates import shared_clusters
from unrote.seeding import generator

LEVELS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Noise levels, as shares of T, from which images are denoised."""
NOISES = 4
"""Noises per image and level."""


def reconstructions(
    unet: Any,
    scheduler: Any,
    train: ImageStore,
    targets: Sequence[int],
    holdout: ImageStore | None,
    *,
    threshold: float,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Noise images to each level and denoise them; count how often the image itself comes back.

    It comes back when it is the nearest of all training images and controls, at a ratio below ``threshold``.

    Args:
        unet: a UNet2DModel in evaluation mode.
        scheduler: DDIM on the model's noise schedule, set to its steps.
        train: the training images.
        targets: positions among them.
        holdout: images that were not trained on, for as many controls as there are targets; None for none. Those that
            are duplicates of training images are left out.
        threshold: of the neighbour ratio.
        seed: of the noises and of the choice of controls.
        batch_size: images denoised at once.

    Returns:
        For each target, and for each control: ``name``, ``levels`` (``t``, ``found`` of ``of``, from the highest t
        down) and ``highest``, the greatest t from which half or more come back, None if there is none.

    Raises:
        InputError: the held-out images have another size.
    """
    controls = _controls(train, holdout, len(targets), seed)
    everything = _joined(train, controls, labelled=unet.config.num_class_embeds is not None)
    index = PixelIndex(everything, threshold=threshold)
    wanted = [*targets, *range(len(train), len(everything))]
    rows: list[dict[str, Any]] = [
        {"name": str(everything.names[place]), "levels": [], "highest": None} for place in wanted
    ]
    for start in _starts(scheduler):
        came_back = _came_back(unet, scheduler, everything, wanted, start, index, seed, batch_size)
        for row, count in zip(rows, came_back, strict=True):
            t = int(scheduler.timesteps[start])
            row["levels"].append({"t": t, "found": count, "of": NOISES})
            if row["highest"] is None and 2 * count >= NOISES:
                row["highest"] = t
    return rows[: len(targets)], rows[len(targets) :]


def _starts(scheduler: Any) -> list[int]:
    """Positions in the sampler's timesteps, from high noise to low."""
    total, timesteps = scheduler.config.num_train_timesteps, scheduler.timesteps
    return sorted({int((timesteps + 1 - level * total).abs().argmin()) for level in LEVELS})


def _controls(train: ImageStore, holdout: ImageStore | None, num: int, seed: int) -> ImageStore | None:
    if holdout is None:
        return None
    if holdout.images.shape[1:] != train.images.shape[1:]:
        raise InputError(f"{holdout.source}: held-out images must have the size and channels of the training images")
    fresh = np.flatnonzero(~shared_clusters(train, holdout)[2])
    return holdout.subset(fresh[subsample(len(fresh), num, seed, "retest-controls")])


def _joined(train: ImageStore, controls: ImageStore | None, *, labelled: bool) -> ImageStore:
    """Training images and controls, with labels if they are needed."""
    if controls is None:
        return train
    pixels = np.concatenate([np.asarray(train.images[:]), np.asarray(controls.images[:])])
    names = [*train.names, *(f"held-out: {name}" for name in controls.names)]
    labels = None
    if labelled:
        theirs = labelled_as(controls, train).labels
        assert train.labels is not None and theirs is not None
        labels = np.concatenate([train.labels, theirs])
    return in_memory_store(pixels, source=train.source, names=names, labels=labels)


@torch.inference_mode()
def _came_back(
    unet: Any,
    scheduler: Any,
    images: ImageStore,
    wanted: Sequence[int],
    start: int,
    index: PixelIndex,
    seed: int,
    batch_size: int,
) -> list[int]:
    """Of each image, how many of its noised selves at ``start`` come back."""
    places = np.repeat(np.array(wanted), NOISES)
    hits = np.zeros(len(places), dtype=bool)
    clusters = index.references.clusters
    time = int(scheduler.timesteps[start])
    for first in range(0, len(places), batch_size):
        part = slice(first, first + batch_size)
        clean = as_floats(np.asarray(images.images[places[part]]), unet.device)
        draws = [generator(seed, "reconstruct", time, row) for row in range(first, first + len(clean))]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]).to(unet.device)
        alpha = scheduler.alphas_cumprod[time]
        labels = None
        if unet.config.num_class_embeds and images.labels is not None:
            labels = torch.from_numpy(images.labels[places[part]]).to(unet.device)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        made = to_uint8(denoised(unet, scheduler, scheduler.timesteps[start:], noisy, labels))
        values, nearest = index(made)
        hits[part] = is_copy(index, values) & (clusters[nearest] == clusters[places[part]])
    counts: list[int] = hits.reshape(-1, NOISES).sum(1).tolist()
    return counts
