"""What a scan found, as files and as a page."""

import csv
import io
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unrote.data.namelist import name_lines
from unrote.files import write_json, write_text
from unrote.report.exports import cell
from unrote.report.page import document
from unrote.report.sprites import make_sheet, thumbnail_bytes

if TYPE_CHECKING:
    from unrote.scanning.scan import ScanReport

RAW_BYTES = 3_500_000  # of thumbnails in each of the two galleries
MAX_GROUPS, MAX_MEMBERS, MAX_RISKS = 150, 12, 240


def write_scan(report: "ScanReport", out: Path) -> Path:
    """Write scan.json, clusters.json, risk.csv, keep.txt and scan.html into ``out``; returns the path of the page."""
    own = len(report.images)
    groups = [
        {
            "size": len(group),
            "names": [report.name(index) for index in group if index < own],
            "holdout_names": [report.name(index) for index in group if index >= own],
        }
        for group in report.groups()
    ]
    found = zip(report.pairs.tolist(), report.correlations.tolist(), strict=True)
    pairs = [[report.name(left), report.name(right), round(value, 4)] for (left, right), value in found]
    write_json(out / "scan.json", report.summary)
    write_json(out / "clusters.json", {"clusters": groups, "pairs": pairs})
    write_text(out / "risk.csv", risk_csv(report))
    write_text(out / "keep.txt", name_lines(str(report.images.names[index]) for index in report.keep))
    page = out / "scan.html"
    write_text(page, scan_page(report))
    return page


def by_risk(report: "ScanReport") -> np.ndarray:
    """Indices of the images, the riskiest first."""
    order: np.ndarray = np.argsort(-report.risk["risk"], kind="stable")
    return order


def risk_csv(report: "ScanReport") -> str:
    """One row per image, the riskiest first; a name that a spreadsheet would run gets a leading apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["rank", "index", "name", *report.risk])
    columns = {key: values.tolist() for key, values in report.risk.items()}
    for rank, index in enumerate(by_risk(report).tolist(), 1):
        row = [rank, index, str(report.images.names[index]), *(column[index] for column in columns.values())]
        writer.writerow([cell(value) for value in row])
    return file.getvalue()


def scan_page(report: "ScanReport") -> str:
    """The page: counts, clusters, images at risk, what could not be read."""
    groups, groups_css = _groups(report)
    risks, risks_css = _risks(report)
    style = (files("unrote.report") / "page.css").read_text(encoding="utf-8") + groups_css + risks_css
    script = (files("unrote.report") / "page.js").read_text(encoding="utf-8")
    source = report.images.source
    words = f"<h1>{escape(source)}</h1><p>{escape(str(report))}</p>"
    top = f'<header class="top"><p class="kicker">unrote scan</p>{words}</header>'
    content = (
        f"<h2>Clusters of duplicates</h2>{groups}<h2>Most likely to be memorized</h2>"
        "<p>The number is log2(copies) + log2(isolation), and what a run's ledger adds; docs/scan.md says what it is "
        "worth. One image of each cluster; all are in risk.csv.</p>"
        f"{risks}{_bad(report)}"
    )
    return document(f"Scan of {source}", style, script, top, content)


def _groups(report: "ScanReport") -> tuple[str, str]:
    groups = report.groups()
    room = max(2, RAW_BYTES // thumbnail_bytes(report.images.images.shape[1:]))
    shown: list[list[int]] = []
    for group in groups[:MAX_GROUPS]:
        members = group[:MAX_MEMBERS]
        if sum(map(len, shown)) + len(members) > room:
            break
        shown.append(members)
    if not shown:
        return "<p>None.</p>", ""
    sheet = make_sheet("g", np.stack([report.pixels(index) for group in shown for index in group]))
    own, position, items = len(report.images), 0, []
    for group, whole in zip(shown, groups, strict=False):
        tiles, names = [], []
        for index in group:
            name = report.name(index) + (" (held out)" if index >= own else "")
            tiles.append(sheet.tile(position, name))
            names.append(escape(name))
            position += 1
        items.append(
            f'<li class="pair" data-pair><div class="images">{"".join(tiles)}</div>'
            f'<div class="ratio">{len(whole):,} images</div><span class="name">{" · ".join(names)}</span></li>'
        )
    note = (
        f'<p class="soft">{len(shown):,} of {len(groups):,} clusters, held-out images included; '
        "all are in clusters.json.</p>"
    )
    return f'{note}<ul class="pairs">{"".join(items)}</ul>', sheet.css


def _risks(report: "ScanReport") -> tuple[str, str]:
    room = max(1, min(MAX_RISKS, RAW_BYTES // thumbnail_bytes(report.images.images.shape[1:])))
    order = by_risk(report)
    _, best = np.unique(report.risk["cluster"][order], return_index=True)  # of duplicates, the riskiest
    chosen = order[np.sort(best)][:room]
    sheet = make_sheet("k", np.stack([report.pixels(index) for index in chosen.tolist()]))
    items = []
    for position, index in enumerate(chosen.tolist()):
        name, values = report.name(index), {key: float(column[index]) for key, column in report.risk.items()}
        text = f"{values['copies']:.0f} copies · isolation {values['isolation']:.2f}"
        if "skip_rate" in values:
            text += f" · skipped {100 * values['skip_rate']:.0f}% · loss ratio {values['mean_ratio']:.2f}"
        items.append(
            f'<li class="pair">{sheet.tile(position, name)}<div class="ratio">{values["risk"]:.2f}</div>'
            f'<span class="name">{escape(name)}</span><span class="soft">{text}</span></li>'
        )
    return f'<ul class="pairs thumbs">{"".join(items)}</ul>', sheet.css


def _bad(report: "ScanReport") -> str:
    rows = [(bad["name"], bad["reason"]) for bad in report.summary["unreadable"]]
    rows += [(name, "constant: all pixels are alike") for name in report.summary["constant"]]
    rows += [(name, "also held out") for name in report.summary["leaks"]]
    if not rows:
        return ""
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(reason)}</td></tr>" for name, reason in rows[:1000])
    return f'<h2>Not to be trained on</h2><div class="scroll"><table><tbody>{lines}</tbody></table></div>'
