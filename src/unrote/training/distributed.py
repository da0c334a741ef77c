"""The processes of one run, as ``torchrun`` or ``accelerate launch`` start them, and how they wait for each other.

Proxies are dealt out to processes. Between two averagings a process needs nothing of the others, so they do not march
in step: each stands somewhere else in its own proxies' turns. They meet where a checkpoint is due, and where their
proxies have had their turns. A meeting takes place through the store of ``torch.distributed``, where it can be said who
is missing and who has failed; tensors go by gloo once everybody is there. Only those that share a proxy march in step.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from unrote.beating import beating
from unrote.errors import InputError, first_line
from unrote.method.assignment import assign, sharing, teams_of
from unrote.method.peers import Alone, Average
from unrote.method.slots import Slots
from unrote.tensorfiles import Stored
from unrote.training.reachable import TIMEOUT, Reachable, lives, machine, meeting_place, patience
from unrote.training.sharding import TeamSlots
from unrote.training.team import Parted, Parts, Team, form
from unrote.training.transport import broadcast, receive, send

logger = logging.getLogger("unrote")


class Single(Alone):
    """One process, with the same meetings: what the loop asks of whoever trains.

    Attributes:
        team: the processes that train its proxy too.
        checkpoint: what to do when a checkpoint is due, told whether the process then ends; set by the loop.
        settle: what to do when all proxies have had their turns; set by the loop.
    """

    def __init__(self, stop: list[int]) -> None:
        self.ticks, self.team = 0, Team()
        self.checkpoint: Callable[[bool], None] = lambda last: None
        self.settle: Callable[[], None] = lambda: None
        self._stop = stop

    def gather(self, message: Any) -> list[Any]:
        """Everybody's ``message`` (what JSON can hold), by rank."""
        return [message]

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """The block is run by one process of each machine before the others, which then find what it cached."""
        yield

    def deal(self, sizes: Sequence[int], parted: str | None = None) -> None:
        """Deal out the proxies, ``sizes`` being their shards', before anything else is done with them.

        Args:
            sizes: see :meth:`mine`.
            parted: the kind of device over which those that share a proxy hold it in parts; None for whole in each.
        """

    def step(self, doing: str) -> bool:
        """Count an optimizer step and look around; whether to stop. ``doing`` says where this process stands."""
        self.ticks += 1
        return bool(self._stop)

    def meet(self, *, ended: bool = False) -> bool:
        """Everybody comes here, for a checkpoint or because its proxies have had their turns.

        Returns:
            Whether all have ended. If not, a checkpoint has been written.

        Raises:
            KeyboardInterrupt: after the checkpoint, if any process was asked to stop.
        """
        everyone = self.gather({"stop": self._asked, "ended": ended, "ticks": self.ticks})
        stop = any(one["stop"] for one in everyone)
        if stop or not all(one["ended"] for one in everyone):
            self.checkpoint(stop)
            if stop:
                raise KeyboardInterrupt
            return False
        # Everybody has its next checkpoint after as many steps.
        self.ticks = max(one["ticks"] for one in everyone)
        self.settle()
        return True

    @property
    def _asked(self) -> bool:
        """Whether anybody is known to have been asked to stop."""
        return bool(self._stop)

    def wait(self) -> None:
        """Until all proxies have had their turns; checkpoints of the others are written meanwhile."""
        while not self.meet(ended=True):
            pass


