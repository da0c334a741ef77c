"""A run in a process of its own, for test_placement: how much its memory grew, against what the plan says.

Usage: memory_program.py OUT SETTINGS (JSON). Every process prints one line of JSON.
"""

import json
import os
import sys
from pathlib import Path

import diffusers  # noqa: F401  what is imported is no part of the growth

from toy import SETTINGS, toy_images
from unrote.api import train_config
from unrote.config import load_config
from unrote.training.plan import make_plan


def peak_bytes() -> int:
    # Not ru_maxrss, which begins at what the parent had before exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    images = toy_images()
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    tiny = load_config(method="standard", overrides=SETTINGS | {"training.epochs": 0.1})
    # Whatever torch allocates once, and the code that it loads: by a run that knows of no other process.
    launched, os.environ["WORLD_SIZE"] = os.environ.get("WORLD_SIZE", "1"), "1"
    train_config(tiny, images, out / f"first-{rank}")
    os.environ["WORLD_SIZE"] = launched
    before = peak_bytes()
    config = load_config(method="iet-agc+", overrides=SETTINGS | settings)
    planned = make_plan(config, images, out / "run", processes=world).placement.ranks[rank]
    train_config(config, images, out / "run")
    line = json.dumps({"rank": rank, "grown": peak_bytes() - before, "planned": planned.host_bytes})
    sys.stdout.write(f"{line}\n")  # at once, or lines of several processes mingle


if __name__ == "__main__":
    main()
