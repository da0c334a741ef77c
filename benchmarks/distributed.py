"""What several processes gain and cost: throughput, averaging as a share of a round, checkpoints.

Throughput is a difference of wall time between runs that differ in length, so that imports and reading cancel. What a
checkpoint takes is timed inside a run, as processor time too; so is averaging the papers' CIFAR-10 network, of ten
proxies that lie in the system's cache of files. Their shares of a round are extrapolated to the papers' 100 local
epochs at an assumed 0.1 s a step, since a round takes days on a CPU. Wall times belong on a quiet machine with at least
two cores.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unrote
from unrote.api import train_config
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.files import write_json
from unrote.method.peers import Alone
from unrote.method.shards import redistribute, split_shards
from unrote.method.slots import FolderSlots
from unrote.models.denoiser import build_unet
from unrote.tensorfiles import Stored, save_state, weighted_average
from unrote.training.checkpoints import Checkpoints
from unrote.training.distributed import launched
from unrote.training.probe import measure

RESULTS = Path(__file__).parent / "results"
IMAGES, SIDE, BATCH = 512, 32, 64
TURNS = {"ensemble.num_shards": 4, "ensemble.local_epochs": 6, "training.batch_size": 16}
"""Of throughput: half-rounds of 24 steps a proxy."""
PAPER = {"shards": 10, "local_epochs": 100, "images": 50_000, "batch": 128}
ASSUMED_STEP = 0.1
"""Seconds of a step at the papers' proportions, on a GPU."""
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


