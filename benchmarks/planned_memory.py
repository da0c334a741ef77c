"""What a plan says of memory, against what the run then takes: one process and two, and proxies shared by two each.

Measured is the peak resident set (VmHWM) of each process in one real run on the CPU of a few steps, with MSR,
beside the peak of the same process before it: when it had imported everything and trained a tiny model by itself. The
plan is that of ``--dry-run --processes W``: bytes of the host, which are those of training too where the CPU computes.

    python benchmarks/planned_memory.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  what is imported is no part of the growth
import numpy as np

from unrote.api import train_config
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.files import write_json, write_text
from unrote.training.plan import make_plan

RESULTS = Path(__file__).parent / "results" / "planned_memory.json"
SIDE, IMAGES, BATCH = 16, 64, 8
CASES = {"alone": (4, 1, False), "dealt out": (4, 2, False), "shared": (2, 4, False), "in parts": (2, 4, True)}
"""K, W, and ``training.fsdp``."""
MODELS = {"small": [32, 64, 64], "medium": [128, 256, 320]}


def settings_of(channels: list[int], shards: int, parts: bool) -> dict[str, Any]:
    """Two rounds of two steps a half-round and proxy, or four."""
    return {
        "model.block_out_channels": channels, "training.epochs": 4, "training.batch_size": BATCH,
        "training.mixed_precision": "no", "training.checkpointing_steps": 5, "training.lr_warmup_steps": 0,
        "ensemble.num_shards": shards, "ensemble.local_epochs": 2, "training.fsdp": parts,
    }  # fmt: skip


def peak_bytes() -> int:
    """Of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def train(channels: list[int], shards: int, parts: bool, folder: Path) -> dict[str, Any]:
    """One process's part of the run."""
    images = in_memory_store(
        np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8), source="noise"
    )
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    # By itself: what torch allocates once and the code that it loads belong to the base.
    os.environ["WORLD_SIZE"] = "1"
    tiny = load_config(method="standard", overrides=settings_of([32, 32], 1, False) | {"training.epochs": 0.5})
    train_config(tiny, images, folder / f"first-{rank}", "cpu")
    os.environ["WORLD_SIZE"] = str(world)
    base, config = peak_bytes(), load_config(method="iet-agc+", overrides=settings_of(channels, shards, parts))
    plan = make_plan(config, images, folder / "run", processes=world)
    train_config(config, images, folder / "run", "cpu")
    sizes = {"base_bytes": base, "peak_bytes": peak_bytes(), "planned_bytes": plan.placement.ranks[rank].host_bytes}
    found = {"rank": rank, "parameters": plan.parameters, "activation_bytes": plan.activation_bytes, **sizes}
    grown, planned = sizes["peak_bytes"] - base, sizes["planned_bytes"]
    return found | {"grown_over_planned": grown / planned, "peak_over_planned": (base + grown) / (base + planned)}


def measure(channels: list[int], shards: int, world: int, parts: bool) -> list[dict[str, Any]]:
    """The run in ``world`` processes: a row for each."""
    launcher = [sys.executable]
    launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--job", json.dumps([channels, shards, parts]), "--folder", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, in MiB."""
    lines = [
        "| parameters | proxies | K | W | rank | process before | planned beside it | measured | measured / planned | "
        "of the whole |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base, planned = row["base_bytes"] / 2**20, row["planned_bytes"] / 2**20
        lines.append(
            f"| {row['parameters'] / 1e6:.1f} M | {row['proxies']} | {row['shards']} | {row['processes']} | "
            f"{row['rank']} | {base:,.0f} | {planned:,.0f} | "
            f"{row['peak_bytes'] / 2**20 - base:,.0f} | {row['grown_over_planned']:.2f} | "
            f"{row['peak_over_planned']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the JSON with its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        row = train(*json.loads(arguments.job), arguments.folder)
        write_json(arguments.folder / f"rank-{row['rank']}.json", row)
        return
    from training_step import machine

    before = machine()
    rows = [
        {"model": name, "proxies": case, "shards": shards, "processes": world, **row}
        for name, channels in MODELS.items()
        for case, (shards, world, parts) in CASES.items()
        for row in measure(channels, shards, world, parts)
    ]
    run = {"images": IMAGES, "side": SIDE, "batch": BATCH, "method": "iet-agc+"}
    write_json(arguments.out, {"machine": before, "run": run, "rows": rows})
    write_text(arguments.out.with_suffix(".md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
