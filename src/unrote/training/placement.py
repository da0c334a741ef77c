"""How a run lies on its processes: who trains which proxies, what that takes in memory, and what they exchange."""

import math
from dataclasses import dataclass

from unrote.config import Config
from unrote.errors import InputError
from unrote.method.assignment import assign
from unrote.method.ledger import Ledger
from unrote.training.budget import Budget


@dataclass(frozen=True)
class StateSize:
    """What one proxy's state takes, in bytes: float32 parameters P, counted once each.

    Attributes:
        weights: 4 P.
        averaged: what is averaged over the proxies: weights, their moving average, and the optimizer's two moments if
            these are averaged too.
        kept: everything that a proxy takes along: weights, moving average and moments.
    """

    weights: int
    averaged: int
    kept: int

    @staticmethod
    def of(config: Config, parameters: int) -> "StateSize":
        """Of a model of so many trained parameters."""
        weights, ema = 4 * parameters, int(config.training.use_ema)
        averaged = weights * (1 + ema + 2 * (config.ensemble.optimizer_state == "average"))
        return StateSize(weights, averaged, weights * (3 + ema))

    def training(self) -> int:
        """While a proxy is live: what it takes along, and gradients."""
        return self.kept + self.weights

    def averaging(self, held: int = 0) -> int:
        """While proxies are averaged, in the memory of the host, beside the live model; counted in ``averaged``.

        2 for sums in float64 and 1 for the proxy that is added, then for the result. Of several processes the first has
        the same; the others have the average before, the one that comes and its copy. ``held``: proxies that are kept
        until all are there, as averaging products of adapters does.
        """
        return self.averaged * (3 + held)


@dataclass(frozen=True)
class Rank:
    """One process. Sizes are in bytes.

    Attributes:
        first: its first proxy.
        proxies: how many it has, in a row.
        samples_per_round: what its proxies see between two averagings.
        steps: optimizer steps in the whole run.
        device_bytes: what training needs where it computes: state, weights that are only read, activations.
        host_bytes: the most that it needs in the memory of the host; of a process that computes on the CPU, of all.
    """

    first: int
    proxies: int
    samples_per_round: int
    steps: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Placement:
    """A run on W processes. Sizes are in bytes.

    Attributes:
        ranks: the processes.
        phases: turns that a proxy has in a round: 2 where samples are redistributed between them.
        gathered_bytes: what the first process receives in a round: every proxy of the others.
        broadcast_bytes: what it sends to each of the others in a round: the average.
        ledger_bytes: of the whole numbers that all add up, once or (MSR) twice a round and for each checkpoint.
        idle: share of the processes' time in a round that is waiting for the one with most to do, in [0, 1).
    """

    ranks: tuple[Rank, ...]
    phases: int
    gathered_bytes: int
    broadcast_bytes: int
    ledger_bytes: int
    idle: float

    def to_text(self) -> str:
        """Who has which proxies, neighbours with equally many in one: ``ranks 0-1: 3 proxies each; rank 2: 2``."""
        groups: list[list[int]] = []
        for index, rank in enumerate(self.ranks):
            if groups and self.ranks[groups[-1][-1]].proxies == rank.proxies:
                groups[-1].append(index)
            else:
                groups.append([index])
        return "; ".join(_group_text(group, self.ranks[group[0]].proxies) for group in groups)


def _group_text(group: list[int], proxies: int) -> str:
    count = f"{proxies} prox{'y' if proxies == 1 else 'ies'}"
    return f"rank {group[0]}: {count}" if len(group) == 1 else f"ranks {group[0]}-{group[-1]}: {count} each"


def place(
    config: Config, budget: Budget, size: StateSize, frozen: int, activations: int, world: int, *, cpu: bool
) -> Placement:
    """Deal a run out to ``world`` processes.

    Args:
        config: of the run.
        budget: its rounds and shards.
        size: of a proxy.
        frozen: bytes of weights that are only read.
        activations: bytes that the forward pass keeps.
        world: W.
        cpu: processes compute on the CPU, so that all memory is the host's.

    Raises:
        InputError: if there are more processes than proxies.
    """
    sizes, count = budget.sizes, len(budget.sizes)
    if not 1 <= world <= count:
        raise InputError(
            f"--processes {world}: there {'are' if count > 1 else 'is'} {count} shard{'s' * (count > 1)}, and a proxy "
            f"trains in one process. Use 1 to {count}, or raise ensemble.num_shards"
        )
    device = size.training() + frozen + activations
    products = config.model.train == "lora" and config.model.lora.average == "product"

    def rank_of(rank: int, block: range) -> Rank:
        seen = sum(budget.target(k, 0, 1.0) for k in block)
        steps = sum(math.ceil(budget.target(k, budget.num_rounds, 1.0) / config.training.batch_size) for k in block)
        averaging = size.averaging(count * products * (rank == 0)) if count > 1 else 0
        # Of the next proxy when it comes, and of the first process's average in the others.
        waiting = (size.kept if count > 1 else 0) + (size.averaged if rank else 0)
        host = max(averaging, waiting)
        if cpu:
            # All is the host's, and freed memory stays with the process (training/heap.py), in pieces too small for
            # what comes: activations, gradients, and the moments that gave way to those of the next proxy.
            host += device + (2 * size.weights if count > 1 else 0)
        return Rank(block.start, len(block), seen, steps, device, host)

    ranks = tuple(rank_of(rank, block) for rank, block in enumerate(assign(sizes, world)))
    longest = max(rank.samples_per_round for rank in ranks)
    total = sum(rank.samples_per_round for rank in ranks)
    several = world > 1
    return Placement(
        ranks,
        phases=2 if config.redistribution.enabled else 1,
        gathered_bytes=size.averaged * (count - ranks[0].proxies),
        broadcast_bytes=size.averaged * several,
        ledger_bytes=8 * (len(Ledger.COUNTS) + len(Ledger.RATIOS)) * sum(sizes) * several,
        idle=1 - total / (world * longest) if longest else 0.0,
    )
