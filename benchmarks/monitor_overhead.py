"""What the monitor's looks cost beside an unconditional training, in CPU seconds of one thread. Usage:

    OMP_NUM_THREADS=1 python benchmarks/monitor_overhead.py [--epochs 300] [--out benchmarks/results]

The demo's ordinary training at small size, asked to look at the end of each round; how rarely it does so instead, to
stay within 5 %, is the product's own rule. The text-to-image model is in ``text_guards.py``.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unrote.api import plan, train_config
from unrote.config import load_config
from unrote.training.images import training_images
from unrote.training.monitor import Monitor


@contextmanager
def timed_looks() -> Iterator[dict[str, Any]]:
    """CPU seconds of the looks inside the block and of all else in it, and their ratio; filled when it ends."""
    found: dict[str, Any] = {}
    seconds: list[float] = []
    look, started = Monitor.look, time.process_time()

    def timed(*arguments: Any) -> None:
        began = time.process_time()
        look(*arguments)
        seconds.append(time.process_time() - began)

    Monitor.look = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Monitor.look = look  # type: ignore[method-assign]
    whole, looks = time.process_time() - started, [spent for spent in seconds if spent > 0.01]  # nothing was due
    training = whole - sum(looks)
    found |= {"training_seconds": training, "look_seconds": looks, "overhead": sum(looks) / training}


def main() -> None:
    """Train, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300, help="of 64 images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"data.limit": 64, "training.epochs": options.epochs, "ensemble.local_epochs": 10, "monitor.every": 1}
    settings |= {"monitor.samples": 32, "monitor.steps": 25}
    config = load_config(method="standard", preset="demo", overrides=settings)
    images = training_images(config)
    with tempfile.TemporaryDirectory() as temporary:
        planned = plan(config, images, Path(temporary) / "run", device="cpu").looks
        assert planned is not None
        with timed_looks() as spent:
            run = train_config(config, images, Path(temporary) / "run", "cpu")
        precision = run.config.training.mixed_precision
    result = {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "cores": os.cpu_count()},
        "settings": settings | {"mixed_precision": precision},
        "planned": {"looks": planned.count, "every": planned.every, "overhead": planned.overhead},
        **spent,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "monitor_overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
