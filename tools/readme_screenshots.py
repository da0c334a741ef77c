"""Take the README's screenshots: ``python tools/readme_screenshots.py runs/watched docs/images``, with Chromium.

Without a run in the folder, one is made: 32 emoji for as long as it takes to learn them by rote, looked at meanwhile.
"""

import argparse
import base64
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import unrote
from browser import Browser

WIDTH = 1000
SETTINGS = {
    "data.resolution": 16,
    "data.limit": 32,
    "training.epochs": 500,
    "training.batch_size": 16,
    "ensemble.local_epochs": 50,
    "monitor.every": 1,
    "monitor.samples": 32,
    "monitor.steps": 20,
    "monitor.max_overhead": 0.5,
    "monitor.holdout": "emoji:holdout",
}
SHOTS = {
    # File: from the top of the first element to the bottom of the second (selectors), and at most so many pixels.
    "report-top.png": ("header.top", "header.top", 900),
    "report-pairs.png": ("section.run", "section.run", 640),
}


def make_run(folder: Path) -> None:
    """A watched run of ordinary training, its samples and their report; goes on where it was interrupted."""
    run = unrote.train("emoji", out=folder, method="standard", preset="demo", settings=SETTINGS)
    unrote.sample(run, num=128)
    unrote.audit(run, run, "emoji:holdout", name="ordinary training").save(folder / "report")


def capture(browser: Browser, path: Path, box: dict[str, Any]) -> None:
    """The part of the page inside ``box`` (CSS pixels from its top left corner) as a PNG."""
    shot = browser.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=box | {"scale": 1})
    path.write_bytes(base64.b64decode(shot["data"]))
    print(f"{path}: {path.stat().st_size:,} bytes")


def box_of(browser: Browser, first: str, last: str, limit: int) -> dict[str, float]:
    """From the top of one element to the bottom of another, over the whole width."""
    edge = "document.querySelector({0!r}).getBoundingClientRect().{1} + window.scrollY"
    top, bottom = browser.run(edge.format(first, "top")), browser.run(edge.format(last, "bottom"))
    return {"x": 0, "y": max(0, top - 16), "width": WIDTH, "height": min(bottom - top + 32, limit)}


def main() -> None:
    """Make the run if there is none, open its page, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    # Without a browser there is an error here, not a skipped test.
    os.environ.setdefault("CI", "1")
    make_run(arguments.run)
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        browser.open(arguments.run / "report" / "report.html", width=WIDTH)
        for name, (first, last, limit) in SHOTS.items():
            capture(browser, arguments.out / name, box_of(browser, first, last, limit))
        browser.open(arguments.run / "monitor.svg", width=WIDTH)
        capture(browser, arguments.out / "monitor.png", box_of(browser, "svg", "svg", 700))


if __name__ == "__main__":
    main()
