"""Shards: how the training set is split (IET) and redistributed (MSR). The shards always are a partition of it."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unrote.seeding import generator

Split = Literal["iid", "stratified", "contiguous"]
Topology = Literal["ring", "shuffled-ring"]


def split_shards(
    num_samples: int,
    num_shards: int,
    split: Split = "iid",
    *,
    seed: int = 0,
    labels: Tensor | None = None,
    left_out: Tensor | None = None,
) -> list[Tensor]:
    """Split samples 0..N-1 into K shards whose sizes differ by at most one (IET, arXiv 2407.15328 §3.1).

    Args:
        num_samples: N.
        num_shards: K, 1..N.
        split: ``iid`` shuffles, ``stratified`` also balances the labels, ``contiguous`` keeps the order.
        seed: of the shuffle.
        labels: int64 [N], needed by ``stratified``.
        left_out: int64 [M], samples that come into no shard.

    Returns:
        K sorted int64 tensors of positions in the data set.

    Raises:
        ValueError: if fewer samples than shards are not left out, or ``stratified`` has no labels.
    """
    if not 1 <= num_shards <= num_samples:
        raise ValueError(f"num_shards must be between 1 and the number of samples, {num_samples}, not {num_shards}")
    if left_out is not None and len(left_out):
        mask = torch.ones(num_samples, dtype=torch.bool).index_fill_(0, left_out, False)
        kept = mask.nonzero().flatten()
        parts = split_shards(len(kept), num_shards, split, seed=seed, labels=None if labels is None else labels[kept])
        return [kept[part] for part in parts]
    if split == "stratified" and labels is None:
        raise ValueError('split "stratified" needs a label for every sample; use "iid" for data without labels')
    if split == "contiguous":
        return list(torch.arange(num_samples).tensor_split(num_shards))
    order = torch.randperm(num_samples, generator=generator(seed, "split"))
    if split == "stratified":
        assert labels is not None
        # Dealing out the samples class after class, one to each shard in turn, balances classes and sizes at once.
        order = order[torch.sort(labels[order], stable=True).indices]
        return [order[shard::num_shards].sort().values for shard in range(num_shards)]
    return [shard.sort().values for shard in order.tensor_split(num_shards)]


def redistribute(
    shards: Sequence[Tensor],
    skips: Tensor,
    *,
    fraction: float,
    topology: Topology = "ring",
    seed: int = 0,
    turn: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Move each shard's most-skipped samples to the next shard of a ring (MSR, arXiv 2502.09434).

    All shards give at once and give equally many, so sizes do not change and no sample is forwarded twice. That number
    is the largest that every shard can give: at most ``fraction`` of its samples, and none that was never skipped.

    Args:
        shards: K int64 tensors, a partition of 0..N-1.
        skips: int64 [N], skips of each sample since it came to its shard.
        fraction: ρ in [0, 1].
        topology: ``ring`` gives from shard k to k+1; ``shuffled-ring`` draws the ring anew each turn.
        seed: of the ring and of the order among equally skipped samples.
        turn: which redistribution of the run this is.

    Returns:
        The new shards, sorted, and the samples that moved, int64 [M].
    """
    num_shards = len(shards)
    if num_shards == 1:
        return list(shards), torch.empty(0, dtype=torch.int64)
    draw = generator(seed, "redistribute", turn)
    ring = torch.randperm(num_shards, generator=draw) if topology == "shuffled-ring" else torch.arange(num_shards)
    tie_break = torch.rand(len(skips), generator=draw, dtype=torch.float64)
    # Skips are whole numbers and the tie break is below 1, so their sum orders by skips first.
    priority = skips.cpu().double() + tie_break
    give = min(min(int(fraction * len(shard)), int((skips.cpu()[shard] > 0).sum())) for shard in shards)
    ranked = [shard[priority[shard].argsort(descending=True)] for shard in shards]
    new = list(shards)
    for giver, taker in zip(ring.tolist(), ring.roll(-1).tolist(), strict=True):
        new[taker] = torch.cat([ranked[taker][give:], ranked[giver][:give]]).sort().values
    return new, torch.cat([shard[:give] for shard in ranked]).sort().values


class SampleStream:
    """The endless order in which a proxy visits its shard: a fresh permutation each epoch, a function of the position.

    Args:
        seed: of the run.
        proxy: which proxy visits.
    """

    def __init__(self, seed: int, proxy: int) -> None:
        self._seed = seed
        self._proxy = proxy
        self._cached: tuple[int, int, Tensor] = (-1, -1, torch.empty(0))

    def take(self, shard: Tensor, position: int, count: int) -> Tensor:
        """The ``count`` samples from ``position`` (samples this proxy has seen so far) on, int64 [count]."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, len(shard))
            part = shard[self._permutation(epoch, len(shard))[offset : offset + count]]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int, size: int) -> Tensor:
        if self._cached[:2] != (epoch, size):
            order = torch.randperm(size, generator=generator(self._seed, "epoch", self._proxy, epoch))
            self._cached = (epoch, size, order)
        return self._cached[2]
