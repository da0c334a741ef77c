"""How many samples and steps a run takes, and where it stands: arithmetic that every process can do by itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from unrote.config import Config


@dataclass
class Counter:
    """Samples seen and steps taken, of one proxy or of the run."""

    samples: int = 0
    steps: int = 0

    def count(self, samples: int) -> None:
        """One more step, on ``samples``."""
        self.samples += samples
        self.steps += 1

    def __add__(self, other: "Counter") -> "Counter":
        return Counter(self.samples + other.samples, self.steps + other.steps)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"samples": self.samples, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.samples, self.steps = state["samples"], state["steps"]


@dataclass(frozen=True)
class Budget:
    """How many samples are seen: epochs x N in all, shared over the proxies in proportion to their shards.

    >>> budget = Budget(total=100, local=30, sizes=(6, 4))
    >>> budget.num_rounds, budget.target(0, 3, 1.0), budget.target(1, 3, 1.0)
    (4, 60, 40)
    """

    total: int
    """Samples seen by all proxies."""
    local: float
    """Samples seen by all proxies in one round: E x N."""
    sizes: tuple[int, ...]
    """Shard sizes."""

    @property
    def num_rounds(self) -> int:
        """R; the last round may be shorter than the others."""
        # No empty last round where rounding leaves E x N just below a whole number.
        return math.ceil(self.total / self.local - 1e-9)

    def target(self, proxy: int, round_index: int, part: float) -> int:
        """Samples that ``proxy`` has seen when ``part`` (in (0, 1]) of round ``round_index`` is over."""
        rounds = round_index + part
        seen = self.total if rounds >= self.num_rounds else min(self.total, math.floor(self.local * rounds))
        # Whole numbers do not grow evenly: a proxy's share of a part can be one more than its share of all.
        return min(self._share(proxy, seen), self._share(proxy, self.total))

    def _share(self, proxy: int, seen: int) -> int:
        before, after, total = self._ends[proxy], self._ends[proxy + 1], self._ends[-1]
        return seen * after // total - seen * before // total

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes, initial=0))


class Progress:
    """What every proxy has done when a part of a round begins, and will have done when it ends, whoever trains it.

    >>> progress = Progress(Budget(total=100, local=30, sizes=(6, 4)), batch_size=8)
    >>> progress.of_others(1, 0, 1.0)  # the first proxy has had its turn: 18 samples, in whole batches
    Counter(samples=24, steps=3)
    >>> progress.advance(0, 1.0)
    >>> progress.whole
    Counter(samples=40, steps=5)
    """

    def __init__(self, budget: Budget, batch_size: int) -> None:
        self._budget, self._batch_size = budget, batch_size
        self._begun = [Counter() for _ in budget.sizes]

    @property
    def whole(self) -> Counter:
        """What all have done when the current part began."""
        return total(self._begun)

    def of_others(self, proxy: int, round_index: int, part: float) -> Counter:
        """What the other proxies have done when ``proxy`` has its turn, if they have theirs one after another.

        The current part of round ``round_index`` ends when ``part`` (in (0, 1]) of it is over.
        """
        before = [self._end(k, round_index, part) for k in range(proxy)]
        return total(before) + total(self._begun[proxy + 1 :])

    def advance(self, round_index: int, part: float) -> None:
        """The current part is over; see :meth:`of_others`."""
        self._begun = [self._end(k, round_index, part) for k in range(len(self._begun))]

    def _end(self, proxy: int, round_index: int, part: float) -> Counter:
        # Batches are whole until the very end.
        begun, target = self._begun[proxy], self._budget.target(proxy, round_index, part)
        steps = max(0, -(-(target - begun.samples) // self._batch_size))
        end = self._budget.target(proxy, self._budget.num_rounds, 1.0)
        return Counter(min(begun.samples + steps * self._batch_size, end), begun.steps + steps)

    def state_dict(self) -> dict[str, Any]:
        """What all had done when the current part began."""
        return {"begun": [one.state_dict() for one in self._begun]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._begun = [Counter(**one) for one in state["begun"]]


def total(counters: Iterable[Counter]) -> Counter:
    """Their sum."""
    return sum(counters, Counter())


def make_budget(config: Config, num_samples: int, sizes: tuple[int, ...]) -> Budget:
    """The budget of a run on ``num_samples`` images in shards of ``sizes``."""
    total = max(1, round(config.training.epochs * num_samples))
    # Without an ensemble a round changes nothing; its end is where a snapshot is taken.
    alone = total / max(1, config.training.snapshots)
    rounds = config.ensemble.enabled or config.monitor.every > 0
    local = config.ensemble.local_epochs * num_samples if rounds else alone
    return Budget(total, local, sizes)
