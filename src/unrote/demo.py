"""``unrote demo``: the whole way, from training to proof, on the embedded emoji."""

import logging
import time
from pathlib import Path
from typing import Any

from unrote.api import train_config
from unrote.auditing import AuditReport
from unrote.auditing.memorization import HEADLINE, at_threshold
from unrote.config import Config, load_config
from unrote.measures import audit
from unrote.report.page import write_page
from unrote.sampling import sample
from unrote.training.images import training_images

logger = logging.getLogger("unrote")

METHODS = ("standard", "iet-agc+")


def run_demo(out: Path, *, toy: bool = False) -> str:
    """Train ordinary diffusion and IET-AGC+ on the same images with the same budget, sample both, audit both.

    Args:
        out: folder of the two runs and the page; the same call again goes on where it was interrupted.
        toy: a few steps on a few images, to see that everything works.

    Returns:
        What was found, where the page is, and what to do next.
    """
    num, steps = (32, 10) if toy else (256, 50)
    reports = []
    for method in METHODS:
        started = time.monotonic()
        config = _config(method, toy)
        run = train_config(config, training_images(config), run_folder(out, method))
        logger.info("%s: trained (%.0f s), sampling %d images", method, time.monotonic() - started, num)
        samples = sample(run, num, steps=steps)
        reports.append(audit(samples, run, "emoji:holdout", name=method))
        logger.info("%s: audited (%.0f s in all)", method, time.monotonic() - started)
    sentence = compare(*reports)
    page = out / "report.html"
    write_page(reports, page, headline=sentence)
    return (
        f"{sentence}\n\nThe evidence: {page}\n\n"
        f"Next: unrote train --data YOUR_IMAGES --resolution 32 --out runs/first\n"
        f"      unrote sample runs/first --num 256\n"
        f"      unrote audit runs/first --train runs/first --holdout YOUR_OTHER_IMAGES"
    )


def run_folder(out: Path, method: str) -> Path:
    """The run of ``method`` in a demo's folder."""
    return out / method.replace("+", "-plus")


def _config(method: str, toy: bool) -> Config:
    small: dict[str, Any] = {"data.limit": 32, "training.epochs": 8}
    return load_config(method=method, preset="demo", overrides=small if toy else {})


def compare(standard: AuditReport, ours: AuditReport) -> str:
    """A plain sentence with the reduction and the quality difference, whatever they are."""
    before, after = copied(standard), copied(ours)
    fd_before, fd_after = frechet(standard), frechet(ours)
    change = "" if before == 0 else f" ({(after - before) / before:+.0%})"
    return (
        f"{before:.0%} of the samples of ordinary training are near-copies of a training image, {after:.0%} of those "
        f"of {ours.name} at the same number of samples seen{change}; their Fréchet distance to held-out images is "
        f"{fd_before:.2f} and {fd_after:.2f} ({(fd_after - fd_before) / fd_before:+.0%}; lower is better)."
    )


def copied(report: AuditReport) -> float:
    """MQ as the papers define it, as a fraction: samples whose squared-L2 neighbour ratio is below 0.33."""
    rows = report.summary["memorization"]["plain"]["squared-l2"]["mq"]
    fraction: float = at_threshold(rows, HEADLINE["squared-l2"])["fraction"]
    return fraction


def frechet(report: AuditReport) -> float:
    """Fréchet distance of the samples to the held-out images."""
    space = report.summary["spaces"][report.summary["quality_space"]]
    distance: float = space["quality"]["generated"]["frechet_distance"]["value"]
    return distance
