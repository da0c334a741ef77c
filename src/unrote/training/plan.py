"""The plan of a run: what it will do and need, checked before the long work begins."""

import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.method.shards import split_shards
from unrote.models.sizing import size_of
from unrote.training.loop import make_budget
from unrote.training.reference import reference_of

logger = logging.getLogger("unrote")


@dataclass(frozen=True)
class Plan:
    """What a run will do and need. Sizes are in bytes."""

    images: int
    quarantined: int
    shape: tuple[int, ...]
    parameters: int
    shard_sizes: tuple[int, ...]
    rounds: int
    samples_seen: int
    steps: int
    state_bytes: int
    """Weights, gradients, optimizer moments and EMA of the live proxy."""
    frozen_bytes: int
    """Weights that are read and not trained."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, for one part of a batch."""
    disk_bytes: int
    """Checkpoints, waiting proxies and the finished model."""
    cache_bytes: int
    """Latents and text embeddings, in the cache folder."""
    free_disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        smallest, largest = min(self.shard_sizes), max(self.shard_sizes)
        size = str(smallest) if smallest == largest else f"{smallest} to {largest}"
        height, width, channels = self.shape
        frozen = f"{_size(self.frozen_bytes)} weights that are only read + " if self.frozen_bytes else ""
        cached = f"; {_size(self.cache_bytes)} of latents and texts in the cache" if self.cache_bytes else ""
        return "\n".join(
            [
                f"data         {self.images:,} images of {height}x{width}, {channels} channels; "
                f"{self.quarantined} quarantined",
                f"model        {self.parameters / 1e6:.2f} M parameters are trained",
                f"shards       {len(self.shard_sizes)} of {size} images; {self.rounds} rounds",
                f"budget       {self.samples_seen:,} samples seen in {self.steps:,} optimizer steps",
                f"memory       {_size(self.state_bytes)} state + {frozen}{_size(self.activation_bytes)} activations "
                "(estimate)",
                f"disk         {_size(self.disk_bytes)} needed at most, {_size(self.free_disk_bytes)} free{cached}",
            ]
        )


def make_plan(config: Config, images: ImageStore, out: Path, *, only_plan: bool = False) -> Plan:
    """Validate a run without starting it.

    Args:
        config: of the run.
        images: the training set.
        out: the run folder.
        only_plan: the run may take place on another machine: too small a disk here is a warning.

    Raises:
        InputError: if data and configuration do not fit together, or the disk is too small.
    """
    labels = _labels(config, images)
    try:
        shards = split_shards(
            len(images),
            config.num_shards,
            config.ensemble.split,
            seed=config.seed,
            labels=labels,
            left_out=reference_of(config, images),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    sizes = tuple(len(shard) for shard in shards)
    budget = make_budget(config, len(images), sizes)
    size, training = size_of(config, images), config.training
    weights = 4 * size.trained
    kept = weights * (3 + training.use_ema)
    waiting = kept * (config.num_shards + 2) if config.num_shards > 1 else 0
    plan = Plan(
        images=len(images),
        quarantined=len(images.quarantined),
        shape=tuple(images.images.shape[1:]),
        parameters=size.trained,
        shard_sizes=sizes,
        rounds=budget.num_rounds,
        samples_seen=budget.total,
        steps=sum(math.ceil(budget.target(k, budget.num_rounds, 1.0) / training.batch_size) for k in range(len(sizes))),
        state_bytes=kept + weights,
        frozen_bytes=size.frozen_bytes,
        activation_bytes=size.activation_bytes,
        disk_bytes=(kept + waiting) * (training.checkpoints_total_limit + 1) + size.model_bytes,
        cache_bytes=size.cache_bytes,
        free_disk_bytes=shutil.disk_usage(_existing_parent(out)).free,
    )
    if plan.disk_bytes > plan.free_disk_bytes:
        problem = (
            f"--out {out}: the run needs up to {_size(plan.disk_bytes)} and the disk has {_size(plan.free_disk_bytes)} "
            "free. Free some space, choose another disk, or lower training.checkpoints_total_limit"
        )
        if not only_plan:
            raise InputError(problem)
        logger.warning(problem)
    return plan


def _labels(config: Config, images: ImageStore) -> Tensor | None:
    if images.labels is None:
        if config.model.class_conditional:
            raise InputError(
                f"model.class_conditional: {images.source} has no labels; put the images into one subfolder per class"
            )
        return None
    return torch.from_numpy(images.labels.copy())


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    return f"{count / (1 << 20):,.0f} MiB" if count < 10 << 30 else f"{count / (1 << 30):,.1f} GiB"
