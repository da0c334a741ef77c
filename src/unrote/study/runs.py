"""Finished runs compared by the measures of a study."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.auditing.memorization import image_identity
from unrote.data import ImageStore, open_images
from unrote.data.store import count_trained_on, digests_of
from unrote.encoders import Encoder
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.errors import InputError
from unrote.files import sha256_file, write_json
from unrote.seeding import derive_seed
from unrote.study.cells import Folder, claimed, counts_of, snapshots_of
from unrote.study.measure import Yardstick
from unrote.study.plan import SamplingPlan
from unrote.study.subjects import Subjects
from unrote.training.images import training_images
from unrote.training.run import Run

logger = logging.getLogger("unrote")

REGIME = "runs"


def compare_runs(
    folders: Sequence[Path],
    out: Path,
    *,
    train: str | None,
    holdout: str | None,
    how: SamplingPlan,
    encoders: Sequence[Encoder] = (),
    device: torch.device,
) -> dict[str, Any]:
    """Sample and measure every snapshot of finished runs (the final model of those that kept none).

    Args:
        folders: the runs; the first one is the baseline.
        out: folder of samples and points; the same call again goes on.
        train: the training images; by default those of the first run.
        holdout: images none was trained on; half of them, at most as many as there are training images, are the
            control, and the rest is what quality is measured against.
        how: how they are sampled.
        encoders: feature spaces besides random convolutions; the first one is primary.
        device: where to sample.

    Returns:
        The same as :func:`unrote.study.run.run_study`, every run being a method.

    Raises:
        InputError: there is no held-out set or nothing in it but training images, or a run is not finished or was
            trained on other images.
    """
    runs = _finished(folders)
    if holdout is None:
        raise InputError("--holdout: is needed to compare runs; name images that none of them was trained on")
    first = next(iter(runs.values()))
    config = first.config.data
    if train is None:
        images = training_images(first.config)
    else:
        side = first.data["shape"][0]
        images = open_images(train, resolution=side, channels=config.channels)
    side = images.images.shape[1]
    held_out = open_images(holdout, resolution=side, channels=config.channels)
    count_trained_on(held_out, images)
    subjects = _subjects(images, held_out)
    _warn_of_differences(runs, images if train is None else None)
    yardstick = Yardstick(subjects, (*encoders, RandomConvEncoder()), out / "cache")
    cells = []
    for name, run in runs.items():
        folder = Folder(out / "cells" / _identity(run, how), name)
        with claimed(folder) as ours:
            if not ours:
                raise InputError(f"{folder.path}: another process is at it")
            models = snapshots_of(run)
            folder.sample(models, how, 0, device)
            # What training cost is not known: the run may have been interrupted, or made elsewhere.
            cost = counts_of(run) | {"cpu_seconds": None, "wall_seconds": None, "snapshots": sorted(models)}
            write_json(folder.path / "trained.json", cost)
            points = folder.measure(yardstick)
        cells.append(
            {"regime": REGIME, "method": name, "seed": 0, "folder": folder.path.name, **cost, "points": points}
        )
    study = {
        "name": "Runs compared",
        "about": ", ".join(str(run.path) for run in runs.values()),
        "seeds": [0],
        "baseline": next(iter(runs)),
        "regimes": {REGIME: {"about": f"Trained on {images.source}; held out {holdout}."}},
        "methods": {name: {"about": run.config.method} for name, run in runs.items()},
    }
    return {
        "study": study,
        "cells": cells,
        "floors": [{"regime": REGIME, "seed": 0, **yardstick.floor}],
        "missing": [],
    }


def _finished(folders: Sequence[Path]) -> dict[str, Run]:
    """The runs by name: that of the folder, or its whole path where two have one name."""
    names = [path.resolve().name for path in folders]
    found = {}
    for path, name in zip(folders, names, strict=True):
        run = Run(path)
        if run.config.model.pretrained is not None:
            raise InputError(f"{path}: is a text-to-image model; compare takes models without text")
        if not run.finished:
            raise InputError(f"{path}: is not a finished run; train it to its end first")
        found[name if names.count(name) == 1 else str(path)] = run
    return found


def _warn_of_differences(runs: dict[str, Run], images: ImageStore | None) -> None:
    """Unequal budgets are a warning; other training images make the runs incomparable."""
    for run in runs.values():
        if images is not None and run.data["fingerprint"] != images.fingerprint:
            raise InputError(
                f"{run.path}: was not trained on {images.source} as it is now, as the first run was; "
                "name the images to look for with --train"
            )
    budgets = {counts_of(run)["samples_seen"] for run in runs.values()}
    if len(budgets) > 1:
        logger.warning(
            "the runs have seen %s samples: not equally many", " and ".join(f"{n:,}" for n in sorted(budgets))
        )


def _subjects(images: ImageStore, held_out: ImageStore) -> Subjects:
    identity = image_identity(digests_of(images))
    firsts = np.flatnonzero(identity == np.arange(len(images)))
    distinct = images if len(firsts) == len(images) else images.subset(firsts)
    order = np.random.default_rng(derive_seed(0, "compare", "held-out")).permutation(len(held_out))
    size = min(len(distinct), len(held_out) // 2)
    if size < 10:
        raise InputError(f"--holdout {held_out.source}: has {len(held_out):,} images; at least 20 are needed")
    control, reference = (held_out.subset(np.sort(part)) for part in (order[:size], order[size:]))
    return Subjects(images, distinct, np.bincount(identity)[firsts] > 1, control, reference)


def _identity(run: Run, how: SamplingPlan) -> str:
    files = sorted(file for model in snapshots_of(run).values() for file in model.rglob("*.safetensors"))
    parts = (how.model_dump_json(), *(sha256_file(file) for file in files))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
