"""Whether memory stays flat in the number of shards K, and what the ensemble costs of a round.

Memory is the peak resident set (ru_maxrss) of a process that does one real training run, K = 20 against K = 2 in turn,
all else equal. Cost is the time that switching proxies, redistribution and averaging take of the rounds, from the first
proxy's start to the last average.

    python benchmarks/ensemble_memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import unrote
from unrote.data.store import in_memory_store
from unrote.files import write_json
from unrote.method.ensemble import ShardEnsemble

RESULTS = Path(__file__).parent / "results"
MODELS = {"tiny": [32, 64, 64], "5M": [64, 128, 160]}
OVERHEAD = {
    "_activate": "switching",
    "_retire": "switching",
    "_redistribute": "redistribution",
    "_aggregate": "averaging",
}


@dataclass
class Clock:
    """Seconds of the ensemble's own work by kind, and from its first to its last."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OVERHEAD.values(), 0.0))
    first: float | None = None
    last: float = 0.0

    def add(self, kind: str, began: float, ended: float) -> None:
        """One piece of work."""
        self.first = began if self.first is None else self.first
        self.spent[kind] += ended - began
        self.last = ended


@contextmanager
def measured(clock: Clock) -> Iterator[None]:
    """Time the ensemble's own work inside the block."""
    originals = {name: getattr(ShardEnsemble, name) for name in OVERHEAD}

    def wrap(name: str) -> Any:
        def call(self: ShardEnsemble) -> None:
            began = time.perf_counter()
            originals[name](self)
            clock.add(OVERHEAD[name], began, time.perf_counter())

        return call

    for name in OVERHEAD:
        setattr(ShardEnsemble, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ShardEnsemble, name, original)


def peak_rss() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One training run in this process: its peak memory, its rounds' time and the ensemble's share of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (job["images"], job["side"], job["side"], 3), dtype=np.uint8)
    settings = {
        "model.block_out_channels": job["channels"],
        "training.epochs": job["rounds"] * job["local_epochs"],
        "training.batch_size": job["batch"],
        "training.mixed_precision": job["precision"],
        "training.checkpointing_steps": 1_000_000,
        "ensemble.num_shards": job["shards"],
        "ensemble.local_epochs": job["local_epochs"],
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, measured(clock):
        store = in_memory_store(pixels, source="noise")
        run = unrote.train(store, out=Path(folder) / "run", method="iet-agc+", settings=settings, device="cpu")
        # Before the weights are looked at to count them.
        peak = peak_rss()
        with safe_open(run.model_folder / "unet" / "diffusion_pytorch_model.safetensors", framework="numpy") as weights:
            parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    assert clock.first is not None
    seconds = clock.last - clock.first
    return {
        **job,
        "parameters": parameters,
        "peak_rss_mib": peak,
        "seconds_per_round": seconds / job["rounds"],
        "ensemble_seconds_per_round": {kind: spent / job["rounds"] for kind, spent in clock.spent.items()},
        "ensemble_share": sum(clock.spent.values()) / seconds,
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
        job = {"channels": channels, "images": 160, "side": 16, "batch": 8, "rounds": 2, "local_epochs": 1}
        job["precision"] = "no"
        peaks: dict[int, list[float]] = {2: [], 20: []}
        for _ in range(repeats):
            for shards, values in peaks.items():
                result = in_subprocess({**job, "shards": shards})
                values.append(result["peak_rss_mib"])
        rows.append(
            {
                "model": name,
                "parameters": result["parameters"],
                # Weights, EMA and two moments of each further proxy, had they been kept in memory.
                "mib_of_18_more_proxies": 18 * 4 * 4 * result["parameters"] / 2**20,
                "peak_rss_mib": peaks,
                "ratio": float(np.median(peaks[20]) / np.median(peaks[2])),
                "run": job,
            }
        )
    return rows


def measure_overhead(local_epochs: int, repeats: int) -> dict[str, Any]:
    """The ensemble's share of two rounds on N = 1,024 images, in the preset's precision: the median run."""
    job = {"channels": MODELS["tiny"], "images": 1024, "side": 16, "batch": 64, "shards": 4, "rounds": 2}
    runs = [in_subprocess({**job, "precision": "bf16", "local_epochs": local_epochs}) for _ in range(repeats)]
    return sorted(runs, key=lambda run: float(run["ensemble_share"]))[(repeats - 1) // 2]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local-epochs", type=int, nargs="*", default=[1, 4, 8, 16])
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
        "memory": memory,
        "overhead": [measure_overhead(local_epochs, args.repeats) for local_epochs in args.local_epochs],
        "goals": {"peak RSS at K = 20 at most 1.1x that at K = 2": {"worst_ratio": worst, "reached": worst <= 1.1}},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
