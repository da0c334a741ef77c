"""Inputs of fuzz.py that are models and what belongs to them: runs, pipelines, weights, samples, reports."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_changes import changed
from safetensors.torch import save_file

import unrote
from unrote.auditing.prompted import read_origins
from unrote.auditing.reading import read_report
from unrote.cli_retest import _of_report
from unrote.files import read_object, sha256_file
from unrote.method.slots import FolderSlots
from unrote.models.pretrained import describe, load_pretrained
from unrote.report.model_card import card_section
from unrote.sample_folder import file_name, indices_in, read_note, start, write_images, write_lines
from unrote.sampling import asks_for_text, load_unet, pipeline_of
from unrote.training.checkpoints import Checkpoints
from unrote.training.run import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from original_layout import in_original_layout
from tiny_pipelines import tiny_stable_diffusion

BASE = {"text_encoder": "0" * 64, "unet": "1" * 64}
SETTINGS = {"model_sha256": "2" * 64, "steps": 2, "guards": [{"guard": "copy-filter", "tries": 4}]}


class ModelInputs:
    """What is changed, and how each kind is read. Everything happens in ``folder``."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.run = self._train()
        self.sampled = self._sample()
        self.report = self._audit()
        pipeline = tiny_stable_diffusion(folder / "tokenizer", vae_levels=2)
        pipeline.save_pretrained(folder / "sd")
        self.single = folder / "single"
        shutil.copytree(folder / "sd", self.single / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(in_original_layout(pipeline), self.single / "tiny.safetensors")
        self.originals = {part: _files(folder / part) for part in ("run", "samples", "report", "sd", "single")}

    def _train(self) -> Path:
        out = self.folder / "run"
        settings = {
            "model.block_out_channels": [32], "training.epochs": 2, "training.mixed_precision": "no",
            "ensemble.num_shards": 2, "ensemble.local_epochs": 1, "training.checkpointing_steps": 1,
        }  # fmt: skip
        run = unrote.train(np.zeros((4, 8, 8, 3), np.uint8), out=out, method="iet-agc+", settings=settings)
        Run(run.path).keep_base(BASE)
        return out

    def _sample(self) -> Path:
        folder = self.folder / "samples"
        start(folder, SETTINGS)
        notes = [{"tries": 1, "attempt": 0, "ratio": 0.5, "nearest": 3, "copy": False}] * 2
        write_images(folder, range(2), np.zeros((2, 8, 8, 3), np.uint8), notes)
        write_lines(folder / "samples.jsonl", [{"file": file_name(i), "origin": f"{i}.png"} for i in range(2)])
        return folder

    def _audit(self) -> Any:
        random_images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3)).astype(np.uint8)
        report = unrote.audit(random_images[10:16], random_images[:12])
        (self.folder / "report").mkdir()
        (self.folder / "report/report.json").write_text(json.dumps(report.summary))
        return report

    @contextmanager
    def _one_changed(self, part: str, wanted: Any = lambda name: True) -> Iterator[Path]:
        """A file of a folder is changed meanwhile; its name."""
        originals = self.originals[part]
        name = self.draw.choice([name for name in originals if wanted(name)])
        try:
            (self.folder / part / name).write_bytes(changed(originals[name], self.draw, list(originals.values())))
            yield name
        finally:
            for other, content in originals.items():
                (self.folder / part / other).write_bytes(content)

    def run_folder(self) -> None:
        """A run folder but for its model; mostly with the checksums of checkpoints made good."""
        with self._one_changed("run", lambda name: "model" not in name.parts) as name:
            if name.suffix == ".safetensors" and self.draw.random() < 0.7:
                self._sign()
            run = Run(self.run)
            _ = run.config, run.data, run.read_ledger()
            run.keep_base(BASE)
            read_object(self.run / "run.json", "")
            slots = FolderSlots(self.run / "proxies")
            checkpoints = Checkpoints(self.run / "checkpoints", slots, 2)
            checkpoints.load_newest()
            for part in sorted((self.run / "proxies").iterdir()):
                slots.load_state_dict({"files": {"proxy": part.name}, "version": 9})
                slots.get("proxy").whole()
            checkpoints.clear_away()

    def _sign(self) -> None:
        for manifest in (self.run / "checkpoints").glob("*.json"):
            values = json.loads(manifest.read_text())
            values["state"] = sha256_file(manifest.with_suffix(".safetensors"))
            values["proxies"] = {name: sha256_file(self.run / "proxies" / name) for name in values["proxies"]}
            manifest.write_text(json.dumps(values))

    def model(self) -> None:
        """The model of a run folder."""
        with self._one_changed("run", lambda name: name.parts[0] == "model" and name.suffix != ".md"):
            source, run = pipeline_of(Run(self.run))
            asks_for_text(source, None)
            load_unet(source, run, "ema")

    def samples(self) -> None:
        """A folder of samples, perhaps with an image that is not ours."""
        foreign = self.sampled / self.draw.choice(("7.png", "1a.png", "0000001.png", "\u0661.png"))
        with self._one_changed("samples"):
            foreign.write_bytes(b"")
            start(self.sampled, SETTINGS)
            read_origins(self.sampled, [file_name(i) for i in range(2)])
            for index in sorted(indices_in(self.sampled)):
                read_note(self.sampled / file_name(index))

    def report_json(self) -> None:
        """The report of an audit, as a baseline and as what says which images to search for."""
        file = self.folder / "report/report.json"
        with self._one_changed("report"):
            card_section(self.report, read_report(file, "--baseline"))
            _of_report(file, 16)

    def pipeline(self) -> None:
        """The folder of a text-to-image pipeline."""
        with self._one_changed("sd"):
            source = str(self.folder / "sd")
            asks_for_text(source, None)
            describe(source)
            load_pretrained(source)

    def single_file(self) -> None:
        """Weights of the original layout in one file, with the configuration beside it."""
        with self._one_changed("single"):
            load_pretrained(str(self.single / "tiny.safetensors"))


def _files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
