"""The plan of a run: what it will do and need, checked before the long work begins."""

import logging
import os
import shutil
from contextlib import suppress
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
from unrote.models.views import ViewCache
from unrote.training.budget import make_budget
from unrote.training.looks import Looks, plan_looks
from unrote.training.modes import Mode, modes_of, operations_of
from unrote.training.pitfalls import memory_pitfall, pitfalls
from unrote.training.placement import Placement, StateSize, place
from unrote.training.probe import Probe
from unrote.training.reference import reference_of
from unrote.training.run import Run

logger = logging.getLogger("unrote")

FOLDERS = ("checkpoints", "proxies", "snapshots", "monitor", "model")
"""Those of a run; samples and reports beside them are not what training needs."""


@dataclass(frozen=True)
class Plan:
    """What a run will do and need. Sizes are in bytes."""

    images: int
    quarantined: int
    reference: int
    """Images that are never trained on, as the gate's reference."""
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
    """Checkpoints, waiting proxies, snapshots, the monitor's best weights and the finished model."""
    cache_bytes: int
    """Latents and text embeddings, in the cache folder."""
    held_disk_bytes: int
    """What the run folder has of that already."""
    free_disk_bytes: int
    checkpoint_bytes: int
    """One checkpoint: every proxy, the average, and those in the middle of their turns."""
    placement: Placement
    """Which process trains which proxies, its memory, and what they exchange."""
    warnings: tuple[str, ...]
    """What would go wrong, or worse than it need."""
    flops: int = 0
    """Floating point operations of the denoiser in the whole run, at most."""
    modes: tuple[Mode, ...] = ()
    """What fine-tuning takes in other modes; empty where only one was looked at."""
    views: ViewCache | None = None
    """Whether augmented views of a pretrained model's images are encoded once, and why; None where there are none."""
    looks: Looks | None = None
    """When the monitor looks at samples; None where it does not."""
    probe: Probe | None = None
    """What was measured in some steps, if asked for."""

    @property
    def seconds(self) -> float | None:
        """Estimated time of the run, without what passes the network; None without a probe."""
        if self.probe is None:
            return None
        parts = self.rounds * self.placement.phases
        longest = max(
            rank.steps * self.probe.step_seconds / rank.members + rank.proxies * parts * self.probe.switch_seconds
            for rank in self.placement.ranks
        )
        averaging = self.rounds * len(self.shard_sizes) * self.probe.average_seconds
        return longest + (averaging if len(self.shard_sizes) > 1 else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"seconds": self.seconds}

    def __str__(self) -> str:
        smallest, largest = min(self.shard_sizes), max(self.shard_sizes)
        size = str(smallest) if smallest == largest else f"{smallest} to {largest}"
        height, width, channels = self.shape
        frozen = f"{_size(self.frozen_bytes)} weights that are only read + " if self.frozen_bytes else ""
        cached = f"; {_size(self.cache_bytes)} of latents and texts in the cache" if self.cache_bytes else ""
        held = f" ({_size(self.held_disk_bytes)} are there already)" if self.held_disk_bytes else ""
        disk = f"{_size(self.disk_bytes)} needed at most{held}, {_size(self.free_disk_bytes)} free"
        apart = f" ({self.reference} kept apart as the gate's reference)" if self.reference else ""
        host = max(rank.host_bytes for rank in self.placement.ranks)
        return "\n".join(
            [
                f"data         {self.images:,} images of {height}x{width}, {channels} channels; "
                f"{self.quarantined} quarantined",
                f"model        {self.parameters / 1e6:.2f} M parameters are trained",
                f"shards       {len(self.shard_sizes)} of {size} images{apart}; {self.rounds} rounds",
                f"budget       {self.samples_seen:,} samples seen in {self.steps:,} optimizer steps",
                f"memory       {_size(self.state_bytes)} state + {frozen}{_size(self.activation_bytes)} activations "
                f"(estimate){f'; host {_size(host)} at most' if host else ''}",
                f"disk         {disk}{cached}",
                f"checkpoint   {_size(self.checkpoint_bytes)}",
                *self._modes(),
                *self._computing(),
                *([] if self.views is None else [f"views        {self.views}"]),
                *([] if self.looks is None else [f"monitor      {self.looks}"]),
                *self._processes(),
                *self._time(),
                *(f"warning      {warning}" for warning in self.warnings),
            ]
        )

    def _modes(self) -> list[str]:
        found = {(mode.train, mode.mixed_precision, mode.gradient_checkpointing): mode.bytes for mode in self.modes}
        return [
            f"{'modes' if train == 'full' else '':<13}{train:<5}"
            + "; ".join(
                f"{'float32' if precision == 'no' else precision} {_size(found[train, precision, False])}, "
                f"{_size(found[train, precision, True])} with gradient checkpointing"
                for precision in ("no", "bf16")
            )
            for train in dict.fromkeys(mode.train for mode in self.modes)
        ]

    def _computing(self) -> list[str]:
        if self.flops < 1e14:
            return []
        slow, fast = (duration(self.flops / rate) for rate in (1e13, 1e14))
        return [
            f"computing    {self.flops:.2g} operations of the denoiser at most: {slow} at 10 TFLOP/s sustained, "
            f"{fast} at 100"
        ]

    def _processes(self) -> list[str]:
        placement, count = self.placement, len(self.placement.ranks)
        if count == 1:
            return []
        steps = f"; in each step each rank that shares a proxy sends {_size(placement.step_bytes)}"
        return [
            f"processes    {count}; {placement.to_text()}",
            *self._memory(),
            f"exchange     in each of {self.rounds} rounds {_size(placement.gathered_bytes)} go to rank 0, "
            f"{_size(placement.broadcast_bytes)} to each other; {_size(placement.ledger_bytes)} of ledger"
            f"{steps if placement.step_bytes else ''}",
        ]

    def _memory(self) -> list[str]:
        """Where processes need different memory, that of each, of those that need the same in one."""
        groups: dict[str, list[int]] = {}
        for index, rank in enumerate(self.placement.ranks):
            host = f", host {_size(rank.host_bytes)}" if rank.host_bytes else ""
            groups.setdefault(f"{_size(rank.device_bytes)}{host}", []).append(index)
        if len(groups) == 1:
            return []
        who = [f"rank {group[0]}" + (f" and {len(group) - 1} more" if group[1:] else "") for group in groups.values()]
        return [f"of each      {'; '.join(f'{ranks}: {needs}' for ranks, needs in zip(who, groups, strict=True))}"]

    def _time(self) -> list[str]:
        if self.probe is None or self.seconds is None:
            return []
        return [
            f"time         {duration(self.seconds)} (estimate without network, from {self.probe.steps} steps of "
            f"{self.probe.step_seconds:.4g} s here)"
        ]


