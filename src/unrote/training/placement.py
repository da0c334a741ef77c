"""How a run lies on its processes: who trains which proxies, what that takes in memory, and what they exchange."""

import math
from dataclasses import dataclass

from unrote.config import Config
from unrote.method.assignment import assign, teams_of
from unrote.method.ledger import Ledger
from unrote.models.sizing import Size
from unrote.training.budget import Budget
from unrote.training.team import BUCKET

GATHERED = 3
"""How many blocks' weights are whole at once in a model that is held in parts."""


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


@dataclass(frozen=True)
class Rank:
    """One process. Sizes are in bytes.

    Attributes:
        first: its first proxy.
        proxies: how many it has, in a row.
        members: ranks that train them, each a part of every batch; 1 if it is alone.
        leads: whether it is the first of these, which holds the proxies.
        samples_per_round: what its proxies see between two averagings.
        steps: optimizer steps of its proxies in the whole run.
        state_bytes: where it computes, what a live proxy takes with its gradients.
        frozen_bytes: there, weights that are only read.
        activation_bytes: there, what the forward pass keeps.
        host_bytes: the most that it needs in the memory of the host, but for tensors under way between files and model;
            of a process that computes on the CPU, of all.
    """

    first: int
    proxies: int
    members: int
    leads: bool
    samples_per_round: int
    steps: int
    state_bytes: int
    frozen_bytes: int
    activation_bytes: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        """What training needs where it computes."""
        return self.state_bytes + self.frozen_bytes + self.activation_bytes


@dataclass(frozen=True)
class Placement:
    """A run on W processes. Sizes are in bytes.

    Attributes:
        ranks: the processes.
        phases: turns that a proxy has in a round: 2 where samples are redistributed between them.
        gathered_bytes: what the first process receives in a round: every proxy of the others.
        broadcast_bytes: what it sends to each of the others in a round: the average.
        step_bytes: what a rank of the largest team sends in each step of gradients and weights; 0 where nobody shares.
        ledger_bytes: of the whole numbers that all add up, once or (MSR) twice a round and for each checkpoint.
        idle: share of the processes' time in a round that is waiting for the one with most to do, in [0, 1).
    """

    ranks: tuple[Rank, ...]
    phases: int
    gathered_bytes: int
    broadcast_bytes: int
    step_bytes: int
    ledger_bytes: int
    idle: float

    def to_text(self) -> str:
        """Who has which proxies, neighbours with equally many in one: ``ranks 0-1: 3 proxies each; rank 2: 2``.

        And who shares one: ``ranks 0-1 share proxy 0; rank 2: 1 proxy``.
        """
        groups: list[list[int]] = []
        for index, rank in enumerate(self.ranks):
            before = self.ranks[groups[-1][-1]] if groups else None
            alike = before is not None and (before.proxies, before.members) == (rank.proxies, rank.members)
            if alike and (rank.members == 1 or not rank.leads):
                groups[-1].append(index)
            else:
                groups.append([index])
        return "; ".join(_group_text(group, self.ranks[group[0]]) for group in groups)


def _group_text(group: list[int], rank: Rank) -> str:
    if rank.members > 1:
        return f"ranks {group[0]}-{group[-1]} share proxy {rank.first}"
    count = f"{rank.proxies} prox{'y' if rank.proxies == 1 else 'ies'}"
    return f"rank {group[0]}: {count}" if len(group) == 1 else f"ranks {group[0]}-{group[-1]}: {count} each"


def place(config: Config, budget: Budget, size: Size, world: int, *, cpu: bool) -> Placement:
    """Deal a run out to ``world`` processes.

    Args:
        config: of the run.
        budget: its rounds and shards.
        size: of the model and of a part of a batch.
        world: W.
        cpu: processes compute on the CPU, so that all memory is the host's.
    """
    sizes, count, training = budget.sizes, len(budget.sizes), config.training
    blocks, state = assign(sizes, world), StateSize.of(config, size.trained)
    teams = teams_of(blocks)

    def rank_of(rank: int, team: range, block: range) -> Rank:
        members, leads = len(team), rank == team.start
        parts = members if training.fsdp else 1
        seen = sum(budget.target(k, 0, 1.0) for k in block)
        steps = sum(math.ceil(budget.target(k, budget.num_rounds, 1.0) / training.batch_size) for k in block)
        kept = math.ceil(size.forward.kept(training) * _part(config, members))
        own, frozen = math.ceil(state.training() / parts), size.frozen(training, parts)
        # Of a model in parts, the weights of one block and of the next one, and a block's gradients.
        own += GATHERED * 4 * size.largest_block * (parts > 1)
        # Proxies come, go and are averaged tensor by tensor. The others than the first process have the average.
        host = (own + frozen + kept if cpu else 0) + (
            state.averaged if rank and count > 1 and (leads or parts == 1) else 0
        )
        if parts > 1:
            # The first one writes and samples the whole model.
            host += 4 * size.denoiser if rank == 0 else 0
        elif members > 1:
            # Who does not hold its proxy in files has it in memory.
            host += (state.kept if count > 1 and not leads else 0) + min(state.weights, BUCKET)
        return Rank(block.start, len(block), members, leads, seen, steps, own, frozen, kept, host)

    ranks = tuple(rank_of(rank, team, blocks[rank]) for team in teams for rank in team)
    own = [rank.samples_per_round / rank.members for rank in ranks]
    largest, several = max(len(team) for team in teams), world > 1
    return Placement(
        ranks,
        phases=2 if config.redistribution.enabled else 1,
        gathered_bytes=state.averaged * (count - ranks[0].proxies),
        broadcast_bytes=state.averaged * several * (count > 1),
        # Gradients are added up by a ring; of parts, weights are gathered for either pass, and gradients scattered.
        step_bytes=(state.weights + (8 * size.denoiser if training.fsdp else state.weights)) * (largest - 1) // largest,
        ledger_bytes=8 * (len(Ledger.COUNTS) + len(Ledger.RATIOS)) * sum(sizes) * several,
        idle=1 - sum(own) / (world * max(own)) if max(own) else 0.0,
    )


def _part(config: Config, members: int) -> float:
    """How large a rank's parts of a batch are, of what they are where it has the batch for itself."""
    batch, parts = config.training.batch_size, config.training.gradient_accumulation_steps
    return math.ceil(math.ceil(batch / members) / parts) / math.ceil(batch / parts)
