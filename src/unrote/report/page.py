"""The report page: one self-contained HTML file that opens from disk, with or without JavaScript.

Names and captions come from strangers. They reach the page through ``html.escape``, or inside a JSON block (which no
browser runs) in which ``<`` cannot stand; page.js only ever makes text of them. A content security policy lets nothing
run or load but the page's own script, style and pictures.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unrote.auditing.memorization import HEADLINE, at_threshold
from unrote.auditing.verdict import headline as headline_row
from unrote.auditing.verdict import headline_table, interval, percent, similarity
from unrote.files import write_text
from unrote.report.charts import Series, cumulative_chart, histogram_chart, ratio_axis
from unrote.report.gallery import MAX_PAIRS, View, pair_views, pairs_data, pairs_gallery, safe_json, worst_pairs
from unrote.report.originals import ALL_ROWS, extracted_table, make_album, skipped_gallery
from unrote.report.space_tables import quality_part, secondary_part, similarity_part
from unrote.report.sprites import Album
from unrote.report.tables import comparison_table, thresholds_table

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport

COLOURS = 5
PAGE_BYTES = 14_500_000
TABLE_BYTES = 450_000  # of a report's tables and charts, generously; the rest is for pairs and pictures


def write_page(reports: Sequence["AuditReport"], path: Path, *, headline: str | None = None) -> None:
    """Write one page for one or several audits, side by side; ``headline`` is the sentence on top (plain text)."""
    assert reports
    sections, styles = [], []
    for number, report in enumerate(reports):
        section, style = _run_section(report, number, len(reports))
        sections.append(section)
        styles.append(style)
    title = headline or (reports[0].summary["verdict"]["title"] if len(reports) == 1 else "Memorization, side by side")
    script = (files("unrote.report") / "page.js").read_text(encoding="utf-8")
    style = (files("unrote.report") / "page.css").read_text(encoding="utf-8") + "".join(styles)
    write_text(Path(path), document(title, style, script, _top(title, reports), "".join(sections)))


def document(title: str, style: str, script: str, top: str, content: str) -> str:
    """A whole page: plain ``title``, and style, script, top and content as they are."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{top}\n<main>{content}</main>\n"
        "<footer>Made by unrote. Numbers: report.json. This measures copies; it is no differential-privacy "
        "guarantee.</footer>\n"
        '<dialog aria-label="enlarged pair"><div class="pair"></div><p class="steps">'
        '<button type="button" data-step="-1">Previous</button><button type="button" data-step="1">Next</button>'
        '<button type="button" data-step="0">Close</button></p></dialog>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _top(title: str, reports: Sequence["AuditReport"]) -> str:
    cards = "".join(_verdict_card(report, alone=len(reports) == 1) for report in reports)
    parts = [f'<p class="kicker">unrote memorization audit</p><h1>{escape(title)}</h1><div class="cards">{cards}</div>']
    if len(reports) > 1:
        parts.append("<h2>Side by side</h2>")
        parts.append(comparison_table([report.name for report in reports], [report.summary for report in reports]))
        parts.append(
            '<p class="soft small">95 % intervals. Bold: best of its line, by chance where intervals overlap.</p>'
        )
        parts.append("<h3>How near the generated images come to training images</h3>")
        series = [one for number, run in enumerate(reports) for one in _series(run, number, several=True)]
        parts.append(_cumulative(series))
    return f'<header class="top">{"".join(parts)}</header>'


def _verdict_card(report: "AuditReport", *, alone: bool) -> str:
    verdict, row = report.summary["verdict"], headline_row(report.summary)
    title = "" if alone else f'<p class="title">{escape(verdict["title"])}</p>'
    return (
        f'<article class="verdict {verdict["level"]}{" alone" if alone else ""}"><div><h2>{escape(report.name)}</h2>'
        f'{title}<p class="big">{_unbroken(percent(row["fraction"]))}</p>'
        f"<p>near-copies ({_unbroken(interval(row))}){_beside(report)}</p></div>"
        f"<p>{_unbroken(escape(verdict['text']))}</p></article>"
    )


def _unbroken(text: str) -> str:
    """No line break between a number and its percent sign."""
    return text.replace(" %", "&nbsp;%")


def _beside(report: "AuditReport") -> str:
    """What stands beside the big number: what real images score, and what copy detection finds."""
    unseen, similar = headline_table(report.summary)["unseen"], similarity(report.summary)
    text = ""
    if unseen is not None:
        row = at_threshold(unseen, HEADLINE["squared-l2"])
        text = f"; real images that were not trained on: <b>{_unbroken(percent(row['fraction']))}</b>"
    if similar is not None and similar["calibrated"] is not None:
        found = similar["calibrated"]
        text += (
            f"; by copy detection <b>{_unbroken(percent(found['above']['fraction']))}</b> where real images have "
            f"{_unbroken(percent(found['unseen']['fraction']))}"
        )
    return text