def make_plan(
    config: Config,
    images: ImageStore,
    out: Path,
    *,
    only_plan: bool = False,
    processes: int = 1,
    device_memory: int | None = None,
    device: str = "cpu",
) -> Plan:
    """Validate a run without starting it.

    Args:
        config: of the run.
        images: the training set.
        out: the run folder.
        only_plan: the run may take place on another machine: too small a disk here is a warning.
        processes: W, that the proxies are dealt out to; if there are more, they share them.
        device_memory: bytes that each process has where it computes; None does not compare.
        device: kind of device that computes: on ``cpu`` all memory is the host's.

    Raises:
        InputError: if data and configuration do not fit together, or the disk is too small.
    """
    split, labels, reference = config.ensemble.split, _labels(config, images), reference_of(config, images)
    try:
        shards = split_shards(
            len(images), config.num_shards, split, seed=config.seed, labels=labels, left_out=reference
        )
    except ValueError as error:  # it begins with the name of the setting
        raise InputError(f"ensemble.{error}") from None
    sizes = tuple(len(shard) for shard in shards)
    budget = make_budget(config, len(images), sizes)
    size, training = size_of(config, images), config.training
    state, count = StateSize.of(config, size.trained), config.num_shards
    placement = place(config, budget, size, processes, cpu=device == "cpu")
    checkpoint = state.kept * (count + 2 + min(processes, count) if count > 1 else 1)
    # The weights of the best look and their average: what each checkpoint names, and what takes the place of the best.
    best = (training.checkpoints_total_limit + 2) * (state.kept - 2 * state.weights)
    largest = max(placement.ranks, key=lambda rank: rank.device_bytes)
    problems = list(pitfalls(config, budget, placement))
    if device_memory is not None:
        problem = memory_pitfall(config, largest, device_memory)
        problems += [] if problem is None else [problem]
    plan = Plan(
        images=len(images),
        quarantined=len(images.quarantined),
        reference=len(images) - sum(sizes),
        shape=tuple(images.images.shape[1:]),
        parameters=size.trained,
        shard_sizes=sizes,
        rounds=budget.num_rounds,
        samples_seen=budget.total,
        steps=sum(rank.steps for rank in placement.ranks if rank.leads),
        state_bytes=largest.state_bytes,
        frozen_bytes=largest.frozen_bytes,
        activation_bytes=largest.activation_bytes,
        disk_bytes=checkpoint * (training.checkpoints_total_limit + 1)
        + size.model_bytes * (1 + training.snapshots)
        + best * (config.monitor.keep_best == "pareto"),
        cache_bytes=size.cache_bytes,
        held_disk_bytes=_held(out),
        free_disk_bytes=shutil.disk_usage(existing_parent(out)).free,
        checkpoint_bytes=checkpoint,
        placement=placement,
        warnings=tuple(problems),
        flops=operations_of(config, size) * budget.total,
        views=size.views,
        modes=modes_of(config, images, size) if only_plan and config.model.pretrained is not None else (),
        looks=plan_looks(config, budget.local, budget.num_rounds, size.reading),
    )
    missing = plan.disk_bytes - plan.held_disk_bytes
    if missing > plan.free_disk_bytes and not Run(out).finished:
        begun = plan.held_disk_bytes > 0
        problem = (
            f"--out {out}: the run needs up to {_size(missing)}{' more' if begun else ''} and the disk has "
            f"{_size(plan.free_disk_bytes)} free. Free some space"
            + ("" if begun else ", choose another disk, or lower training.checkpoints_total_limit")
        )
        if not only_plan:
            raise InputError(problem)
        logger.warning(problem)
    return plan


