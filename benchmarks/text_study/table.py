"""The study's outcome: results as JSON, a table, and curves along training."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unrote.files import write_json, write_text

REFERENCE, UNTUNED = "fine-tuning", "no fine-tuning"
COLUMNS = {
    "copied": ("memorization", "copied"),
    "of repeated": ("memorization", "copies_of_repeated"),
    "of single": ("memorization", "copies_of_single"),
    "calibrated": ("memorization", "calibrated_ratio"),
    "distinct": ("memorization", "distinct_extracted"),
    "own nearest": ("memorization", "own_image_nearest"),
    "SSCD p95": ("memorization", "sscd_95"),
    "SSCD > 1 %": ("memorization", "sscd_calibrated"),
    "FD": ("quality", "frechet_distance"),
    "FD, training captions": ("quality", "frechet_distance_training_captions"),
    "prompt rank": ("quality", "prompt_rank"),
    "prompt first": ("quality", "prompt_first"),
}
"""Column → where its number stands in a point."""

Cell = Mapping[str, Any]


def write_outcome(out: Path, cells: Sequence[Cell], facts: Mapping[str, Any]) -> None:
    """``results.json``, ``table.md`` and ``curves.svg``."""
    write_json(out / "results.json", {**facts, "cells": list(cells)})
    write_text(out / "table.md", table(cells))
    draw(out / "curves.svg", cells)


def table(cells: Sequence[Cell]) -> str:
    """Markdown: each method at the end of training, mean and standard deviation over seeds."""
    lines = ["| method | seeds | skipped | " + " | ".join(COLUMNS) + " | copied against fine-tuning at equal FD |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 4))
    curve = reference_curve(cells)
    for name, same in by_method(cells).items():
        last = [cell["points"][-1] for cell in same]
        shown = [number([point[part].get(key) for point in last]) for part, key in COLUMNS.values()]
        skipped = number([cell["skipped"] / cell["samples_seen"] if "skipped" in cell else None for cell in same])
        lines.append(f"| {name} | {len(same)} | {skipped} | {' | '.join(shown)} | {against(last, curve)} |")
    return "\n".join(lines) + "\n"


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


def reference_curve(cells: Sequence[Cell]) -> list[tuple[float, float]]:
    """Fréchet distance and copied share of ordinary fine-tuning along training, from none on, means over seeds."""
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        if cell["method"] in (REFERENCE, UNTUNED):
            for point in cell["points"]:
                if point["quality"]["frechet_distance"] is not None:
                    both = (point["quality"]["frechet_distance"], point["memorization"]["copied"])
                    points[point["samples_seen"]].append(both)
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
    distances = [point["quality"]["frechet_distance"] for point in points]
    if None in distances or not curve:
        return "–"
    usual = copied_at(curve, float(np.mean(distances)))
    if usual is None:
        return "better than it ever was"
    mine = float(np.mean([point["memorization"]["copied"] for point in points]))
    return "–" if usual == 0 else f"{(mine - usual) / usual:+.0%} ({mine:.3f} : {usual:.3f})"


def draw(file: Path, cells: Sequence[Cell]) -> None:
    """Copied share against Fréchet distance along training, a line per method, means over seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    styles = [(colour, line) for line in ("-", "--") for colour in pyplot.colormaps["tab10"].colors]
    for (name, same), (colour, line) in zip(by_method(cells).items(), styles, strict=False):
        both = [
            [(p["quality"]["frechet_distance"], p["memorization"]["copied"]) for p in cell["points"]] for cell in same
        ]
        if any(None in pair for cell in both for pair in cell):
            continue
        mean = np.mean(both, 0)
        axes.plot(mean[:, 0], mean[:, 1], line, color=colour, marker="o", markersize=4, label=name)
    axes.set_xlabel("Fréchet distance of images from held-out captions to held-out art (lower is better)")
    axes.set_ylabel("share of images from training captions that are copies")
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
