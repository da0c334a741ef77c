"""Draw the README's picture: ``python tools/readme_picture.py demo docs/images/before-after.png`` after `make demo`."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from unrote.auditing import AuditReport
from unrote.demo import METHODS, copied, run_folder
from unrote.measures import audit

SIDE, GAP, COLUMNS, LABEL = 80, 6, 11, 118
INK, PAPER, RED = "#1c1b1a", "#ffffff", "#b3261e"


def draw(reports: list[AuditReport]) -> Image.Image:
    """For each report a row of its first samples, unselected, and under each the nearest training image."""
    band = 2 * (SIDE + GAP) + 44
    canvas = Image.new("RGB", (LABEL + COLUMNS * (SIDE + GAP) + GAP, band * len(reports) + GAP), PAPER)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(17), ImageFont.load_default(13)
    for row, report in enumerate(reports):
        top = row * band + 38
        title = "Ordinary training" if report.name == "standard" else report.name.upper()
        pen.text((GAP, top - 30), f"{title}: {copied(report):.0%} of the samples are near-copies", INK, font)
        pen.text((GAP, top + SIDE / 2 - 8), "generated", INK, small)
        pen.text((GAP, top + GAP + 1.5 * SIDE - 8), "nearest in\ntraining set", INK, small)
        for column in range(COLUMNS):
            left = LABEL + column * (SIDE + GAP)
            pair = report.generated.images[column], report.train.images[int(report.pairs["train_index"][column])]
            for below, pixels in enumerate(pair):
                tile = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                canvas.paste(tile, (left, top + below * (SIDE + GAP)))
            if report.pairs["ratio_squared_l2"][column] < 0.33:
                pen.rectangle((left - 2, top - 2, left + SIDE + 1, top + 2 * SIDE + GAP + 1), outline=RED, width=3)
    return canvas


def main() -> None:
    """Read the demo folder, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    runs = [(method, run_folder(arguments.demo, method)) for method in METHODS]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw([audit(run, run, name=method) for method, run in runs]).save(arguments.out)


if __name__ == "__main__":
    main()
