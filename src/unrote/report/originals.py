"""The training images that came back, and those that training skipped most; and the pictures all galleries share."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from unrote.auditing.ledger import most_skipped, times_copied
from unrote.neighbours.orbit import orbit
from unrote.report.gallery import View, ledger_line, more_keys, pair_keys, shorten
from unrote.report.sprites import Album, Key
from unrote.report.tables import table, up_to

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport

MIN_FIRST, MAX_FIRST = 60, 1000  # near-copies that have all their pictures before the other pairs have any
OPEN_ROWS, ALL_ROWS = 12, 1000


def make_album(report: "AuditReport", css_class: str, views: Sequence[View], shown: np.ndarray, budget: int) -> Album:
    """All pictures of a report: the worst pairs, the images that came back, the most skipped, the other pairs."""
    copies = sum(any(view.is_copy(index) for view in views) for index in shown.tolist())
    first, rest = np.split(shown, [min(len(shown), max(MIN_FIRST, min(copies, MAX_FIRST)))])
    keys = [key for pair in first for key in (*pair_keys(views, pair[None]), *more_keys(views, pair[None]))]
    keys += [("train", row["cluster"]) for row in report.summary["extracted"]["images"][:ALL_ROWS]]
    keys += [("train", index) for index in _skipped(report)]
    keys += pair_keys(views, rest)
    return Album(css_class, keys, more_keys(views, rest), lambda some: load(report, some), budget)


def load(report: "AuditReport", keys: Sequence[Key]) -> np.ndarray:
    """The images [n, H, W, C] that ``keys`` name, each set read at once."""
    images = np.empty((len(keys), *report.train.images.shape[1:]), dtype=np.uint8)
    indices = np.array([key[1] for key in keys], dtype=np.int64)
    made = np.array([key[0] == "generated" for key in keys])
    images[made] = report.generated.images[indices[made]]
    images[~made] = report.train.images[indices[~made]]
    transforms = _transforms(report) if any(len(key) == 3 for key in keys) else {}
    for position, key in enumerate(keys):
        if len(key) == 3:
            images[position] = transforms[key[2]].apply(images[position : position + 1])[0]
    return images


def _transforms(report: "AuditReport") -> dict[str, Any]:
    """The orbit of this audit, by label."""
    height, width = report.train.images.shape[1:3]
    names = ("flip", "max_shift", "scales", "brightness")
    settings: dict[str, Any] = {name: report.summary["settings"][name] for name in names}
    return {view.label: view for view in orbit(**settings, height=height, width=width)}


def extracted_table(report: "AuditReport", album: Album, most: int = ALL_ROWS) -> str:
    """HTML of the distinct training images that came back, most often first."""
    extracted = report.summary["extracted"]
    rows = [_extracted_row(report, row, album) for row in extracted["images"][:most]]
    if not rows:
        return "<p>None.</p>"
    heads = ("training image", "came back", "exact", "best ratio", "copies in the training set")
    columns = "".join(f'<th scope="col">{text}</th>' for text in heads)
    head = f"<tr>{columns}</tr>"
    words = "1 distinct training image" if extracted["distinct"] == 1 else f"{extracted['distinct']:,} distinct images"
    listed = f", the first {len(rows):,} of them listed" if len(rows) < extracted["distinct"] else ""
    parts = [
        f"<p>{words}{listed}, duplicates counted once. A near-copy counts for the training image nearest to "
        f"it{up_to(report.summary)}.</p>",
        table(head, "".join(rows[:OPEN_ROWS])),
    ]
    if rows[OPEN_ROWS:]:
        more = table(head, "".join(rows[OPEN_ROWS:]))
        parts.append(f"<details><summary>{len(rows) - OPEN_ROWS:,} more</summary>{more}</details>")
    return "".join(parts)


def _extracted_row(report: "AuditReport", row: Mapping[str, Any], album: Album) -> str:
    name = shorten(row["name"])
    tile = album.tile(("train", row["cluster"]), f"training image {name}")
    cells = (f"{row['times']:,}×", f"{row['exact']:,}" if row["exact"] else "–", f"{row['ratio']:.3f}", row["members"])
    return (
        f'<tr><th scope="row"><span class="original">{tile}<span class="name">{escape(name)}</span></span></th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    )


def _skipped(report: "AuditReport") -> list[int]:
    if report.ledger is None or report.summary["ledger"] is None:
        return []
    return [int(index) for index in most_skipped(report.ledger)]


def skipped_gallery(report: "AuditReport", album: Album) -> str:
    """HTML of the training images skipped most; empty without a ledger or skips."""
    indices = _skipped(report)
    if not indices:
        return ""
    copies = times_copied(report.pairs, len(report.train))
    items = []
    for index in indices:
        name = shorten(report.train.names[index])
        came_back = f"<b>came back {int(copies[index]):,}×</b>" if copies[index] else ""
        items.append(
            f'<li class="pair"><div>{album.tile(("train", index), f"training image {name}")}</div>'
            f'<span class="name">{escape(name)}</span>'
            f'<span class="soft">{ledger_line(report, index)}</span> {came_back}</li>'
        )
    text = _skipped_text(report.summary["ledger"])
    return f'<h3>Most skipped in training</h3><p>{text}</p><ul class="pairs thumbs">{"".join(items)}</ul>'


def _skipped_text(ledger: Mapping[str, Any]) -> str:
    text = f"{100 * ledger['skip_rate']:.1f} % of {ledger['visits']:,} visits were skipped."
    copied, others = ledger["copied"], ledger["others"]
    if copied["skip_rate"] is not None and others["skip_rate"] is not None:
        text += (
            f" The {copied['images']:,} training images that came back were skipped on "
            f"{100 * copied['skip_rate']:.1f} % of their visits, the others on {100 * others['skip_rate']:.1f} %."
        )
    return text
