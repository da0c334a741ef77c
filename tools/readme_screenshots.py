"""Take the screenshots of README and docs: ``python tools/readme_screenshots.py docs/images``, with Chromium.

The report is of emoji among which copies are planted, as in docs/notebooks/first-audit.ipynb; the chart is of a small
model that learns 16 emoji of 8x8 pixels by rote while the monitor looks. A minute of one core.
"""

import argparse
import base64
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import unrote
from browser import Browser

WIDTH = 1000
SETTINGS = {
    "data.resolution": 8,
    "data.limit": 16,
    "model.block_out_channels": [32, 32],
    "model.prediction_type": "v_prediction",
    "model.beta_schedule": "squaredcos_cap_v2",
    "training.mixed_precision": "no",
    "training.epochs": 360,
    "training.batch_size": 16,
    "training.learning_rate": 2e-3,
    "training.lr_warmup_steps": 2,
    "training.ema_decay": 0.99,
    "ensemble.local_epochs": 30,
    "monitor.every": 1,
    "monitor.max_overhead": 10.0,
    "monitor.stop_when": "mq-orbit-squared@0.33 > 0.9",
    "monitor.holdout": "emoji:holdout",
}
SHOTS = {
    # File: what it begins with, and at most so many pixels.
    "report-top.png": ("header.top", 420),
    "report-pairs.png": ("section.run", 640),
}


def planted_report(folder: Path) -> Path:
    """The page of an audit of 60 emoji and 16 copies of training images: noisy, mirrored, shifted, brighter."""
    random = np.random.default_rng(0)
    train = unrote.open_images("emoji", resolution=32, limit=400).images
    others = unrote.open_images("emoji:holdout", resolution=32).images
    noisy, mirrored, shifted, bright = np.split(train[random.choice(len(train), 16, replace=False)], 4)
    noisy = np.clip(noisy + random.normal(0, 8, noisy.shape), 0, 255).astype(np.uint8)
    bright = np.clip(bright * 1.12, 0, 255).astype(np.uint8)
    copies = [noisy, mirrored[:, :, ::-1], np.roll(shifted, 2, axis=2), bright]
    generated = np.concatenate([others[:60], *copies])
    return unrote.audit(generated, train, others[60:460], name="planted copies").save(folder)


def capture(browser: Browser, path: Path, selector: str, limit: int) -> None:
    """An element of the page, over the whole width and at most ``limit`` pixels of its height, as a PNG."""
    edge = f"document.querySelector({selector!r}).getBoundingClientRect()"
    top, height = browser.run(f"{edge}.top + window.scrollY"), browser.run(f"{edge}.height")
    box: dict[str, Any] = {"x": 0, "y": top, "width": WIDTH, "height": min(height, limit), "scale": 1}
    shot = browser.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=box)
    path.write_bytes(base64.b64decode(shot["data"]))
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Make the report and the run, open both, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    # Without a browser there is an error here, not a skipped test.
    os.environ.setdefault("CI", "1")
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        browser.open(planted_report(Path(folder) / "report"), width=WIDTH)
        for name, (selector, limit) in SHOTS.items():
            capture(browser, out / name, selector, limit)
        run = unrote.train("emoji", out=Path(folder) / "run", method="standard", settings=SETTINGS)
        browser.open(run.path / "monitor.svg", width=WIDTH)
        capture(browser, out / "monitor.png", "svg", 700)


if __name__ == "__main__":
    main()
