"""Measurements of cells as small files for a repository: a study goes on from what other machines computed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unrote.files import write_text
from unrote.study.cells import Cell


@dataclass(frozen=True)
class Records:
    """A folder of one file per measured cell, and of the classifiers that their quality was measured with.

    The classifiers belong to them: one that is trained elsewhere rounds otherwise, and so its distances are others.

    Attributes:
        path: the folder; made when something is written.
    """

    path: Path

    @property
    def classifiers(self) -> Path:
        """Where :func:`unrote.study.classifier.trained_classifier` keeps weights."""
        return self.path / "classifiers"

    def file(self, cell: Cell) -> Path:
        """Named as the cell's folder: by the hash of everything that its samples depend on."""
        return self.path / f"{cell.folder.path.name}.json"

    def read(self, cell: Cell, yardstick: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Costs and points of a cell; None unless they are there, measured by the yardstick of this key.

        Raises:
            InputError: a default has changed since.
        """
        file = self.file(cell)
        if not file.exists():
            return None
        written = json.loads(file.read_text("utf-8"))
        if written["yardstick"] != yardstick:
            return None
        cell.check_against(written["config"], file)
        return written["cost"], written["points"]

    def write(self, cell: Cell, yardstick: str, cost: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
        """Keep what was measured of a cell."""
        record = {
            "label": cell.label,
            "config": cell.config.model_dump(mode="json"),
            "yardstick": yardstick,
            "cost": cost,
            "points": points,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.file(cell), json.dumps(record) + "\n")
