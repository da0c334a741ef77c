"""Whether memory stays flat in the number of shards K, and what the ensemble costs of a round.

Memory is the peak resident set (VmHWM) of a process that does one real training run, all else equal in turn: K = 20
against K = 2 for new models of pixels, K = 8 against K = 1 for low-rank adapters of the small Stable Diffusion of
fine_tuning_step.py. Cost is the time that switching proxies, redistribution and averaging take of the rounds, from the
first proxy's start to the last average.

    python benchmarks/ensemble_memory.py [pixels] [adapters] [overhead]
"""

import argparse
import json
import os
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
from unrote.api import train_config
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.files import write_json
from unrote.method.ensemble import ShardEnsemble
from unrote.models.sizing import size_of

RESULTS = Path(__file__).parent / "results"
GOAL = 1.1
MODELS = {"tiny": [32, 64, 64], "5M": [64, 128, 160]}
RANKS = [16, 128]
"""Of adapters: the default, and one whose adapters are no longer next to nothing."""
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
    """Of this process so far, in MiB; ru_maxrss would begin at what the process that started this one had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


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


def fine_tune(job: dict[str, Any]) -> dict[str, Any]:
    """One run of low-rank adapters in this process: its peak memory and weights."""
    from fine_tuning_step import pictures

    settings = {
        "model.pretrained": job["base"], "model.train": "lora", "model.lora.rank": job["rank"],
        "training.epochs": job["rounds"], "training.batch_size": job["batch"], "training.mixed_precision": "no",
        "training.gradient_checkpointing": False, "ensemble.num_shards": job["shards"], "ensemble.local_epochs": 1,
        "redistribution.enabled": job["shards"] > 1,
    }  # fmt: skip
    store = pictures(job["side"])
    config = load_config(method="iet-agc+", preset="fine-tune", overrides=settings)
    with tempfile.TemporaryDirectory() as folder:
        train_config(config, store, Path(folder) / "run", device="cpu")
    peak, size = peak_rss(), size_of(config, store)
    found = {"adapter_parameters": size.trained, "frozen_mib": size.frozen_bytes / 2**20, "peak_rss_mib": peak}
    return {key: value for key, value in job.items() if key != "base"} | found


def in_subprocess(job: dict[str, Any]) -> dict[str, Any]:
    """:func:`train` or :func:`fine_tune` in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compared(job: dict[str, Any], few: int, many: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """``many`` shards against ``few`` in turn: what is compared, and the last run."""
    peaks: dict[int, list[float]] = {few: [], many: []}
    for _ in range(repeats):
        for shards, values in peaks.items():
            result = in_subprocess({**job, "shards": shards})
            values.append(result["peak_rss_mib"])
    ratio = float(np.median(peaks[many]) / np.median(peaks[few]))
    return {"peak_rss_mib": peaks, "ratio": ratio}, result


def measure_pixels(repeats: int) -> list[dict[str, Any]]:
    """K = 20 against K = 2, for each model."""
    rows = []
    for name, channels in MODELS.items():
        job = {"channels": channels, "images": 160, "side": 16, "batch": 8, "rounds": 2, "local_epochs": 1}
        job["precision"] = "no"
        found, result = compared(job, 2, 20, repeats)
        # Weights, EMA and two moments of each further proxy, had they been kept in memory.
        more = 18 * 4 * 4 * result["parameters"] / 2**20
        row = {"model": name, "parameters": result["parameters"], "mib_of_18_more_proxies": more}
        rows.append(row | found | {"run": job})
    return rows


def measure_adapters(repeats: int) -> list[dict[str, Any]]:
    """K = 8 against K = 1, for each rank; latents and texts are cached before."""
    from fine_tuning_step import make_base

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        os.environ["UNROTE_CACHE"] = f"{folder}/cache"
        job = {"side": 64, "batch": 2, "rounds": 2}
        in_subprocess({**job, "base": f"{folder}/base", "rank": RANKS[0], "shards": 1})
        for rank in RANKS:
            found, result = compared({**job, "base": f"{folder}/base", "rank": rank}, 1, 8, repeats)
            more = 7 * 4 * 4 * result["adapter_parameters"] / 2**20
            row = {"rank": rank, "adapter_parameters": result["adapter_parameters"]}
            row |= {"frozen_mib": result["frozen_mib"], "mib_of_7_more_proxies": more}
            rows.append(row | found | {"run": job})
    return rows


def measure_overhead(local_epochs: int, repeats: int) -> dict[str, Any]:
    """The ensemble's share of two rounds on N = 1,024 images, in the preset's precision: the median run."""
    job = {"channels": MODELS["tiny"], "images": 1024, "side": 16, "batch": 64, "shards": 4, "rounds": 2}
    runs = [in_subprocess({**job, "precision": "bf16", "local_epochs": local_epochs}) for _ in range(repeats)]
    return sorted(runs, key=lambda run: float(run["ensemble_share"]))[(repeats - 1) // 2]


def main() -> None:
    """Measure the parts asked for; each replaces its entry in the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["pixels", "adapters", "overhead"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local-epochs", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--out", type=Path, default=RESULTS / "ensemble_memory.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        print(json.dumps((fine_tune if "rank" in job else train)(job)))
        return
    from training_step import machine

    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts:
        before = machine()
        match part:
            case "pixels":
                found = measure_pixels(args.repeats)
            case "adapters":
                found = measure_adapters(args.repeats)
            case "overhead":
                found = [measure_overhead(local_epochs, args.repeats) for local_epochs in args.local_epochs]
            case _:
                parser.error(f"{part}: there are pixels, adapters and overhead")
        result[part] = {"machine": before, "runs": found}
        if part != "overhead":
            worst = max(row["ratio"] for row in found)
            result[part] |= {"goal": GOAL, "worst_ratio": worst, "reached": worst <= GOAL}
        write_json(args.out, result)
        print(json.dumps(result[part], indent=2))


if __name__ == "__main__":
    main()
