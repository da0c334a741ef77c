"""The shell commands and Python blocks of the documentation: found, told apart, cut down to toy size.

A page is run from top to bottom in a folder of its own that has what its commands name (``doc_world``). Whoever adds
a command to a page either sees it run, or says in ``NOT_RUN`` why it cannot be.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from unrote.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALL = "--set training.lr_warmup_steps=1 --set ensemble.num_shards=2 --set ensemble.local_epochs=1"
PIXELS = "--set model.block_out_channels=[32,32] --set model.layers_per_block=1 --set model.attention_levels=[]"

TOY = (
    # An unrote command in which this is found, and the words that follow it here; of an option the last one counts.
    (r"^train ", f"--epochs 2 --batch-size 8 {SMALL}"),
    (r"^train (?!.*(--pretrained|lora|laion))", f"--resolution 8 {PIXELS}"),
    (r"^train .*(--pretrained|lora)", "--resolution 16 --set training.mixed_precision=no"),
    (r"^train .*monitor", "--set monitor.samples=4 --set monitor.steps=2 --set monitor.max_overhead=1"),
    (r"^train .*--processes 5", "--set ensemble.num_shards=5"),
    (r"^sample ", "-n 4 --steps 2"),
    (r"^audit samples/", "--resolution 16"),
    (r"^retest ", "--tries 4 --steps 2"),
    (r"^compare .*yaml", "--only */standard/0"),
    (r"^compare runs", "--num 4 --steps 2"),
    (r"^prompts ", "--seeds 1"),
)

SHELL = {"mkdir held-out": ("-n 30", "-n 8")}
"""What a line that the shell runs as it is begins with, and what is put into it for toys."""

PROCESSES = 2
"""Of every job that torchrun starts here, however many it has in the docs."""

NOT_RUN = (
    # What a line begins with, and why it is not run; what unrote is told in it is parsed all the same.
    ("pip install", "installs packages"),
    ("make ", "CI runs the demo with --toy, and the tests are these; that there is such a target is tested"),
    (".ci/run", "it runs these tests; that it is a shell script is tested"),
    (".venv/bin/pre-commit install", "changes the repository; its configuration is tested"),
    ("unrote demo", "CI runs it with --toy, in a step of its own"),
    ("unrote data get", "downloads 170 MB; test_data_named.py runs it against a server of its own"),
    ("export TORCH_ELASTIC", "needs Slurm"),
    ("trap 'trap", "needs Slurm"),
    ("head=$(scontrol", "needs Slurm"),
    ("wait $!", "needs Slurm"),
    ("srun torchrun", "needs Slurm; test_distributed.py starts several processes"),
    ("torchrun --nnodes 2", "needs two machines"),
    ("python benchmarks/text_study/run.py", "test_text_study.py runs it with --toy"),
)


@dataclass(frozen=True)
class Command:
    """One command line of a page, continued lines joined."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """What a shell makes of it, up to a comment, or to what has it run beside what follows."""
        return shlex.split(self.line.removesuffix(" &"), comments=True)

    @property
    def launcher(self) -> list[str]:
        """What stands before unrote: nothing, or ``torchrun`` and its options."""
        return self.words[: self.words.index("-m")] if "-m" in self.words else []

    @property
    def arguments(self) -> list[str] | None:
        """What unrote is told; None if the line does not call it."""
        words = self.words
        if "-m" in words:
            words = words[words.index("-m") + 1 :]
        return words[1:] if words[0] == "unrote" else None

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        return next((reason for start, reason in NOT_RUN if self.line.startswith(start)), None)

    @property
    def shell(self) -> str | None:
        """What the shell is given; None if it is not the shell that runs it."""
        return next((self.line.replace(*small) for start, small in SHELL.items() if self.line.startswith(start)), None)

    @property
    def toy(self) -> list[str]:
        """``arguments`` and what makes them small."""
        assert self.arguments is not None, self
        text = " ".join(self.arguments)
        more = [words for pattern, words in TOY if re.search(pattern, text)]
        return [*self.arguments, *shlex.split(" ".join(more))]


def blocks(page: Path, languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages (a regular expression)."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[Command]:
    """Every line of its shell blocks that is a command; with parts in brackets it is a synopsis, and none."""
    lines = "\n".join(re.sub(r"\\\n\s*", "", block) for block in blocks(page, "sh|bash|console|shell")).splitlines()
    stripped = [line.strip().removeprefix("$ ") for line in lines]
    return [Command(page.name, line) for line in stripped if line and line[0] != "#" and "[--" not in line]


def written_by(commands: list[Command]) -> set[str]:
    """The folders that they make."""
    words = [command.words for command in commands]
    return {each[at + 1] for each in words for at, word in enumerate(each[:-1]) if word in ("--out", "mkdir")}


def parsed(arguments: list[str]) -> str:
    """The names of the command, after parsing everything as the command line would; runs nothing."""
    command: click.Command = cli
    context, names = click.Context(cli, info_name="unrote"), []
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert name is not None and found is not None
        names.append(name)
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_context(names[-1], list(arguments), parent=context.parent)
    return " ".join(names)
