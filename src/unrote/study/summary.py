"""From points to the study's numbers: what each method attains against ordinary training with early stopping."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unrote.study.curves import Curve, Estimate, dominates, mean_over_seeds, ratio_over_seeds

QUALITY_MARGIN = 1.05
"""Equal quality: a Fréchet distance of at most so many times that of the baseline's best point."""
EQUAL_MEMORIZATION = 0.1
"""Equal memorization: at most so many times the baseline's at equal quality."""
MARGINS = (1.05, 1.25, 1.5, 2.0)
"""Equal quality, and worse ones, that the baseline is stopped early for."""
AREA_DISTANCE = 2.0
"""The area's reference point: so many times the baseline's best distance, and its highest memorization."""
COMPARED_AT = np.geomspace(1.0, 4.0, 25)
"""Distances, in units of the baseline's best, at which curves are compared for dominance."""

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A reading of memorization: ``value`` of a point, None if it has none, and half a count in its unit."""

    name: str
    words: str
    value: Callable[[Point], float | None]
    half: Callable[[Point], float]


def _of(*keys: str) -> Callable[[Point], float | None]:
    def read(point: Point) -> float | None:
        found: Any = point["memorization"]
        for key in keys:
            found = None if found is None else found.get(key)
        return None if found is None else float(found)

    return read


def _half_sample(point: Point) -> float:
    return 0.5 / float(point["memorization"]["orbit"]["total"])


MEASURES = (
    Measure("near-copies", "share of samples that are near-copies", _of("orbit", "fraction"), _half_sample),
    Measure("extracted", "distinct training images that came back", _of("orbit", "distinct"), lambda _: 0.5),
    Measure(
        "calibrated", "share of samples below the calibrated threshold", _of("calibrated", "fraction"), _half_sample
    ),
    Measure(
        "repeated",
        "share of samples that copy a repeated image",
        _of("orbit", "repeated", "fraction"),
        _half_sample,
    ),
)
"""The first one is the headline."""


def summarize(points: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of every regime, measure and feature space, from what ``points.json`` holds; JSON-able."""
    study = points["study"]
    regimes = {}
    for regime in study["regimes"]:
        cells = [cell for cell in points["cells"] if cell["regime"] == regime]
        if any(cell["method"] == study["baseline"] for cell in cells):
            regimes[regime] = _regime(cells, study)
    return regimes


def curve_of(cell: Mapping[str, Any], measure: Measure, space: str) -> Curve | None:
    """The curve of a cell; None if the measure or the space is not there."""
    points = cell["points"]
    values = [measure.value(point) for point in points]
    found = [value for value in values if value is not None]
    if len(found) < len(points) or any(space not in point["quality"] for point in points):
        return None
    distances = [point["quality"][space]["frechet_distance"]["value"] for point in points]
    return Curve(np.array(distances), np.array(found), measure.half(points[0]))


