"""The page's pairs: generated | nearest training image, worst first; all of them as data, the first also as HTML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from unrote.auditing.verdict import orbit_words
from unrote.report.sprites import COLUMNS, Album, Key

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport
    from unrote.data.store import ImageStore

MAX_PAIRS = 10_000  # of all reports on a page together
STATIC_PAIRS = 60  # are in the HTML itself, for readers without JavaScript
MAX_TEXT = 160  # characters of a name or caption; names in full are in pairs.csv


@dataclass(frozen=True)
class View:
    """A way to find the nearest training image: its score, and what the page says about each pair.

    Attributes:
        key: ``orbit``, ``plain`` or the key of an encoder.
        label: in words.
        score: what ``values`` are, in words.
        values: score of each pair [G].
        nearest: index of the training image [G].
        lower: whether a low score means a copy; otherwise a high one does.
        thresholds: (value, words), the first one is the default.
        exact: whether the two are the same to the pixel [G].
        second: another score [G] and its words, or None.
        transforms: how the training image was matched [G], or None.
    """

    key: str
    label: str
    score: str
    values: np.ndarray
    nearest: np.ndarray
    lower: bool
    thresholds: list[tuple[float, str]]
    exact: np.ndarray
    second: tuple[np.ndarray, str] | None = None
    transforms: np.ndarray | None = None

    def is_copy(self, index: int) -> bool:
        """Whether a pair is beyond the default threshold."""
        value, threshold = float(self.values[index]), self.thresholds[0][0]
        return value < threshold if self.lower else value > threshold


def pair_views(report: "AuditReport") -> list[View]:
    """The views of a report: up to flips and shifts, as they are, then by each encoder that knows copies.

    Pixel scores are the ratios in which duplicates of the nearest image count once, as in the verdict.
    """
    pairs, views = report.pairs, []
    prefixes = {"orbit": "orbit_", "plain": ""} if report.summary["settings"]["num_transforms"] > 1 else {"plain": ""}
    labels = {"orbit": f"pixels, up to {orbit_words(report.summary)}", "plain": "pixels, as they are"}
    for key, prefix in prefixes.items():
        views.append(
            View(
                key,
                labels[key],
                "squared-L2 ratio",
                pairs[f"{prefix}ratio_distinct"],
                pairs[f"{prefix}train_index"],
                lower=True,
                thresholds=_ratio_thresholds(report.summary["memorization"][key]["squared-l2"]),
                exact=pairs[f"{prefix}distance"] == 0,
                second=(pairs[f"{prefix}ratio_l2"], "L2 ratio"),
                transforms=pairs["orbit_transform"] if key == "orbit" else None,
            )
        )
    for key, space in report.summary["spaces"].items():
        if f"{key}_similarity" in pairs and space["similarity"] is not None:
            nearest = pairs[f"{key}_train_index"]
            thresholds = _similarity_thresholds(space["similarity"])
            label, exact = f"similarity, {space['encoder']}", np.zeros(len(nearest), dtype=bool)
            values = pairs[f"{key}_similarity"]
            views.append(View(key, label, "cosine similarity", values, nearest, False, thresholds, exact))
    return views


def _ratio_thresholds(table: Mapping[str, Any]) -> list[tuple[float, str]]:
    chosen = [(table["headline_threshold"], f"below {table['headline_threshold']:g}")]
    if table["distinct_aware"] is None:  # otherwise it belongs to other ratios than those shown
        chosen += _calibrated(table["calibrated"], "below")
    others = [row["threshold"] for row in table["mq"] if row["threshold"] != table["headline_threshold"]]
    return chosen + [(threshold, f"below {threshold:g}") for threshold in others]


def _similarity_thresholds(similarity: Mapping[str, Any]) -> list[tuple[float, str]]:
    chosen = _calibrated(similarity["calibrated"], "above")
    return chosen + [(row["threshold"], f"above {row['threshold']:g}") for row in similarity["generated"]["above"]]


def _calibrated(calibrated: Mapping[str, Any] | None, side: str) -> list[tuple[float, str]]:
    if calibrated is None:
        return []
    words = f"{side} {calibrated['threshold']:.3g} ({100 * calibrated['false_positive_rate']:g} % of held-out)"
    return [(calibrated["threshold"], words)]


def worst_pairs(views: Sequence[View], most: int) -> np.ndarray:
    """Indices of the pairs to show, those first that are near the top of any view's order (pixels and similarity)."""
    ranks = []
    for view in views:
        if view.key != "plain" or len(views) == 1:
            second = view.values if view.second is None else view.second[0]
            order = np.lexsort((~view.exact, second, view.values if view.lower else -view.values))
            ranks.append(np.argsort(order, kind="stable"))
    chosen: np.ndarray = np.argsort(np.min(ranks, axis=0), kind="stable")[:most]
    return chosen


