"""The report for machines and model cards: report.json, pairs.csv, summary.md."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unrote.auditing.memorization import at_threshold
from unrote.auditing.prompted import prompted_sentence
from unrote.auditing.verdict import interval, orbit_words, percent
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
    """The result for a model card: Markdown in which names and what callers said cannot be read as markup."""
    summary = report.summary
    parts = [
        ["## Memorization audit"],
        [f"**{summary['verdict']['title']}.** {summary['verdict']['text']}"],
        _copies_lines(summary),
        [_extracted_sentence(summary)],
        [] if summary["prompted"] is None else [prompted_sentence(summary["prompted"])],
        *([line] for line in _similarity_sentences(summary)),
        _space_lines(summary),
        _clip_sentence(summary["clip_score"]),
        [_settings_sentence(summary)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _copies_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of near-copies at the thresholds of the papers and at those calibrated on the held-out images."""
    lines = [
        "| near-copies (MQ) | ratio below | generated images | distinct | without memorization |",
        "|---|---|---|---|---|",
    ]
    views = {"plain": "as they are", "orbit": f"up to {orbit_words(summary)}"}
    if summary["settings"]["num_transforms"] == 1:
        del views["orbit"]
    for view, label in views.items():
        for definition, table in summary["memorization"][view].items():
            threshold = table["headline_threshold"]
            row = at_threshold(table["mq"], threshold)
            control = at_threshold(table["control"]["holdout"], threshold) if table["control"] else None
            beside = f"{percent(control['fraction'])} against held-out images" if control else "not measured"
            lines.append(_copies_line(f"{definition}, {label}", f"{threshold:g}", row, beside))
            if (view, definition) != (list(views)[-1], "squared-l2"):
                continue  # the verdict rests on the last
            if table["distinct_aware"]:
                once = at_threshold(table["distinct_aware"]["mq"], threshold)
                lines.append(_copies_line(f"{definition}, {label}, duplicates once", f"{threshold:g}", once, ""))
            if table["calibrated"]:
                found = table["calibrated"]
                words = f"{found['threshold']:.3g} (calibrated)"
                unseen = f"{percent(found['unseen']['fraction'])} of held-out images score so"
                lines.append(_copies_line(f"{definition}, {label}, calibrated", words, found["below"], unseen))
    return lines


def _copies_line(label: str, threshold: str, row: Mapping[str, Any], beside: str) -> str:
    return f"| {label} | {threshold} | {percent(row['fraction'])} ({interval(row)}) | {row['distinct']} | {beside} |"


def _extracted_sentence(summary: Mapping[str, Any]) -> str:
    extracted, duplicates, exact = summary["extracted"], summary["duplicates"], summary["exact_copies"]["orbit"]
    return (
        f"Distinct training images that came back: {extracted['distinct']:,}; generated images that equal one to the "
        f"pixel: {exact['count']:,}. Duplicates in the training set: {duplicates['images']:,} images in "
        f"{duplicates['clusters']:,} cluster{'' if duplicates['clusters'] == 1 else 's'}."
    )


def _similarity_sentences(summary: Mapping[str, Any]) -> list[str]:
    sentences = []
    for space in summary["spaces"].values():
        if space["similarity"] is None:
            continue
        similarity = space["similarity"]
        text = f"Similarity ({code(space['encoder'])}): mean {similarity['generated']['mean']['value']:.3f}"
        if similarity["unseen"]:
            text += f", held-out images {similarity['unseen']['mean']['value']:.3f}"
        for row in similarity["generated"]["above"]:
            text += f"; above {row['threshold']:g}: {percent(row['fraction'])}"
        if similarity["calibrated"]:
            found = similarity["calibrated"]
            text += (
                f"; above {found['threshold']:.3f} (calibrated): {percent(found['above']['fraction'])} "
                f"({interval(found['above'])}), held-out images {percent(found['unseen']['fraction'])}"
            )
        sentences.append(f"{text}.")
    return sentences


def _space_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of quality and of the secondary measures, one line for each feature space."""
    lines = [
        "| features | weights | Fréchet distance | training images themselves | precision | recall | AuthPct | C_T |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for space in summary["spaces"].values():
        quality = space["quality"]
        generated, floor = quality["generated"], quality["floor"] or {}
        name = f"{code(space['encoder'])}{'' if space['is_fid_inception'] else ' (not an FID)'}"
        authentic = (space["authenticity"] or {}).get("authpct")
        cells = [name, code(space["weights_sha256"][:12])]
        cells += [measured(generated.get("frechet_distance")), measured(floor.get("frechet_distance"))]
        cells += [measured(generated.get("precision")), measured(generated.get("recall"))]
        cells += ["–" if authentic is None else percent(authentic["fraction"])]
        cells += [measured((space["generalization"] or {}).get("c_t"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _clip_sentence(score: Mapping[str, Any] | None) -> list[str]:
    if score is None:
        return []
    return [f"CLIP score ({code(score['model'] or 'default')}, {score['num']:,} images): {measured(score)}."]


def measured(entry: Mapping[str, Any] | None) -> str:
    """A number with its interval; a dash where there is none."""
    if entry is None:
        return "–"
    between = entry.get("interval")
    return f"{entry['value']:.4g}" + ("" if between is None else f" ({between[0]:.4g} to {between[1]:.4g})")


def _settings_sentence(summary: Mapping[str, Any]) -> str:
    counts, settings = summary["counts"], summary["settings"]
    holdout = "none" if counts["holdout"] is None else f"{counts['holdout']:,}"
    return (
        f"{counts['generated']:,} generated, {counts['train']:,} training, {holdout} held-out images; "
        f"n = {settings['num_neighbors']} neighbours, {settings['num_transforms']} views of each training image, seed "
        f"{settings['seed']}. Intervals are 95 %. A count of copies is a lower bound, and no differential-privacy "
        "guarantee."
    )


def code(text: Any) -> str:
    """Text of strangers as Markdown code inside a table: on one line, without what would end either."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39)).replace('|', '/')}`"
