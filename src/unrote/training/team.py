"""The ranks that train one proxy together, each on its part of every batch (W > K).

Every member draws the whole batch: noise, timesteps, augmentation, order. Then it computes its own part, and the losses
of all parts are brought together, so that everybody decides alike what is skipped, and fills the same bank and ledger.
Gradients are added up, and everybody takes the same step: weights and optimizer states stay equal to the last bit.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 25
"""Bytes of gradients that are added up at once."""


class Team:
    """One rank, which shares with nobody.

    Attributes:
        salt: what seeds are made of besides proxy and step, where members must not draw alike; nothing for the first.
    """

    salt: tuple[int, ...] = ()

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


def form(teams: Sequence[range], rank: int, seconds: float, finish: Callable[[Any], None]) -> Team:
    """The team of ``rank``. Every process must call it at once.

    Args:
        teams: the ranks of each proxy.
        rank: of this process.
        seconds: after which gloo gives up; whoever waits by ``finish`` should have done so before.
        finish: see :class:`Members`.
    """
    found = Team()
    for ranks in (ranks for ranks in teams if len(ranks) > 1):
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=seconds), backend="gloo")
        if rank in ranks:
            found = Members(ranks, rank, group, finish)
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
