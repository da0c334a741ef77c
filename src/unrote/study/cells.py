"""A cell: one method of a regime on one seed, trained, sampled at every snapshot and measured."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unrote.api import train_config
from unrote.config import Config, changed_keys, parse
from unrote.data import ImageStore
from unrote.errors import InputError
from unrote.files import atomic_path, write_json
from unrote.ownership import BusyError, Ownership
from unrote.sampling import sample
from unrote.study.measure import Yardstick
from unrote.study.plan import SamplingPlan
from unrote.training.run import Run

logger = logging.getLogger("unrote")

SHEET_SIDE = 8
"""Images a side of a sheet."""


@dataclass(frozen=True)
class Cell:
    """Where one cell is kept, and what it is.

    Attributes:
        regime: name in the study.
        method: name in the study.
        seed: of the images and of training.
        config: what is trained.
        sampling: how its snapshots are sampled.
        images: what is trained on, by fingerprint.
        root: the study's folder.
        guards: at work while it is sampled.
    """

    regime: str
    method: str
    seed: int
    config: Config
    sampling: SamplingPlan
    images: str
    root: Path
    guards: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As ``--only`` names it."""
        return f"{self.regime}/{self.method}/{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the samples depend on: settings that differ from their defaults, images, sampling."""
        return {
            "settings": self.config.model_dump(mode="json", exclude_defaults=True, exclude={"method", "preset"}),
            "sampling": self.sampling.model_dump(mode="json"),
            "images": self.images,
        } | ({"guards": list(self.guards)} if self.guards else {})

    @property
    def folder(self) -> "Folder":
        """Named by the hash of the identity, so that equal cells are one and renaming a method costs nothing."""
        text = json.dumps(self.identity, sort_keys=True)
        return Folder(self.root / "cells" / hashlib.sha256(text.encode()).hexdigest()[:20], self.label)

    @property
    def trained_in(self) -> "Folder":
        """Where its run is: with those that differ from it in guards alone, in the folder of the one without any."""
        return replace(self, guards=()).folder

    def check(self) -> None:
        """Raises InputError if what is kept was trained when a default had another value: its hash is the same."""
        file = self.folder.path / "cell.json"
        kept = (_read(file) or {}).get("config")
        if kept is not None:
            self.check_against(kept, self.folder.path)

    def check_against(self, kept: Mapping[str, Any], where: Path) -> None:
        """Raises InputError if the configuration that is kept in ``where`` is not the present one."""
        same = {"method": self.config.method, "preset": self.config.preset}
        changed = changed_keys(parse(dict(kept) | same, str(where)), self.config)
        if changed:
            raise InputError(
                f"{where}: holds {self.label} of an older version ({'; '.join(changed)}); "
                "remove it to compute it again, or choose another --out"
            )


@dataclass(frozen=True)
class Folder:
    """What is kept of a cell: samples and sheets of its snapshots, its costs, its points.

    Attributes:
        path: the folder.
        label: what it is, for people.
    """

    path: Path
    label: str

    @property
    def trained(self) -> dict[str, Any] | None:
        """Costs and snapshots, if it is trained and sampled."""
        return _read(self.path / "trained.json")

    def samples_file(self, seen: int) -> Path:
        """The samples of the snapshot after so many samples seen."""
        return self.path / f"samples-{seen:09d}.npz"

    def sheet_file(self, seen: int) -> Path:
        """The first of these samples as a picture."""
        return self.path / f"sheet-{seen:09d}.png"

    def pairs_file(self, seen: int) -> Path:
        """The samples nearest to training images, and below them these."""
        return self.path / f"closest-{seen:09d}.png"

    def points(self, yardstick: Yardstick) -> list[dict[str, Any]] | None:
        """The measured points, earliest first, if they are measured by this yardstick."""
        file = self.path / "points.json"
        if not file.exists():
            return None
        written = json.loads(file.read_text())
        return list(written["points"]) if written["yardstick"] == yardstick.key else None

    def sample(
        self,
        models: Mapping[int, Path],
        how: SamplingPlan,
        seed: int,
        device: torch.device,
        guards: Sequence[str] = (),
        train: ImageStore | None = None,
    ) -> None:
        """Sample models by samples seen; what is there is not made again. Guards compare with ``train``."""
        for seen, model in sorted(models.items()):
            target = self.samples_file(seen)
            if not target.exists():
                sample(
                    model,
                    how.num,
                    seed=seed,
                    out=target,
                    sampler=how.sampler,
                    steps=how.steps,
                    batch_size=how.batch_size,
                    guards=guards,
                    train=train,
                    device=device,
                )
            write_sheet(self.sheet_file(seen), read_samples(target))

    def measure(self, yardstick: Yardstick) -> list[dict[str, Any]]:
        """The points of what is trained and sampled; measured once by each yardstick."""
        points = self.points(yardstick)
        if points is None:
            trained = self.trained
            assert trained is not None
            points = []
            for seen in trained["snapshots"]:
                samples = read_samples(self.samples_file(seen))
                point = {"samples_seen": seen, **yardstick.measure(samples)}
                pairs = [samples[[pair["sample"] for pair in point["closest"]]]]
                pairs += [yardstick.subjects.distinct.images[[pair["train"] for pair in point["closest"]]]]
                write_sheet(self.pairs_file(seen), np.concatenate(pairs))
                points.append(point)
            write_json(self.path / "points.json", {"label": self.label, "yardstick": yardstick.key, "points": points})
        return points


