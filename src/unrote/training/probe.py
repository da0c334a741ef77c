"""A few real steps, timed, so that the time of a run can be estimated before it begins."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.method.peers import Alone
from unrote.method.shards import SampleStream, split_shards
from unrote.models.making import make_task
from unrote.seeding import derive_seed
from unrote.tensorfiles import Stored, load_state, save_state
from unrote.training.step import TrainingStep

STEPS = 20
WARM_UP = 3
"""Steps that are not counted: in the first ones memory is allocated and kernels are chosen."""


@dataclass(frozen=True)
class Probe:
    """What was measured, in seconds.

    Attributes:
        steps: how many steps were timed.
        step_seconds: the median step, on the device.
        switch_seconds: writing a proxy's state to the run's disk and reading the next one's.
        average_seconds: what one proxy adds to an averaging, with reading it.
        peak_device_bytes: the most that the device's allocator held; None on a CPU.
    """

    steps: int
    step_seconds: float
    switch_seconds: float
    average_seconds: float
    peak_device_bytes: int | None


def measure(config: Config, images: ImageStore, folder: Path, device: torch.device, *, steps: int = STEPS) -> Probe:
    """Train the first proxy for some steps and put its state away, as the run would; nothing is kept.

    The steps are those that a run begins with: few are skipped yet, so a gate that later saves work seems dearer.

    Args:
        config: of the run.
        images: the training set. Latents and embeddings that the run needs are computed and cached first.
        folder: an existing folder on the disk that the run will use.
        device: where to compute.
        steps: how many are timed.
    """
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(dir=folder, prefix=".unrote-probe-") as scratch:
        torch.manual_seed(derive_seed(config.seed, "init"))
        task = make_task(config, images, device)
        step = TrainingStep(config, task, len(images), device, WARM_UP + steps)
        seconds = _steps(config, step, len(images), steps)
        state = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict()}
        state |= {} if step.ema is None else {"ema": step.ema.state_dict()}
        switching, averaging = _putting_away(state, Path(scratch) / "state.safetensors", task.average)
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return Probe(steps, seconds, switching, averaging, peak)


def _steps(config: Config, step: TrainingStep, num_images: int, steps: int) -> float:
    batch = config.training.batch_size
    # A shard that is contiguous takes as long as any other.
    shard = split_shards(num_images, config.num_shards, "contiguous")[0]
    stream, seconds = SampleStream(config.seed, 0), []
    for index in range(WARM_UP + steps):
        begun = time.perf_counter()
        losses, _ = step(stream.take(shard, index * batch, batch), proxy=0, step=index + 1)
        losses.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARM_UP:])


def _putting_away(state: dict[str, Any], path: Path, average: Any) -> tuple[float, float]:
    begun = time.perf_counter()
    save_state(path, state, durable=False)
    load_state(path)
    read = time.perf_counter()
    parts = [name for name in state if name != "optimizer"]
    Alone().average([Stored.at(path).parts(parts)] * 2, [0.5, 0.5], average).whole()
    return read - begun, (time.perf_counter() - read) / 2