def spaces_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The feature spaces of quality, the primary one first."""
    quality = cells[0]["points"][0]["quality"]
    return [quality["primary"], *(key for key in quality if key not in ("primary", quality["primary"]))]


def _regime(cells: Sequence[Mapping[str, Any]], study: Mapping[str, Any]) -> dict[str, Any]:
    baseline = study["baseline"]
    methods = [name for name in study["methods"] if any(cell["method"] == name for cell in cells)]
    by_space: dict[str, Any] = {}
    for space in spaces_of(cells):
        by_measure = {}
        for measure in MEASURES:
            curves = {
                method: {
                    cell["seed"]: curve
                    for cell in cells
                    if cell["method"] == method and (curve := curve_of(cell, measure, space)) is not None
                }
                for method in methods
            }
            if curves[baseline]:
                by_measure[measure.name] = _table(curves, baseline)
        by_space[space] = by_measure
    costs = {method: _cost(cells, method, baseline) for method in methods}
    return {"spaces": by_space, "costs": costs}


def _table(curves: Mapping[str, Mapping[int, Curve]], baseline: str) -> dict[str, Any]:
    """A row for every method, from its seeds that the baseline has too."""
    reference = curves[baseline]
    rows = {}
    for method, own in curves.items():
        seeds = [seed for seed in own if seed in reference]
        if seeds:
            rows[method] = _row([own[seed] for seed in seeds], [reference[seed] for seed in seeds])
    for method, row in rows.items():
        row["dominated_by"] = [
            other for other in rows if other != method and _dominated(curves[method], curves[other], reference)
        ]
    return rows


def _row(curves: Sequence[Curve], baselines: Sequence[Curve]) -> dict[str, Any]:
    targets = [QUALITY_MARGIN * baseline.best_distance for baseline in baselines]
    own = [curve.memorized_at(target) for curve, target in zip(curves, targets, strict=True)]
    theirs = [baseline.memorized_at(target) for baseline, target in zip(baselines, targets, strict=True)]
    half, best = curves[0].half, [curve.best_distance for curve in curves]
    levels = [EQUAL_MEMORIZATION * value for value in theirs if value is not None]
    distances = [curve.distance_at(level) for curve, level in zip(curves, levels, strict=True)]
    standard = [baseline.distance_at(level) for baseline, level in zip(baselines, levels, strict=True)]
    areas = [
        tuple(one.area(AREA_DISTANCE * baseline.best_distance, float(baseline.memorized.max())) for one in pair)
        for pair in zip(curves, baselines, strict=True)
        for baseline in pair[1:]
    ]
    return {
        "seeds": len(curves),
        "best_distance": _dict(mean_over_seeds(best, low=0)),
        "at_best_distance": _dict(mean_over_seeds([curve.at_best for curve in curves], low=0)),
        "best_distance_ratio": _ratio(list(zip(best, (one.best_distance for one in baselines), strict=True))),
        "at_own_best_ratio": _ratio(
            [
                (curve.at_best, baseline.memorized_at(curve.best_distance))
                for curve, baseline in zip(curves, baselines, strict=True)
            ],
            half,
        ),
        "ratio_at": {f"{margin:g}": _ratio_at(margin, curves, baselines) for margin in MARGINS},
        "at_equal_quality": _all(own, lambda values: mean_over_seeds(values, low=0)),
        "at_equal_quality_ratio": _ratio(list(zip(own, theirs, strict=True)), half),
        "distance_at_equal_memorization": _all(distances, lambda values: mean_over_seeds(values, low=0)),
        "distance_at_equal_memorization_ratio": _ratio(list(zip(distances, standard, strict=True))),
        "area_ratio": _ratio(areas),
        "not_reached": sum(value is None for value in own),
    }


def _ratio_at(margin: float, curves: Sequence[Curve], baselines: Sequence[Curve]) -> dict[str, Any] | None:
    """Memorization over the baseline's, both at ``margin`` times the baseline's best distance."""
    pairs = [
        tuple(one.memorized_at(margin * baseline.best_distance) for one in (curve, baseline))
        for curve, baseline in zip(curves, baselines, strict=True)
    ]
    return _ratio(pairs, curves[0].half)


def _dominated(curves: Mapping[int, Curve], others: Mapping[int, Curve], reference: Mapping[int, Curve]) -> bool:
    seeds = [seed for seed in curves if seed in others and seed in reference]
    grids = [(reference[seed].best_distance * COMPARED_AT).tolist() for seed in seeds]
    return bool(seeds) and dominates([others[s] for s in seeds], [curves[s] for s in seeds], grids)


def _all(values: Sequence[float | None], mean: Callable[[list[float]], Estimate | None]) -> dict[str, Any] | None:
    """None unless every seed has a value: the seeds that have one are the easy ones."""
    found = [value for value in values if value is not None]
    return _dict(mean(found)) if len(found) == len(values) else None


def _ratio(pairs: Sequence[tuple[float | None, ...]], half: float = 0.0) -> dict[str, Any] | None:
    found = [(a, b) for a, b in pairs if a is not None and b is not None]
    return _dict(ratio_over_seeds(found, half)) if len(found) == len(pairs) else None


def _dict(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_dict()


def _cost(cells: Sequence[Mapping[str, Any]], method: str, baseline: str) -> dict[str, Any]:
    seconds = {(cell["method"], cell["seed"]): cell["cpu_seconds"] for cell in cells}
    # Processor time compares on one kind of processor and at one precision only.
    kinds = {(cell["method"], cell["seed"]): (cell.get("machine"), cell.get("precision")) for cell in cells}
    seeds = [seed for name, seed in kinds if name == method and kinds.get((baseline, seed)) == kinds[name, seed]]
    own = [cell for cell in cells if cell["method"] == method]
    return {
        "cpu_seconds": _all([cell["cpu_seconds"] for cell in own], mean_over_seeds),
        "cpu_ratio": _ratio([(seconds[method, seed], seconds[baseline, seed]) for seed in seeds]),
        "skipped": _dict(mean_over_seeds([cell["skipped"] / cell["samples_seen"] for cell in own], low=0, high=1)),
    }
