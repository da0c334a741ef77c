"""Every command of the README and of docs/ runs, at toy size, and every Python block."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from doc_commands import NOT_RUN, PAGES, PROCESSES, ROOT, blocks, commands_of, parsed, written_by
from forking import Command
from launching import in_process

COMMANDS = {page.name: commands_of(page) for page in PAGES if commands_of(page)}
PYTHON = [(page.name, number, code) for page in PAGES for number, code in enumerate(blocks(page, "python"))]


@pytest.fixture(scope="module")
def world(tmp_path_factory, module_cache):
    from doc_world import build_world

    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return folder


@pytest.fixture
def place(world, request, tmp_path, monkeypatch):
    """The working directory for a page or block: a copy of the world, without what is made there."""
    from doc_world import INSTEAD

    page, code = (request.node.callspec.params.get(name) for name in ("page", "code"))
    folder = tmp_path / "place"
    shutil.copytree(world, folder, symlinks=True)
    for name, other in INSTEAD.get(page, {}).items():
        shutil.rmtree(folder / name)
        shutil.copytree(folder / other, folder / name)
    made = re.findall(r'\bout="(.+?)"', code) if code else written_by(COMMANDS[page])
    for name in made:
        shutil.rmtree(folder / name, ignore_errors=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("UNROTE_DATA", str(folder / "data"))
    return folder


def in_processes(command):
    """How a line for torchrun ends in fewer processes; the launcher itself is parsed below, and run elsewhere."""
    assert command.launcher[0] == "torchrun"
    return Command(["-m", "unrote", *command.toy], PROCESSES).finish(300)


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page_run(page, place, monkeypatch, capfd):
    for command in COMMANDS[page]:
        if command.reason is not None:
            continue
        if command.shell is not None:
            subprocess.run(["bash", "-c", command.shell], check=True)
            continue
        assert command.arguments is not None, f"{page}: neither a command of unrote nor in NOT_RUN: {command.line}"
        if command.launcher:
            done = in_processes(command)
            code, said = done.returncode, done.stderr
        else:
            code, said = in_process(command.toy, monkeypatch), "".join(capfd.readouterr())
        assert code == 0, f"{page}: {command.line}\n{said[-3000:]}"


@pytest.mark.parametrize("page", COMMANDS)
def test_what_is_not_run_is_parsed(page):
    from torch.distributed.run import get_args_parser

    for command in COMMANDS[page]:
        if command.reason is not None and command.arguments is not None:
            parsed(command.arguments)
        if command.launcher:
            launcher = command.launcher[command.launcher.index("torchrun") + 1 :]
            words = [*launcher, "-m", "unrote", *command.arguments]
            assert get_args_parser().parse_args(words).training_script_args == list(command.arguments), command.line


def test_what_is_run_in_the_repository_is_there():
    """Of ``make TARGET``, a script, and a tool's configuration: that they are, without running them."""
    lines = {command.line for commands in COMMANDS.values() for command in commands}
    targets = sorted({line.split()[1] for line in lines if line.startswith("make ")})
    assert {"demo", "test", "lint", "format"} <= set(targets)
    there = [["make", "--dry-run", *targets], ["bash", "-n", ".ci/run"]]
    there.append([sys.executable, "-m", "pre_commit", "validate-config"])
    for command in there:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_every_reason_is_needed():
    lines = [command.line for commands in COMMANDS.values() for command in commands]
    for start, _ in NOT_RUN:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(("page", "number", "code"), PYTHON, ids=[f"{page}-{number}" for page, number, _ in PYTHON])
def test_a_python_block_runs(page, number, code, place, monkeypatch):
    from doc_python import ENVIRONMENT, made_small, names_for

    for name, value in ENVIRONMENT.get((page, number), {}).items():
        monkeypatch.setenv(name, value)
    names = names_for(page, number)
    exec(compile(made_small(page, number, code), f"{page}, block {number}", "exec"), names)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
