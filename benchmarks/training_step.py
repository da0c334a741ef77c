"""Our training step against the loop of diffusers' unconditional example, and what gate and ledger cost.

Both sides train the same UNet on images of the same shape at the same batch size and precision, each in a process of
its own, as it would be, but one step each in turn: whatever else the machine does meets both. Their side is the
published example (accelerate, AdamW, EMAModel, cosine schedule, loss read every step) without transforms, progress bar
and trackers; ours is the step of iet-agc+ (gate, ledger and augmentation included), driven as the training loop drives
it.

What gate, ledger and sample order cost is timed inside real steps, with the caches as a step leaves them, and given as
a share of the very step it is part of.

    python benchmarks/training_step.py --seconds 60
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unrote.config import Config, load_config
from unrote.data.store import ImageRows, in_memory_store
from unrote.files import write_json
from unrote.method.shards import SampleStream
from unrote.models.denoiser import build_unet
from unrote.models.making import make_task
from unrote.training.loop import Meter
from unrote.training.step import TrainingStep

RESULTS = Path(__file__).parent / "results"
NUM_IMAGES = 2048
CPU = torch.device("cpu")
PRECISIONS = {"no": "fp32", "bf16": "bf16"}
Step = Callable[[], None]


def settings(precision: str, batch: int) -> Config:
    """Ours at the preset ``tiny``, but for precision and batch size."""
    overrides = {"training.mixed_precision": precision, "training.batch_size": batch}
    return load_config(method="iet-agc+", preset="tiny", overrides=overrides)


def unet(config: Config, side: int) -> UNet2DModel:
    """The model of both sides, with the same fresh weights."""
    torch.manual_seed(0)
    return build_unet(config.model, resolution=side, channels=3, num_classes=None)


class OurStep:
    """One step as ``unrote.training.loop`` takes it, on ``rows`` images of which 2,048 differ."""

    def __init__(self, precision: str, batch: int, side: int, rows: int = NUM_IMAGES) -> None:
        self.config, self.batch, self.taken = settings(precision, batch), batch, 0
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, side, side, 3), dtype=np.uint8)
        # Repeated by index: a million images cost no memory here.
        repeated = ImageRows(pixels, np.arange(rows) % NUM_IMAGES)
        store = replace(in_memory_store(pixels, source="noise"), images=repeated)
        torch.manual_seed(0)
        task = make_task(self.config, store, CPU)
        self.step = TrainingStep(self.config, task, rows, CPU, proxy_steps=10_000)
        self.stream, self.shard, self.meter = SampleStream(0, 0), torch.arange(rows), Meter(CPU)

    def __call__(self) -> None:
        """Take it."""
        indices = self.stream.take(self.shard, self.taken * self.batch, self.batch)
        self.taken += 1
        self.meter.add(*self.step(indices, proxy=0, step=self.taken))
        if self.taken % self.config.training.log_every_steps == 0:
            self.meter.read()

    def clock_method(self, spent: list[float]) -> None:
        """From now on, append to ``spent`` the seconds of every call into the gate, its ledger and the sample order."""
        gate = self.step.gate
        calls = [(gate, "decide"), (gate, "record"), (gate, "any_kept"), (gate.ledger, "running_ratio_of")]
        for owner, name in [*calls, (self.stream, "take")]:
            setattr(owner, name, clocked(getattr(owner, name), spent))


def clocked(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """``function``, which notes the seconds it takes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        spent.append(time.perf_counter() - began)
        return result

    return call


def their_step(precision: str, batch: int, side: int) -> Step:
    """One step as diffusers' example takes it, with its defaults."""
    # Accelerate keeps one precision for a process; the models prepared before keep theirs.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images = torch.randn(NUM_IMAGES, 3, side, side)
    model = unet(settings(precision, batch), side)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    loader = DataLoader([{"input": image} for image in images], batch_size=batch, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10_000)
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)

    def forever() -> Iterator[Any]:
        while True:
            # Once per epoch, as the example does.
            model.train()
            yield from loader

    batches = forever()

    def take() -> None:
        clean = next(batches)["input"].to(dtype)
        noise = torch.randn(clean.shape, dtype=dtype)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(clean),)).long()
        noisy = schedule.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(noisy, timesteps).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
        loss.detach().item()

    return take


def timed(step: Step) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": 1e3 * middle, "lower_quartile_ms": 1e3 * low, "upper_quartile_ms": 1e3 * high}