@contextmanager
def claimed(folder: Folder) -> Iterator[bool]:
    """Whether the cell is ours; not if another process works on it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(Ownership(folder.path / ".lock", f"{folder.path}: is another process's").held())
        except BusyError:
            yield False
            return
        yield True


def train_cell(
    cell: Cell, images: ImageStore, device: torch.device, *, keep: bool = False, others: Sequence[Cell] = ()
) -> None:
    """Train and sample a cell, from where it was interrupted; :attr:`Cell.trained_in` is claimed.

    Args:
        cell: the cell.
        images: what it is trained on.
        device: where to compute.
        keep: keep the run folder, which otherwise goes when nobody needs it any more.
        others: cells that may still need it.
    """
    folder, trained_in = cell.folder, cell.trained_in.path
    if folder.trained is not None:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    whole = cell.config.model_dump(mode="json")
    write_json(folder.path / "cell.json", {"label": cell.label, **cell.identity, "config": whole})
    run = Run(trained_in / "run")
    if not run.path.exists():
        # What an earlier training took, whose run is gone.
        (trained_in / "time.json").unlink(missing_ok=True)
    if not run.finished:
        with _timed(trained_in / "time.json"):
            train_config(cell.config, images, run.path, str(device))
    models = snapshots_of(run)
    folder.sample(models, cell.sampling, cell.seed, device, cell.guards, images)
    cost = json.loads((trained_in / "time.json").read_text()) | trained_by(run, device)
    write_json(folder.path / "trained.json", counts_of(run) | cost | {"snapshots": sorted(models)})
    waiting = any(other.trained_in.path == trained_in and other.folder.trained is None for other in others)
    if not (keep or waiting):
        shutil.rmtree(run.path)


def snapshots_of(run: Run) -> dict[int, Path]:
    """The models of a finished run by samples seen: its snapshots; the final one alone if there are none.

    Also if the monitor chose it, by stopping or by what it kept: then that one is what the method gives.
    """
    monitored, folder = _monitored(run), run.path / "snapshots"
    if monitored is not None and monitored["stop_when"] is not None:
        return {monitored["model_samples"]: run.model_folder}
    found = {int(path.name): path for path in folder.iterdir()} if folder.is_dir() else {}
    return found or {counts_of(run)["samples_seen"]: run.model_folder}


def counts_of(run: Run) -> dict[str, Any]:
    """Samples seen and skipped by a finished run, and the share of its time that its monitor took."""
    summary = json.loads((run.path / "run.json").read_text())
    counts, monitored = {key: summary[key] for key in ("samples_seen", "skipped")}, _monitored(run)
    return counts if monitored is None else counts | {"monitor": monitored["overhead"]}


def _monitored(run: Run) -> dict[str, Any] | None:
    """What the monitor saw and decided; None if nothing looked."""
    return _read(run.path / "monitor.json")


def _read(file: Path) -> dict[str, Any] | None:
    """What a JSON file says, if it is there."""
    return json.loads(file.read_text()) if file.exists() else None


def trained_by(run: Run, device: torch.device) -> dict[str, str]:
    """What its processor time depends on besides the work: kind of processor, and precision."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"machine": kind, "precision": run.config.training.mixed_precision}


def read_samples(file: Path) -> np.ndarray:
    """Samples uint8 [G, H, W, C]. Raises InputError if the file is not there or damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images: np.ndarray = arrays["images"]
            return images
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: can't be read ({error}); remove its folder to compute the cell again") from None


def write_sheet(file: Path, samples: np.ndarray) -> None:
    """A PNG of the first samples, 8 a row, at most 8 rows."""
    count = min(len(samples), SHEET_SIDE**2)
    _, height, width, channels = samples.shape
    rows = -(-count // SHEET_SIDE)
    sheet = np.full((rows * (height + 1), SHEET_SIDE * (width + 1), channels), 255, np.uint8)
    for place, image in enumerate(samples[:count]):
        top, left = place // SHEET_SIDE * (height + 1), place % SHEET_SIDE * (width + 1)
        sheet[top : top + height, left : left + width] = image
    with atomic_path(file, durable=False) as temporary:
        Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(temporary, "PNG")


@contextmanager
def _timed(file: Path) -> Iterator[None]:
    """Add the wall-clock and processor seconds of the block to those in ``file``, also if it is interrupted."""
    before = _read(file) or {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    wall, processor = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        spent = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - processor}
        write_json(file, {key: before[key] + spent[key] for key in before})
