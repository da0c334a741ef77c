"""What several processes gain and cost: throughput, averaging as a share of a round, checkpoints.

Throughput and checkpoints are differences of wall time between runs that differ in one thing (length, number of
checkpoints), so that imports and reading cancel. Averaging is measured on the papers' CIFAR-10 network; its share of a
round is extrapolated to their 100 local epochs, since a round takes days on a CPU. Timings belong on a quiet machine
with at least two cores.

    python benchmarks/distributed.py [throughput] [averaging] [checkpoints] [sharing]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unrote
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.files import write_json
from unrote.tensorfiles import load_state, save_state, weighted_average
from unrote.training.plan import make_plan
from unrote.training.probe import measure

RESULTS = Path(__file__).parent / "results"
IMAGES, SIDE, BATCH = 1024, 32, 64
PAPER = {"shards": 10, "local_epochs": 100, "images": 50_000, "batch": 128}
PAPER_MODEL = {
    "model.block_out_channels": [128, 256, 256, 256],
    "model.layers_per_block": 2,
    "model.attention_levels": [1],
    "model.attention_head_dim": 256,
    "model.dropout": 0.1,
}
GOALS = {"speedup": 1.9, "averaging_share": 0.02, "checkpoint_share": 0.02}


def machine() -> dict[str, Any]:
    """Where and beside what it is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            "unknown",
        ),
        "cores": os.cpu_count(),
        "threads_per_process": 1,
        "load_average": list(os.getloadavg()),
        "torch": torch.__version__,
        "unrote": unrote.__version__,
    }


