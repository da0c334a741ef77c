"""Files of older versions, read as what the present one would have written."""

from collections.abc import Callable, Sequence
from typing import Any

from unrote.errors import InputError

Values = dict[str, Any]
Step = Callable[[Values], Values]
"""What a version wrote → what the next one writes instead."""

RESULT_VERSION = 1
"""``schema_version`` of run.json, monitor.json, sampling.json and a re-test's result: fields' names and meanings."""


def migrated(values: Values, version: int, steps: Sequence[Step], where: str) -> Values:
    """``values`` of an older version as the present one has them.

    Args:
        values: what a file of that version says.
        version: of the file, from 1.
        steps: the v-th, from 1, leads from version v to v + 1; so the present version is one more than their number.
        where: names the file in the error.

    Raises:
        InputError: the file is of a newer version.
    """
    known = len(steps) + 1
    if version > known:
        raise InputError(
            f"{where}: has version {version}, this unrote knows {known} and older: it was "
            "written by a newer one. Upgrade with `pip install --upgrade unrote`"
        )
    for step in steps[version - 1 :]:
        values = step(values)
    return values
