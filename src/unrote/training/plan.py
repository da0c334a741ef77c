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
from unrote.models.denoiser import autocast_dtype, build_unet
from unrote.training.loop import make_budget

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
    activation_bytes: int
    """What the forward pass keeps for the backward pass, for one part of a batch."""
    disk_bytes: int
    """Checkpoints, waiting proxies and the finished model."""
    free_disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        smallest, largest = min(self.shard_sizes), max(self.shard_sizes)
        size = str(smallest) if smallest == largest else f"{smallest} to {largest}"
        height, width, channels = self.shape
        return "\n".join(
            [
                f"data         {self.images:,} images of {height}x{width}, {channels} channels; "
                f"{self.quarantined} quarantined",
                f"model        {self.parameters / 1e6:.2f} M parameters",
                f"shards       {len(self.shard_sizes)} of {size} images; {self.rounds} rounds",
                f"budget       {self.samples_seen:,} samples seen in {self.steps:,} optimizer steps",
                f"memory       {_size(self.state_bytes)} state + {_size(self.activation_bytes)} activations (estimate)",
                f"disk         {_size(self.disk_bytes)} needed at most, {_size(self.free_disk_bytes)} free",
            ]
        )


def make_plan(config: Config, images: ImageStore, out: Path) -> Plan:
    """Validate a run without starting it.

    Raises:
        InputError: if data and configuration do not fit together, or the disk is too small.
    """
    labels = _labels(config, images)
    try:
        shards = split_shards(len(images), config.num_shards, config.ensemble.split, seed=config.seed, labels=labels)
        unet = _fake_unet(config, images)
    except ValueError as error:
        raise InputError(str(error)) from None
    sizes = tuple(len(shard) for shard in shards)
    budget = make_budget(config, len(images), sizes)
    weights = 4 * sum(p.numel() for p in unet.parameters())
    training = config.training
    kept = weights * (3 + training.use_ema)
    waiting = kept * (config.num_shards + 2) if config.num_shards > 1 else 0
    plan = Plan(
        images=len(images),
        quarantined=len(images.quarantined),
        shape=tuple(images.images.shape[1:]),
        parameters=weights // 4,
        shard_sizes=sizes,
        rounds=budget.num_rounds,
        samples_seen=budget.total,
        steps=sum(math.ceil(budget.target(k, budget.num_rounds, 1.0) / training.batch_size) for k in range(len(sizes))),
        state_bytes=kept + weights,
        activation_bytes=_activation_bytes(unet, config, images),
        disk_bytes=(kept + waiting) * (training.checkpoints_total_limit + 1) + 2 * weights,
        free_disk_bytes=shutil.disk_usage(_existing_parent(out)).free,
    )
    if plan.disk_bytes > plan.free_disk_bytes:
        raise InputError(
            f"--out {out}: the run needs up to {_size(plan.disk_bytes)} and the disk has {_size(plan.free_disk_bytes)} "
            "free. Free some space, choose another disk, or lower training.checkpoints_total_limit"
        )
    return plan


def _labels(config: Config, images: ImageStore) -> Tensor | None:
    if images.labels is None:
        if config.model.class_conditional:
            raise InputError(
                f"model.class_conditional: {images.source} has no labels; put the images into one subfolder per class"
            )
        return None
    return torch.from_numpy(images.labels.copy())


def _fake_unet(config: Config, images: ImageStore) -> Any:
    """The model without memory behind its weights: enough to count."""
    _, height, width, channels = images.images.shape
    if height != width:
        raise InputError(f"{images.source}: images of {height}x{width} are not square; give --resolution")
    classes = len(images.class_names or ()) if config.model.class_conditional else None
    with torch.device("meta"):
        return build_unet(config.model, resolution=height, channels=channels, num_classes=classes)


def _activation_bytes(unet: Any, config: Config, images: ImageStore) -> int:
    """Bytes that autograd saves of a forward pass, counted on the meta device: no memory, no arithmetic."""
    _, height, width, channels = images.images.shape
    parts = config.training.gradient_accumulation_steps
    batch = math.ceil(min(config.training.batch_size, len(images)) / parts)
    weights = {id(p.untyped_storage()) for p in unet.parameters()}
    saved: dict[int, tuple[Any, int]] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            saved[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        labels = torch.zeros(batch, dtype=torch.int64, device="meta") if config.model.class_conditional else None
        timesteps = torch.zeros(batch, dtype=torch.int64, device="meta")
        unet(torch.zeros(batch, channels, height, width, device="meta"), timesteps, class_labels=labels)
    total = sum(size for _, size in saved.values())
    return total if autocast_dtype(config.training) is None else total // 2


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    return f"{count / (1 << 20):,.0f} MiB" if count < 10 << 30 else f"{count / (1 << 30):,.1f} GiB"
