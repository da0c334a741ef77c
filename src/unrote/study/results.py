"""What a study leaves behind: study.json, study.md and study.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unrote import __version__
from unrote.encoders import load_encoder
from unrote.files import write_json, write_text
from unrote.study.page import write_page
from unrote.study.plan import SamplingPlan, load_study
from unrote.study.records import Records
from unrote.study.run import run_study
from unrote.study.runs import compare_runs
from unrote.study.summary import summarize
from unrote.study.tables import COLUMNS, floor_lines, not_computed, table

SCHEMA_VERSION = 1


def compare(
    what: Sequence[Path],
    out: Path,
    *,
    device: torch.device,
    only: Sequence[str] = (),
    keep: bool = False,
    train: str | None = None,
    holdout: str | None = None,
    num: int = 512,
    steps: int = 50,
    encoders: Sequence[str] = (),
    records: Path | None = None,
) -> dict[str, Any]:
    """Run or continue a study, or compare finished runs, and write the results; see ``unrote compare``.

    Raises:
        InputError: the study file, the runs or the images are unusable.
    """
    spaces = [load_encoder(encoder, device=str(device)) for encoder in encoders]
    if len(what) == 1 and what[0].suffix in (".yaml", ".yml"):
        known = None if records is None else Records(records)
        points = run_study(
            load_study(what[0]), out, device=device, only=only, keep=keep, encoders=spaces, records=known
        )
    else:
        how = SamplingPlan(num=num, steps=steps)
        points = compare_runs(what, out, train=train, holdout=holdout, how=how, encoders=spaces, device=device)
    return write_results(points, out)


def write_results(points: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Write ``study.json``, ``study.md`` and ``study.html`` to ``root``; what the first holds is returned."""
    result = {"schema_version": SCHEMA_VERSION, "unrote": __version__, "summary": summarize(points), **points}
    write_json(root / "study.json", result)
    write_text(root / "study.md", markdown(result))
    write_page(result, root / "study.html", root)
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """A table per regime, in the primary feature space."""
    parts = [f"# {result['study']['name']}\n"]
    if result["study"]["about"]:
        parts.append(f"{result['study']['about']}\n")
    for regime, summary in result["summary"].items():
        space = next(iter(summary["spaces"]))
        parts.append(f"## {regime}\n\nFréchet distance in the features of `{space}`.\n")
        header = "| " + " | ".join(COLUMNS).replace("standard", result["study"]["baseline"]) + " |"
        lines = [header, "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in table(summary, space)]
        floors = [floor for floor in result["floors"] if floor["regime"] == regime]
        parts.append("\n".join([*lines, "", *floor_lines(floors, space)]) + "\n")
    if result["missing"]:
        parts.append(f"Not computed yet: {not_computed(result['missing'])}.\n")
    return "\n".join(parts)
