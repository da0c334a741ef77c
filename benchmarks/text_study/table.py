"""The study's outcome: results as JSON, a table, and curves along training."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unrote.files import write_json, write_text

REFERENCE = "fine-tuning"
DISTANCE = ("quality", "random-conv", "frechet_distance", "value")
COPIED = ("memorization", "orbit", "fraction")
COLUMNS = {
    "copied": COPIED,
    "of repeated": ("memorization", "orbit", "repeated", "fraction"),
    "of single": ("memorization", "orbit", "single", "fraction"),
    "calibrated": ("memorization", "calibrated", "fraction"),
    "distinct": ("memorization", "orbit", "distinct"),
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
    write_text(out / "table.md", table(cells, untuned))
    draw(out / "curves.svg", cells)


def table(cells: Sequence[Cell], untuned: Cell) -> str:
    """Markdown: each method at the end of training, mean and standard deviation over seeds."""
    lines = ["| method | seeds | skipped | " + " | ".join(COLUMNS) + " | copied against fine-tuning at equal FD |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 4))
    shown = [number([read(untuned["points"][-1], keys)]) for keys in COLUMNS.values()]
    lines.append(f"| {untuned['method']} | 1 | – | {' | '.join(shown)} | – |")
    curve = reference_curve(cells)
    for name, same in by_method(cells).items():
        last = [cell["points"][-1] for cell in same]
        shown = [number([read(point, keys) for point in last]) for keys in COLUMNS.values()]
        skipped = number([cell["skipped"] / cell["samples_seen"] for cell in same])
        equal = "–" if name == REFERENCE else against(last, curve)
        lines.append(f"| {name} | {len(same)} | {skipped} | {' | '.join(shown)} | {equal} |")
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


def both_of(point: Any) -> tuple[float, float]:
    """Fréchet distance and copied share."""
    distance, copied = read(point, DISTANCE), read(point, COPIED)
    assert distance is not None and copied is not None
    return distance, copied


def reference_curve(cells: Sequence[Cell]) -> list[tuple[float, float]]:
    """Fréchet distance and copied share of ordinary fine-tuning along training, from none on, means over seeds."""
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        if cell["method"] == REFERENCE:
            for point in cell["points"]:
                points[point["samples_seen"]].append(both_of(point))
    return [tuple(np.mean(points[seen], 0).tolist()) for seen in sorted(points)]


def copied_at(curve: Sequence[tuple[float, float]], distance: float) -> float | None:
    """How much ordinary fine-tuning had copied when it first was as good as ``distance``; None if it never was so good.

    Early stopping is what any method must beat, so the first crossing counts. Linear between snapshots.
    """
    for (before, low), (after, high) in pairwise(curve):
        if after <= distance:
            share = 0.0 if before <= distance or before == after else (before - distance) / (before - after)
            return low + share * (high - low)
    return None


def against(points: Sequence[Mapping[str, Any]], curve: Sequence[tuple[float, float]]) -> str:
    """Change of the copied share against ordinary fine-tuning stopped early at the method's Fréchet distance."""
    distance, mine = np.mean([both_of(point) for point in points], 0).tolist()
    usual = copied_at(curve, distance)
    if usual is None:
        return "fine-tuning was never so good"
    return "–" if usual == 0 else f"{(mine - usual) / usual:+.0%} ({mine:.3f} : {usual:.3f})"


def draw(file: Path, cells: Sequence[Cell]) -> None:
    """What is copied against the Fréchet distance along training, a line per method, means over seeds.

    Twice: the share of copies by the neighbour ratio, and that by SSCD where it has looked.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(15, 6), layout="constrained")
    styles = [(colour, line) for line in ("-", "--") for colour in pyplot.colormaps["tab10"].colors]
    for axes, keys, by in zip(both, (COPIED, COLUMNS["SSCD calibrated"]), ("neighbour ratio", "SSCD"), strict=True):
        for (name, same), (colour, line) in zip(by_method(cells).items(), styles, strict=False):
            found = [[(read(point, DISTANCE), read(point, keys)) for point in cell["points"]] for cell in same]
            mean = np.mean(np.array(found, dtype=float), 0)
            axes.plot(mean[:, 0], mean[:, 1], line, color=colour, marker="o", markersize=4, label=name)
        axes.set_xlabel("Fréchet distance of images from held-out captions to held-out art (lower is better)")
        axes.set_ylabel(f"share of images from training captions that are copies, by {by}")
    both[0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
