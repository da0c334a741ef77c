"""What an audit returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unrote.auditing.prompted import prompted_sentence
from unrote.auditing.verdict import headline, interval, percent
from unrote.data.store import ImageStore
from unrote.errors import InputError


@dataclass(frozen=True)
class AuditReport:
    """The result of :func:`unrote.audit.audit`.

    Attributes:
        name: what was audited.
        summary: everything that is a number, with its provenance; JSON-able, described in docs/audit.md.
        pairs: columns of equal length G, one entry per generated image; described in docs/audit.md.
        curves: neighbour ratios [·] by ``(view, definition, set)``: view ``plain`` or ``orbit``, or these with
            ``-distinct`` (each cluster of duplicates counted once); definition ``l2`` or ``squared-l2``; set ``train``
            (generated against all training images), ``control-train`` and ``holdout`` (against equally many of both)
            or ``unseen`` (held-out images against training images). And similarities in a space of copy detection, by
            ``(its key, "similarity", set)``: set ``unseen``, or ``background`` (between training images).
        generated: the generated images.
        train: the training images.
        ledger: the run's ledger columns, aligned with ``train``; None if there was none.
    """

    name: str
    summary: dict[str, Any]
    pairs: dict[str, np.ndarray]
    curves: dict[tuple[str, str, str], np.ndarray] = field(repr=False)
    generated: ImageStore = field(repr=False)
    train: ImageStore = field(repr=False)
    ledger: Mapping[str, np.ndarray] | None = field(default=None, repr=False)

    def save(self, out: Path) -> Path:
        """Write report.json, pairs.csv, summary.md and report.html into ``out``; returns the path of the page."""
        from unrote.report.exports import write_exports
        from unrote.report.page import write_page

        out = Path(out)
        write_exports(self, out)
        page = out / "report.html"
        write_page([self], page)
        return page

    def to_pandas(self) -> Any:
        """``pairs`` as a ``pandas.DataFrame``, one row per generated image.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas() needs pandas: pip install pandas, or read pairs.csv of save()") from None
        return pandas.DataFrame(dict(self.pairs))

    def __str__(self) -> str:
        """A short result in plain words, for a terminal."""
        lines = [f"{self.name}: {self.summary['verdict']['title']}", self.summary["verdict"]["text"]]
        plain = headline(self.summary, "plain")
        lines.append(
            f"Compared as they are: {plain['count']:,} near-copies ({percent(plain['fraction'])}, {interval(plain)})."
        )
        if self.summary["prompted"] is not None:
            lines.append(prompted_sentence(self.summary["prompted"]))
        return "\n".join([*lines, *self._quality_lines()])

    def _quality_lines(self) -> list[str]:
        space = self.summary["spaces"][self.summary["quality_space"]]
        quality = space["quality"]
        generated, floor = quality["generated"]["frechet_distance"], quality["floor"] or {}
        if generated is None:
            return []
        beside = floor.get("frechet_distance")
        what = "FID" if space["is_fid_inception"] else "Fréchet distance"
        return [
            f"{what} ({space['encoder']}, to {quality['reference']}): "
            f"{generated['value']:.2f}" + (f"; training images themselves: {beside['value']:.2f}." if beside else ".")
        ]
