"""The audit's result in words, and how sure it is."""

from collections.abc import Mapping
from typing import Any

from unrote.auditing.memorization import HEADLINE, at_threshold

HEAVY = 0.10

Summary = Mapping[str, Any]


def headline(summary: Summary, view: str = "orbit") -> dict[str, Any]:
    """The MQ row the verdict rests on: squared-l2 at 0.33, with the orbit of augmentations unless told otherwise."""
    row: dict[str, Any] = at_threshold(summary["memorization"][view]["squared-l2"]["mq"], HEADLINE["squared-l2"])
    return row


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
    table, threshold = summary["memorization"]["orbit"]["squared-l2"], HEADLINE["squared-l2"]
    if table["control"] is None:
        return None
    train, holdout = (at_threshold(table["control"][side], threshold) for side in ("train", "holdout"))
    unseen = at_threshold(table["unseen"], threshold)
    equal_sizes: float = train["interval"][0] - holdout["interval"][1]
    all_images: float = headline(summary)["interval"][0] - max(holdout["interval"][1], unseen["interval"][1])
    return max(equal_sizes, all_images)


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
    views = "allowing for flips and shifts" if summary["settings"]["num_transforms"] > 1 else "compared as they are"
    exact = summary["exact_copies"]["orbit"]["count"]
    sentences = [
        f"{row['count']:,} of {row['total']:,} generated images ({percent(row['fraction'])}) score as near-copies of a "
        f"training image (squared-L2 neighbour ratio below {row['threshold']}, {views}), {exact:,} of them exact to "
        f"the pixel; {row['distinct']:,} distinct training image{'' if row['distinct'] == 1 else 's'} come back."
    ]
    table = summary["memorization"]["orbit"]["squared-l2"]
    if table["control"] is None:
        return [*sentences, "No held-out set was given, so natural resemblance cannot be told from copying."]
    holdout, unseen = (at_threshold(rows, row["threshold"]) for rows in (table["control"]["holdout"], table["unseen"]))
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
    if counts["train_duplicates"]:
        notes.append(
            f"{counts['train_duplicates']:,} training images are exact duplicates of another. Copies of an image that "
            f"is there {settings['num_neighbors']} times or more cannot lower the ratio, unless they are exact."
        )
    notes.append(
        "Pixel distance sees copies that are pixel-wise close, after a flip or a small shift. It does not see a copy "
        "that is cropped, rescaled, recoloured or reassembled from parts; the count of copies is a lower bound."
    )
    return notes


def _control_notes(summary: Summary) -> list[str]:
    """How often the measure is wrong on real images, and what the size of the control can show."""
    counts = summary["counts"]
    unseen = at_threshold(summary["memorization"]["orbit"]["squared-l2"]["unseen"], HEADLINE["squared-l2"])
    notes = [
        f"False alarms: of {unseen['total']:,} held-out images, which no model made, {percent(unseen['fraction'])} "
        f"({interval(unseen)}) score as near-copies of a training image at the same threshold."
    ]
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