def pair_keys(views: Sequence[View], shown: np.ndarray) -> list[Key]:
    """The pictures that the pairs need in the first view, in the order of the pairs."""
    return [key for i in shown.tolist() for key in (("generated", i), ("train", int(views[0].nearest[i])))]


def more_keys(views: Sequence[View], shown: np.ndarray) -> list[Key]:
    """The pictures that the pairs need besides: as matched, and the nearest images of the other views."""
    keys: list[Key] = []
    for index in shown.tolist():
        keys += [key for view in views if (key := matched_key(view, index)) is not None]
        keys += [("train", int(view.nearest[index])) for view in views[1:]]
    return keys


def matched_key(view: View, index: int) -> Key | None:
    """The picture of the training image as it was matched; None where that is the image itself."""
    if view.transforms is None or view.transforms[index] == "identity":
        return None
    return ("matched", int(view.nearest[index]), str(view.transforms[index]))


def pairs_gallery(report: "AuditReport", views: Sequence[View], shown: np.ndarray, album: Album) -> str:
    """HTML of the pairs: controls, the first of them, a template, and all of them as data."""
    first = shown[np.argsort(views[0].values[shown], kind="stable")][:STATIC_PAIRS]
    cards = "".join(_card(report, views[0], index, album) for index in first.tolist())
    empty = _slots('<span class="tile"></span><span class="tile"></span>', *[""] * 8)
    return (
        f'<p class="soft small">{_what_is_shown(report, views, shown, album)}</p>{_controls()}'
        f'<ul class="pairs all">{cards}</ul>{_pager()}'
        f'<template><li class="pair">{empty}</li></template>'
        f'<script type="application/json">{safe_json(pairs_data(report, views, shown, album))}</script>'
    )


def _controls() -> str:
    return (
        '<div class="filter" role="search" aria-label="Pairs">'
        '<label>Compared by <select data-control="view"></select></label>'
        '<label>Near-copy <select data-control="threshold"></select></label>'
        '<label><input type="checkbox"> near-copies only</label>'
        '<label>Sort <select data-control="sort"><option value="worst">worst first</option>'
        '<option value="best">best first</option><option value="name">by name</option></select></label>'
        '<label>Text contains <input type="search"></label><output class="soft" aria-live="polite"></output></div>'
    )


def _pager() -> str:
    buttons = (
        '<button type="button" data-page="-1">Previous</button><span class="soft"></span>'
        '<button type="button" data-page="1">Next</button>'
    )
    return f'<nav class="pager" aria-label="Pages of pairs">{buttons}</nav>'


def _what_is_shown(report: "AuditReport", views: Sequence[View], shown: np.ndarray, album: Album) -> str:
    total = len(report.pairs["index"])
    every = "The one pair is here" if total == 1 else f"All {total:,} pairs are here"
    parts = [every if len(shown) == total else f"The worst {len(shown):,} of {total:,} pairs"]
    pictured = sum(album.number(("generated", index)) >= 0 for index in shown.tolist())
    if pictured < len(shown):
        parts.append(f"pictures of the worst {pictured:,}, of the others the numbers only")
    if album.words is not None:
        parts.append(f"the worst pictures lossless, the others {album.words}")
    parts.append("pairs.csv has all of them, with all columns")
    if len(shown) > STATIC_PAIRS:
        parts[0] += f"<noscript> (without JavaScript: the first {STATIC_PAIRS})</noscript>"
    return "; ".join(parts) + "."


