"""The page's pictures: generated | nearest training image, worst first, and the images most skipped in training."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from unrote.auditing.ledger import most_skipped, times_copied
from unrote.auditing.memorization import HEADLINE
from unrote.report.sprites import Sheet, make_sheet, thumbnail_bytes

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport

MAX_PAIRS = 240
RAW_BYTES = 7_000_000  # of thumbnails on a page, before PNG and base64: keeps any page below 15 MB


def worst_pairs(report: "AuditReport", num_reports: int) -> np.ndarray:
    """Indices of the pairs to show, nearest to a copy first: as many as a page has room for."""
    pairs = report.pairs
    order = np.lexsort((pairs["orbit_distance"], pairs["orbit_ratio_l2"], pairs["orbit_ratio_squared_l2"]))
    room = RAW_BYTES // num_reports // (2 * thumbnail_bytes(report.train.images.shape[1:]))
    chosen: np.ndarray = order[: max(8, min(MAX_PAIRS, room))]
    return chosen


def pairs_gallery(report: "AuditReport", css_class: str, num_reports: int) -> tuple[str, str]:
    """HTML and CSS of the pairs with their filter."""
    shown = worst_pairs(report, num_reports)
    generated = _rows(report.generated.images, shown)
    nearest = _rows(report.train.images, report.pairs["orbit_train_index"][shown])
    sheet = make_sheet(css_class, np.stack([generated, nearest], axis=1).reshape(-1, *generated.shape[1:]))
    items = "".join(_pair(report, sheet, position, int(index)) for position, index in enumerate(shown))
    total = len(report.pairs["index"])
    note = f"The {len(shown):,} nearest to a copy of {total:,}; all are in pairs.csv." if len(shown) < total else ""
    controls = (
        '<div class="filter"><label>Name contains <input type="search"></label>'
        '<label><input type="checkbox"> near-copies only</label><output class="soft"></output></div>'
    )
    return f'<p class="soft small">{note}</p>{controls}<ul class="pairs">{items}</ul>', sheet.css


def _pair(report: "AuditReport", sheet: Sheet, position: int, index: int) -> str:
    pairs = report.pairs
    ratio, transform = float(pairs["orbit_ratio_squared_l2"][index]), str(pairs["orbit_transform"][index])
    name, train_name = str(pairs["name"][index]), str(pairs["orbit_train_name"][index])
    nearest = int(pairs["orbit_train_index"][index])
    is_copy, exact = ratio < HEADLINE["squared-l2"], pairs["orbit_distance"][index] == 0
    tag = f'<span class="tag">{"exact copy" if exact else "near-copy"}</span>' if is_copy else ""
    caption = report.train.captions[nearest] if report.train.captions is not None else ""
    lines = [f'<span class="name">generated <b>{escape(name)}</b></span>']
    lines.append(f'<span class="name">training <b>{escape(train_name)}</b>{_caption(caption)}</span>')
    lines.append(f'<span class="soft">L2 ratio {pairs["orbit_ratio_l2"][index]:.3f} · {escape(transform)}</span>')
    if report.ledger is not None:
        lines.append(f'<br><span class="soft">{_ledger_line(report.ledger, nearest)}</span>')
    images = sheet.tile(2 * position, f"generated image {name}") + sheet.tile(
        2 * position + 1, f"nearest training image {train_name}"
    )
    return (
        f'<li class="pair{" copy" if is_copy else ""}" data-pair><div class="images">{images}</div>'
        f'<div class="ratio" title="squared-L2 neighbour ratio"><span>{ratio:.3f}</span>{tag}</div>'
        f"{''.join(lines)}</li>"
    )


def _caption(caption: str) -> str:
    return f" “{escape(caption)}”" if caption else ""


def _ledger_line(ledger: Mapping[str, np.ndarray], index: int) -> str:
    """What happened to a training image in training, in words."""
    words = [f"{int(ledger[column][index]):,} {column}" for column in ("visits", "skips", "moves") if column in ledger]
    ratio = ledger.get("mean_ratio")
    if ratio is not None and np.isfinite(ratio[index]):
        words.append(f"loss ratio {ratio[index]:.2f}")
    return " · ".join(words)


def skipped_gallery(report: "AuditReport", css_class: str, num_reports: int) -> tuple[str, str]:
    """HTML and CSS of the training images skipped most; empty without a ledger or skips."""
    if report.ledger is None or report.summary["ledger"] is None:
        return "", ""
    indices = most_skipped(report.ledger)
    if not len(indices):
        return "", ""
    room = max(1, RAW_BYTES // num_reports // 4 // thumbnail_bytes(report.train.images.shape[1:]))
    indices = indices[:room]
    sheet = make_sheet(css_class, _rows(report.train.images, indices))
    copies = times_copied(report.pairs, len(report.train))
    items = []
    for position, index in enumerate(indices.tolist()):
        name = str(report.train.names[index])
        came_back = f"<br><b>came back {int(copies[index]):,}×</b>" if copies[index] else ""
        items.append(
            f'<li class="pair"><div>{sheet.tile(position, f"training image {name}")}</div>'
            f'<span class="name">{escape(name)}</span>'
            f'<span class="soft">{_ledger_line(report.ledger, index)}</span>{came_back}</li>'
        )
    text = _skipped_text(report.summary["ledger"])
    return f'<h3>Most skipped in training</h3><p>{text}</p><ul class="pairs thumbs">{"".join(items)}</ul>', sheet.css


def _skipped_text(ledger: Mapping[str, Any]) -> str:
    text = f"{100 * ledger['skip_rate']:.1f} % of {ledger['visits']:,} visits were skipped."
    copied, others = ledger["copied"], ledger["others"]
    if copied["skip_rate"] is not None and others["skip_rate"] is not None:
        text += (
            f" The {copied['images']:,} training images that came back were skipped on "
            f"{100 * copied['skip_rate']:.1f} % of their visits, the others on {100 * others['skip_rate']:.1f} %."
        )
    return text


def _rows(images: Any, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(images[np.asarray(indices, dtype=np.int64)])
