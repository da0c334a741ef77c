"""One process to a folder, also where the locks of files do not reach from machine to machine, or do not exist."""

import errno
import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from unrote.beating import beating
from unrote.errors import InputError
from unrote.files import write_text

logger = logging.getLogger("unrote")

BEAT_SECONDS = 5.0
"""How often the owner touches the file."""

WATCH_SECONDS = 30.0
"""How long a process watches the file of an owner whose lock it cannot see, before it takes over."""

SETTLE_SECONDS = 1.0
"""Without locks: how long a process that has signed waits to see whether another did so at the same time."""

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What ``flock`` says where there are no locks: Lustre without ``flock``, NFS without its lock daemon."""


class BusyError(InputError):
    """Another process is the owner."""


class Ownership:
    """A file: locked, where that works; its content names the owner, who keeps touching it.

    A process on the owner's machine goes by the lock. One on another machine, to which the lock may mean nothing, and
    any where there are no locks, looks whether the owner still touches the file. Should two get in all the same, the
    earlier finds out at :meth:`check`.

    Args:
        file: in an existing folder; made if it is not there, and left.
        taken: in words, that another process is the owner.
    """

    def __init__(self, file: Path, taken: str) -> None:
        self._file, self._taken = file, taken
        self._mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"

    @contextmanager
    def held(self, *, wait: bool = False) -> Iterator[None]:
        """Be the owner inside the block.

        Raises:
            BusyError: if another process is, unless this one is to ``wait`` for that.
            InputError: if the filesystem has locks, and another reason not to lock the file.
        """
        with self._file.open("a+") as file:
            locked = self._lock(file, wait)
            while not self._signed(file, locked, wait):
                pass
            try:
                with beating(self._beat, BEAT_SECONDS):
                    yield
            finally:
                if self._read() == self._mark:
                    os.truncate(self._file, 0)

    def check(self) -> None:
        """Make sure that this process is still the owner, before something is written that counts.

        Raises:
            InputError: if another process has become it.
        """
        if self._read() != self._mark:
            raise InputError(
                f"{self._taken} now, or {self._file.name} was removed; this one stops. See that one process is started "
                "at a time; the same command goes on from here"
            )

    def _lock(self, file: TextIO, wait: bool) -> bool:
        """Lock the file; whether there are locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise BusyError(self._taken) from None
            logger.info("%s: waiting for it", self._taken)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise InputError(
                    f"{self._file}: cannot be locked ({error.strerror}); choose a folder on another filesystem"
                ) from None
            return False
        return True

    def _signed(self, file: TextIO, locked: bool, wait: bool) -> bool:
        """Whether the file names this process, after nobody else kept touching it."""
        self._watch(locked, wait)
        if locked:
            file.truncate(0)
            file.write(self._mark)
            file.flush()
            return True
        # In place of the file, so that of several who sign at once the last one's mark is all that it says.
        write_text(self._file, self._mark)
        time.sleep(SETTLE_SECONDS)
        if self._read() != self._mark and not wait:
            raise BusyError(self._taken)
        return self._read() == self._mark

    def _watch(self, locked: bool, wait: bool) -> None:
        since, seen = time.monotonic(), self._seen()
        host = seen[0].partition(" ")[0]
        if host not in ("", socket.gethostname()):
            logger.info("%s: its last owner was on %s; watching whether it still is", self._file, host)
        while host and not (locked and host == socket.gethostname()) and time.monotonic() - since < WATCH_SECONDS:
            time.sleep(min(1.0, WATCH_SECONDS / 4))
            now = self._seen()
            if now != seen and not wait:
                raise BusyError(f"{self._taken}, on {host}")
            if now != seen:
                since, seen, host = time.monotonic(), now, now[0].partition(" ")[0]

    def _seen(self) -> tuple[str, int]:
        """Who the owner is, and when it last touched the file."""
        # A network filesystem asks again when a file is opened.
        with suppress(FileNotFoundError), self._file.open() as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
        return "", 0

    def _read(self) -> str:
        return self._seen()[0]

    def _beat(self) -> None:
        with suppress(OSError):
            os.utime(self._file)
