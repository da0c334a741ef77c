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

    def seen(self, rounds: float) -> int:
        """Samples that all proxies have seen after so many rounds."""
        return self.total if rounds >= self.num_rounds else min(self.total, math.floor(self.local * rounds))

    def target(self, proxy: int, round_index: int, part: float) -> int:
        """Samples that ``proxy`` has seen when ``part`` (in (0, 1]) of round ``round_index`` is over."""
        seen = self.seen(round_index + part)
        # Whole numbers do not grow evenly: a proxy's share of a part can be one more than its share of all.
        return min(self._share(proxy, seen), self._share(proxy, self.total))

    def _share(self, proxy: int, seen: int) -> int:
        before, after, total = self._ends[proxy], self._ends[proxy + 1], self._ends[-1]
        return seen * after // total - seen * before // total

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes, initial=0))


@dataclass(frozen=True)
class Progress:
    """Where proxies are when each part of a round begins and ends, whichever process trains them.

    >>> progress = Progress(Budget(total=100, local=30, sizes=(6, 4)), batch_size=8)
    >>> progress.of_others(1, 0, phase=0, num_phases=1)  # the first proxy has had its turn: 18 samples, whole batches
    Counter(samples=24, steps=3)
    """

    budget: Budget
    batch_size: int

    def of(self, proxy: int, round_index: int, part: float) -> Counter:
        """What ``proxy`` has done when ``part`` (in (0, 1]) of a round is over: whole batches until the very end."""
        end = self.budget.target(proxy, self.budget.num_rounds, 1.0)
        steps = -(-self.budget.target(proxy, round_index, part) // self.batch_size)
        return Counter(min(steps * self.batch_size, end), steps)

    def of_others(self, proxy: int, round_index: int, phase: int, num_phases: int) -> Counter:
        """What the other proxies have done when ``proxy`` has its turn and they have theirs one after another.

        Args:
            proxy: k; those before it have had their turns in this part of the round.
            round_index: the round.
            phase: which part of it, 0..num_phases-1.
            num_phases: in how many parts.
        """
        start = (round_index, phase / num_phases) if phase else (round_index - 1, 1.0)
        end = (round_index, (phase + 1) / num_phases)
        return total(self.of(k, *(end if k < proxy else start)) for k in self._proxies if k != proxy)

    def of_all(self, num_rounds: int) -> Counter:
        """What all have done when so many rounds are over."""
        return total(self.of(k, num_rounds - 1, 1.0) for k in self._proxies)

    @property
    def _proxies(self) -> range:
        return range(len(self.budget.sizes))


def total(counters: Iterable[Counter]) -> Counter:
    """Their sum."""
    return sum(counters, Counter())


def make_budget(config: Config, num_samples: int, sizes: tuple[int, ...]) -> Budget:
    """The budget of a run on ``num_samples`` images in shards of ``sizes``."""
    total = max(1, round(config.training.epochs * num_samples))
    # Without an ensemble a round changes nothing; its end is where a snapshot is taken.
    alone = total / max(1, config.training.snapshots)
    local = config.ensemble.local_epochs * num_samples if config.ensemble.enabled else alone
    return Budget(total, local, sizes)
