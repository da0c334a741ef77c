"""What guards take away from a text-to-image model that copies, and what they cost.

The text study's pictures and parts, at 16×16 and hardly pretrained, are fine-tuned in the ordinary way until the model
gives most images back. With and without each guard, images are made from the captions that it was fine-tuned on, where
copies are counted, and from held-out captions, where quality is measured; noises are the same for all. Times are CPU
seconds of one thread for making both, so that a busy machine does not count. So are the monitor's looks. Usage:

    OMP_NUM_THREADS=1 python benchmarks/text_guards.py --work FOLDER [--packages FOLDER] [--out benchmarks/results]
    OMP_NUM_THREADS=1 python benchmarks/text_guards.py --work FOLDER --only-monitor 360   # epochs

It needs what the text study needs: npm for the emoji, pip for the text encoder.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "text_study"))

import torch
from art import prepare
from base_model import FULL, Sizes, pretrain
from cells import SCALES, settings_of
from monitor_overhead import timed_looks
from run import Study

import unrote
from unrote.auditing.extracted import near_copies
from unrote.auditing.intervals import fraction
from unrote.data import ImageStore
from unrote.measures import audit
from unrote.models.pretrained import load_pretrained
from unrote.sampling import sample

SMALL = {"vae_images": 12_000, "unet_images": 4_000, "unet_pictures": 64}
SIZES = Sizes(FULL.pictures, side=16, vae_channels=(16, 32), **SMALL)
ROWS, EPOCHS = 96, 120
"""What is fine-tuned on, and how often each of it is seen."""
SEEDS, FRESH = 1, 96
"""Images of each caption that was fine-tuned on, and held-out captions, one image each."""
OPTIONS = {"sampler": "dpm-solver++", "steps": 12, "guidance_scale": 3.0, "batch_size": 32}
GUARDS: dict[str, list[str]] = {
    "none": [],
    "random-tokens": ["random-tokens"],
    "repeat-words": ["repeat-words"],
    "embedding-noise": ["embedding-noise"],
    "embedding-noise, 0.5": ["embedding-noise:std=0.5"],
    "prompt-optimization": ["prompt-optimization:target={target}"],
    "attention": ["attention"],
    "amg": ["amg"],
    "amg, despecify and deduplicate": ["amg:despecify=4,deduplicate=4"],
    "copy-filter, 4 tries": ["copy-filter:tries=4"],
    "copy-filter, 4 tries, calibrated at 1 %": ["copy-filter:tries=4,holdout={holdout}"],
    "random-tokens + copy-filter, 4 tries": ["random-tokens", "copy-filter:tries=4"],
}


def main() -> None:
    """Pretrain and fine-tune, sample with each guard, audit, write; what is there is not done again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models and samples go")
    parser.add_argument("--packages", type=Path, help="folder of the packages' archives [WORK/packages]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only-monitor", type=int, metavar="EPOCHS", help="what looks cost in a training so long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = SmallStudy(options.work, options.packages or options.work / "packages", "full", with_sscd=False)
    study.prepare()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only_monitor is not None:
        found = json.dumps(looks_alone(study, options.only_monitor), indent=2)
        (options.out / "text_monitor.json").write_text(found + "\n")
        print(found)
        return
    run, monitored = tuned(study)
    target = usual_norm(run, study)
    holdout = study.out / "art/holdout"
    rows = []
    for name, texts in GUARDS.items():
        guards = [text.format(target=f"{target:.4g}", holdout=holdout) for text in texts]
        rows.append(kept(study, name, guards, run))
        print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        row["guards"] = [text.replace(str(holdout), "HELD-OUT") for text in row["guards"]]
    result = {
        "machine": machine(),
        "settings": OPTIONS | {"rows": ROWS, "epochs": EPOCHS, "seeds": SEEDS, "held_out_captions": FRESH},
        "captions": len(study.known),
        "monitor": monitored,
        "prompt_optimization_target": target,
        "guards": rows,
    }
    (options.out / "text_guards.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "text_guards.md").write_text(table(rows))
    print(table(rows))


class SmallStudy(Study):
    """The study's full set of pictures, made smaller, and small parts."""

    sizes = SIZES  # type: ignore[assignment]

    def prepare(self) -> None:
        """The sets as the study has them, and a base model."""
        art = self.out / "art"
        prepare(art, self.packages, FULL.pictures, side=FULL.side, toy=False)
        pretrain(self.base, art, self._text(), self.sizes)

    @cached_property
    def trained_on(self) -> ImageStore:
        """The rows that are fine-tuned on."""
        return self.train.limit(ROWS)

    @property
    def known(self) -> list[str]:
        """Their captions, each once."""
        assert self.trained_on.captions is not None
        return list(dict.fromkeys(self.trained_on.captions))


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "cores": os.cpu_count()}


def monitored_settings(study: SmallStudy, epochs: int) -> dict[str, Any]:
    """Ordinary fine-tuning, asked to look at the end of every round."""
    settings = settings_of("fine-tuning", SCALES["full"], str(study.base), study.sizes.side, 0, 0.0)
    settings |= {"training.learning_rate": 1e-3, "training.snapshots": 0, "training.epochs": epochs}
    settings |= {"data.limit": ROWS, "monitor.every": 1, "monitor.samples": 32, "monitor.steps": 10}
    return settings | {"monitor.guidance_scale": OPTIONS["guidance_scale"]}


def looks_alone(study: SmallStudy, epochs: int) -> dict[str, Any]:
    """What looks cost beside a training of so many epochs: planned, by the product's clock, and in CPU seconds."""
    settings = monitored_settings(study, epochs)
    with TemporaryDirectory() as temporary, timed_looks() as spent:
        run = unrote.train(study.out / "art/train", out=Path(temporary) / "run", method="standard", settings=settings)
        decided = json.loads((run.path / "monitor.json").read_text())
    rounds = [look["round"] for look in decided["looks"]]
    planned = {"every": decided["every"], "overhead": decided["planned_overhead"]}
    kept = {key: value for key, value in settings.items() if key != "model.pretrained"}
    found = {"planned": planned, "rounds": rounds, "wall_overhead": decided["overhead"], **spent}
    return {"machine": machine(), "load": os.getloadavg()[0], "settings": kept, **found}


def tuned(study: SmallStudy) -> tuple[unrote.Run, dict[str, Any]]:
    """The base model, fine-tuned in the ordinary way, and what the monitor cost beside it."""
    settings = monitored_settings(study, EPOCHS)
    file = study.out / "monitor.json"
    if not file.exists():
        with timed_looks() as spent:
            unrote.train(study.out / "art/train", out=study.out / "tuned", method="standard", settings=settings)
        file.write_text(json.dumps(spent))
    return unrote.Run(study.out / "tuned"), json.loads(file.read_text())


def usual_norm(run: unrote.Run, study: SmallStudy) -> float:
    """The median of how strongly held-out captions steer the tuned model's first step: prompts known to be fine."""
    pipeline = load_pretrained(str(study.base))
    pipeline.unet = type(pipeline.unet).from_pretrained(run.model_folder, subfolder="unet", low_cpu_mem_usage=False)
    captions = fresh_captions(study)[:32]
    scores = unrote.prompt_scores(pipeline, captions, guidance_scale=OPTIONS["guidance_scale"])
    return statistics.median(score.score for score in scores)


def fresh_captions(study: SmallStudy) -> list[str]:
    """Of held-out pictures."""
    assert study.holdout.captions is not None
    return list(study.holdout.captions[:FRESH])


def kept(study: SmallStudy, name: str, guards: list[str], run: unrote.Run) -> dict[str, Any]:
    """One guard's row; what was measured before is read again."""
    folder = study.out / "guards" / name.replace(" ", "-").replace("%", "percent")
    file = folder / "row.json"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.write_text(json.dumps(measured(study, name, guards, run, folder)))
    row: dict[str, Any] = json.loads(file.read_text())
    return row


def measured(study: SmallStudy, name: str, guards: list[str], run: unrote.Run, folder: Path) -> dict[str, Any]:
    """One guard: copies, quality, cost."""
    began = time.process_time()
    sample(run, out=folder / "copies", prompts=study.known * SEEDS, guards=guards, **OPTIONS)
    sample(run, out=folder / "fresh", prompts=fresh_captions(study), guards=guards, **OPTIONS)
    seconds = time.process_time() - began
    copies, fresh = (audit(folder / part, study.trained_on, study.holdout, name=name) for part in ("copies", "fresh"))
    rows = [json.loads(line) for line in (folder / "copies/samples.jsonl").read_text().splitlines()]
    found = near_copies(copies.pairs)
    calibrated = copies.summary["memorization"]["orbit"]["squared-l2"]["calibrated"]
    return {
        "name": name,
        "guards": guards,
        "seconds": seconds,
        "copied": fraction(int(found.sum()), len(found)),
        "calibrated": {"threshold": calibrated["threshold"], **calibrated["below"]},
        "distinct": copies.summary["extracted"]["distinct"],
        "images_made": sum(row.get("tries", 1) for row in rows),
        "flagged": sum(row.get("copy", False) for row in rows),
        "copied_from_held_out_captions": float(near_copies(fresh.pairs).mean()),
        "frechet": fresh.summary["spaces"]["random-conv"]["quality"]["generated"]["frechet_distance"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| guard | near-copies | 95 % | calibrated | distinct | images made | flagged | Fréchet distance | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["copied"]["interval"]
        cost = f"{row['seconds']:.0f} ({row['seconds'] / rows[0]['seconds']:.1f}×)"
        lines.append(
            f"| {row['name']} | {row['copied']['fraction']:.1%} | {low:.1%} to {high:.1%} "
            f"| {row['calibrated']['fraction']:.1%} | {row['distinct']} | {row['images_made']} | {row['flagged']} "
            f"| {row['frechet']['value']:.1f} | {cost} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