class Group(Single):
    """Several processes.

    Args:
        store: shared by all of them.
        rank: of this one.
        size: how many they are.
        timeout: seconds after which a process that gives no sign of life is given up.
        stop: filled when this process is asked to stop.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float, stop: list[int]) -> None:
        super().__init__(stop)
        self.rank, self.size = rank, size
        self._store, self._timeout = store, timeout
        self._meetings, self._looked, self._told, self._heard = 0, 0.0, False, False
        self._blocks: list[range] = []
        self._neighbours: dict[int, int] = {}

    def introduce(self) -> None:
        """Learn which of the others are on this machine: there it is seen at once if one dies."""
        place = machine()
        for rank, (theirs, pid) in enumerate(self.gather([place, os.getpid()])):
            if place and theirs == place and rank != self.rank:
                self._neighbours[rank] = pid

    def deal(self, sizes: Sequence[int], parted: str | None = None) -> None:
        """See :meth:`Single.deal` and :func:`unrote.method.assignment.assign`."""
        self._blocks = assign(sizes, self.size)
        self._teams = teams_of(self._blocks)
        self._own = next(team for team in self._teams if self.rank in team)
        self.leads = self.rank == self._own.start
        if len(self._teams) < self.size:
            # Here it is noticed if somebody is gone.
            self.gather(None)
            with self._named("forming teams"):
                parts = None if parted is None else Parts(parted, self._named, self._explained)
                self.team = form(self._teams, self.rank, 2 * self._timeout, self._finish, parted=parts)
            self.parted = isinstance(self.team, Parted)
            if self.rank == 0:
                weights = "" if parted is None else " and of the weights"
                logger.info("%s, each on its part of every batch%s", sharing(self._blocks), weights)

    def mine(self, sizes: Sequence[int]) -> range:
        """See :meth:`unrote.method.peers.Peers.mine`."""
        if not self._blocks:
            self.deal(sizes)
        return self._blocks[self.rank]

    def shared(self, slots: Slots) -> Slots:
        """See :meth:`unrote.method.peers.Peers.shared`."""
        return TeamSlots(slots if self.leads else None, self.team) if isinstance(self.team, Parted) else slots

    def step(self, doing: str) -> bool:
        """See :meth:`Single.step`. Others are listened to once a second."""
        self.ticks += 1
        if time.monotonic() - self._looked >= 1 or (self._stop and not self._told):
            self._look(doing)
        return self.team.agree(self._asked)

    @property
    def _asked(self) -> bool:
        return bool(self._stop) or self._heard

    def gather(self, message: Any) -> list[Any]:
        """See :meth:`Single.gather`.

        Raises:
            InputError: if another process has failed or gives no sign of life.
        """
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        with self._named("meeting the other processes"):
            self._store.set(f"{name}/{self.rank}", json.dumps(message))
            if self._store.add(f"{name}/count", 1) == self.size:
                self._store.set(f"{name}/all", "")

            def arrived(waited: float) -> bool:
                if self._store.check([f"{name}/all"]):
                    return True
                # It costs what it delays: a twentieth of the wait. The store's own wait prints a warning when it ends.
                time.sleep(min(0.05, waited / 20))
                return False

            def missing() -> list[int]:
                silent = [rank for rank in range(self.size) if not self._store.check([f"{name}/{rank}"])]
                # All have spoken, but somebody stands still before counting itself.
                return silent or [rank for rank in range(self.size) if rank != self.rank]

            self._await(arrived, missing)
            answers = self._store.multi_get([f"{name}/{rank}" for rank in range(self.size)])
            # Everybody is here, so nobody reads the messages of the meeting before any more.
            if self._meetings > 1:
                self._store.delete_key(f"meeting/{self._meetings - 1}/{self.rank}")
        return [json.loads(answer) for answer in answers]

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """See :meth:`Single.one_per_machine_first`."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            self.gather(None)
        with self.working("making the model"):
            yield
        if first:
            self.gather(None)

    @contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """See :meth:`unrote.method.peers.Peers.working`."""

        def beat() -> None:
            # Where the store is gone, the process finds that out when it asks for the others.
            with suppress(RuntimeError):
                self._beat(doing)

        beat()
        with beating(beat, 1.0):
            yield

    def sum(self, numbers: Tensor) -> Tensor:
        """See :meth:`unrote.method.peers.Peers.sum`."""
        # Here it is noticed who is missing.
        self.gather(None)
        with self.working("adding up the ledger"), self._named("adding up the ledger"):
            dist.all_reduce(numbers)
        return numbers

    def average(self, states: Sequence[Stored], weights: Sequence[float], average: Average) -> Stored:
        """Gathered and averaged by the first process in the order of the proxies, so that rounding is one process's.

        Raises:
            InputError: if proxies differ in what they consist of.
        """
        if len(set(self.gather(states[0].digest()))) > 1:
            raise InputError("the proxies differ in what they consist of, so they can't be averaged")
        senders = [team.start for team in self._teams[1:] for _ in self._blocks[team.start]]

        def read(names: Sequence[str]) -> dict[str, Tensor]:
            forms = {name: states[0].forms[name] for name in names}
            with self._named("averaging the proxies"):
                averaged = None
                own = (state.read(names) for state in states)
                if self.rank == 0:
                    averaged = average(chain(own, (receive(forms, sender) for sender in senders)), weights)
                elif self.leads:
                    for tensors in own:
                        send(tensors, 0)
                elif self.parted:
                    # The first one's slots are read by all of its team.
                    for _ in own:
                        pass
                return broadcast(averaged, forms)

        return replace(states[0], read=read)

    def fail(self, reason: str) -> None:
        """Tell the others to stop because of ``reason``."""
        with suppress(RuntimeError):
            # Who fails because another did would hide what that one said.
            if not self._store.check(["failed"]):
                self._tell("failed", f"process {self.rank} failed: {reason}")

    def leave(self, seconds: float) -> None:
        """The process that has the store goes last, or the others could not read why."""
        with suppress(RuntimeError):
            left, end = self._store.add("left", 1), time.monotonic() + min(seconds, self._timeout)
            while self.rank == 0 and left < self.size and self._others() and time.monotonic() < end:
                time.sleep(0.02)
                left = self._store.add("left", 0)

    def _tell(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def _look(self, doing: str) -> None:
        """Give a sign of life and listen, also whether anyone was asked to stop."""
        self._looked = time.monotonic()
        with self._named("looking for the other processes"):
            if self._stop and not self._told:
                # Also while waiting for the others, who would otherwise train on until they come to a meeting.
                self._tell("stop", str(self.rank))
                self._told = True
            self._beat(doing)
            if self._store.check(["failed"]):
                raise InputError(self._store.get("failed").decode())
            if death := self._death():
                raise InputError(death)
            self._heard = self._heard or bool(self._store.check(["stop"]))

    def _beat(self, doing: str) -> None:
        self._store.set(f"beat/{self.rank}", f"{time.monotonic()} {doing}")

    def _finish(self, work: Any) -> None:
        """Wait for what a team does together."""

        def done(_: float) -> bool:
            try:
                work.wait(timedelta(seconds=0.2))
            except RuntimeError:
                if not work.is_completed():
                    return False
                work.wait()  # raises again, unless it was only late
            return True

        with self._named("sharing a batch"):
            self._await(done, lambda: self._own)

    def _await(self, done: Callable[[float], bool], missing: Callable[[], Iterable[int]]) -> None:
        """Wait until ``done``, told how long already, and look around meanwhile for those who may be ``missing``."""
        begun = time.monotonic()
        since, seen = dict.fromkeys(range(self.size), begun), dict.fromkeys(range(self.size), "")
        while not done(time.monotonic() - begun):
            if time.monotonic() - self._looked < 1:
                continue
            try:
                self._look("waiting for the other processes")
            except InputError:
                # Who came last may have set out again, or ended, in between.
                if done(0.0):
                    return
                raise
            for rank in missing():
                beat = self._heard_of(rank)
                if beat != seen[rank]:
                    seen[rank], since[rank] = beat, time.monotonic()
                if time.monotonic() - since[rank] > self._timeout:
                    raise InputError(self._missing(rank, beat, self._timeout))

    def _heard_of(self, rank: int) -> str:
        return str(self._store.get(f"beat/{rank}").decode()) if self._store.check([f"beat/{rank}"]) else ""

    def _missing(self, rank: int, beat: str, seconds: float) -> str:
        last = beat.partition(" ")[2] or "starting"
        return (
            f"process {rank} of {self.size} has given no sign of life for {seconds:g} seconds, last heard of "
            f"{last}. See what became of it, or raise {TIMEOUT} if it is only slow; the same command goes on from here"
        )

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Errors of communication say what was going on, or the reason that another process gave."""
        try:
            yield
        except RuntimeError as error:
            raise InputError(self._reason() or f"{what}: another process is gone ({first_line(error)})") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """As :meth:`_named`, around what may fail for reasons of its own."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            with self._named("sharing a step"):
                raise

    def _reason(self) -> str | None:
        # The connection breaks at the moment the other process ends, and it gave its reason before that.
        with suppress(RuntimeError):
            if self._store.check(["failed"]):
                return str(self._store.get("failed").decode())
        # It also breaks a moment before the process is gone.
        end = time.monotonic() + 1
        while not (death := self._death()) and time.monotonic() < end:
            time.sleep(0.02)
        return death or self._silence()

    def _silence(self) -> str | None:
        """Who gives no signs of life while it should do something together with the others."""
        with suppress(RuntimeError):
            before = [self._heard_of(rank) for rank in range(self.size)]
            time.sleep(3)
            for rank, beat in enumerate(before):
                if rank != self.rank and beat == self._heard_of(rank):
                    return self._missing(rank, beat, 3)
        return None

    def _others(self) -> bool:
        """Whether any of the others may still be there."""
        return len(self._neighbours) < self.size - 1 or any(map(lives, self._neighbours.values()))

    def _death(self) -> str | None:
        for rank, pid in self._neighbours.items():
            if not lives(pid):
                return f"process {rank} of {self.size} has died; the same command goes on from here"
        return None


@contextmanager
def launched(stop: list[int]) -> Iterator[Single]:
    """The processes that the launcher started, as its environment variables say; one where there was none.

    If the block fails, the others are told why.

    Raises:
        InputError: if they do not find each other, or another one fails.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Single(stop)
        return
    group, patience = _join(stop), 60.0
    try:
        yield group
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            patience = 5.0
            group.fail(first_line(error))
        raise
    finally:
        group.leave(patience)
        dist.destroy_process_group()


def _join(stop: list[int]) -> Group:
    timeout = patience()
    if dist.is_initialized():
        raise InputError("torch.distributed is initialized already: train without it, each process will join by itself")
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = meeting_place(timeout)
        dist.init_process_group("gloo", store=PrefixStore("gloo", store), rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes did not find each other at {os.environ.get('MASTER_ADDR')}: {first_line(error)}. "
            "Start them with torchrun, or check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE"
        ) from None
    shared: Any = PrefixStore("unrote", store)
    if rank > 0:
        shared = Reachable(shared, f"process 0 of {size}", timeout)
    group = Group(shared, rank, size, timeout, stop)
    group.introduce()
    return group
