"""The report for machines and model cards: report.json, pairs.csv, summary.md."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unrote.auditing.memorization import at_threshold
from unrote.auditing.verdict import interval, percent
from unrote.files import write_json, write_text

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
LEDGER_COLUMNS = ("visits", "skips", "augmented", "moves", "last_ratio", "mean_ratio", "running_ratio")


def write_exports(report: "AuditReport", out: Path) -> None:
    """Write report.json, pairs.csv and summary.md into ``out``."""
    write_json(out / "report.json", report.summary)
    write_text(out / "pairs.csv", pairs_csv(report))
    write_text(out / "summary.md", summary_markdown(report))


def pairs_csv(report: "AuditReport") -> str:
    """All pairs, in the order of the generated images; columns in docs/audit.md.

    A name that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    columns = dict(report.pairs)
    if report.ledger is not None:
        nearest = report.pairs["orbit_train_index"]
        columns |= {f"ledger_{key}": report.ledger[key][nearest] for key in LEDGER_COLUMNS if key in report.ledger}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(values.tolist() for values in columns.values()), strict=True):
        writer.writerow([cell(value) for value in row])
    return file.getvalue()


def cell(value: Any) -> Any:
    """A value as it stands in a CSV file: a name that would start a formula is made text, NaN is empty."""
    if isinstance(value, str):
        return "'" + value if value.startswith(FORMULA_STARTS) else value
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.9g}"
    return value


def summary_markdown(report: "AuditReport") -> str:
    """The result for a model card."""
    summary = report.summary
    quality, counts = summary["quality"], summary["counts"]
    lines = [
        "## Memorization audit",
        "",
        f"**{summary['verdict']['title']}.** {summary['verdict']['text']}",
        "",
        "| near-copies (MQ) | threshold | of training images | distinct | of held-out images, equally many |",
        "|---|---|---|---|---|",
    ]
    for view, label in (("plain", "as they are"), ("orbit", "up to flips and shifts")):
        for definition, table in summary["memorization"][view].items():
            threshold = table["headline_threshold"]
            row = at_threshold(table["mq"], threshold)
            control = at_threshold(table["control"]["holdout"], threshold) if table["control"] else None
            lines.append(
                f"| {definition}, {label} | {threshold} | {percent(row['fraction'])} ({interval(row)}) "
                f"| {row['distinct']} | {percent(control['fraction']) if control else 'not measured'} |"
            )
    distance = quality["generated"]["frechet_distance"]
    if distance is not None:
        floor = f"; training images themselves {quality['floor']['frechet_distance']:.2f}" if quality["floor"] else ""
        lines += [
            "",
            f"Fréchet distance in `{quality['encoder']}` features (not an FID; weights "
            f"`{quality['weights_sha256'][:12]}`) to {quality['num_reference']:,} {quality['reference']} images, "
            f"{quality['num_generated']:,} generated: {distance:.2f}{floor}.",
        ]
    holdout = "none" if counts["holdout"] is None else f"{counts['holdout']:,}"
    lines += [
        "",
        f"{counts['generated']:,} generated, {counts['train']:,} training, {holdout} held-out images; "
        f"n = {summary['settings']['num_neighbors']} neighbours, {summary['settings']['num_transforms']} views of each "
        f"training image, seed {summary['settings']['seed']}. A pixel-space count of copies is a lower bound, and no "
        "differential-privacy guarantee.",
        "",
    ]
    return "\n".join(lines)
