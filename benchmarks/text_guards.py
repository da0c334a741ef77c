"""What guards take away from a text-to-image model that copies, and what they cost.

The text study's base model at its short scale is fine-tuned in the ordinary way until it gives most of its images back.
With and without each guard, images are made from the captions that it was fine-tuned on, where copies are counted, and
from held-out captions, where quality is measured; noises are the same for all. Times are CPU seconds of one thread for
making both, so that a busy machine does not count. About half an hour. Usage:

    OMP_NUM_THREADS=1 python benchmarks/text_guards.py --work FOLDER [--packages FOLDER] [--out benchmarks/results]

It needs what the text study needs: npm for the emoji, pip for the text encoder.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "text_study"))

import torch
from cells import SCALES, settings_of
from run import Study

import unrote
from unrote.auditing.extracted import near_copies
from unrote.auditing.intervals import fraction
from unrote.measures import audit
from unrote.models.pretrained import load_pretrained
from unrote.sampling import sample

SCALE = SCALES["short"]
SEEDS = 3
"""Images of each caption that was fine-tuned on."""
OPTIONS = {"sampler": "dpm-solver++", "steps": 12, "guidance_scale": 3.0, "batch_size": 32}
GUARDS: dict[str, list[str]] = {
    "none": [],
    "random-tokens": ["random-tokens"],
    "random-tokens, 8": ["random-tokens:count=8"],
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options.work, options.packages or options.work / "packages", "short", with_sscd=False)
    study.prepare()
    run = tuned(study)
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
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "cores": os.cpu_count()},
        "settings": OPTIONS | {"seeds": SEEDS, "captions": len(study.asked), "held_out_captions": len(study.holdout)},
        "prompt_optimization_target": target,
        "guards": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "text_guards.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "text_guards.md").write_text(table(rows))
    print(table(rows))


def tuned(study: Study) -> unrote.Run:
    """The base model, fine-tuned in the ordinary way."""
    settings = settings_of("fine-tuning", SCALE, str(study.base), study.sizes.side, 0, 0.0)
    settings |= {"training.snapshots": 0}
    return unrote.train(study.out / "art/train", out=study.out / "tuned", method="standard", settings=settings)


def usual_norm(run: unrote.Run, study: Study) -> float:
    """The median of how strongly held-out captions steer the tuned model's first step: prompts known to be fine."""
    pipeline = load_pretrained(str(study.base))
    pipeline.unet = type(pipeline.unet).from_pretrained(run.model_folder, subfolder="unet", low_cpu_mem_usage=False)
    captions = study.holdout.captions
    assert captions is not None
    scores = unrote.prompt_scores(pipeline, list(captions[:32]), guidance_scale=OPTIONS["guidance_scale"])
    return statistics.median(score.score for score in scores)


def kept(study: Study, name: str, guards: list[str], run: unrote.Run) -> dict[str, Any]:
    """One guard's row; what was measured before is read again."""
    folder = study.out / "guards" / name.replace(" ", "-").replace("%", "percent")
    file = folder / "row.json"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.write_text(json.dumps(measured(study, name, guards, run, folder)))
    row: dict[str, Any] = json.loads(file.read_text())
    return row


def measured(study: Study, name: str, guards: list[str], run: unrote.Run, folder: Path) -> dict[str, Any]:
    """One guard: copies, quality, cost."""
    known, unseen = study.asked.captions, study.holdout.captions
    assert known is not None and unseen is not None
    began = time.process_time()
    sample(run, out=folder / "copies", prompts=list(known) * SEEDS, guards=guards, **OPTIONS)
    sample(run, out=folder / "fresh", prompts=list(unseen), guards=guards, **OPTIONS)
    seconds = time.process_time() - began
    copies, fresh = (audit(folder / part, study.train, study.holdout, name=name) for part in ("copies", "fresh"))
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
