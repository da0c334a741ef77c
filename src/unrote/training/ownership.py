"""One process to a run folder, also where the locks of files do not reach from machine to machine."""

import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unrote.errors import InputError

logger = logging.getLogger("unrote")

BEAT_SECONDS = 5.0
"""How often the owner touches the file."""

WATCH_SECONDS = 30.0
"""How long a process watches the file of an owner on another machine, before it takes the folder over."""


class Ownership:
    """The file ``.lock`` of a folder: locked, where that works; its content names the owner, who keeps touching it.

    A process on the owner's machine goes by the lock. One on another machine, to which the lock may mean nothing, looks
    whether the owner still touches the file. Should two get in all the same, the earlier finds out at :meth:`check`.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / ".lock"
        self._mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder inside the block.

        Raises:
            InputError: if another process owns it.
        """
        with self._file.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self._folder}: another process is training in this folder") from None
            self._watch()
            file.truncate(0)
            file.write(self._mark)
            file.flush()
            ended = threading.Event()
            beating = threading.Thread(target=self._beat, args=(ended,), daemon=True)
            beating.start()
            try:
                yield
            finally:
                ended.set()
                beating.join()
                if self._read() == self._mark:
                    file.truncate(0)

    def check(self) -> None:
        """Make sure that the folder is still this process's, before something is written that counts.

        Raises:
            InputError: if another process has taken it.
        """
        if self._read() != self._mark:
            raise InputError(
                f"{self._folder}: another process has begun to train in this folder, or .lock was removed; this one "
                "stops. See that one process is started at a time; the same command goes on from here"
            )

    def _read(self) -> str | None:
        with suppress(FileNotFoundError):
            return self._file.read_text()
        return None

    def _watch(self) -> None:
        owner, touched = self._read() or "", self._touched()
        host = owner.partition(" ")[0]
        if host in ("", socket.gethostname()):
            return
        logger.info("%s: was last trained in on %s; watching whether it still is", self._folder, host)
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS))
            if self._touched() != touched or self._read() != owner:
                raise InputError(f"{self._folder}: another process is training in this folder, on {host}")

    def _touched(self) -> int:
        # A network filesystem asks again when a file is opened.
        with self._file.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._file)
