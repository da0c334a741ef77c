"""An audit's ``report.json``, read again."""

from pathlib import Path
from typing import Any

from unrote.errors import InputError
from unrote.files import parse_json

SCHEMA_VERSION = 2
"""Of the fields' names and meanings. 1 had no images that were extracted, and counted each copy of an image."""


def read_report(file: Path, flag: str) -> dict[str, Any]:
    """The summary in a ``report.json``.

    A report of another version is refused: what is missing in an older one can't be computed from it.

    Args:
        file: the report.
        flag: the option that named it, for errors.

    Raises:
        InputError: it can't be read, is no report of an audit, or is of another version.
    """
    try:
        summary = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {file}: cannot be read ({error}); give the report.json of an audit") from None
    version = summary.get("schema_version") if isinstance(summary, dict) else None
    if type(version) is not int or "memorization" not in summary:
        raise InputError(f"{flag} {file}: is no report.json of an audit")
    if version != SCHEMA_VERSION:
        found = f"{flag} {file}: has version {version}, this unrote reads {SCHEMA_VERSION}: it was written by"
        if version > SCHEMA_VERSION:
            raise InputError(f"{found} a newer one. Upgrade with `pip install --upgrade unrote`")
        raise InputError(f"{found} an older one. Run that `unrote audit` again")
    return dict(summary)