def _labels(config: Config, images: ImageStore) -> Tensor | None:
    if images.labels is None:
        if config.model.class_conditional:
            raise InputError(
                f"model.class_conditional: {images.source} has no labels; put the images into subfolders, one per "
                "class, at least two"
            )
        return None
    return torch.from_numpy(images.labels.copy())


def _held(out: Path) -> int:
    """Bytes of the run in its folder; hidden is what killed processes left, which goes when it is gone on with."""
    entries = list(out.iterdir()) if out.is_dir() else []
    files = [entry for entry in entries if entry.is_file()]
    folders = [entry for entry in entries if entry.name in FOLDERS or entry.name.startswith(".")]
    files += [Path(inner, name) for folder in folders for inner, _, names in os.walk(folder) for name in names]
    held = 0
    for file in files:
        with suppress(FileNotFoundError):  # another process of the run may be further, and clear away
            held += file.stat().st_size
    return held


def existing_parent(path: Path) -> Path:
    """The nearest folder that is there, which tells the disk."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(count: int) -> str:
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    return f"{count / (1 << 20):,.0f} MiB" if count < 10 << 30 else f"{count / (1 << 30):,.1f} GiB"


def duration(seconds: float) -> str:
    """In words: whole seconds up to two minutes, whole minutes up to an hour.

    >>> duration(119), duration(120), duration(7260)
    ('119 s', '2 min', '2 h 01 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
