"""A study from its file to its points: every cell once, however often and by how many processes it is started."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.data import ImageStore
from unrote.encoders import Encoder
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.errors import InputError
from unrote.scanning.duplicates import near_clusters
from unrote.study.cells import Cell, claimed, train_cell
from unrote.study.classifier import trained_classifier
from unrote.study.measure import Yardstick
from unrote.study.plan import ImagesPlan, Study
from unrote.study.records import Records
from unrote.study.subjects import Subjects, choose_subjects, encoder_images

logger = logging.getLogger("unrote")


@dataclass(frozen=True)
class Ground:
    """What all methods of a regime and seed share: images and yardstick, found when they are needed."""

    study: Study
    regime: str
    seed: int
    root: Path
    encoders: tuple[Encoder, ...] = ()
    records: Records | None = None

    @cached_property
    def subjects(self) -> Subjects:
        """The images."""
        return choose_subjects(self.study.regimes[self.regime].images, self.seed)

    @cached_property
    def yardstick(self) -> Yardstick:
        """What the methods' samples are measured by."""
        classifiers = None if self.records is None else self.records.classifiers
        spaces = (*self.encoders, *quality_spaces(self.study.regimes[self.regime].images, classifiers))
        return Yardstick(self.subjects, spaces, self.root / "cache")

    @cached_property
    def _deduplicated(self) -> ImageStore:
        train = self.subjects.train
        return train.subset(np.unique(near_clusters(train)))

    def images(self, method: str) -> ImageStore:
        """What ``method`` trains on."""
        return self._deduplicated if self.study.methods[method].deduplicate else self.subjects.train

    def cell(self, method: str) -> Cell:
        """The cell of ``method``."""
        train = self.images(method)
        config = self.study.config(self.regime, method, self.seed, len(train))
        sampling = self.study.regimes[self.regime].sampling
        guards = self.study.methods[method].guards
        return Cell(self.regime, method, self.seed, config, sampling, train.fingerprint, self.root, guards)

    def cells(self) -> list[Cell]:
        """Those of all methods."""
        return [self.cell(method) for method in self.study.methods_of(self.regime)]

    def measured(self, cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Costs and points of a cell, computed here or recorded; what was computed here is recorded."""
        cost, records = cell.folder.trained, self.records
        points = None if cost is None else cell.folder.points(self.yardstick)
        if cost is None or points is None:
            return self.recorded(cell)
        if records is not None and self.recorded(cell) is None:
            records.write(cell, self.yardstick.key, cost, points)
        return cost, points

    def recorded(self, cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Costs and points that another machine or folder computed."""
        if self.records is None or not self.records.file(cell).exists():
            return None
        return self.records.read(cell, self.yardstick.key)


@lru_cache
def quality_spaces(plan: ImagesPlan, classifiers: Path | None = None) -> tuple[Encoder, ...]:
    """Feature spaces that quality is measured in, the primary one first; the folder keeps its weights."""
    images = encoder_images(plan)
    classifier = None if images is None else trained_classifier(images, classifiers)
    return (RandomConvEncoder(),) if classifier is None else (classifier, RandomConvEncoder())


def run_study(
    study: Study,
    root: Path,
    *,
    device: torch.device,
    only: Sequence[str] = (),
    keep: bool = False,
    encoders: Sequence[Encoder] = (),
    records: Records | None = None,
) -> dict[str, Any]:
    """Compute the cells that are not there yet; the same call again goes on.

    Args:
        study: what is compared.
        root: the study's folder; several processes may share it, each takes cells that no other works on.
        device: where to train and sample.
        only: parts ``regime``, ``regime/method`` or ``regime/method/seed``, ``*`` for any: only those are computed.
        keep: keep the run folders.
        encoders: feature spaces of quality besides the classifier and random convolutions; the first one is primary.
        records: what was computed elsewhere, and is not computed again; what is computed here is added.

    Returns:
        The study, every measured cell, of this call or of others, and the labels of those that are missing; JSON-able.

    Raises:
        InputError: images or settings are unusable, or ``only`` fits no cell.
    """
    wanted = [Wanted.parse(text) for text in only] or [Wanted()]
    grounds = [
        Ground(study, regime, seed, root, tuple(encoders), records) for seed in study.seeds for regime in study.regimes
    ]
    todo = [
        (ground, method)
        for ground in grounds
        for method in study.methods_of(ground.regime)
        if any(one.fits(ground.regime, method, ground.seed) for one in wanted)
    ]
    if not todo:
        raise InputError(f"--only {' '.join(only)}: fits no cell; write REGIME/METHOD/SEED, * for any")
    for number, (ground, method) in enumerate(todo, 1):
        compute(ground, method, f"{number} of {len(todo)}", device, keep=keep)
    return collect(study, grounds)


def compute(ground: Ground, method: str, number: str, device: torch.device, *, keep: bool) -> None:
    """Train and measure one cell, unless that is done or another process is at it."""
    cell = ground.cell(method)
    cell.check()
    folder = cell.folder
    if ground.measured(cell) is not None:
        return
    started = time.monotonic()
    with claimed(cell.trained_in) as ours:
        if not ours:
            logger.info("%s (%s): another process is at it", cell.label, number)
            return
        others = [other for other in ground.cells() if ground.recorded(other) is None]
        train_cell(cell, ground.images(method), device, keep=keep, others=others)
        between = time.monotonic()
        last = folder.measure(ground.yardstick)[-1]
        ground.measured(cell)
    logger.info(
        "%s (%s): %.0f s, of which measuring %.1f; at the end %.1f %% near-copies of %d images, Fréchet distance %.2f",
        cell.label,
        number,
        time.monotonic() - started,
        time.monotonic() - between,
        100 * last["memorization"]["orbit"]["fraction"],
        last["memorization"]["orbit"]["distinct"],
        frechet(last),
    )


def collect(study: Study, grounds: Sequence[Ground]) -> dict[str, Any]:
    """Every measured cell, and what is missing."""
    cells, floors, missing = [], [], []
    for ground in grounds:
        there = False
        for method in study.methods_of(ground.regime):
            cell = ground.cell(method)
            found = ground.measured(cell)
            if found is None:
                missing.append(cell.label)
                continue
            there, (cost, points) = True, found
            names = {"regime": cell.regime, "method": cell.method, "seed": cell.seed, "folder": cell.folder.path.name}
            cells.append({**names, **cost, "points": points})
        if there:
            floors.append({"regime": ground.regime, "seed": ground.seed, **ground.yardstick.floor})
    return {"study": study.model_dump(mode="json"), "cells": cells, "floors": floors, "missing": missing}


def frechet(point: dict[str, Any]) -> float:
    """The Fréchet distance of a point in its primary space."""
    quality = point["quality"]
    return float(quality[quality["primary"]]["frechet_distance"]["value"])


@dataclass(frozen=True)
class Wanted:
    """A part of ``--only``."""

    regime: str = "*"
    method: str = "*"
    seed: str = "*"

    @staticmethod
    def parse(text: str) -> "Wanted":
        """``regime/method/seed``; what is left out at the end is any."""
        parts = [part or "*" for part in text.split("/")]
        if len(parts) > 3:
            raise InputError(f"--only {text}: write REGIME/METHOD/SEED, * for any")
        return Wanted(*parts)

    def fits(self, regime: str, method: str, seed: int) -> bool:
        """Whether a cell is wanted."""
        pairs = ((self.regime, regime), (self.method, method), (self.seed, str(seed)))
        return all(wanted in ("*", there) for wanted, there in pairs)
