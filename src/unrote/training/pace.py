"""Which rounds are looked at: as planned, and fewer as soon as the clock says that looks take more than planned."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from unrote.errors import InputError
from unrote.files import parse_json, write_json
from unrote.training.looks import Looks

logger = logging.getLogger("unrote")


class Pace:
    """The plan, corrected by what looks and training really take, so that all looks stay within ``most``.

    Operations are counted before the run begins, seconds are not: a small network's pass takes as long as its calls,
    and a process that looks while others wait holds all of them up. A decision is on disk before anything follows from
    it, and is not taken again: a run that is killed and goes on looks at the rounds that it would have looked at.

    Args:
        plan: when looks are made if they take what is planned.
        rounds: of the run, R.
        samples: of the run.
        most: what looks may take of the seconds of training.
        file: where decisions are kept.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, plan: Looks, rounds: int, samples: int, most: float, file: Path) -> None:
        self._plan, self._rounds, self._samples, self._most, self._file = plan, rounds, samples, most, file
        self._decided = _read(file) if file.exists() else []
        self.start(0)

    def start(self, samples: int) -> None:
        """Training begins, or goes on after ``samples``: its seconds are counted from here."""
        self._began, self._seen, self._looking = time.monotonic(), samples, 0.0

    def due(self, rounds: int) -> bool:
        """Whether a look is due after ``rounds`` rounds."""
        before = [one for one in self._decided if one["round"] < rounds]
        every = before[-1]["every"] if before else self._plan.every
        return every > 0 and (self._rounds - rounds) % every == 0

    @property
    def overhead(self) -> float:
        """What all looks so far took, as a share of the seconds of the whole training."""
        return float(self._decided[-1]["overhead"]) if self._decided else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was decided."""
        return {"decided": list(self._decided)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, in this process or another; what the file had beyond it stays."""
        self._decided = max(state["decided"], self._decided, key=len)

    def looked(self, rounds: int, samples: int, seconds: float, settling_in: float) -> None:
        """A look is over; decide when the next one is due.

        Args:
            rounds: that are over.
            samples: seen so far.
            seconds: that it took.
            settling_in: those of them that only a process's first look takes.
        """
        training = max(time.monotonic() - self._began - self._looking - seconds, 1e-9)
        self._looking += seconds
        known = [one for one in self._decided if one["round"] <= rounds]
        if known and known[-1]["round"] == rounds:  # before it was killed
            return
        whole = training / max(1, samples - self._seen) * self._samples
        spent, told = sum(one["seconds"] for one in known) + seconds, known[-1]["every"] if known else self._plan.every
        left = self._most * whole - spent
        every = next_every(self._plan.every, self._rounds - rounds, left, seconds - settling_in)
        known.append({"round": rounds, "seconds": seconds, "every": every, "overhead": spent / whole})
        write_json(self._file, known)
        self._decided = known
        takes = f"monitor: {len(known)} looks took {spent:.1f} s of some {whole:.0f} of the whole training"
        if rounds < self._rounds and every != told:
            rest = f"the next are made every {every} rounds" if every else "no more are made, nor at the end"
            logger.warning("%s; to stay within monitor.max_overhead=%g %s", takes, self._most, rest)
        elif left < 0:
            logger.warning("%s, more than monitor.max_overhead=%g", takes, self._most)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        parts: list[dict[str, Any]] = parse_json(file.read_bytes())
        whole = all(one["round"] > 0 and one["every"] >= 0 and one["seconds"] + one["overhead"] >= 0 for one in parts)
        if isinstance(parts, list) and whole:
            return parts
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{file}: is damaged; remove it: what the newest checkpoint knows of it is used")


def next_every(every: int, left: int, seconds: float, cost: float) -> int:
    """Rounds between looks that take ``cost`` seconds each and together at most ``seconds``.

    Args:
        every: at least so many.
        left: rounds, at whose end is the last look.
        seconds: that may be spent.
        cost: of a look.

    Returns:
        The rounds; 0 where no look can be made.

    >>> next_every(2, 20, 100.0, 5.0), next_every(2, 20, 20.0, 5.0), next_every(2, 20, 4.0, 5.0)
    (2, 5, 0)
    """
    affordable = math.floor(seconds / cost + 1e-9) if cost > 0 else left
    return max(every, math.ceil(left / affordable)) if affordable > 0 else 0
