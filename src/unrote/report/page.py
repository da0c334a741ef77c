"""The report page: one self-contained HTML file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from unrote.files import write_text

if TYPE_CHECKING:
    from unrote.audit.result import AuditReport


def write_page(reports: Sequence["AuditReport"], path: Path, *, headline: str | None = None) -> None:
    """Write one page for one or several audits, side by side."""
    parts = [f"<h1>{escape(headline or 'Memorization audit')}</h1>"]
    for report in reports:
        verdict = report.summary["verdict"]
        parts.append(f"<h2>{escape(report.name)}: {escape(verdict['title'])}</h2><p>{escape(verdict['text'])}</p>")
    write_text(path, "<!doctype html><meta charset=utf-8><title>Memorization audit</title>" + "".join(parts))