def run_seconds(folder: Path, world: int, copies: int = 1, **settings: Any) -> float:
    """Wall time of a training run of one thread a process, or of several beside each other, from command to end."""
    data = folder / "images.npz"
    if not data.exists():
        random = np.random.default_rng(0)
        np.savez(data, images=random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        command = [sys.executable, *launcher, "-m", "unrote", "train", "--data", str(data)]
        fixed = TURNS | {"training.checkpointing_steps": 1_000_000, "training.mixed_precision": "no"}
        for key, value in (fixed | settings).items():
            command += ["--set", f"{key}={value}"]
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        silent["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        jobs = [subprocess.Popen([*command, "--out", f"{out}/{copy}"], **silent) for copy in range(copies)]
        codes = [job.wait() for job in jobs]
        if any(codes):
            raise RuntimeError(f"failed: {' '.join(command)}")
        return time.perf_counter() - began


def throughput(folder: Path, epochs: Sequence[int], repeats: int) -> dict[str, Any]:
    """Images per second of one process, of two, and of two runs of one process each, in turn.

    Whoever has had its proxies' turns waits for the other, and the shorter these are, the more of the time it is. Two
    runs that know nothing of each other are what the machine gives.
    """
    short, long = epochs
    kinds = {"one process": (1, 1), "two processes": (2, 1), "two runs": (1, 2)}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, (world, copies) in kinds.items():
            seconds = [run_seconds(folder, world, copies, **{"training.epochs": n}) for n in (short, long)]
            rates[name].append(copies * (long - short) * IMAGES / (seconds[1] - seconds[0]))
    one, two, separate = (statistics.median(found) for found in rates.values())
    return {
        "epochs": [short, long],
        "settings": TURNS,
        "images_per_second": rates,
        "speedup": two / one,
        "goal": GOALS["speedup"],
        "speedup_of_two_runs": separate / one,
        "share_of_what_the_machine_gives": two / separate,
    }


class Clock:
    """Wall and processor seconds of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """So far."""
        return {"wall": time.perf_counter() - self._wall, "processor": time.process_time() - self._processor}


def over(seconds: dict[str, float], count: float) -> dict[str, float]:
    """Of one of so many."""
    return {name: value / count for name, value in seconds.items()}


def paper_state() -> dict[str, dict[str, torch.Tensor]]:
    """Weights, moving average and two moments of the papers' CIFAR-10 network: random numbers."""
    with torch.device("meta"):
        config = load_config(method="iet", overrides=PAPER_MODEL).model
        shapes = {
            name: p.shape
            for name, p in build_unet(config, resolution=32, channels=3, num_classes=None).named_parameters()
        }
    return {part: {name: torch.randn(shape) for name, shape in shapes.items()} for part in ("model", "ema", "m", "v")}


def averaging(folder: Path) -> dict[str, Any]:
    """Averaging and redistribution at the papers' CIFAR-10 proportions."""
    count, state, path = PAPER["shards"], paper_state(), folder / "proxy.safetensors"
    parameters = sum(tensor.numel() for tensor in state["model"].values())
    clock = Clock()
    save_state(path, state, durable=False)
    written = clock.read()
    del state
    clock = Clock()
    proxy = Stored.at(path).parts(["model", "ema"])
    Alone().average([proxy] * count, [1 / count] * count, weighted_average).whole()
    added = over(clock.read(), count)
    shards = split_shards(PAPER["images"], count, "iid")
    clock = Clock()
    redistribute(shards, torch.randint(0, 100, (PAPER["images"],)), fraction=0.25)
    moved = clock.read()
    steps = PAPER["images"] * PAPER["local_epochs"] / PAPER["batch"]
    work = {kind: count * added[kind] + moved[kind] for kind in added}
    return {
        "parameters": parameters,
        "shards": count,
        "measured": {
            "average_seconds_per_proxy": added,
            "writing_seconds_per_proxy": written,
            "redistribution_seconds": moved,
            "transport_seconds_per_proxy": transport(folder),
        },
        "extrapolated": {
            "steps_per_round": steps,
            "assumed_step_seconds": ASSUMED_STEP,
            "share_of_round": {kind: value / (value + steps * ASSUMED_STEP) for kind, value in work.items()},
        },
        "goal": GOALS["averaging_share"],
    }


def transport(folder: Path) -> dict[str, float]:
    """One proxy's weights and moving average from one process to the other, and the average back, over loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += ["--exchange", "--folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds: dict[str, float] = json.loads((folder / "exchange.json").read_text())
    return seconds


def exchange(folder: Path) -> None:
    """What each of the two processes does; the first says what it took it."""
    torch.set_num_threads(1)
    state = Stored.of({part: tensors for part, tensors in paper_state().items() if part in ("model", "ema")})
    with launched([]) as peers:
        peers.mine([1, 1])
        peers.average([state], [0.5, 0.5], weighted_average).whole()
        peers.gather(None)
        clock = Clock()
        peers.average([state], [0.5, 0.5], weighted_average).whole()
        together = clock.read()
        if peers.rank == 0:
            clock = Clock()
            Alone().average([state] * 2, [0.5, 0.5], weighted_average).whole()
            # What two proxies take without a network is no transport.
            alone = clock.read()
            write_json(folder / "exchange.json", {kind: max(0.0, together[kind] - alone[kind]) for kind in alone})


@contextmanager
def clocked_checkpoints(found: list[dict[str, Any]]) -> Iterator[None]:
    """What each checkpoint takes inside the block, with all that was written of proxies since the one before.

    That is more than its own share: a proxy is written at the end of its turn whether or not there are checkpoints, but
    not hashed.
    """
    put, save = FolderSlots.put, Checkpoints.save
    since = {"wall": 0.0, "processor": 0.0, "new_bytes": 0.0}

    def add(seconds: dict[str, float], size: float = 0) -> None:
        for name, value in (seconds | {"new_bytes": size}).items():
            since[name] += value

    def clocked_put(self: FolderSlots, name: str, state: dict[str, Any]) -> None:
        clock = Clock()
        put(self, name, state)
        add(clock.read(), (self.folder / self.state_dict()["files"][name]).stat().st_size)

    def clocked_save(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        clock = Clock()
        save(self, step, state)
        add(clock.read())
        found.append(dict(since))
        since.update(dict.fromkeys(since, 0.0))

    FolderSlots.put, Checkpoints.save = clocked_put, clocked_save  # type: ignore[method-assign]
    try:
        yield
    finally:
        FolderSlots.put, Checkpoints.save = put, save  # type: ignore[method-assign]


def checkpointed(folder: Path, images: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A run in this process, whose checkpoints are timed; the first one is left out."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, SIDE, SIDE, 3), dtype=np.uint8)
    fixed = {"training.mixed_precision": "no", "ensemble.local_epochs": 2, "training.lr_warmup_steps": 0}
    config = load_config(method="iet-agc+", overrides=fixed | settings)
    found: list[dict[str, Any]] = []
    with clocked_checkpoints(found), tempfile.TemporaryDirectory(dir=folder) as out:
        run = train_config(config, in_memory_store(pixels, source="random"), Path(out) / "run", "cpu")
        steps = json.loads((run.path / "run.json").read_text())["steps"]
    medians = {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
    return {"checkpoints": len(found), "steps": steps, "one": medians}


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


def checkpoints(folder: Path, epochs: int) -> dict[str, Any]:
    """What a checkpoint takes, of the default model and of the papers', and its share at their intervals."""
    default = load_config().training.checkpointing_steps
    batch = {"training.batch_size": BATCH, "ensemble.num_shards": 4}
    small = checkpointed(folder, IMAGES, batch | {"training.epochs": epochs, "training.checkpointing_steps": 8})
    config = load_config(method="iet-agc+", overrides=batch | {"training.mixed_precision": "no"})
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    step = measure(config, in_memory_store(pixels, source="random"), folder, torch.device("cpu"), steps=8).step_seconds
    few = {"training.batch_size": 1, "training.epochs": 2, "training.checkpointing_steps": 2, "ensemble.num_shards": 2}
    large = checkpointed(folder, 6, PAPER_MODEL | few)
    interval = load_config(preset="cifar10").training.checkpointing_steps
    # A half-round's turn of each proxy leaves one more new file.
    turn = PAPER["images"] / PAPER["shards"] * PAPER["local_epochs"] / 2 / PAPER["batch"]
    files = 1 + interval / turn
    scale = files * paper_bytes() / large["one"]["new_bytes"]
    seconds = {kind: large["one"][kind] * scale for kind in ("wall", "processor")}
    return {
        "default": small
        | {
            "step_seconds_wall": step,
            "interval_steps": default,
            "share_wall": small["one"]["wall"] / (small["one"]["wall"] + default * step),
        },
        "papers": large
        | {
            "interval_steps": interval,
            "assumed_step_seconds": ASSUMED_STEP,
            "new_files_per_checkpoint": files,
            "extrapolated_seconds": seconds,
            "share": {kind: value / (value + interval * ASSUMED_STEP) for kind, value in seconds.items()},
        },
        "goal": GOALS["checkpoint_share"],
    }


def paper_bytes() -> int:
    """Of one proxy's file."""
    return 16 * sum(tensor.numel() for tensor in paper_state()["model"].values())


def main() -> None:
    """Measure the parts asked for; each replaces its entry in the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["throughput", "averaging", "checkpoints"])
    parser.add_argument("--epochs", type=int, nargs=2, default=(6, 12), help="of the short and the long run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--exchange", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--add", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exchange:
        exchange(arguments.folder)
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
                    found = checkpoints(folder, arguments.epochs[1])
                case "sharing":
                    found = sharing(folder, arguments.repeats)
                case _:
                    parser.error(f"{part}: there are throughput, averaging, checkpoints and sharing")
            results[part] = {"machine": before, "load_average_at_end": list(os.getloadavg()), **found}
            write_json(arguments.out, results)
            print(json.dumps(results[part], indent=2))


if __name__ == "__main__":
    main()