def run_seconds(folder: Path, world: int, **settings: Any) -> float:
    """Wall time of one training run of one thread a process, from the command to its end."""
    data = folder / "images.npz"
    if not data.exists():
        random = np.random.default_rng(0)
        np.savez(data, images=random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        command = [sys.executable, *launcher, "-m", "unrote", "train", "--data", str(data), "--out", f"{out}/run"]
        fixed = {"ensemble.num_shards": 4, "ensemble.local_epochs": 2, "training.batch_size": BATCH}
        fixed |= {"training.checkpointing_steps": 1_000_000, "training.mixed_precision": "no"}
        for key, value in (fixed | settings).items():
            command += ["--set", f"{key}={value}"]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return time.perf_counter() - began


def throughput(folder: Path, epochs: Sequence[int], repeats: int) -> dict[str, Any]:
    """Images per second of one process and of two, in turn; K = 4, rounds of 2 local epochs."""
    short, long = epochs
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for world, found in rates.items():
            seconds = [run_seconds(folder, world, **{"training.epochs": n}) for n in (short, long)]
            found.append((long - short) * IMAGES / (seconds[1] - seconds[0]))
    medians = {world: statistics.median(found) for world, found in rates.items()}
    return {
        "epochs": [short, long],
        "images_per_second": rates,
        "speedup": medians[2] / medians[1],
        "goal": GOALS["speedup"],
    }


def averaging(folder: Path) -> dict[str, Any]:
    """Averaging at the papers' CIFAR-10 proportions: one proxy's part measured, a round extrapolated."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    images = in_memory_store(pixels, source="random")
    batch = 2
    config = load_config(method="iet", overrides=PAPER_MODEL | {"training.batch_size": batch, "ensemble.num_shards": 2})
    parameters = make_plan(config, images, folder, only_plan=True).parameters
    found = measure(config, images, folder, torch.device("cpu"), steps=5)
    step = found.step_seconds * PAPER["batch"] / batch
    count = PAPER["shards"]
    steps = PAPER["images"] * PAPER["local_epochs"] / PAPER["batch"]
    work = count * (found.average_seconds + found.switch_seconds)
    return {
        "parameters": parameters,
        "measured": {
            "step_seconds": {"batch": batch, "seconds": found.step_seconds},
            "average_seconds_per_proxy": found.average_seconds,
            "switch_seconds": found.switch_seconds,
            "transport_seconds_per_proxy": transport_seconds(folder, parameters),
        },
        "extrapolated": {
            "step_seconds_batch_128": step,
            "steps_per_round": steps,
            "share_of_round": work / (work + steps * step),
            "share_if_a_step_took_0.1_s": work / (work + steps * 0.1),
        },
        "goal": GOALS["averaging_share"],
    }


def transport_seconds(folder: Path, parameters: int) -> float:
    """One proxy's weights and moving average from one process to the other, averaged, and back, over loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += ["--exchange", str(parameters), "--folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds: float = json.loads((folder / "exchange.json").read_text())
    return seconds


def exchange(parameters: int, folder: Path) -> None:
    """What each of the two processes does."""
    from unrote.training.distributed import launched

    state = {"model": {"weight": torch.randn(parameters)}, "ema": {"weight": torch.randn(parameters)}}
    with launched([]) as peers:
        peers.mine([1, 1])
        peers.average([state], [0.5, 0.5], weighted_average)
        peers.gather(None)
        began = time.perf_counter()
        peers.average([state], [0.5, 0.5], weighted_average)
        seconds = time.perf_counter() - began
        if peers.rank == 0:
            path = folder / "alone.safetensors"
            save_state(path, state, durable=False)
            began = time.perf_counter()
            weighted_average((load_state(path) for _ in range(2)), [0.5, 0.5])
            # What two proxies take without a network is no transport.
            write_json(folder / "exchange.json", max(0.0, seconds - (time.perf_counter() - began)))


def sharing(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds in which 2 and 3 ranks add up the gradients of the papers' CIFAR-10 network over loopback, in each step.

    As it is done, by a ring; and as it would be in the order of ranks, everybody getting everybody's.
    """
    parameters = json.loads((RESULTS / "distributed.json").read_text())["averaging"]["parameters"]
    found = {}
    for world in (2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
        command += ["--add", str(parameters), "--repeats", str(repeats), "--folder", str(folder)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found[f"{world} ranks"] = json.loads((folder / "sums.json").read_text())
    return {"parameters": parameters, "seconds": found}


def add(parameters: int, repeats: int, folder: Path) -> None:
    """What each of the processes does."""
    import torch.distributed as dist

    from unrote.training.distributed import launched

    seconds: dict[str, list[float]] = {"ring": [], "gathered": []}
    with launched([]) as peers:
        peers.mine([1])
        weights = [torch.nn.Parameter(torch.zeros(part)) for part in (1 << 20,) * (parameters >> 20)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        for _ in range(repeats):
            began = time.perf_counter()
            peers.team.add_up(weights)
            seconds["ring"].append(time.perf_counter() - began)
            began = time.perf_counter()
            for weight in weights:
                everyone = [torch.empty_like(weight) for _ in range(peers.size)]
                dist.all_gather(everyone, weight.grad)
                weight.grad = sum(everyone)
            seconds["gathered"].append(time.perf_counter() - began)
        if peers.rank == 0:
            write_json(folder / "sums.json", {how: statistics.median(found) for how, found in seconds.items()})


def checkpoints(folder: Path, epochs: int, repeats: int) -> dict[str, Any]:
    """Seconds of one checkpoint, with fsync and checksums, and its share at the default interval."""
    steps = epochs * IMAGES // BATCH
    every = 8
    extra = steps // every - 1
    found: list[tuple[float, float]] = []
    for _ in range(repeats):
        without = run_seconds(folder, 1, **{"training.epochs": epochs})
        with_them = run_seconds(folder, 1, **{"training.epochs": epochs, "training.checkpointing_steps": every})
        shorter = run_seconds(folder, 1, **{"training.epochs": epochs // 2})
        found.append(((with_them - without) / extra, (without - shorter) / (steps - steps // 2)))
    one, step = (statistics.median(column) for column in zip(*found, strict=True))
    default = load_config().training.checkpointing_steps
    return {
        "seconds_per_checkpoint": one,
        "step_seconds": step,
        "default_interval_steps": default,
        "share_at_default_interval": one / (one + default * step),
        "goal": GOALS["checkpoint_share"],
    }


def main() -> None:
    """Measure the parts asked for; each replaces its entry in the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["throughput", "averaging", "checkpoints"])
    parser.add_argument("--epochs", type=int, nargs=2, default=(2, 10), help="of the short and the long run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--exchange", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--add", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exchange:
        exchange(arguments.exchange, arguments.folder)
        return
    if arguments.add:
        add(arguments.add, arguments.repeats, arguments.folder)
        return
    torch.set_num_threads(1)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part in arguments.parts:
            before = machine()
            match part:
                case "throughput":
                    found = throughput(folder, arguments.epochs, arguments.repeats)
                case "averaging":
                    found = averaging(folder)
                case "checkpoints":
                    found = checkpoints(folder, arguments.epochs[1], arguments.repeats)
                case "sharing":
                    found = sharing(folder, arguments.repeats)
                case _:
                    parser.error(f"{part}: there are throughput, averaging, checkpoints and sharing")
            results[part] = {"machine": before, "load_average_at_end": list(os.getloadavg()), **found}
            write_json(arguments.out, results)
            print(json.dumps(results[part], indent=2))


if __name__ == "__main__":
    main()
