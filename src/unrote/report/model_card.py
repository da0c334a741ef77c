"""The result of an audit in the model card of the run that made the images, beside that of a baseline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unrote.auditing.memorization import HEADLINE
from unrote.auditing.result import AuditReport
from unrote.auditing.verdict import headline, interval, orbit_words, percent
from unrote.card_section import with_section
from unrote.errors import InputError
from unrote.files import write_text
from unrote.report.exports import code, measured, summary_markdown

CARDS = ("README.md", "model/README.md")
"""The model cards of a run folder: of the run, and in the folder that is given away."""

Summary = Mapping[str, Any]


def add_to_cards(folder: Path, report: AuditReport, baseline: Summary | None = None) -> list[Path]:
    """Put the result into the model cards of a run folder, in place of an earlier one.

    Args:
        folder: of the run.
        report: of images of the run's model.
        baseline: summary of another model's audit, to stand beside it.

    Returns:
        The cards that were changed; those that there are not are not made.

    Raises:
        InputError: the baseline was measured against other images, or otherwise.
    """
    content = card_section(report, baseline)
    cards = [card for name in CARDS if (card := folder / name).exists()]
    for card in cards:
        write_text(card, with_section(card.read_text(), content))
    return cards


def card_section(report: AuditReport, baseline: Summary | None) -> str:
    """The Markdown summary of the report, after a table of both models if there is a baseline."""
    summary = summary_markdown(report)
    if baseline is None:
        return summary
    title, rest = summary.split("\n", 1)
    try:
        check_comparable(report.summary, baseline)
        return f"{title}\n\n{comparison_table(report.summary, baseline)}\n{rest}"
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--baseline: is no whole report.json ({error!r}); run that `unrote audit` again") from None


def check_comparable(summary: Summary, baseline: Summary) -> None:
    """Raise InputError, naming what differs, unless both were measured against the same images in the same way."""
    differing = [
        f"{role} images" for role in ("train", "holdout") if _fingerprint(summary, role) != _fingerprint(baseline, role)
    ]
    settings, others = summary["settings"], baseline["settings"]
    # What an older report had no setting for, None, it has no measure of either.
    ignored = {"seed", "encoders"} | {key for key, value in others.items() if value is None}
    differing += [key for key in settings if key not in ignored and settings[key] != others.get(key)]
    if differing:
        raise InputError(f"--baseline: was audited with other {', '.join(differing)}; audit it in the same way")


def _fingerprint(summary: Summary, role: str) -> Any:
    return (summary["data"][role] or {}).get("fingerprint")


def comparison_table(summary: Summary, baseline: Summary) -> str:
    """What both models copy and how good they are, a line for each measure that either has."""
    here, there = _measures(summary), _measures(baseline)
    lines = ["| | this model | baseline |", "|---|---|---|"]
    lines += [f"| {name} | {here.get(name, '–')} | {there.get(name, '–')} |" for name in here | there]
    return "\n".join(lines)


def _measures(summary: Summary) -> dict[str, str]:
    copies = headline(summary)
    words = f"near-copies (squared-l2 below {HEADLINE['squared-l2']:g}, up to {orbit_words(summary)})"
    found = {
        "audited": code(Path(summary["name"]).name),
        "generated images": f"{summary['counts']['generated']:,}",
        words: f"{percent(copies['fraction'])} ({interval(copies)})",
        "distinct training images that came back": f"{summary['extracted']['distinct']:,}",
    }
    for space in summary["spaces"].values():
        found |= _measures_in(space)
    if summary["clip_score"] is not None:
        found[f"CLIP score ({code(summary['clip_score']['model'] or 'default')})"] = measured(summary["clip_score"])
    return found


def _measures_in(space: Summary) -> dict[str, str]:
    name, found = code(space["encoder"]), {}
    if space["similarity"] and space["similarity"]["calibrated"]:
        above = space["similarity"]["calibrated"]["above"]
        found[f"more similar ({name}) than held-out images"] = f"{percent(above['fraction'])} ({interval(above)})"
    if (distance := space["quality"]["generated"].get("frechet_distance")) is not None:
        kind = "FID" if space["is_fid_inception"] else "Fréchet distance"
        found[f"{kind} ({name})"] = measured(distance)
    return found
