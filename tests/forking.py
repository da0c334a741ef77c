"""Real processes that need not import everything first: forked from a server that has.

Several find each other by the same environment variables as under torchrun, but nothing ends the others when one fails:
they have to notice by themselves.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Where the server finds what it is to import.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
os.environ["OMP_NUM_THREADS"] = "1"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forking_imports"])
INTERRUPTED, UNUSABLE = 130, 2
DEVICE = os.environ.get("UNROTE_TEST_DEVICE", "cpu")
"""Where jobs compute."""


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def variables_of(world: int) -> list[dict[str, str]]:
    """What torchrun would set in the environment of each of W processes."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


class _Processes:
    """W of them, by rank."""

    def __init__(self, target: Any, arguments: Sequence[tuple]) -> None:
        self.processes = [CONTEXT.Process(target=target, args=each) for each in arguments]
        for process in self.processes:
            process.start()

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all, or to these."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def _end(self, seconds: float) -> list[int]:
        """Wait for them; those that are still there after so long are killed, and these ranks are returned."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill(ranks=late)
        for process in self.processes:
            process.join()
        return late


def exit_codes(target: Any, arguments: Sequence[tuple], seconds: float = 120) -> list[int]:
    """How processes that call ``target`` with these arguments end, by rank; those that take longer are killed."""
    started = _Processes(target, arguments)
    started._end(seconds)
    return [process.exitcode for process in started.processes]


class Command(_Processes):
    """W processes of one command, with what tests need of :class:`subprocess.Popen`.

    Args:
        words: what would follow ``python``: ``-m MODULE`` or a script, and arguments.
        world: W.
        cwd: where it runs; by default here.
        variables: of the environment, besides this process's own.
    """

    def __init__(self, words: Sequence[object], world: int = 1, *, cwd: Path | None = None, **variables: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        given = list(map(str, words)), str(cwd or Path.cwd()), self._outputs
        ranks = variables_of(world) if world > 1 else [{}]
        own = [environment | rank | variables for rank in ranks]
        super().__init__(_run, [(*given, each) for each in own])

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid for process in self.processes]

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank; None of one that runs."""
        return [process.exitcode for process in self.processes]

    def poll(self) -> int | None:
        """The first exit code that is not 0, or 0; None while any runs."""
        return None if None in self.codes else next(filter(None, self.codes), 0)

    def finish(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Wait for the end; what is there after so many seconds is killed, and that is an error."""
        late = self._end(timeout)
        out, errors = (path.read_text() if path.exists() else "" for path in self._outputs)
        assert not late, f"ranks {late} took more than {timeout} s:\n{errors}"
        return subprocess.CompletedProcess([], self.poll(), out, errors)


def _run(words: list[str], cwd: str, outputs: list[Path], variables: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Job(_Processes):
    """W processes that train the toy images in a folder, or with ``model.pretrained`` those with captions.

    Args:
        out: the run folder.
        world: W.
        method: see :func:`unrote.train`.
        settings: dotted fields.
        before: called with the rank in each process before it trains, for what is to go wrong there; of a module that
            they can import.
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
        before: Callable[[int], None] | None = None,
        hosts: Sequence[str] = (),
        **variables: str,
    ) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self._logs = [out.parent / f"{out.name}.{rank}.log" for rank in range(world)]
        arguments = []
        for rank, (own, log) in enumerate(zip(variables_of(world), self._logs, strict=True)):
            host = hosts[rank] if hosts else None
            told = None if before is None else partial(before, rank)
            arguments.append((host, own | variables, log, out, method, settings or {}, told))
        super().__init__(_work, arguments)

    @property
    def running(self) -> bool:
        """Whether any of them is."""
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes of all; those that are still there after so long are killed, and that is an error."""
        late = self._end(seconds)
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
    before: Callable[[], None] | None,
) -> None:
    if host is not None:
        _move_to(host)
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 2)
    if before is not None:
        before()
    sys.exit(_train(out, method, settings))


def _move_to(host: str) -> None:
    """Into a network namespace, and under its name; Python 3.11 has no setns."""
    library = ctypes.CDLL(None, use_errno=True)
    clone_newuts = 0x04000000
    with Path("/run/netns", host).open() as namespace:
        if library.setns(namespace.fileno(), 0) or library.unshare(clone_newuts):
            raise OSError(ctypes.get_errno(), f"cannot move to {host}")
    socket.sethostname(host)


def _train(out: Path, method: str, settings: dict[str, Any]) -> int:
    from toy import SETTINGS, captioned_images, toy_images
    from unrote.api import train
    from unrote.errors import InputError

    images = captioned_images() if "model.pretrained" in settings else toy_images()
    try:
        train(images, out=out, method=method, settings=SETTINGS | settings, device=DEVICE)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
