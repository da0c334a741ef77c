"""An audit's ``report.json``, read again."""

from functools import partial
from pathlib import Path
from typing import Any

from unrote.auditing.older import from_version_1
from unrote.errors import InputError
from unrote.files import parse_json
from unrote.versions import migrated

STEPS = (from_version_1,)
"""What makes a report of the next version of one of version 1, 2, …, and the folder where it lies."""

SCHEMA_VERSION = len(STEPS) + 1
"""Of the fields' names and meanings."""


def read_report(file: Path, flag: str) -> dict[str, Any]:
    """The summary in a ``report.json``.

    One of an older version is brought up to the present one; what can't be known is None then. See
    :mod:`unrote.auditing.older`.

    Args:
        file: the report.
        flag: the option that named it, for errors.

    Raises:
        InputError: it can't be read, is no report of an audit, or is of a newer version.
    """
    try:
        summary = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {file}: cannot be read ({error}); give the report.json of an audit") from None
    version = summary.get("schema_version") if isinstance(summary, dict) else None
    if type(version) is not int or version < 1 or "memorization" not in summary:
        raise InputError(f"{flag} {file}: is no report.json of an audit")
    steps = [partial(step, folder=file.parent) for step in STEPS]
    try:
        return migrated(summary, version, steps, f"{flag} {file}")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise InputError(f"{flag} {file}: is a damaged report of version {version}; run that audit again") from None
