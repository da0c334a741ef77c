"""The audit's result in words, and how sure it is."""

from collections.abc import Mapping
from typing import Any

from unrote.audit.memorization import HEADLINE, at_threshold

HEAVY = 0.10

Summary = Mapping[str, Any]


def headline(summary: Summary, view: str = "orbit") -> dict[str, Any]:
    """The MQ row the verdict rests on: squared-l2 at 0.33, with the orbit of augmentations unless told otherwise."""
    row: dict[str, Any] = at_threshold(summary["memorization"][view]["squared-l2"]["mq"], HEADLINE["squared-l2"])
    return row


def verdict(summary: Summary) -> dict[str, Any]:
    """``level`` (heavy, some, none), ``title`` and ``text``.

    With a held-out set memorization is asserted only where the 95 % interval of the fraction of near-copies of
    training images lies above that of equally many held-out images. Without one, resemblance that any good sample
    bears to common images cannot be told from copying, and the text says so.
    """
    row, table = headline(summary), summary["memorization"]["orbit"]["squared-l2"]
    control = table["control"]
    if control is None:
        level = _level(row["interval"][0], certain=row["interval"][0] > 0.01)
    else:
        threshold = HEADLINE["squared-l2"]
        train, holdout = (at_threshold(control[side], threshold) for side in ("train", "holdout"))
        certain = train["interval"][0] > holdout["interval"][1]
        level = _level(train["interval"][0], certain)
    titles = {"heavy": "It copies its training images", "some": "It copies some training images"}
    title = titles.get(level, "No copying found")
    return {"level": level, "title": title, "text": " ".join(_sentences(summary, row, control))}


def _level(lower_bound: float, certain: bool) -> str:
    if not certain:
        return "none"
    return "heavy" if lower_bound >= HEAVY else "some"


def _sentences(summary: Summary, row: Mapping[str, Any], control: Mapping[str, Any] | None) -> list[str]:
    views = "allowing for flips and shifts" if summary["settings"]["num_transforms"] > 1 else "compared as they are"
    sentences = [
        f"{row['count']:,} of {row['total']:,} generated images ({percent(row['fraction'])}, 95 % interval "
        f"{interval(row)}) are near-copies of a training image (squared-L2 neighbour ratio below "
        f"{row['threshold']}, {views}); they copy {row['distinct']:,} distinct training "
        f"image{'' if row['distinct'] == 1 else 's'}."
    ]
    if control is None:
        return [*sentences, "No held-out set was given, so natural resemblance cannot be told from copying."]
    holdout = at_threshold(control["holdout"], row["threshold"])
    share = summary["train_share"]["plain"]
    sentences.append(
        f"Against equally many held-out images ({summary['counts']['control']:,}) it is {percent(holdout['fraction'])}."
    )
    sentences.append(
        f"The nearest image is a training image for {percent(share['fraction'])} of them ({interval(share)}); "
        "50 % would be no memorization."
    )
    return sentences


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
        unseen = at_threshold(summary["memorization"]["orbit"]["squared-l2"]["unseen"], HEADLINE["squared-l2"])
        notes.append(
            f"False alarms: of {unseen['total']:,} held-out images, which no model made, {percent(unseen['fraction'])} "
            f"({interval(unseen)}) count as near-copies of a training image at the same threshold."
        )
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


def percent(value: float) -> str:
    """A fraction for readers: ``37.4 %``, ``0.02 %``."""
    scaled = 100 * value
    digits = 0 if scaled in (0, 100) else 1 if scaled >= 0.95 else 2
    return f"{scaled:.{digits}f} %"


def interval(row: Mapping[str, Any]) -> str:
    """A 95 % interval for readers: ``35.1–39.8 %``."""
    low, high = row["interval"]
    return f"{100 * low:.1f}–{100 * high:.1f} %"
