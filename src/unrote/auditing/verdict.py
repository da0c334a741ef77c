"""The audit's result in words, and how sure it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from unrote.auditing.memorization import HEADLINE, at_threshold

HEAVY = 0.10

Summary = Mapping[str, Any]


def headline(summary: Summary, view: str = "orbit") -> dict[str, Any]:
    """The MQ row the verdict rests on: squared-l2 at 0.33, duplicates counted once, over the orbit by default."""
    return _row(headline_table(summary, view)["mq"])


def headline_table(summary: Summary, view: str = "orbit") -> dict[str, Any]:
    """``mq``, ``control`` and ``unseen`` that the verdict rests on."""
    table: dict[str, Any] = summary["memorization"][view]["squared-l2"]
    return table["distinct_aware"] or table


def _row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return at_threshold(rows, HEADLINE["squared-l2"])


def verdict(summary: Summary) -> dict[str, Any]:
    """``level`` (heavy, some, none), ``title`` and ``text``.

    ``excess`` is by how much the fraction of near-copies certainly exceeds what needs no memorization: the distance
    between 95 % intervals, the larger of two comparisons. Equal sizes: generated against train, and against equally
    many held-out images (blind to copies of images outside the subset, when train is larger). All: generated against
    the whole training set, and the higher of that control and what held-out images score themselves. Copying is
    asserted only with excess > 0, or by pixel-exact copies where real held-out images are none. Without held-out
    images the level rests on the fraction alone (above 1 %), and the text says so.
    """
    row, excess = headline(summary), certain_excess(summary)
    level = _level(row["interval"][0] - 0.01 if excess is None else excess)
    if level == "none" and exact_beyond_chance(summary):
        level = "some"
    titles = {"heavy": "It copies its training images", "some": "It copies some training images"}
    title = titles.get(
        level,
        "No copying found beyond natural resemblance" if excess is not None else "Few near-copies, without a control",
    )
    return {"level": level, "title": title, "text": " ".join(_sentences(summary, row)), "excess": excess}


def certain_excess(summary: Summary) -> float | None:
    """See :func:`verdict`; negative when nothing is certain, None without held-out images."""
    table = headline_table(summary)
    if table["control"] is None:
        return None
    train, holdout = (_row(table["control"][side]) for side in ("train", "holdout"))
    equal_sizes: float = train["interval"][0] - holdout["interval"][1]
    unseen = max(holdout["interval"][1], _row(table["unseen"])["interval"][1])
    all_images: float = _row(table["mq"])["interval"][0] - unseen
    return max(equal_sizes, all_images, similar_excess(summary))


def similar_excess(summary: Summary) -> float:
    """By how much similarity above the calibrated threshold certainly exceeds its rate; -1 without copy detection."""
    similar = similarity(summary)
    if similar is None or similar["calibrated"] is None:
        return -1.0
    found = similar["calibrated"]
    # A model that copies nothing also makes images like those held-out ones that resemble training images, so all of
    # these count here.
    excess: float = found["above"]["interval"][0] - found["unseen"]["interval"][1]
    return excess


def similarity(summary: Summary) -> dict[str, Any] | None:
    """What copy detection found; None without such an encoder."""
    key = summary["copy_space"]
    return None if key is None else summary["spaces"][key]["similarity"]


def exact_beyond_chance(summary: Summary) -> bool:
    """Whether there are exact copies that cannot be explained by images that train and held-out share."""
    exact, unseen = summary["exact_copies"]["orbit"], summary["exact_copies"]["unseen"]
    if unseen is None or unseen["count"] == 0:
        return bool(exact["count"] > 0)
    return bool(exact["interval"][0] > unseen["interval"][1])


def _level(excess: float) -> str:
    if excess <= 0:
        return "none"
    return "heavy" if excess >= HEAVY else "some"


def _sentences(summary: Summary, row: Mapping[str, Any]) -> list[str]:
    views = (
        f"allowing for {orbit_words(summary)}" if summary["settings"]["num_transforms"] > 1 else "compared as they are"
    )
    exact = summary["exact_copies"]["orbit"]["count"]
    sentences = [
        f"{row['count']:,} of {row['total']:,} generated images ({percent(row['fraction'])}) score as near-copies of a "
        f"training image (squared-L2 neighbour ratio below {row['threshold']}, {views}), {exact:,} of them exact to "
        f"the pixel; {row['distinct']:,} distinct training image{'' if row['distinct'] == 1 else 's'} come back."
    ]
    sentences += _similar_sentence(summary)
    table = headline_table(summary)
    if table["control"] is None:
        return [*sentences, "No held-out set was given, so natural resemblance cannot be told from copying."]
    holdout, unseen = _row(table["control"]["holdout"]), _row(table["unseen"])
    share = summary["train_share"]["plain"]
    sentences.append(
        f"What needs no memorization: {percent(unseen['fraction'])} of real held-out images score the same, and "
        f"{percent(holdout['fraction'])} of the generated images do against {holdout_words(summary)}."
    )
    sentences.append(
        f"With equally many of both, the nearest image is a training image for {percent(share['fraction'])} "
        f"({interval(share)}); without memorization it would be 50 % "
        f"({interval({'interval': share['null_interval']})} by chance)."
    )
    return sentences


def _similar_sentence(summary: Summary) -> list[str]:
    similar = similarity(summary)
    if similar is None or similar["calibrated"] is None:
        return []
    found = similar["calibrated"]
    return [
        f"Copy detection ({summary['copy_space']}) finds {percent(found['above']['fraction'])} "
        f"({interval(found['above'])}) of them more similar to a training image than {found['threshold']:.2f}, as "
        f"{percent(found['unseen']['fraction'])} of real held-out images are."
    ]


def orbit_words(summary: Summary) -> str:
    """What the orbit allows for: ``flips, shifts, zoom and brightness``; empty without an orbit."""
    settings = summary["settings"]
    allowed = {"flips": settings["flip"], "shifts": settings["max_shift"], "zoom": settings["scales"]}
    words = [word for word, used in {**allowed, "brightness": settings["brightness"]}.items() if used]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def holdout_words(summary: Summary) -> str:
    """The control in words: ``700 held-out images``."""
    return f"{summary['counts']['control']:,} held-out images"


def certainty(summary: Summary) -> list[str]:
    """What limits this result: sentences for the reader, the most important first."""
    counts, settings = summary["counts"], summary["settings"]
    notes = []
    if counts["holdout"] is None:
        notes.append(
            "Without held-out images there is no control: a model of simple or repetitive images scores near-copies "
            "that are none. Give images of the same kind that were not trained on."
        )
    else:
        notes += _control_notes(summary)
    if counts["generated"] < 400:
        notes.append(
            f"Only {counts['generated']:,} generated images: fractions are known to about ±"
            f"{100 * 0.98 / max(1, counts['generated']) ** 0.5:.0f} percentage points. The papers use 65,536."
        )
    if settings["num_neighbors"] < settings["num_neighbors_asked"]:
        notes.append(
            f"The ratio uses n = {settings['num_neighbors']} neighbours, all there are, instead of "
            f"{settings['num_neighbors_asked']}: do not compare it with numbers for n = 50."
        )
    notes += _duplicate_notes(summary)
    up_to = f", up to {orbit_words(summary)}" if settings["num_transforms"] > 1 else ""
    notes.append(
        f"Pixel distance sees copies that are pixel-wise close{up_to}. It does not see a copy "
        "that is cropped, turned, recoloured or reassembled from parts; the count of copies is a lower bound."
        + ("" if summary["copy_space"] else " Copy detection (--encoder sscd) sees more of them.")
    )
    return notes


def _duplicate_notes(summary: Summary) -> list[str]:
    exact, near = summary["counts"]["train_duplicates"], summary["duplicates"]
    if not near["images"]:
        return []
    clusters = "cluster" if near["clusters"] == 1 else "clusters"
    kinds = "duplicates or near-duplicates" if near["method"] == "near" else "duplicates"
    return [
        f"{exact:,} training images are exact duplicates of another; {near['images']:,} are in {near['clusters']:,} "
        f"{clusters} of {kinds}, the largest of "
        f"{near['largest']:,}. The verdict counts each cluster once; the MQ of the papers does not, and is blind to "
        "inexact copies of an image that is there many times."
    ]


def _control_notes(summary: Summary) -> list[str]:
    """How often the measure is wrong on real images, and what the size of the control can show."""
    counts = summary["counts"]
    unseen = _row(headline_table(summary)["unseen"])
    notes = [
        f"False alarms: of {unseen['total']:,} held-out images, which no model made, {percent(unseen['fraction'])} "
        f"({interval(unseen)}) score as near-copies of a training image at the same threshold."
    ]
    if counts["leaks"]:
        notes.append(
            f"{counts['leaks']:,} of {counts['holdout']:,} held-out images are duplicates or near-duplicates of "
            "training images (`unrote scan` lists them): they count as false alarms, but not for calibrated thresholds."
        )
    if counts["control"] < counts["train"]:
        notes.append(
            f"The equal-size control compares with {counts['control']:,} of the {counts['train']:,} training images, "
            "drawn by the seed; copies of the others do not show in it. More held-out images make it sharper."
        )
    return notes


def percent(value: float) -> str:
    """A fraction for readers: ``37.4 %``, ``0.02 %``."""
    scaled = 100 * value
    digits = 0 if scaled in (0, 100) else 1 if scaled >= 0.95 else 2
    return f"{scaled:.{digits}f} %"


def interval(row: Mapping[str, Any]) -> str:
    """A 95 % interval for readers: ``35.1–39.8 %``."""
    low, high = row["interval"]
    return f"{100 * low:.1f}–{100 * high:.1f} %"
