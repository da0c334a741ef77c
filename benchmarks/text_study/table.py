"""The study's outcome: results as JSON, a table, and curves along training."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unrote.files import write_json, write_text
from unrote.study.curves import Curve, ratio_over_seeds

REFERENCE = "fine-tuning"
DISTANCE = ("quality", "random-conv", "frechet_distance", "value")
COPIED, DISTINCT = ("memorization", "orbit", "fraction"), ("memorization", "orbit", "distinct")
CALIBRATED = ("memorization", "calibrated", "fraction")
MEMORIZED = {"copied": COPIED, "calibrated": CALIBRATED, "distinct": DISTINCT}
WITHIN = (1.05, 1.2, 1.5)
"""Times the best Fréchet distance of ordinary fine-tuning: where what is memorized is compared. As studies do."""
COLUMNS = {
    "copied": COPIED,
    "of repeated": ("memorization", "orbit", "repeated", "fraction"),
    "of single": ("memorization", "orbit", "single", "fraction"),
    "calibrated": CALIBRATED,
    "distinct": DISTINCT,
    "own nearest": ("prompts", "own_image_nearest"),
    "SSCD p95": ("memorization", "sscd", "p95"),
    "SSCD calibrated": ("memorization", "sscd", "calibrated", "fraction"),
    "FD": DISTANCE,
    "FD, training captions": ("prompts", "training_captions_distance"),
    "prompt rank": ("prompts", "prompt_rank"),
    "prompt first": ("prompts", "prompt_first"),
}
"""Column → where its number stands in a point."""

Cell = Mapping[str, Any]


def write_outcome(out: Path, cells: Sequence[Cell], untuned: Cell, facts: Mapping[str, Any]) -> None:
    """``results.json``, in the form of a study's points; ``table.md``; ``curves.svg``.

    Args:
        out: the folder.
        cells: the finished cells; each curve is made to begin at the pretrained model.
        untuned: the cell of the pretrained model.
        facts: what else is to be known of the study.
    """
    cells = [{**cell, "points": [*untuned["points"], *cell["points"]]} for cell in cells]
    write_json(out / "results.json", {**facts, "cells": cells, "untuned": untuned})
    tables = [table(cells, untuned), *(equal_quality(cells, within) for within in WITHIN)]
    write_text(out / "table.md", "\n".join(tables))
    draw(out / "curves.svg", cells)


def table(cells: Sequence[Cell], untuned: Cell) -> str:
    """Markdown: each method at the end of training, mean and standard deviation over seeds."""
    lines = ["| method | seeds | skipped | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 3)]
    shown = [number([read(untuned["points"][-1], keys)]) for keys in COLUMNS.values()]
    lines.append(f"| {untuned['method']} | 1 | – | {' | '.join(shown)} |")
    for name, same in by_method(cells).items():
        last = [cell["points"][-1] for cell in same]
        shown = [number([read(point, keys) for point in last]) for keys in COLUMNS.values()]
        skipped = number([cell["skipped"] / cell["samples_seen"] for cell in same])
        lines.append(f"| {name} | {len(same)} | {skipped} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def read(point: Any, keys: Sequence[str]) -> float | None:
    """The number at ``keys``, None where it is not known."""
    for key in keys:
        point = None if point is None else point.get(key)
    return None if point is None else float(point)


def by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each method, in the order given."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell["method"]].append(cell)
    return dict(groups)


def number(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation, in three digits."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{np.mean(known):.3g}"
    return mean if len(known) < 2 else f"{mean} ± {np.std(known, ddof=1):.2g}"


def curve(cell: Cell, keys: Sequence[str]) -> Curve:
    """Fréchet distance and the number at ``keys`` along training."""
    found = np.array([[read(point, DISTANCE), read(point, keys)] for point in cell["points"]], dtype=float)
    return Curve(found[:, 0], found[:, 1], half_count(cell, keys))


def half_count(cell: Cell, keys: Sequence[str]) -> float:
    """Half an image in the unit of the number at ``keys``."""
    return 0.5 if keys == DISTINCT else 0.5 / cell["points"][0]["memorization"]["orbit"]["total"]


def equal_quality(cells: Sequence[Cell], within: float) -> str:
    """Markdown: the least that each method memorizes with a Fréchet distance that ordinary fine-tuning attains.

    Early stopping is what any method must beat, so all snapshots of both count, and what lies between two. The distance
    is ``within`` times the best of ordinary fine-tuning on that seed. Ratios are geometric means over paired seeds.
    """
    lines = [f"At {within:g} × the best Fréchet distance of {REFERENCE}, both stopped early for it:", ""]
    lines.append("| method | seeds that attain it | " + " | ".join(f"{name} | against" for name in MEMORIZED) + " |")
    lines.append("|" + "---|" * (2 * len(MEMORIZED) + 2))
    usual = {cell["seed"]: cell for cell in cells if cell["method"] == REFERENCE}
    for name, same in by_method(cells).items():
        paired = [(cell, usual[cell["seed"]]) for cell in same if cell["seed"] in usual]
        shown, reached = [], 0
        for keys in MEMORIZED.values():
            pairs = [(own, other) for own, other in (_least(*pair, keys, within) for pair in paired) if own is not None]
            against = "–" if name == REFERENCE else ratio(pairs, half_count(same[0], keys))
            shown += [number([own for own, _ in pairs]), against]
            reached = len(pairs)
        lines.append(f"| {name} | {reached} of {len(paired)} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _least(cell: Cell, usual: Cell, keys: Sequence[str], within: float) -> tuple[float | None, float]:
    """The least of ``cell`` and of ordinary fine-tuning, at ``within`` times its best Fréchet distance."""
    reference = curve(usual, keys)
    distance = within * reference.best_distance
    attained = reference.memorized_at(distance)
    assert attained is not None
    return curve(cell, keys).memorized_at(distance), attained


def ratio(pairs: Sequence[tuple[float, float]], half: float) -> str:
    """The geometric mean over seeds with its 95 % interval."""
    found = ratio_over_seeds(pairs, half)
    if found is None:
        return "never so good"
    return f"{found.value:.2f}" + ("" if found.low is None else f" ({found.low:.2f}–{found.high:.2f})")


def draw(file: Path, cells: Sequence[Cell]) -> None:
    """What is copied, by the neighbour ratio, against the Fréchet distance along training; means over seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 7), layout="constrained")
    styles = [(colour, line) for line in ("-", "--") for colour in pyplot.colormaps["tab10"].colors]
    for (name, same), (colour, line) in zip(by_method(cells).items(), styles, strict=False):
        found = [[(read(point, DISTANCE), read(point, COPIED)) for point in cell["points"]] for cell in same]
        mean = np.mean(np.array(found, dtype=float), 0)
        axes.plot(mean[:, 0], mean[:, 1], line, color=colour, marker="o", markersize=4, label=name)
    axes.set_xlabel("Fréchet distance of images from held-out captions to held-out art (lower is better)")
    axes.set_ylabel("share of images from training captions that are copies")
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
