"""The documentation is true: its commands are commands, its settings exist, its links lead somewhere."""

import itertools
import re
import shlex
from pathlib import Path

import click
import pytest

from doc_commands import parsed
from unrote.cli import cli
from unrote.config import fields_of, preset_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
QUICK = {"config explain", "config show", "presets", "data list", "completion", "env"}


def commands_in(page):
    """Every ``unrote …`` line of a shell block, and every whole command in running text."""
    text = page.read_text("utf-8")
    found = []
    for block in re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        found += [line.strip().removeprefix("$ ") for line in lines if re.match(r"(\$ )?unrote ", line.strip())]
    # With parts in brackets it is a synopsis; its options are looked at below.
    return [line for line in found if "[--" not in line]


def words(command):
    """Its arguments, up to a comment, a pipe or a second command; … stands for more."""
    tokens = shlex.split(command, comments=True)
    end = next((i for i, token in enumerate(tokens) if token in ("|", "&&", ";", ">", "2>&1")), len(tokens))
    return [token for token in tokens[1:end] if token != "…"]


COMMANDS = [(page.name, command) for page in PAGES for command in commands_in(page)]


def test_there_are_commands_in_the_docs():
    assert len(COMMANDS) > 30
    assert {"README.md", "recipes.md", "index.md", "fine-tuning.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_of_the_docs_is_one(page, command):
    arguments = words(command)
    name = parsed(arguments)
    known = {row[0] for row in fields_of()}
    for flag, value in itertools.pairwise(arguments):
        if flag == "--set":
            assert value.partition("=")[0] in known, value
        if flag == "--preset":
            assert value in preset_names(), value
    if name in QUICK and "--help" not in arguments:
        from click.testing import CliRunner

        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert result.output


def test_commands_in_running_text_exist():
    """`unrote name …` between backticks: the name, and the options that are written with it."""
    for page in PAGES:
        content = page.read_text("utf-8")
        synopses = re.findall(r"^unrote ([a-z].*\[--.*)$", content, re.MULTILINE)
        for text in re.findall(r"`unrote ([a-z][^`\n]*)`", content) + synopses:
            tokens = text.replace("[", "").replace("]", "").split()
            command = cli
            while isinstance(command, click.Group) and tokens and "|" not in tokens[0]:
                name = tokens.pop(0)
                assert name in command.commands, f"{page.name}: unrote {text}"
                command = command.commands[name]
            if not isinstance(command, click.Group):
                options = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
                written = {token.partition("=")[0] for token in tokens if token.startswith("--")}
                assert written <= options | {"--help"}, f"{page.name}: unrote {text}"


def test_settings_that_pages_name_exist():
    known = {row[0] for row in fields_of()}
    sections = {name.rpartition(".")[0] for name in known} - {""}
    # An attribute of ShardEnsemble, where one of its examples calls it so.
    known.add("ensemble.redistribution")
    for page in PAGES:
        for name in re.findall(
            r"`((?:data|model|training|text|ensemble|gate|redistribution|augmentation)\.[a-z_.]+)", page.read_text()
        ):
            if name.endswith((".py", ".json", ".safetensors", ".", "_")):
                continue
            assert name in known | sections, f"{page.name}: {name}"


def test_every_preset_has_its_place_in_the_recipes():
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for name in preset_names():
        assert f"`{name}`" in text or f"--preset {name}" in text, name


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_are_shown_and_small():
    texts = "".join(page.read_text("utf-8") for page in PAGES)
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert f"images/{picture.name})" in texts, picture
        assert picture.stat().st_size <= 400_000, picture


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_completes(shell):
    from click.shell_completion import get_completion_class
    from click.testing import CliRunner

    script = CliRunner().invoke(cli, ["completion", shell]).output
    assert "_UNROTE_COMPLETE" in script
    complete = get_completion_class(shell)(cli, {}, "unrote", "_UNROTE_COMPLETE")
    assert "audit" in [item.value for item in complete.get_completions([], "a")]
    assert "--holdout" in [item.value for item in complete.get_completions(["audit"], "--ho")]
