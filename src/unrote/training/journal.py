"""The lines of the log, in the order in which one process would write them, whichever processes train."""

import json
from typing import Any

from unrote.config import Config
from unrote.files import temporary_path
from unrote.method.peers import Peers
from unrote.training.run import Log, Run
from unrote.training.trackers import NoTracker, Tracker, make_tracker

Record = dict[str, Any]


class Journal:
    """Lines wait until those of all earlier proxies of this part of the round are written.

    The first process has the first proxies, so its lines never wait; those of the others wait until all meet. Then they
    go to it by files in the run's folder, since what goes through the store must be small, and goes to everybody.

    Args:
        peers: the processes; only the first writes.
        run: whose ``log.jsonl`` it is.
        config: where the lines also go.
        step: of the run, to go on from.
        state: what :meth:`save` gave; None begins a new log.
    """

    def __init__(self, peers: Peers, run: Run, config: Config, step: int, state: dict[str, Any] | None) -> None:
        self._peers, self._run = peers, run
        self._log: Log | None = None
        self._tracker: Tracker = NoTracker()
        # What waited at the checkpoint waits in the first process, whoever trains that proxy now: it is the oldest.
        self._waiting: dict[int, list[Record]] = dict(state["waiting"]) if state and peers.rank == 0 else {}
        if peers.rank == 0:
            self._log = Log(run.path / "log.jsonl", 0 if state is None else state["length"])
            self._tracker = make_tracker(config.training.report_to, run.path, config, step)

    def add(self, proxy: int, record: Record) -> None:
        """A line of the proxy that is live; of those that share one, the first process says it."""
        if not self._peers.leads:
            return
        self._waiting.setdefault(proxy, []).append(record)
        if self._log is not None:
            self._write(proxy)

    def note(self, record: Record, scalars: dict[str, float]) -> None:
        """A line of the run between two rounds, and the numbers in it; only the first process writes it."""
        if self._log is not None:
            self._log.write(record)
            self._tracker.log(scalars, record["step"])

    def settle(self) -> None:
        """All proxies have had their turns: everything is written. Every process must call it at once."""
        self._waiting = self._everybodys()
        if self._log is not None:
            self._write(max(self._waiting, default=0))
        self._waiting = {}

    def save(self) -> dict[str, Any]:
        """The lines that wait, of all processes, and how long the file is; nothing but in the first process.

        Every process must call it at once.
        """
        waiting = self._everybodys()
        if self._log is None:
            return {}
        self._log.sync()
        return {"waiting": waiting, "length": self._log.length}

    def close(self) -> None:
        """Close the file and whatever else the lines go to."""
        if self._log is not None:
            self._log.close()
        self._tracker.close()

    def _everybodys(self) -> dict[int, list[Record]]:
        """What waits anywhere, in the first process; of each proxy, its own lines first, which are the oldest."""
        own = temporary_path(self._run.path / "waiting")
        brings = self._peers.rank > 0 and any(self._waiting.values())
        try:
            if brings:
                own.write_text(json.dumps(list(self._waiting.items())))
            names = self._peers.gather(own.name if brings else None)
            together = {} if self._log is None else {proxy: list(lines) for proxy, lines in self._waiting.items()}
            for name in names if self._log is not None else ():
                for proxy, lines in json.loads((self._run.path / name).read_text()) if name else ():
                    together.setdefault(proxy, []).extend(lines)
            if any(names):
                self._peers.gather(None)  # the first has read them
        finally:
            own.unlink(missing_ok=True)
        return together

    def _write(self, last: int) -> None:
        assert self._log is not None
        for proxy in sorted(proxy for proxy in self._waiting if proxy <= last):
            for record in self._waiting.pop(proxy):
                self._log.write(record)
                scalars = {name: value for name, value in record.items() if name != "time"}
                self._tracker.log(scalars, record["step"])
