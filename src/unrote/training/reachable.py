"""Which other processes there are, and whether still: by their ids on one machine, by the store's answers otherwise."""

import os
import socket
import threading
import time
import uuid
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from unrote.errors import InputError

TIMEOUT = "UNROTE_PEER_TIMEOUT"
"""Environment variable: after so many seconds without a sign of life a process is given up. Default 1800."""


class Reachable:
    """The store that the first process keeps, as another one sees it: its methods are those of ``store``.

    The store's own calls wait for an answer as long as the connection stands, and it stands where a cut network
    swallows what is sent, or where the process that keeps the store hangs. So each call waits in a thread of its own,
    which is left behind if there is no answer.

    Args:
        store: to be asked.
        what: the process that keeps it, for the error.
        seconds: how long an answer may take.

    Raises:
        RuntimeError: from every call, once one was not answered.
    """

    def __init__(self, store: Any, what: str, seconds: float) -> None:
        self._store, self._seconds, self._lost = store, seconds, False
        self._message = f"{what} has given no sign of life for {seconds:g} seconds"

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._call(getattr(self._store, name), arguments)

    def _call(self, method: Any, arguments: tuple[Any, ...]) -> Any:
        if self._lost:
            raise RuntimeError(self._message)
        answer: Future[Any] = Future()

        def ask() -> None:
            try:
                answer.set_result(method(*arguments))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.result(self._seconds)
        except TimeoutError:
            self._lost = True
            raise RuntimeError(self._message) from None


def machine() -> str:
    """Where process ids mean the same: a machine, or a container on it."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def lives(pid: int) -> bool:
    """Whether there is such a process on this machine, and it has not ended."""
    # A process that was killed is there until its parent has looked at it.
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def patience() -> float:
    """Seconds after which a process is given up, as the environment says.

    Raises:
        InputError: if that is no such number.
    """
    text = os.environ.get(TIMEOUT, "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e9:
        raise InputError(f"{TIMEOUT}: must be a number of seconds, at least 1, not {text!r}")
    return seconds


def meeting_place(seconds: float) -> tuple[Any, int, int]:
    """The store of the processes that one launcher started, as its variables say; the rank of this one; how many.

    Raises:
        RuntimeError: if they do not come within so many seconds.
        ValueError: if a variable is missing or wrong.
    """
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    return PrefixStore(attempt(PrefixStore("unrote", store), rank, size, seconds), store), rank, size


def attempt(store: Any, rank: int, size: int, timeout: float) -> str:
    """A name on which the processes of this attempt agree, and none of an earlier one.

    torchrun keeps its store when it starts workers again, with all that those before have left in it, and counts
    attempts on each machine apart. So each process asks with a word of its own, and the first one answers that word.

    Raises:
        RuntimeError: if somebody does not come within ``timeout`` seconds.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    name, missing = (own, list(range(1, size))) if rank == 0 else ("", [0])
    if rank > 0:
        store.set(f"ask/{rank}", own)
    while missing:
        if time.monotonic() > end:
            raise RuntimeError(f"process {missing[0]} did not come within {timeout:g} seconds")
        time.sleep(0.01)
        if rank == 0:
            missing = [other for other in missing if not _has_heard(store, other, name)]
        else:
            name = _answer(store, rank, own)
            missing = [] if name else [0]
    return name


def _has_heard(store: Any, other: int, name: str) -> bool:
    """Answer; perhaps it is still the word of an earlier attempt, so until somebody says that it was heard."""
    if store.check([f"ask/{other}"]):
        store.set(f"answer/{other}", f"{store.get(f'ask/{other}').decode()} {name}")
    return bool(store.check([f"heard/{name}/{other}"]))


def _answer(store: Any, rank: int, word: str) -> str:
    answer = store.get(f"answer/{rank}").decode() if store.check([f"answer/{rank}"]) else ""
    asked, _, name = str(answer).partition(" ")
    if asked != word:
        return ""
    store.set(f"heard/{name}/{rank}", "")
    return name
