"""What would go wrong in a run that could begin, or go worse than it need, with the way out."""

import math
from collections.abc import Iterator

from unrote.config import Config
from unrote.training.budget import Budget
from unrote.training.placement import Placement, Rank


def pitfalls(config: Config, budget: Budget, placement: Placement) -> Iterator[str]:
    """One sentence for each, which names the setting."""
    if config.num_shards > 1:
        yield from _of_shards(config, budget)
    yield from _of_processes(config, placement)
    steps = math.ceil(budget.target(0, budget.num_rounds, 1.0) / config.training.batch_size)
    warmup = config.training.lr_warmup_steps
    if warmup >= steps:
        yield (
            f"training.lr_warmup_steps: {warmup} steps of warm-up, and a proxy takes {steps} in all: the learning rate "
            "never reaches its peak; lower it, or train for more epochs"
        )
    taa, epochs = config.augmentation, config.training.epochs
    if config.model.pretrained is not None and taa.enabled and taa.cache_budget and epochs < taa.cached_views:
        yield (
            f"augmentation.cached_views: {taa.cached_views} views of each image would be encoded, and an image is "
            f"visited {epochs:g} times; use at most {max(1, math.floor(epochs))}, or augmentation.cache_budget=0"
        )
    ticks = max(rank.steps for rank in placement.ranks)
    if config.training.checkpointing_steps > ticks:
        yield (
            f"training.checkpointing_steps: {config.training.checkpointing_steps} is more than the {ticks} steps that "
            "any process takes: after a crash the run begins anew; lower it"
        )


def _of_shards(config: Config, budget: Budget) -> Iterator[str]:
    batch, smallest, local = config.training.batch_size, min(budget.sizes), config.ensemble.local_epochs
    if batch > smallest:
        yield (
            f"training.batch_size: a batch of {batch} holds images of a shard of {smallest} more than once; "
            f"use at most {smallest}, or fewer shards"
        )
    parts = 2 if config.redistribution.enabled else 1
    turn = local * smallest / parts
    if turn < batch:
        what = "half-round" if parts == 2 else "round"
        yield (
            f"ensemble.local_epochs: a {what} is {turn:g} images of a proxy, less than a batch of {batch}: in some of "
            f"them a proxy takes no step; use at least {math.ceil(parts * batch / smallest)}, or smaller batches"
        )
    if config.redistribution.enabled and local % 2:
        even = 2 * math.ceil(local / 2)
        yield (
            f"ensemble.local_epochs: {local:g}, so images move (MSR) in the middle of an epoch, and in that epoch some "
            f"are seen twice and some not; use an even number, such as {even}"
        )
    if budget.num_rounds == 1:
        yield (
            f"training.epochs: {config.training.epochs:g} epochs are one round of {local:g}, so proxies are averaged "
            "only once, at the end; train for more epochs or lower ensemble.local_epochs"
        )


def _of_processes(config: Config, placement: Placement) -> Iterator[str]:
    world, count = len(placement.ranks), config.num_shards
    members, batch = max(rank.members for rank in placement.ranks), config.training.batch_size
    if members > batch:
        yield (
            f"--processes {world}: {members} of them share batches of {batch}, so some have nothing to do; use at most "
            f"{count * batch}"
        )
    elif placement.idle > 0.1:
        fitting = max(other for other in range(1, world + 1) if count % other == 0 or other % count == 0)
        yield (
            f"--processes {world}: {count} proxies do not divide evenly, and {placement.idle:.0%} of the processes' "
            f"time is waiting for others; {fitting} would not wait"
        )


def memory_pitfall(config: Config, rank: Rank, memory: int) -> str | None:
    """What to do if training needs more device memory than there is.

    Args:
        config: of the run.
        rank: the process that needs most.
        memory: bytes that there are.
    """
    need, state, activations = rank.device_bytes, rank.state_bytes, rank.activation_bytes
    if need <= memory:
        return None
    training, fixed = config.training, need - activations
    ways = []
    now = training.gradient_accumulation_steps
    if fixed < memory and (parts := math.ceil(now * activations / (memory - fixed))) <= training.batch_size:
        ways.append(f"training.gradient_accumulation_steps={parts}")
    if training.mixed_precision == "no":
        ways.append("training.mixed_precision=bf16")
    if not training.gradient_checkpointing:
        ways.append("training.gradient_checkpointing=true")
    if fixed >= memory:
        ways = ["model.train=lora"] if config.model.pretrained and config.model.train == "full" else ["a smaller model"]
        ways += ["training.use_ema=false"] if training.use_ema and need - state // 5 <= memory else []
        ways += [] if training.fsdp else ["training.fsdp=true and more processes than proxies"]
    gib = 1 << 30
    return (
        f"--device-memory {memory / gib:.3g}: training needs about {need / gib:.2f} GiB ({fixed / gib:.2f} whatever "
        f"the batch, {activations / gib:.2f} activations); use {' or '.join(ways) or 'a larger device'}"
    )
