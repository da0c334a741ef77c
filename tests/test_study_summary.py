"""The study's numbers from points whose answer is known."""

import pytest

from unrote.study.results import markdown
from unrote.study.summary import summarize

SAMPLES = 500


def cell(method, seed, distances, counts, *, seconds=100.0, skipped=0):
    """A cell whose snapshots have these Fréchet distances and so many near-copies."""
    points = [
        {
            "samples_seen": 10 * (place + 1),
            "memorization": {
                "orbit": {"count": count, "total": SAMPLES, "fraction": count / SAMPLES, "distinct": count // 2},
                "calibrated": None,
            },
            "quality": {"primary": "space", "space": {"frechet_distance": {"value": distance}}},
        }
        for place, (distance, count) in enumerate(zip(distances, counts, strict=True))
    ]
    cost = {"cpu_seconds": seconds, "skipped": skipped, "samples_seen": 30}
    return {"regime": "one", "method": method, "seed": seed, "folder": "x", **cost, "points": points}


def summary(*cells, methods=("standard", "half", "worse")):
    study = {
        "name": "s",
        "about": "",
        "baseline": "standard",
        "regimes": {"one": {}},
        "methods": dict.fromkeys(methods),
    }
    result = {"study": study, "cells": list(cells), "floors": [], "missing": []}
    return summarize(result) | {"all": result}


@pytest.fixture(scope="module")
def found():
    cells = []
    for seed, scale in enumerate((1.0, 2.0, 0.5)):
        distances = [8 * scale, 4 * scale, 2 * scale]
        cells.append(cell("standard", seed, distances, [0, 100, 400]))
        cells.append(cell("half", seed, distances, [0, 50, 200], seconds=150.0, skipped=3))
        # It never gets as good as the baseline.
        cells.append(cell("worse", seed, [9 * scale, 5 * scale, 3 * scale], [0, 200, 400]))
    return summary(*cells)


def test_memorization_at_equal_quality_is_read_at_each_seeds_own_distance(found):
    rows = found["one"]["spaces"]["space"]["near-copies"]
    # At 1.05 x the best distance, between the last two points: (100.5 / 500)^0.05 (400.5 / 500)^0.95 - 0.001.
    expected = 100.5**0.05 * 400.5**0.95 / SAMPLES - 0.5 / SAMPLES
    assert rows["standard"]["at_equal_quality"]["value"] == pytest.approx(expected)
    assert rows["standard"]["at_equal_quality"]["interval"] == pytest.approx([expected, expected])
    ratio = (50.5**0.05 * 200.5**0.95) / (100.5**0.05 * 400.5**0.95)
    assert rows["half"]["at_equal_quality_ratio"]["value"] == pytest.approx(ratio)
    assert rows["half"]["seeds"] == 3


def test_what_is_not_reached_on_every_seed_has_no_number(found):
    worse = found["one"]["spaces"]["space"]["near-copies"]["worse"]
    assert worse["at_equal_quality"] is None and worse["at_equal_quality_ratio"] is None
    assert worse["not_reached"] == 3
    assert worse["best_distance_ratio"]["value"] == pytest.approx(1.5)
    # At its own best, distance 3, the baseline is half way between 100 and 400 copies.
    assert worse["at_own_best_ratio"]["value"] == pytest.approx(400.5 / (100.5 * 400.5) ** 0.5)
    # At 2 x the baseline's best, distance 4, worse is half way between 200 and 400.
    assert worse["ratio_at"]["2"]["value"] == pytest.approx((200.5 * 400.5) ** 0.5 / 100.5)
    assert worse["ratio_at"]["1.05"] is None


def test_quality_at_a_tenth_of_the_memorization(found):
    rows = found["one"]["spaces"]["space"]["near-copies"]
    assert rows["standard"]["distance_at_equal_memorization_ratio"]["value"] == pytest.approx(1.0)
    assert rows["half"]["distance_at_equal_memorization_ratio"]["value"] < 0.95
    assert rows["worse"]["distance_at_equal_memorization_ratio"]["value"] > 1.1


def test_areas_dominance_and_cost(found):
    rows, costs = found["one"]["spaces"]["space"]["near-copies"], found["one"]["costs"]
    assert rows["standard"]["area_ratio"]["value"] == pytest.approx(1.0)
    assert rows["half"]["area_ratio"]["value"] > 1.05 > 0.9 > rows["worse"]["area_ratio"]["value"]
    assert [rows[name]["dominated_by"] for name in ("standard", "half", "worse")] == [
        ["half"],
        [],
        ["standard", "half"],
    ]
    assert costs["half"]["cpu_ratio"]["value"] == pytest.approx(1.5)
    assert costs["half"]["skipped"]["value"] == pytest.approx(0.1)


def test_other_measures_and_missing_ones(found):
    measures = found["one"]["spaces"]["space"]
    assert set(measures) == {"near-copies", "extracted"}
    # 50 and 200 images, half a count added to each.
    expected = 50.5**0.05 * 200.5**0.95 - 0.5
    assert measures["extracted"]["standard"]["at_equal_quality"]["value"] == pytest.approx(expected)


def test_a_method_is_compared_on_the_seeds_both_have():
    rows = summary(
        cell("standard", 0, [4.0, 2.0], [10, 100]),
        cell("half", 0, [4.0, 2.0], [5, 50]),
        cell("half", 1, [4.0, 2.0], [500, 500]),
        methods=("standard", "half"),
    )
    row = rows["one"]["spaces"]["space"]["near-copies"]["half"]
    assert row["seeds"] == 1 and row["at_equal_quality_ratio"]["interval"] is None
    assert row["at_equal_quality_ratio"]["value"] == pytest.approx(0.5, abs=0.01)


def test_without_the_baseline_there_is_no_summary():
    assert "one" not in summary(cell("half", 0, [4.0, 2.0], [5, 50]))


def test_markdown_has_a_line_per_method(found):
    text = markdown({"summary": {"one": found["one"]}, **found["all"]})
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| method", "| standard", "| half", "| worse"]
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| – |" in lines[3]
