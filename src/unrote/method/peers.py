"""The processes among which the proxies of an ensemble are dealt out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from unrote.method.slots import Slots
from unrote.tensorfiles import Stored

Average = Callable[[Iterable[Mapping[str, Tensor]], Sequence[float]], dict[str, Tensor]]
"""From some tensors of K states, by name, and K weights to their averages; for every tensor in turn."""


class Peers(Protocol):
    """What an ensemble asks of them; :class:`Alone` where there is one.

    All methods must be called by every process, in the same order.

    Attributes:
        rank: which of them this is, 0..size-1; 0 keeps what belongs to all.
        size: W, how many there are.
        leads: whether this process holds the proxies that it trains: of those that share one, the first does.
        parted: whether each of those that share one has only a part of its weights while it is live.
    """

    rank: int
    size: int
    leads: bool
    parted: bool

    def mine(self, sizes: Sequence[int]) -> range:
        """The proxies that this process trains, in turn; earlier processes have earlier ones. ``sizes``: of shards.

        Where there are more processes than shards, consecutive ones have the same proxy, and share its batches.
        """

    def shared(self, slots: Slots) -> Slots:
        """``slots`` of this process; where it is ``parted``, those of the first of its team, in all members."""

    def gather(self, message: Any) -> list[Any]:
        """Everybody's ``message`` (what JSON can hold), by rank."""

    def wait(self) -> None:
        """Until every process is here. A process waits here when its proxies have had their turns."""

    def working(self, doing: str) -> AbstractContextManager[None]:
        """Around what takes one process long, without steps, while others wait: it gives signs of life meanwhile."""

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of everybody's ``numbers``, int64 on the CPU, of equal shapes."""

    def average(self, states: Sequence[Stored], weights: Sequence[float], average: Average) -> Stored:
        """``average`` of the states of all proxies, in their order; ``states`` are those that this process trains.

        It is made while it is read, which every process does at once, from the first tensor to the last.
        """


class Alone:
    """No other process."""

    rank, size, leads, parted = 0, 1, True, False

    def mine(self, sizes: Sequence[int]) -> range:
        """All of them."""
        return range(len(sizes))

    def shared(self, slots: Slots) -> Slots:
        """The own ones."""
        return slots

    def gather(self, message: Any) -> list[Any]:
        """The own one."""
        return [message]

    def wait(self) -> None:
        """For nobody."""

    def working(self, doing: str) -> AbstractContextManager[None]:
        """Nobody waits."""
        return nullcontext()

    def sum(self, numbers: Tensor) -> Tensor:
        """The own ones."""
        return numbers

    def average(self, states: Sequence[Stored], weights: Sequence[float], average: Average) -> Stored:
        """Of the own ones, which are all."""
        return replace(states[0], read=lambda names: average((state.read(names) for state in states), weights))
