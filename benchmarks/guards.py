"""What guards take away, and what they cost; and what the monitor costs.

The demo's ordinary training at small size (64 emoji of 16×16, 300 epochs) learns most of its images by rote. The same
256 noises are sampled without and with each guard, and audited with held-out emoji as control. Times are CPU seconds of
one thread, so that a busy machine does not count; searches and what the guards prepare are in them. About six
minutes. Usage:

    OMP_NUM_THREADS=1 python benchmarks/guards.py [--num 256] [--work FOLDER] [--out benchmarks/results]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monitor_overhead import timed_looks

from unrote.api import train_config
from unrote.auditing.extracted import near_copies
from unrote.auditing.intervals import fraction
from unrote.config import load_config
from unrote.demo import copied, frechet
from unrote.measures import audit
from unrote.sampling import sample
from unrote.training.images import training_images
from unrote.training.run import Run

STEPS = 25
SETTINGS = {
    "data.limit": 64,
    "training.epochs": 300,
    "ensemble.local_epochs": 10,
    "monitor.every": 1,
    "monitor.samples": 64,
    "monitor.steps": STEPS,
}
GUARDS: dict[str, list[str]] = {
    "none": [],
    "copy-filter, 4 tries": ["copy-filter:tries=4"],
    "copy-filter, 16 tries": ["copy-filter:tries=16"],
    "copy-filter, 4 tries, calibrated at 1 %": ["copy-filter:tries=4,holdout=emoji:holdout"],
    "amg": ["amg"],
    "amg, strength 1": ["amg:strength=1"],
    "amg + copy-filter, 4 tries": ["amg", "copy-filter:tries=4"],
}


def main() -> None:
    """Train, sample with each guard, audit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=256, help="images per guard")
    parser.add_argument("--work", type=Path, help="where the run and the samples go [a temporary folder]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        run, monitored = trained(work)
        rows = [measured(run, name, guards, options.num, work) for name, guards in GUARDS.items()]
    result = {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "cores": os.cpu_count()},
        "settings": SETTINGS | {"num": options.num, "sampler": "ddim", "steps": STEPS, "seed": 0},
        "monitor": monitored,
        "guards": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "guards.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "guards.md").write_text(table(result))
    print(table(result))


def trained(work: Path) -> tuple[Run, dict[str, Any]]:
    """The run, and what its looks cost beside its training."""
    config = load_config(method="standard", preset="demo", overrides=SETTINGS)
    with timed_looks() as spent:
        run = train_config(config, training_images(config), work / "run", "cpu")
    records = json.loads((run.path / "monitor.json").read_text())["looks"]
    return run, {
        **spent,
        "looks": [{"samples": record["samples"], **record["monitor"]} for record in records],
    }


def measured(run: Run, name: str, guards: list[str], num: int, work: Path) -> dict[str, Any]:
    """One guard: copies, quality, cost."""
    folder = work / name.replace(" ", "-").replace("%", "percent")
    began = time.process_time()
    sample(run, num, steps=STEPS, out=folder, guards=guards)
    seconds = time.process_time() - began
    report = audit(folder, run, "emoji:holdout", name=name)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = near_copies(report.pairs)
    return {
        "name": name,
        "guards": guards,
        "seconds": seconds,
        "copied": fraction(int(found.sum()), len(found)),
        "copied_plain": copied(report),
        "images_made": sum(row.get("tries", 1) for row in rows),
        "flagged": sum(row.get("copy", False) for row in rows),
        "frechet": frechet(report),
        "threshold": next((row.get("threshold") for row in settings_of(folder) if "tries" in row), None),
    }


def settings_of(folder: Path) -> list[dict[str, Any]]:
    """The guards as they were."""
    return json.loads((folder / "sampling.json").read_text())["guards"] or []


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows, first = result["guards"], result["guards"][0]["seconds"]
    lines = ["| guard | near-copies | 95 % | images made | flagged | Fréchet distance | CPU seconds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["copied"]["interval"]
        cost = f"{row['seconds']:.1f} ({row['seconds'] / first:.1f}×)"
        lines.append(
            f"| {row['name']} | {row['copied']['fraction']:.1%} | {low:.1%} to {high:.1%} | {row['images_made']} "
            f"| {row['flagged']} | {row['frechet']:.2f} | {cost} |"
        )
    monitor = result["monitor"]
    if monitor["overhead"] is not None:
        lines += [
            "",
            f"Monitor: {len(monitor['look_seconds'])} looks took {sum(monitor['look_seconds']):.1f} s beside ",
        ]
        lines[-1] += f"{monitor['training_seconds']:.1f} s of training: {monitor['overhead']:.1%}."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
