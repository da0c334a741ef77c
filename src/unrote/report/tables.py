"""The page's tables of memorization: runs side by side, and every threshold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from unrote.auditing.memorization import HEADLINE, at_threshold
from unrote.auditing.verdict import headline, headline_table, interval, orbit_words, percent

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the comparison: its label, the number and its text in a summary, and which direction is better."""

    label: str
    value: Callable[[Summary], float | None]
    text: Callable[[Summary], str]
    better: int = 0
    """-1 lower is better, 1 higher is better, 0 neither: nothing is set in bold."""


def comparison_table(names: Sequence[str], summaries: Sequence[Summary]) -> str:
    """All runs side by side, the best value of each line in bold."""
    body = []
    for row in comparison_rows():
        values = [row.value(summary) for summary in summaries]
        if all(value is None for value in values):
            continue
        cells = "".join(
            f"<td{_best(value, values, row.better)}>{'–' if value is None else row.text(summary)}</td>"
            for value, summary in zip(values, summaries, strict=True)
        )
        body.append(f'<tr><th scope="row">{row.label}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return table(f"<tr><td></td>{head}</tr>", "".join(body))


def comparison_rows() -> list[Row]:
    """The lines of the comparison table: memorization, then quality, then training."""
    return [
        _fraction_row("Near-copies, up to what the audit allows for (squared-L2 &lt; 0.33)", headline, -1),
        _fraction_row("Near-copies, as they are (squared-L2 &lt; 0.33)", lambda s: headline(s, "plain"), -1),
        _fraction_row("Near-copies, as they are (L2 &lt; 0.5)", _plain_l2, -1),
        _fraction_row("Control: the first line against held-out images", _control, 0),
        _fraction_row("Control: real held-out images in place of generated ones", _unseen, 0),
        _fraction_row("Exact copies", lambda s: s["exact_copies"]["orbit"], -1),
        Row(
            "Distinct training images copied",
            lambda s: s["extracted"]["distinct"],
            lambda s: f"{s['extracted']['distinct']:,}",
            -1,
        ),
        _fraction_row(
            "Nearest image is a training image (50 % = none)", lambda s: (s["train_share"] or {}).get("plain"), 0
        ),
        _fraction_row("Copies by similarity, threshold calibrated on held-out images", _similar, -1),
        _number_row("Fréchet distance (lower is better)", _quality("frechet_distance"), -1),
        _number_row("… of the training images themselves", _quality("frechet_distance", "floor"), 0),
        _number_row("Precision", _quality("precision"), 1),
        _number_row("Recall", _quality("recall"), 1),
        _number_row("Coverage", _quality("coverage"), 1),
        _number_row("CLIP score (higher is better)", lambda s: s["clip_score"], 1),
        Row("Skipped in training", _skip_rate, lambda s: percent(s["ledger"]["skip_rate"])),
        Row("Generated images", lambda s: s["counts"]["generated"], lambda s: f"{s['counts']['generated']:,}"),
    ]


def thresholds_table(summary: Summary, definition: str) -> str:
    """MQ of one definition at every threshold, with control and false alarms, and at the calibrated threshold."""
    plain, orbit = (summary["memorization"][view][definition] for view in ("plain", "orbit"))
    columns = {"as they are": plain["mq"]}
    if summary["settings"]["num_transforms"] > 1:
        columns[f"up to {orbit_words(summary)}"] = orbit["mq"]
    distinct = orbit["distinct_aware"]
    if distinct:
        columns["the same, duplicates in the training set counted once"] = distinct["mq"]
    controls = distinct or orbit
    if controls["control"]:
        columns["control: equally many held-out images"] = controls["control"]["holdout"]
        columns["false alarms: held-out as generated"] = controls["unseen"]
    body = []
    for position, row in enumerate(plain["mq"]):
        threshold = row["threshold"]
        cells = [with_interval(rows[position]) for rows in columns.values()]
        cells.append(f"{controls['mq'][position]['distinct']:,}")
        marked = ' class="headline"' if threshold == plain["headline_threshold"] else ""
        body.append(f'<tr{marked}><th scope="row">&lt; {threshold:g}</th>{_cells(cells)}</tr>')
    head = "".join(f'<th scope="col">{text}</th>' for text in ("ratio", *columns, "distinct images copied"))
    title = {"l2": "L2 ratio (Carlini et al.)", "squared-l2": "Squared-L2 ratio (MQ of IET-AGC)"}[definition]
    return table(f"<tr>{head}</tr>", "".join(body), title) + _calibrated_words(summary, definition)


def _calibrated_words(summary: Summary, definition: str) -> str:
    calibrated = summary["memorization"]["orbit"][definition]["calibrated"]
    if calibrated is None:
        return ""
    below = calibrated["below"]
    return (
        f"<p><b>Calibrated on the held-out images:</b> {percent(calibrated['false_positive_rate'])} of "
        f"{calibrated['num_holdout']:,} of them that duplicate no training image have a ratio below "
        f"{calibrated['threshold']:.3g}{up_to(summary)}, and so do {percent(calibrated['unseen']['fraction'])} of all "
        f"of them, and {percent(below['fraction'])} ({interval(below)}) of the generated images.</p>"
    )


def up_to(summary: Summary) -> str:
    """What the audit allows for, to end a sentence with; empty if images are compared as they are."""
    return f" (up to {orbit_words(summary)})" if summary["settings"]["num_transforms"] > 1 else ""


def table(head: str, body: str, caption: str | None = None) -> str:
    """A table that scrolls sideways where it is too wide; ``caption`` is HTML."""
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _fraction_row(label: str, find: Callable[[Summary], Mapping[str, Any] | None], better: int) -> Row:
    def value(summary: Summary) -> float | None:
        row = find(summary)
        return None if row is None else float(row["fraction"])

    def text(summary: Summary) -> str:
        row = find(summary)
        return "" if row is None else with_interval(row)

    return Row(label, value, text, better)


def _number_row(label: str, find: Callable[[Summary], Mapping[str, Any] | None], better: int) -> Row:
    def value(summary: Summary) -> float | None:
        found = find(summary)
        return None if found is None else float(found["value"])

    return Row(label, value, lambda summary: measured(find(summary)), better)


def _quality(metric: str, side: str = "generated") -> Callable[[Summary], Mapping[str, Any] | None]:
    """Finds a metric of the headline feature space."""

    def find(summary: Summary) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = (headline_quality(summary)[side] or {}).get(metric)
        return found

    return find


def headline_quality(summary: Summary) -> Mapping[str, Any]:
    """The quality block of the space whose Fréchet distance is the headline."""
    quality: Mapping[str, Any] = summary["spaces"][summary["quality_space"]]["quality"]
    return quality


def _similar(summary: Summary) -> dict[str, Any] | None:
    if summary["copy_space"] is None:
        return None
    calibrated = summary["spaces"][summary["copy_space"]]["similarity"]["calibrated"]
    return calibrated["above"] if calibrated else None


def _plain_l2(summary: Summary) -> dict[str, Any]:
    return at_threshold(summary["memorization"]["plain"]["l2"]["mq"], HEADLINE["l2"])


def _control(summary: Summary) -> dict[str, Any] | None:
    control = headline_table(summary)["control"]
    return at_threshold(control["holdout"], HEADLINE["squared-l2"]) if control else None


def _unseen(summary: Summary) -> dict[str, Any] | None:
    unseen = headline_table(summary)["unseen"]
    return at_threshold(unseen, HEADLINE["squared-l2"]) if unseen else None


def _skip_rate(summary: Summary) -> float | None:
    return None if summary["ledger"] is None else float(summary["ledger"]["skip_rate"])


def _best(value: float | None, values: Sequence[float | None], better: int) -> str:
    known = [other for other in values if other is not None]
    if value is None or not better or len(set(known)) < 2:
        return ""
    return ' class="best"' if value == (max(known) if better > 0 else min(known)) else ""


def with_interval(row: Mapping[str, Any]) -> str:
    """A fraction and its 95 % interval as HTML."""
    return f'{percent(row["fraction"])}<span class="range">{interval(row)}</span>'


def measured(entry: Mapping[str, Any] | None) -> str:
    """A number and its 95 % interval as HTML; a dash where there is none."""
    if entry is None:
        return "–"
    values = [entry["value"], *(entry.get("interval") or ())]
    largest = max(map(abs, values))
    value, *between = (number(one, largest) for one in values)
    return value + (f'<span class="range">{between[0]} to {between[1]}</span>' if between else "")


def number(value: float, largest: float | None = None) -> str:
    """A number with as many decimals as suit the ``largest`` of the numbers beside it."""
    size = abs(value) if largest is None else largest
    if 0 < size < 0.01:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.{3 if size < 2 else 2 if size < 10 else 1 if size < 1000 else 0}f}"
    return text.replace("-", "−")


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)
