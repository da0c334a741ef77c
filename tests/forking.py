"""Training in several real processes that need not import everything first: forked from a server that has.

They find each other by the same environment variables as under torchrun, but nothing ends the others when one fails:
they have to notice by themselves.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Where the server finds what it is to import.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
os.environ["OMP_NUM_THREADS"] = "1"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forking_imports"])
INTERRUPTED, UNUSABLE = 130, 2


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Job:
    """W processes that train the toy images in a folder, or with ``model.pretrained`` those with captions.

    Args:
        out: the run folder.
        world: W.
        method: see :func:`unrote.train`.
        settings: dotted fields.
        limit: bytes that a file may have in rank 0, as on a disk that is full; None for no limit.
        hosts: a network namespace for each, which then is a machine of that name; none for this machine.
        variables: of the environment.
    """

    def __init__(
        self,
        out: Path,
        world: int,
        method: str = "iet-agc+",
        settings: dict[str, Any] | None = None,
        *,
        limit: int | None = None,
        hosts: Sequence[str] = (),
        **variables: str,
    ) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self._logs = [out.parent / f"{out.name}.{rank}.log" for rank in range(world)]
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank, log in enumerate(self._logs):
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables
            host = hosts[rank] if hosts else None
            arguments = (host, own, log, out, method, settings or {}, limit if rank == 0 else None)
            self.processes.append(CONTEXT.Process(target=_work, args=arguments))
        for process in self.processes:
            process.start()

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        """Send a signal to some of them."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    @property
    def running(self) -> bool:
        """Whether any of them is."""
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes of all; those that are still there after so long are killed, and that is an error."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill(late)
        for process in self.processes:
            process.join()
        assert not late, f"ranks {late} were still there after {seconds} s: {self.messages()}"
        return [process.exitcode for process in self.processes]

    def messages(self) -> list[str]:
        """What each of them wrote to stderr."""
        return [log.read_text() if log.exists() else "" for log in self._logs]


def _work(
    host: str | None,
    variables: dict[str, str],
    log: Path,
    out: Path,
    method: str,
    settings: dict[str, Any],
    limit: int | None,
) -> None:
    if host is not None:
        _move_to(host)
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 2)
    sys.exit(_train(out, method, settings, limit))


def _move_to(host: str) -> None:
    """Into a network namespace, and under its name; Python 3.11 has no setns."""
    library = ctypes.CDLL(None, use_errno=True)
    clone_newuts = 0x04000000
    with Path("/run/netns", host).open() as namespace:
        if library.setns(namespace.fileno(), 0) or library.unshare(clone_newuts):
            raise OSError(ctypes.get_errno(), f"cannot move to {host}")
    socket.sethostname(host)


def _train(out: Path, method: str, settings: dict[str, Any], limit: int | None) -> int:
    import resource

    from toy import SETTINGS, captioned_images, toy_images
    from unrote.api import train
    from unrote.errors import InputError

    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    images = captioned_images() if "model.pretrained" in settings else toy_images()
    try:
        train(images, out=out, method=method, settings=SETTINGS | settings, device="cpu")
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
