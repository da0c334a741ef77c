"""Running things as users do, but in this process: a command, a program of the repository."""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from unrote.cli import main


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


def program(name: str) -> ModuleType:
    """A program of the repository, such as ``tools/readme_table``, as a module."""
    path = Path(__file__).parents[1] / f"{name}.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
