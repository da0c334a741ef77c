"""Whether memory stays flat in the number of shards K, and what the ensemble costs of a round.

Memory is the peak resident set (ru_maxrss) of a process that does one real training run, K = 20 against K = 2, all else
equal. Cost is the time that switching proxies, redistribution and averaging take, against the time of the steps.

    python benchmarks/ensemble_memory.py
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import unrote
from unrote.data.store import in_memory_store
from unrote.files import write_json
from unrote.method.ensemble import ShardEnsemble

RESULTS = Path(__file__).parent / "results"
MODELS = {"tiny": [32, 64, 64], "5M": [64, 128, 160]}
OVERHEAD = ("_activate", "_retire", "_redistribute", "_aggregate")


@contextmanager
def measured(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that the ensemble's own work takes."""
    originals = {name: getattr(ShardEnsemble, name) for name in OVERHEAD}

    def wrap(name: str) -> Any:
        def call(self: ShardEnsemble) -> None:
            began = time.perf_counter()
            originals[name](self)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return call

    for name in OVERHEAD:
        setattr(ShardEnsemble, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ShardEnsemble, name, original)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One training run in this process: its peak memory, its time and the ensemble's share of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (job["images"], job["side"], job["side"], 3), dtype=np.uint8)
    settings = {
        "model.block_out_channels": job["channels"],
        "training.epochs": job["epochs"],
        "training.batch_size": job["batch"],
        "training.mixed_precision": "no",
        "training.checkpointing_steps": 1_000_000,
        "ensemble.num_shards": job["shards"],
        "ensemble.local_epochs": job["local_epochs"],
    }
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, measured(spent):
        began = time.perf_counter()
        store = in_memory_store(pixels, source="noise")
        run = unrote.train(store, out=Path(folder) / "run", method="iet-agc+", settings=settings, device="cpu")
        seconds = time.perf_counter() - began
        # Before the weights are read back to count them.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        weights = load_file(run.model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    rounds = job["epochs"] / job["local_epochs"]
    return {
        **job,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "peak_rss_mib": peak,
        "run_seconds": seconds,
        "ensemble_seconds_per_round": sum(spent.values()) / rounds,
        "ensemble_share": sum(spent.values()) / seconds,
        "seconds": spent,
    }


def in_subprocess(job: dict[str, Any]) -> dict[str, Any]:
    """:func:`train` in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_memory(repeats: int) -> list[dict[str, Any]]:
    """K = 20 against K = 2, for each model."""
    rows = []
    for name, channels in MODELS.items():
        job = {"channels": channels, "images": 160, "side": 16, "batch": 8, "epochs": 2, "local_epochs": 1}
        peaks: dict[int, list[float]] = {2: [], 20: []}
        for _ in range(repeats):
            for shards, values in peaks.items():
                result = in_subprocess({**job, "shards": shards})
                values.append(result["peak_rss_mib"])
        ratio = float(np.median(peaks[20]) / np.median(peaks[2]))
        row = {"model": name, "parameters": result["parameters"], "peak_rss_mib": peaks, "ratio": ratio, "run": job}
        rows.append(row)
    return rows


def measure_overhead(local_epochs: int) -> dict[str, Any]:
    """The ensemble's share of a run of one round on N = 1,024 images."""
    job = {"channels": MODELS["tiny"], "images": 1024, "side": 16, "batch": 64, "shards": 4}
    return in_subprocess({**job, "epochs": local_epochs, "local_epochs": local_epochs})


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local-epochs", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--out", type=Path, default=RESULTS / "ensemble_memory.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(train(json.loads(args.job))))
        return
    from training_step import machine

    before = machine()
    memory = measure_memory(args.repeats)
    worst = max(row["ratio"] for row in memory)
    result = {
        "machine": before,
        "shared_machine": before["load_average"][0] > 1.3 * (os.cpu_count() or 1),
        "memory": memory,
        "goals": {"peak RSS at K = 20 at most 1.1x that at K = 2": {"worst_ratio": worst, "reached": worst <= 1.1}},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    result["overhead"] = []
    for local_epochs in args.local_epochs:
        result["overhead"].append(measure_overhead(local_epochs))
        # Each at once: the long ones come last.
        write_json(args.out, result)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