def paired_ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over the turns of their time by our time: above 1, ours is faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


MAKERS: dict[str, Callable[[str, int, int], Step]] = {"ours": OurStep, "theirs": their_step}


def serve(connection: Connection, who: str, precision: str, batch: int, side: int) -> None:
    """In a process of its own: take a step whenever asked, and tell the seconds, until asked no more."""
    step = MAKERS[who](precision, batch, side)
    while connection.recv():
        connection.send(timed(step))


@contextmanager
def stepper(*variant: Any) -> Iterator[Callable[[], float]]:
    """A process that does nothing but, when called, one step; the call gives its seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *variant), daemon=True)
    process.start()

    def step() -> float:
        ours.send(True)
        seconds: float = ours.recv()
        return seconds

    yield step
    ours.send(False)
    process.join()


def compare(side: int, batch: int, budget: float) -> dict[str, Any]:
    """All four variants in turn, for ``budget`` seconds and at least 5 turns."""
    times: dict[tuple[str, str], list[float]] = {(who, p): [] for p in PRECISIONS for who in MAKERS}
    with ExitStack() as stack:
        steps = {key: stack.enter_context(stepper(*key, batch, side)) for key in times}
        for step in list(steps.values()) * 3:
            step()
        end = time.monotonic() + budget
        while time.monotonic() < end or len(times["ours", "no"]) < 5:
            turn = len(times["ours", "no"])
            # Who goes first changes from turn to turn.
            for key in list(steps) if turn % 2 else list(steps)[::-1]:
                times[key].append(steps[key]())
    return {
        "resolution": side,
        "batch_size": batch,
        "turns": len(times["ours", "no"]),
        "steps": {f"{who} {PRECISIONS[p]}": summary(values) for (who, p), values in times.items()},
        "speedup_fp32": paired_ratio(times["theirs", "no"], times["ours", "no"]),
        "speedup_bf16": paired_ratio(times["theirs", "bf16"], times["ours", "bf16"]),
        "speedup_defaults": paired_ratio(times["theirs", "no"], times["ours", "bf16"]),
    }


def method_cost(precision: str, side: int, rows: int, steps: int, batch: int = 64) -> dict[str, Any]:
    """What gate, ledger and sample order take of a step at ``rows`` training images, medians over ``steps`` steps."""
    step = OurStep(precision, batch, side, rows)
    # The first draw of an epoch shuffles it: paid once in rows / batch steps.
    shuffle = timed(lambda: step.stream.take(step.shard, 0, batch))
    for _ in range(3):
        step()
    spent: list[float] = []
    step.clock_method(spent)
    costs, shares = [], []
    for _ in range(steps):
        spent.clear()
        whole = timed(step)
        costs.append(sum(spent) + shuffle * batch / rows)
        shares.append(costs[-1] / whole)
    return {
        "num_samples": rows,
        "resolution": side,
        "batch_size": batch,
        "precision": PRECISIONS[precision],
        "steps": steps,
        "cost": summary(costs),
        "share_of_step": statistics.median(shares),
    }


def machine() -> dict[str, Any]:
    """Where and when."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
        # What tells the allocator to keep freed memory, as ours does by itself, tells both sides.
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def goals(cells: list[dict[str, Any]], costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of each kind against what it should be."""
    worst = min(min(cell["speedup_fp32"], cell["speedup_bf16"]) for cell in cells)
    defaults = min(cell["speedup_defaults"] for cell in cells)
    share = max(row["share_of_step"] for row in costs)
    return {
        "never slower at the same precision": {"worst_speedup": worst, "reached": worst >= 1},
        "our defaults at least 1.5x theirs": {"worst_speedup": defaults, "reached": defaults >= 1.5},
        "gate, ledger and sample order at most 1 % of a step": {"largest_share": share, "reached": share <= 0.01},
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="per combination of resolution and batch size")
    parser.add_argument("--steps", type=int, default=60, help="per combination, for what gate and ledger cost")
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.json")
    args = parser.parse_args()
    before = machine()
    cells = [compare(side, batch, args.seconds) for side in args.sides for batch in (16, 64)]
    costs = [
        method_cost(precision, side, rows, args.steps)
        for side in args.sides
        for rows in (50_000, 1_000_000)
        for precision in PRECISIONS
    ]
    result = {
        "machine": before,
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
        "step": cells,
        "gate_ledger_and_sample_order": costs,
        "goals": goals(cells, costs),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
