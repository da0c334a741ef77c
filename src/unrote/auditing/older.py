"""Reports that earlier versions of the audit wrote, as the present one would: what cannot be known stays unknown."""

import csv
from pathlib import Path
from typing import Any

from unrote.auditing.extracted import MAX_LISTED
from unrote.auditing.memorization import HEADLINE, at_threshold

Summary = dict[str, Any]

BORDERS = ", with the borders that shifts bring in"


def from_version_1(summary: Summary, folder: Path) -> Summary:
    """Version 2 of a report of version 1.

    Version 1 looked at flips and shifts only, compared shifted views with what the shift brings in at the border, told
    duplicates by equal pixels, calibrated no threshold and had one feature space without intervals. Its settings say
    so here, so that it is not compared with a report that was measured otherwise. Which images came back is taken from
    the ``pairs.csv`` beside it. None stands for what is not known: with duplicates among the training images, which
    of them came back, and the ratio that counts each once.

    Args:
        summary: the report.
        folder: where it lies.
    """
    exact = not summary["counts"]["train_duplicates"]
    settings, quality = summary["settings"], summary["quality"]
    settings |= {"scales": [], "brightness": [], "near_duplicates": False, "false_positive_rate": None}
    settings["encoders"] = [quality["encoder"]]
    settings["features"] += BORDERS if settings["max_shift"] else ""
    copies = at_threshold(summary["memorization"]["orbit"]["squared-l2"]["mq"], HEADLINE["squared-l2"])
    unknown = dict.fromkeys(("calibrated", "distinct_aware"))
    views = summary["memorization"].items()
    new = {
        "counts": {**summary["counts"], "leaks": None},
        "settings": settings,
        "memorization": {view: {name: table | unknown for name, table in tables.items()} for view, tables in views},
        "duplicates": {"method": "pixels", **dict.fromkeys(("clusters", "images", "largest"))},
        "extracted": {"distinct": copies["distinct"], "images": _extracted(folder, copies["count"]) if exact else None},
        "spaces": {quality["encoder"]: _space(quality)},
        "quality_space": quality["encoder"],
    }
    if exact:
        new["duplicates"] |= {"clusters": 0, "images": 0, "largest": 1}
    added = dict.fromkeys(("copy_space", "clip_score", "prompted"))
    kept = {key: value for key, value in summary.items() if key != "quality"}
    return kept | added | new | {"schema_version": 2}


def _space(quality: Summary) -> Summary:
    """Its one feature space: the Fréchet distance is the same measure, without an interval; the others are left out."""
    sides = {side: quality[side] and _distance(quality[side]["frechet_distance"]) for side in ("generated", "floor")}
    counts = {key: quality[key] for key in ("reference", "num_generated", "num_reference")}
    known = {key: quality[key] for key in ("encoder", "weights_sha256")}
    absent = dict.fromkeys(("similarity", "authenticity", "generalization"))
    return {**known, "is_fid_inception": False, "quality": counts | sides, **absent}


def _distance(value: float | None) -> Summary:
    return {"frechet_distance": None if value is None else {"value": value, "interval": None}}


def _extracted(folder: Path, count: int) -> list[Summary] | None:
    """As :func:`unrote.auditing.extracted.extracted_images` lists them, without duplicates in the training set.

    None if ``pairs.csv`` is not there, or has not as many near-copies as the report.
    """
    try:
        with (folder / "pairs.csv").open(newline="", encoding="utf-8") as file:
            copies = [copy for copy in map(_pair, csv.DictReader(file)) if copy["ratio"] < HEADLINE["squared-l2"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        return None
    if len(copies) != count:
        return None
    found: dict[int, Summary] = {}
    for copy in copies:
        image = found.setdefault(copy["cluster"], {**copy, "members": 1, "times": 0, "exact": 0})
        image["times"] += 1
        image["exact"] += copy["exact"]
        image["ratio"] = min(image["ratio"], copy["ratio"])
    return sorted(found.values(), key=lambda image: (-image["times"], image["ratio"], image["cluster"]))[:MAX_LISTED]


def _pair(row: dict[str, str]) -> Summary:
    """What a line says of the nearest training image; an empty ratio is one that there is not."""
    return {
        "cluster": int(row["orbit_train_index"]),
        "name": row["orbit_train_name"].removeprefix("'"),
        "ratio": float(row["orbit_ratio_squared_l2"] or "nan"),
        "exact": int(float(row["orbit_distance"]) == 0),
    }
