"""The ranks that train one proxy together, each on its part of every batch (W > K).

Every member draws the whole batch: noise, timesteps, augmentation, order. Then it computes its own part, and the losses
of all parts are brought together, so that everybody decides alike what is skipped, and fills the same bank and ledger.
Gradients are added up, and everybody takes the same step: weights and optimizer states stay equal to the last bit. Or
each member has only a part of them, see :mod:`unrote.training.sharding`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

BUCKET = 1 << 25
"""Bytes of gradients that are added up at once."""


class Team:
    """One rank, which shares with nobody.

    Attributes:
        salt: what seeds are made of besides proxy and step, where members must not draw alike; nothing for the first.
        mesh: the ``DeviceMesh`` over which weights are parted; None where each member has all of them.
        scale: what losses are multiplied by before the backward pass, which may divide gradients by as much.
    """

    salt: tuple[int, ...] = ()
    mesh: Any = None
    scale: int = 1

    def span(self, count: int) -> slice:
        """Which of ``count`` samples this member computes."""
        return slice(0, count)

    def whole(self, count: int, *columns: Tensor) -> tuple[Tensor, ...]:
        """Of each column (float32, of this member's :meth:`span`) that of all ``count`` samples, in their order."""
        return columns

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the sum of the members', the same everywhere; it stays None where nobody has one."""

    def agree(self, stop: bool) -> bool:
        """Whether to stop after this step, in all members or in none; ``stop`` is what this one was asked."""
        return stop

    def passes(self, count: int, parts: int) -> int:
        """How many passes this member makes for ``count`` samples in ``parts``, however few samples it has itself."""
        return 0

    def every(self, found: bool) -> bool:
        """Whether it was ``found`` in all members; asked where each sees something else."""
        return found

    def computing(self) -> AbstractContextManager[None]:
        """Around a step: if it fails because a member is gone, that is said."""
        return nullcontext()


class Members(Team):
    """Several ranks.

    Args:
        ranks: of the team, which the processes of the run form at once, see :func:`form`.
        rank: of this process.
        group: the team's process group.
        finish: waits for what is under way, and says why if it fails.
    """

    def __init__(self, ranks: range, rank: int, group: Any, finish: Callable[[Any], None]) -> None:
        self._place, self._size = rank - ranks.start, len(ranks)
        self._group, self._finish = group, finish
        self._asking, self._agreed = False, False
        self.salt = (self._place,) if self._place else ()

    def span(self, count: int) -> slice:
        """Contiguous parts, which differ by one sample at most; empty if there are fewer samples than members."""
        return self._span(count, self._place)

    def _span(self, count: int, place: int) -> slice:
        return slice(count * place // self._size, count * (place + 1) // self._size)

    def whole(self, count: int, *columns: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Team.whole`. Whether anybody was asked to stop goes along."""
        own, longest = torch.stack(columns).float(), -(-count // self._size)
        padded = nn.functional.pad(own, (0, longest - own.shape[1])).flatten().cpu()
        message = torch.cat([torch.tensor([float(self._asking)]), padded])
        everyone = [torch.empty_like(message) for _ in range(self._size)]
        self._finish(dist.all_gather(everyone, message, group=self._group, async_op=True))
        self._agreed = any(bool(one[0]) for one in everyone)
        spans = [self._span(count, place) for place in range(self._size)]
        parts = [
            one[1:].view(len(columns), longest)[:, : span.stop - span.start]
            for one, span in zip(everyone, spans, strict=True)
        ]
        return torch.cat(parts, 1).to(own.device).unbind()

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`Team.add_up`. The order of the sum depends on the number of members only."""
        for some in _buckets(parameters):
            present = torch.tensor([float(parameter.grad is not None) for parameter in some])
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            flat = torch.cat([present, *(gradient.flatten().cpu() for gradient in gradients)])
            self._finish(dist.all_reduce(flat, group=self._group, async_op=True))
            found, *sums = torch.split(flat, [len(some), *(parameter.numel() for parameter in some)])
            for parameter, members, gradient, total in zip(some, found.tolist(), gradients, sums, strict=True):
                if members:
                    parameter.grad = gradient.copy_(total.view_as(gradient))

    def agree(self, stop: bool) -> bool:
        """What was asked before this step's losses came together, of any member; what is asked now counts in the next.

        So nobody leaves while another goes on to a step in which it waits for the first.
        """
        self._asking |= stop
        return self._agreed


@dataclass(frozen=True)
class Parts:
    """How members of a team are to hold parts of the weights.

    Attributes:
        device: the kind of device that computes.
        named: around what members exchange: it says what that was if somebody is gone.
        explained: see :meth:`Team.computing`.
    """

    device: str
    named: Callable[[str], AbstractContextManager[None]]
    explained: Callable[[], AbstractContextManager[None]]


class Parted(Members):
    """Several ranks, each of which holds a part of the weights, gradients and moments (FSDP2).

    Every pass through the network is one of all members at once, which give each other the weights for it.

    Args:
        weights: the process group in which they do that.
        parts: what they hold.

    Attributes:
        first: the rank that leads.
        group: of all members, for what they tell each other.
    """

    def __init__(
        self, ranks: range, rank: int, group: Any, finish: Callable[[Any], None], weights: Any, parts: Parts
    ) -> None:
        super().__init__(ranks, rank, group, finish)
        # FSDP takes the mean over the members.
        self.mesh, self.scale = DeviceMesh.from_group(weights, parts.device), len(ranks)
        self.first, self.group, self.leads = ranks.start, group, rank == ranks.start
        self.named, self._explained = parts.named, parts.explained

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """FSDP has done it."""

    def passes(self, count: int, parts: int) -> int:
        """As many as the member with most samples."""
        return min(parts, -(-count // self._size))

    def every(self, found: bool) -> bool:
        """See :meth:`Team.every`."""
        flag = torch.tensor([int(found)])
        with self.named("sharing a step"):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def computing(self) -> AbstractContextManager[None]:
        """See :meth:`Team.computing`."""
        return self._explained()


def form(
    teams: Sequence[range],
    rank: int,
    seconds: float,
    finish: Callable[[Any], None],
    *,
    parted: Parts | None = None,
) -> Team:
    """The team of ``rank``. Every process must call it at once.

    Args:
        teams: the ranks of each proxy.
        rank: of this process.
        seconds: after which gloo gives up; whoever waits by ``finish`` should have done so before.
        finish: see :class:`Members`.
        parted: how members are to hold parts of the weights; None for all of them in each.
    """
    found, limit = Team(), timedelta(seconds=seconds)
    for ranks in (ranks for ranks in teams if len(ranks) > 1):
        group = dist.new_group(list(ranks), timeout=limit, backend="gloo")
        # What FSDP exchanges has a group of its own, so that it can't get in between what members tell each other.
        backend = "nccl" if parted is not None and parted.device == "cuda" else "gloo"
        weights = None if parted is None else dist.new_group(list(ranks), timeout=limit, backend=backend)
        if rank in ranks:
            members = Members(ranks, rank, group, finish)
            found = members if parted is None else Parted(ranks, rank, group, finish, weights, parted)
    return found


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in (parameter for parameter in parameters if parameter.requires_grad):
        if bucket and size + 4 * parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += 4 * parameter.numel()
    if bucket:
        yield bucket
