"""Running things as users do: several processes of one job, none of which outlives the test; a command; a tool."""

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from unrote.cli import main

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def start(world: int, command: Sequence[object], *options: str, **variables: str) -> subprocess.Popen:
    """``command`` (a script or -m MODULE, and arguments) as ``world`` processes; plainly if there is to be one."""
    launcher = [sys.executable] if world == 1 else [*TORCHRUN, f"--nproc-per-node={world}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    # A session of its own, so that whatever it started can be found and ended.
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> subprocess.CompletedProcess:
    """Wait for it, and end it with all that it started if it takes longer."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in (*descendants(process.pid), process.pid):
            os.kill(pid, 9)
        stdout, stderr = process.communicate()
        raise AssertionError(f"it took more than {timeout} s:\n{stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launch(world: int, command: Sequence[object], *options: str, **variables: str) -> subprocess.CompletedProcess:
    """:func:`start` and :func:`finish`."""
    return finish(start(world, command, *options, **variables))


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and those they started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [deeper for child in found for deeper in descendants(child)]


def workers(pid: int) -> dict[int, int]:
    """The pid of each rank of a job whose launcher is ``pid``; those that have not begun are left out."""
    ranks = {}
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            entries = Path(f"/proc/{child}/environ").read_text().split("\0")
            variables = dict(entry.partition("=")[::2] for entry in entries)
            if "RANK" in variables:
                ranks.setdefault(int(variables["RANK"]), child)
    return ranks


def in_process(words: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``unrote words…``, run in this process, which saves the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", ["unrote", *map(str, words)])
    logger = logging.getLogger("unrote")
    handlers, level = list(logger.handlers), logger.level
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        logger.handlers[:], logger.level = handlers, level
    return stop.value.code


def tool(name: str) -> ModuleType:
    """A program of ``tools/``, as a module."""
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
