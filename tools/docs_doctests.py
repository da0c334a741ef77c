"""Lets the documentation site show the examples of docstrings, which stand without a heading, as code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>>.*\n(?:(?!>>>).*\S.*\n?)*)+", re.MULTILINE)
"""Lines from one that begins with >>> to the next empty one."""


class Doctests(griffe.Extension):
    """Puts fences around every doctest."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """After an object was read."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example: re.Match[str]) -> str:
    return f"```pycon\n{example[0].rstrip()}\n```\n"
