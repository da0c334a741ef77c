"""The page's tables: runs side by side, thresholds, quality."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from unrote.auditing.memorization import HEADLINE, at_threshold
from unrote.auditing.verdict import headline, interval, percent

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
    return _table(f"<tr><td></td>{head}</tr>", "".join(body))


def comparison_rows() -> list[Row]:
    """The lines of the comparison table: memorization, then quality, then training."""
    return [
        _fraction_row("Near-copies, up to flips and shifts (squared-L2 &lt; 0.33)", headline, -1),
        _fraction_row("Near-copies, as they are (squared-L2 &lt; 0.33)", lambda s: headline(s, "plain"), -1),
        _fraction_row("Near-copies, as they are (L2 &lt; 0.5)", _plain_l2, -1),
        _fraction_row("Control: the first line against held-out images", _control, 0),
        _fraction_row("Control: real held-out images in place of generated ones", _unseen, 0),
        _fraction_row("Exact copies", lambda s: s["exact_copies"]["orbit"], -1),
        Row(
            "Distinct training images copied",
            lambda s: headline(s)["distinct"],
            lambda s: f"{headline(s)['distinct']:,}",
            -1,
        ),
        _fraction_row(
            "Nearest image is a training image (50 % = none)", lambda s: (s["train_share"] or {}).get("plain"), 0
        ),
        _number_row("Fréchet distance (lower is better)", lambda s: s["quality"]["generated"]["frechet_distance"], -1),
        _number_row(
            "… of the training images themselves", lambda s: (s["quality"]["floor"] or {}).get("frechet_distance"), 0
        ),
        _number_row("Precision", lambda s: s["quality"]["generated"]["precision"], 1),
        _number_row("Recall", lambda s: s["quality"]["generated"]["recall"], 1),
        _number_row("Coverage", lambda s: s["quality"]["generated"]["coverage"], 1),
        Row("Skipped in training", _skip_rate, lambda s: percent(s["ledger"]["skip_rate"])),
        Row("Generated images", lambda s: s["counts"]["generated"], lambda s: f"{s['counts']['generated']:,}"),
    ]


def thresholds_table(summary: Summary, definition: str) -> str:
    """MQ of one definition at every threshold, with control and false alarms."""
    plain, orbit = (summary["memorization"][view][definition] for view in ("plain", "orbit"))
    body = []
    for row, wide in zip(plain["mq"], orbit["mq"], strict=True):
        threshold = row["threshold"]
        cells = [_with_interval(row), _with_interval(wide), f"{wide['distinct']:,}"]
        controls = (orbit["control"]["holdout"], orbit["unseen"]) if orbit["control"] else ()
        cells += [_with_interval(at_threshold(table, threshold)) for table in controls]
        marked = ' class="headline"' if threshold == plain["headline_threshold"] else ""
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr{marked}><th scope="row">&lt; {threshold:g}</th>{columns}</tr>')
    heads = ["ratio", "as they are", "up to flips and shifts", "distinct images copied"]
    heads += (
        ["control: equally many held-out images", "false alarms: held-out as generated"] if orbit["control"] else []
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    title = {"l2": "L2 ratio (Carlini et al.)", "squared-l2": "Squared-L2 ratio (MQ of IET-AGC)"}[definition]
    return _table(f"<tr>{head}</tr>", "".join(body), title)


def quality_table(summary: Summary) -> str:
    """Quality of the generated images beside that of equally many training images."""
    quality = summary["quality"]
    columns = {"generated": quality["generated"]}
    if quality["floor"] is not None:
        columns["training images themselves"] = quality["floor"]
    labels = {
        "frechet_distance": "Fréchet distance",
        **{key: key.capitalize() for key in quality["generated"] if key != "frechet_distance"},
    }
    body = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{_number(column[key])}</td>" for column in columns.values())
        + "</tr>"
        for key, label in labels.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return _table(f"<tr><td></td>{head}</tr>", body)


def _table(head: str, body: str, caption: str | None = None) -> str:
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _fraction_row(label: str, find: Callable[[Summary], Mapping[str, Any] | None], better: int) -> Row:
    def value(summary: Summary) -> float | None:
        row = find(summary)
        return None if row is None else float(row["fraction"])

    def text(summary: Summary) -> str:
        row = find(summary)
        return "" if row is None else _with_interval(row)

    return Row(label, value, text, better)


def _number_row(label: str, find: Callable[[Summary], float | None], better: int) -> Row:
    return Row(label, find, lambda summary: _number(find(summary)), better)


def _plain_l2(summary: Summary) -> dict[str, Any]:
    return at_threshold(summary["memorization"]["plain"]["l2"]["mq"], HEADLINE["l2"])


def _control(summary: Summary) -> dict[str, Any] | None:
    control = summary["memorization"]["orbit"]["squared-l2"]["control"]
    return at_threshold(control["holdout"], HEADLINE["squared-l2"]) if control else None


def _unseen(summary: Summary) -> dict[str, Any] | None:
    unseen = summary["memorization"]["orbit"]["squared-l2"]["unseen"]
    return at_threshold(unseen, HEADLINE["squared-l2"]) if unseen else None


def _skip_rate(summary: Summary) -> float | None:
    return None if summary["ledger"] is None else float(summary["ledger"]["skip_rate"])


def _best(value: float | None, values: Sequence[float | None], better: int) -> str:
    known = [other for other in values if other is not None]
    if value is None or not better or len(set(known)) < 2:
        return ""
    return ' class="best"' if value == (max(known) if better > 0 else min(known)) else ""


def _with_interval(row: Mapping[str, Any]) -> str:
    return f'{percent(row["fraction"])}<span class="range">{interval(row)}</span>'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 2 else f"{value:,.1f}"
