"""Files that name images: one name a line, and whatever a line cannot hold as a JSON string."""

import json
from collections.abc import Iterable
from pathlib import Path

from unrote.errors import InputError
from unrote.files import parse_json, text_lines


def name_lines(names: Iterable[str]) -> str:
    """The text of such a file; :func:`read_names` gives the same names back."""
    return "".join(f"{name if _plain(name) else json.dumps(name)}\n" for name in names)


def read_names(file: Path) -> list[str]:
    """The names in a file; empty lines count for nothing.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return [_name(line) for line in text_lines(file) if line]
    except InputError as error:
        raise InputError(f"{file}: cannot be read as a list of names ({error})") from None


def _plain(name: str) -> bool:
    return name.isprintable() and name == name.strip() != "" and not name.startswith('"')


def _name(line: str) -> str:
    if line.startswith('"'):
        try:
            name = parse_json(line)
        except ValueError:
            return line
        if isinstance(name, str):
            return name
    return line
