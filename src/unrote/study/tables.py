"""The study's numbers as text: what Markdown and the page both show."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

COLUMNS = (
    "method",
    "seeds",
    "near-copies at equal quality",
    "÷ standard",
    "images extracted",
    "÷ standard",
    "best Fréchet distance",
    "near-copies there ÷ standard",
    "near-copies at 1.5 × ÷ standard",
    "distance at equal memorization ÷ standard",
    "area ÷ standard",
    "CPU time ÷ standard",
    "dominated by",
)


def not_computed(missing: Sequence[str]) -> str:
    """Labels of cells in words, methods of a regime that lack the same seeds together; empty if none is missing.

    >>> not_computed(["few/agc/0", "few/iet/0", "few/agc/1", "few/iet/1", "emoji/agc/1"])
    'few (seeds 0, 1): agc, iet; emoji (seed 1): agc'
    """
    seeds: dict[tuple[str, str], list[str]] = {}
    for label in missing:
        regime, method, seed = label.split("/")
        seeds.setdefault((regime, method), []).append(seed)
    methods: dict[tuple[str, str], list[str]] = {}
    for (regime, method), lacking in seeds.items():
        which = f"seed{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}"
        methods.setdefault((regime, which), []).append(method)
    return "; ".join(f"{regime} ({which}): {', '.join(names)}" for (regime, which), names in methods.items())


def table(summary: Mapping[str, Any], space: str) -> list[list[str]]:
    """The cells of :data:`COLUMNS` for every method, as text."""
    measures = summary["spaces"][space]
    extracted = measures["extracted"]
    return [
        [
            method,
            str(row["seeds"]),
            percents(row["at_equal_quality"]),
            number(row["at_equal_quality_ratio"]),
            number(extracted[method]["at_equal_quality"], 1),
            number(extracted[method]["at_equal_quality_ratio"]),
            number(row["best_distance"]),
            number(row["at_own_best_ratio"]),
            number(row["ratio_at"]["1.5"]),
            number(row["distance_at_equal_memorization_ratio"]),
            number(row["area_ratio"]),
            number(summary["costs"][method]["cpu_ratio"]),
            listed(row["dominated_by"]),
        ]
        for method, row in measures["near-copies"].items()
    ]


def number(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
    """``1.23 (1.10–1.40)``; a dash where there is none: not reached on every seed."""
    if estimate is None:
        return "–"
    return f"{estimate['value']:.{digits}f}" + _interval(estimate, lambda end: f"{end:.{digits}f}")


def percents(estimate: Mapping[str, Any] | None) -> str:
    """Likewise, of a share."""
    if estimate is None:
        return "–"
    return f"{100 * estimate['value']:.1f} %" + _interval(estimate, lambda end: f"{100 * end:.1f}")


def listed(names: Sequence[str]) -> str:
    """Names with commas, or ``none``."""
    return ", ".join(names) or "none"


def _interval(estimate: Mapping[str, Any], words: Callable[[float], str]) -> str:
    interval = estimate["interval"]
    return "" if interval is None else f" ({words(interval[0])}–{words(interval[1])})"


def floor_lines(floors: Sequence[Mapping[str, Any]], space: str) -> list[str]:
    """What real images score, averaged over seeds, in sentences."""
    if not floors:
        return []
    control, train = (
        float(np.mean([floor[role][space]["frechet_distance"]["value"] for floor in floors]))
        for role in ("control", "train")
    )
    below = [floor["unseen_below"]["fraction"] for floor in floors]
    lines = [
        f"Real images: Fréchet distance of the held-out control {control:.2f}, of the training images {train:.2f}; "
        f"{100 * float(np.mean(below)):.1f} % of the control would count as near-copies."
    ]
    accuracies = {floor["classifier_accuracy"] for floor in floors if floor.get("classifier_accuracy") is not None}
    if accuracies:
        found = ", ".join(f"{100 * accuracy:.1f} %" for accuracy in sorted(accuracies))
        lines.append(f"The classifier is right on {found} of other images.")
    return lines
