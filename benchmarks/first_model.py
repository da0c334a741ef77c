"""A stranger's path: from installing the wheel to an audited model of 300 images of one's own, timed.

The wheel is built from this tree, the environment is new, and the folder holds 300 JPEGs of different sizes and shapes:
CIFAR-10 photographs made larger, or with ``--data emoji`` the emoji that are part of the package. Then the commands of
docs/first-model.md run as they stand there, one after the other, each with its wall and processor time. Usage:

    python benchmarks/first_model.py --work FOLDER [--data cifar10|emoji] [--constraint constraints.txt]

It needs the build backend (hatchling) and a package index that has what the wheel depends on. A command that was
finished is not run again.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unrote import open_images

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "first-model.md"
COUNT = 300


def main() -> None:
    """Build, install, make the folder, run the page's commands, write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder, or none yet")
    parser.add_argument("--data", default="cifar10", help="where the 300 images are from: cifar10 or emoji")
    parser.add_argument("--constraint", type=Path, default=PROJECT / "constraints.txt", help="versions to install")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_photos(work / "photos", options.data)
    install, *commands = commands_of(PAGE.read_text("utf-8"))
    kept = work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    if not rows:
        wheel = build_wheel(work)
        venv.create(work / "env", with_pip=True)
        real = f"{install.replace('./unrote', str(wheel))} --quiet --constraint {options.constraint.resolve()}"
        rows = [timed(install, real, work)]
    for command in commands[len(rows) - 1 :]:
        kept.write_text(json.dumps(rows))
        rows.append(timed(command, command, work))
        print(json.dumps(rows[-1], indent=2), flush=True)
    result = {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "data": options.data,
        "images": COUNT,
        "commands": rows,
        "audit": json.loads((work / "runs/first/samples-report/report.json").read_text())["memorization"],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "first_model.json").write_text(json.dumps(result, indent=2) + "\n")


def commands_of(page: str) -> list[str]:
    """The commands of the page's first block."""
    (block, *_) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for line in block.replace("\\\n", "").splitlines() if line and not line.startswith("#")]


def make_photos(folder: Path, data: str, seed: int = 0) -> None:
    """300 JPEGs of 200 to 1,200 pixels a side, from nearly square to 9:5."""
    if folder.exists():
        return
    folder.mkdir()
    source, random = open_images(data, resolution=None), np.random.default_rng(seed)
    for number, index in enumerate(random.choice(len(source), COUNT, replace=False).tolist()):
        width, height = random.integers(200, 1200, 2).tolist()
        width = int(np.clip(width, height / 1.8, height * 1.8))
        image = Image.fromarray(source.images[index]).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"IMG_{number:04d}.jpg", quality=90)


def build_wheel(work: Path) -> Path:
    """The wheel of this tree."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(work / "dist")]
    subprocess.run(build, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def timed(shown: str, command: str, work: Path) -> dict[str, Any]:
    """What a command printed and took, in the new environment and the stranger's folder; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = kept | {"PATH": f"{work / 'env/bin'}:{os.environ['PATH']}"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True)
    after, load = resource.getrusage(resource.RUSAGE_CHILDREN), os.getloadavg()[0]
    if done.returncode:
        sys.exit(f"{shown}\n{done.stdout}\n{done.stderr}")
    return {
        "command": shown,
        "wall_seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load": round(load, 1),
        "said": done.stdout.splitlines()[-12:],
    }


if __name__ == "__main__":
    main()