def _series(report: "AuditReport", number: int, *, several: bool) -> list[Series]:
    """The ratios of the verdict, of its control and, for one run, of real images that were not trained on."""
    view = "orbit-distinct"
    prefix = f"{report.name}: " if several else ""
    colour = f"c{number % COLOURS}"
    ratios = report.curves[view, "squared-l2", "train"]
    series = [Series(f"{prefix}generated → training images", ratios, colour)]
    holdout = report.curves.get((view, "squared-l2", "holdout"))
    if holdout is not None:
        control_colour = colour if several else "control"
        series.append(Series(f"{prefix}generated → held-out images", holdout, control_colour, dashed=True))
    unseen = report.curves.get((view, "squared-l2", "unseen"))
    if unseen is not None and not several:
        series.append(Series("real held-out → training images", unseen, "unseen"))
    return series


def _cumulative(series: Sequence[Series]) -> str:
    label = "Cumulative share of images by squared-L2 neighbour ratio"
    return cumulative_chart(series, ratio_axis(HEADLINE["squared-l2"]), label=label)


def _run_section(report: "AuditReport", number: int, num_reports: int) -> tuple[str, str]:
    """HTML and CSS of everything about one audit."""
    summary = report.summary
    views = pair_views(report)
    shown = worst_pairs(views, MAX_PAIRS // num_reports)
    album = _album(report, f"p{number}", views, shown, PAGE_BYTES // num_reports - TABLE_BYTES)
    series = _series(report, number, several=False)
    label = f"Histogram of squared-L2 neighbour ratios, {report.name}"
    histogram = histogram_chart(series, ratio_axis(HEADLINE["squared-l2"]), label=label)
    tables = "".join(thresholds_table(summary, definition) for definition in ("squared-l2", "l2"))
    parts = [
        f"<h2>{escape(report.name)}</h2>",
        "<h3>Generated | nearest training image, worst first</h3>",
        "<p>The number says how near the two are: for pixels the squared-L2 neighbour ratio, 0 for an exact copy and 1 "
        "for nothing special (duplicates in the training set counted once). The training image is shown as it is; "
        "enlarge a pair to see it as it was matched.</p>",
        pairs_gallery(report, views, shown, album),
        f"<h3>Training images that came back</h3>{extracted_table(report, album, ALL_ROWS // num_reports)}",
        _duplicates(summary),
        f'<div class="two"><div><h3>Ratios, as a histogram</h3>{histogram}</div>'
        f"<div><h3>Ratios, cumulative</h3>{_cumulative(series)}</div></div>",
        f"<h3>Near-copies at every threshold</h3>{tables}",
        similarity_part(report),
        quality_part(summary),
        secondary_part(summary),
        skipped_gallery(report, album),
        f"<h3>How sure is this</h3>{_notes(summary)}",
        f"<details><summary>Provenance</summary>{_provenance(summary)}</details>",
    ]
    return f'<section class="run">{"".join(parts)}</section>', album.css


def _album(report: "AuditReport", css_class: str, views: Sequence[View], shown: np.ndarray, budget: int) -> Album:
    """The pictures, in what the pairs' own data leave of the budget."""
    nothing = Album(css_class, [], [], lambda keys: np.empty(0), 0)
    data = len(safe_json(pairs_data(report, views, shown, nothing)).encode())
    return make_album(report, css_class, views, shown, budget - data - 40 * len(shown))


def _duplicates(summary: Mapping[str, Any]) -> str:
    facts = summary["duplicates"]
    alike = {"pixels": "the same pixels", "near": "nearly the same pixels"}[facts["method"]]
    if not facts["clusters"]:
        return f'<p class="soft">No two training images have {alike}.</p>'
    words = (
        f"{facts['images']:,} training images have {alike} as another one; they form {facts['clusters']:,} "
        f"cluster{'' if facts['clusters'] == 1 else 's'}, the largest of {facts['largest']:,}. Images that are in the "
        "training set many times are copied first: unrote scan finds them before training."
    )
    return f"<p>{words}</p>"


def _notes(summary: Mapping[str, Any]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in summary["certainty"])}</ul>'


def _provenance(summary: Mapping[str, Any]) -> str:
    entries: dict[str, Any] = {}
    for role, origin in summary["data"].items():
        if origin is not None:
            shape = "×".join(str(size) for size in origin["shape"])
            entries[role] = f"{origin['source']}, {shape}, fingerprint {origin['fingerprint'][:16]}"
    for key, space in summary["spaces"].items():
        entries[f"encoder {key}"] = (
            f"{space['encoder']}, {space['dimensions']:,} dimensions, weights {space['weights_sha256'][:16]}; "
            f"{space['preprocessing']}"
        )
    entries |= summary["settings"] | summary["provenance"] | {f"{k} version": v for k, v in summary["versions"].items()}
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_plain(value))}</dd>" for key, value in entries.items())
    return f"<dl>{items}</dl>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
