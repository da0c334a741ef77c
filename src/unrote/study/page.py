"""The study's page: one self-contained HTML file with Pareto plots, tables and sample sheets; it runs no script."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from unrote.files import write_text
from unrote.study.cells import Folder
from unrote.study.charts import chart_style, pareto_chart
from unrote.study.curves import Curve
from unrote.study.summary import MEASURES, QUALITY_MARGIN, curve_of, spaces_of
from unrote.study.tables import COLUMNS, floor_lines, not_computed, table

SHEET_STYLE = (
    ".sheets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:18px;margin:14px 0}"
    ".sheets img{width:100%;image-rendering:pixelated;display:block;border-radius:6px;margin-top:6px}"
    "figcaption{font-size:13.5px;line-height:1.4;margin-top:5px}td .range{display:block;margin:0}"
    "td,th{padding-right:12px}"
)


def write_page(result: Mapping[str, Any], path: Path, root: Path) -> None:
    """Write the page of what ``study.json`` holds; sample sheets are taken from the cells in ``root``."""
    style = (files("unrote.report") / "page.css").read_text(encoding="utf-8") + chart_style() + SHEET_STYLE
    study = result["study"]
    sections = [_regime(result, regime, root) for regime in result["summary"]]
    missing = not_computed(result["missing"])
    gaps = f'<p class="soft">Not computed yet: {escape(missing)}.</p>' if missing else ""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study['name'])}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header class="top"><p class="kicker">unrote study: equal samples seen, equal model, measured along training'
        f"</p><h1>{escape(study['name'])}</h1><p>{escape(study['about'])}</p>{gaps}</header>\n"
        f"<main>{''.join(sections)}</main>\n<footer>Made by unrote. Numbers: study.json; what they mean: "
        "docs/compare.md.</footer>\n</body>\n</html>\n",
    )


def _regime(result: Mapping[str, Any], regime: str, root: Path) -> str:
    study, summary = result["study"], result["summary"][regime]
    cells = [cell for cell in result["cells"] if cell["regime"] == regime]
    space = spaces_of(cells)[0]
    about = study["regimes"][regime]["about"]
    parts = [f"<section><h2>{escape(regime)}</h2><p>{escape(about)}</p>"]
    names = [study["baseline"], *(name for name in study["methods"] if name != study["baseline"])]
    target = _target(cells, study["baseline"], space)
    for measure in MEASURES:
        curves = {name: _curves(cells, name, measure.name, space) for name in names}
        shown = {name: own for name, own in curves.items() if own}
        if measure.name in summary["spaces"][space] and shown:
            share = measure.name != "extracted"
            chart = pareto_chart(shown, words=measure.words, target=target, share=share)
            first = measure is MEASURES[0]
            title = f"<h3>{escape(measure.words[0].upper() + measure.words[1:])}</h3>"
            parts.append(
                title + chart if first else f"<details><summary>{escape(measure.words)}</summary>{chart}</details>"
            )
    parts.append(
        '<p class="soft small">A faint line per seed, a strong one through the means of its snapshots; dots grow along '
        "training. Only the curve of a method that lies below and left of ordinary training's is worth having: that "
        "one stops early for free.</p>"
    )
    parts.append(_table(summary, space, study["baseline"]))
    floors = [floor for floor in result["floors"] if floor["regime"] == regime]
    parts.append("".join(f'<p class="soft small">{escape(line)}</p>' for line in floor_lines(floors, space)))
    parts.append(_sheets(cells, names, space, root))
    return "".join(parts) + "</section>"


def _curves(cells: Sequence[Mapping[str, Any]], method: str, measure: str, space: str) -> list[Curve]:
    read = next(one for one in MEASURES if one.name == measure)
    found = [curve_of(cell, read, space) for cell in cells if cell["method"] == method]
    return [curve for curve in found if curve is not None]


def _target(cells: Sequence[Mapping[str, Any]], baseline: str, space: str) -> float | None:
    """Equal quality, averaged over the baseline's seeds."""
    curves = _curves(cells, baseline, MEASURES[0].name, space)
    return float(np.mean([QUALITY_MARGIN * curve.best_distance for curve in curves])) if curves else None


def _table(summary: Mapping[str, Any], space: str, baseline: str) -> str:
    head = "".join(f"<th>{escape(name.replace('standard', baseline))}</th>" for name in COLUMNS)
    rows = "".join(
        f"<tr{' class=headline' if cells[0] == baseline else ''}>"
        + "".join(f"<td>{_with_range(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in table(summary, space)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _with_range(cell: str) -> str:
    """A value, and its interval in small below it."""
    value, bracket, interval = cell.partition(" (")
    return escape(value) + (f'<span class="range">{escape(interval.removesuffix(")"))}</span>' if bracket else "")


def _sheets(cells: Sequence[Mapping[str, Any]], names: Sequence[str], space: str, root: Path) -> str:
    """Of each method's first seed, samples of the first snapshot at equal quality, or of its best one."""
    figures = []
    for name in names:
        cell = next((cell for cell in cells if cell["method"] == name), None)
        if cell is None:
            continue
        same = [other for other in cells if other["seed"] == cell["seed"]]
        target = _target(same, names[0], space)
        distances = [point["quality"][space]["frechet_distance"]["value"] for point in cell["points"]]
        equal = [i for i, distance in enumerate(distances) if target is not None and distance <= target]
        place = equal[0] if equal else int(np.argmin(distances))
        point = cell["points"][place]
        folder = Folder(root / "cells" / cell["folder"], name)
        file = folder.sheet_file(point["samples_seen"])
        if file.exists():
            words = (
                f"{name}, {'first at equal quality' if equal else 'at its best'}: "
                f"{point['samples_seen']:,} samples seen, Fréchet distance {distances[place]:.2f}, "
                f"{100 * point['memorization']['orbit']['fraction']:.1f} % near-copies"
            )
            pairs = folder.pairs_file(point["samples_seen"])
            figures.append(
                f"<figure>{_picture(file, f'samples of {name}')}<figcaption>{escape(words)}</figcaption>"
                f"{_picture(pairs, f'the samples of {name} nearest to training images, and these below')}</figure>"
            )
    words = (
        "The first samples of a seed; below, the eight samples nearest to different training images, over the training "
        "images they are nearest to (as they are, not mirrored or moved)."
    )
    return f'<h3>Samples</h3><p class="soft small">{words}</p><div class="sheets">{"".join(figures)}</div>'


def _picture(file: Path, words: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'