def _card(report: "AuditReport", view: View, index: int, album: Album) -> str:
    nearest = int(view.nearest[index])
    name, train_name = shorten(report.pairs["name"][index]), shorten(report.train.names[nearest])
    tiles = album.tile(("generated", index), f"generated image {name}")
    tiles += album.tile(("train", nearest), f"nearest training image {train_name}")
    copy = view.is_copy(index)
    tag = "" if not copy else "exact copy" if view.exact[index] else "near-copy"
    detail = "" if view.second is None else f"{view.second[1]} {view.second[0][index]:.3f}"
    matched = matched_key(view, index)
    if matched is not None:
        detail += f" · {matched[2]}"
    prompt, caption = (quoted(store, at) for store, at in ((report.generated, index), (report.train, nearest)))
    score, note = f"{view.values[index]:.3f}", ledger_line(report, nearest)
    texts = [score, tag, name, prompt, train_name, caption, detail, note]
    return f'<li class="pair{" copy" if copy else ""}">{_slots(tiles, *map(escape, texts))}</li>'


def _slots(tiles: str, *texts: str) -> str:
    """The inside of a card; every text is escaped already. page.js fills the same slots."""
    score, tag, name, prompt, train, caption, detail, note = texts
    return (
        f'<button type="button" class="images" title="Enlarge">{tiles}</button>'
        f'<span class="ratio"><span data-slot="score">{score}</span><span class="tag" data-slot="tag">{tag}</span>'
        f'</span><span class="name">generated <b data-slot="name">{name}</b> <span data-slot="prompt">{prompt}</span>'
        f'</span><span class="name">training <b data-slot="train">{train}</b> '
        f'<span data-slot="caption">{caption}</span></span>'
        f'<span class="soft" data-slot="detail">{detail}</span><span class="soft" data-slot="note">{note}</span>'
    )


def pairs_data(report: "AuditReport", views: Sequence[View], shown: np.ndarray, album: Album) -> dict[str, Any]:
    """What page.js needs: columns in the order of ``shown``; training images by their place in ``train``."""
    used = np.unique(np.concatenate([view.nearest[shown] for view in views]))
    originals = used.tolist()
    return {
        "columns": COLUMNS,
        "sheets": [{"name": sheet.css_class, "count": sheet.count, "steps": sheet.steps} for sheet in album.sheets],
        "name": [shorten(report.pairs["name"][index]) for index in shown.tolist()],
        "prompt": _captions(report.generated, shown.tolist()),
        "picture": [album.number(("generated", index)) for index in shown.tolist()],
        "train": {
            "name": [shorten(report.train.names[index]) for index in originals],
            "caption": _captions(report.train, originals),
            "note": [ledger_line(report, index) for index in originals] if report.ledger is not None else None,
            "picture": [album.number(("train", index)) for index in originals],
        },
        "views": [_view_data(view, shown, used, album) for view in views],
    }


def _view_data(view: View, shown: np.ndarray, used: np.ndarray, album: Album) -> dict[str, Any]:
    data: dict[str, Any] = {
        "label": view.label,
        "score": view.score,
        "lower": view.lower,
        "thresholds": view.thresholds,
        "value": _rounded(view.values[shown]),
        "train": np.searchsorted(used, view.nearest[shown]).tolist(),
        "exact": np.flatnonzero(view.exact[shown]).tolist(),
    }
    if view.second is not None:
        data |= {"second": _rounded(view.second[0][shown]), "secondWords": view.second[1]}
    if view.transforms is not None:
        labels, numbers = np.unique(view.transforms[shown].astype(str), return_inverse=True)
        keys = [matched_key(view, index) for index in shown.tolist()]
        matched = [-1 if key is None else album.number(key) for key in keys]
        data |= {"transforms": labels.tolist(), "transform": numbers.tolist(), "matched": matched}
    return data


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def safe_json(data: Any) -> str:
    """JSON that may stand inside <script>: no ``<``, ``>`` or ``&`` in it, whatever the names are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def shorten(text: Any) -> str:
    """A name or caption of bounded length."""
    text = str(text)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def quoted(store: "ImageStore", index: int) -> str:
    """The caption of an image in quotation marks; empty if it has none."""
    caption = "" if store.captions is None else shorten(store.captions[index])
    return f"“{caption}”" if caption else ""


def _captions(store: "ImageStore", indices: Sequence[int]) -> list[str] | None:
    return None if store.captions is None else [quoted(store, index) for index in indices]


def ledger_line(report: "AuditReport", index: int) -> str:
    """What happened to a training image in training, in words."""
    ledger = report.ledger or {}
    words = [f"{int(ledger[column][index]):,} {column}" for column in ("visits", "skips", "moves") if column in ledger]
    ratio = ledger.get("mean_ratio")
    if ratio is not None and np.isfinite(ratio[index]):
        words.append(f"loss ratio {ratio[index]:.2f}")
    return " · ".join(words)
