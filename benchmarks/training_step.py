"""Our training step against the loop of diffusers' unconditional example, and what gate and ledger cost.

Both sides train the same UNet on the same images at the same batch size and precision, one step each in turn, in one
process: whatever else the machine does meets both. Their side is the published example (accelerate, AdamW, EMAModel,
cosine schedule, loss read every step) without its image transforms, progress bar and trackers; ours is the step of the
default method, iet-agc+ (gate, ledger and augmentation included), driven as the training loop drives it.

    python benchmarks/training_step.py --seconds 60
"""

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
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
from unrote.data.store import in_memory_store
from unrote.files import write_json
from unrote.method.gate import LossGate
from unrote.method.ledger import Ledger
from unrote.method.shards import SampleStream
from unrote.models.denoiser import build_unet
from unrote.training.loop import Meter
from unrote.training.step import TrainingStep

RESULTS = Path(__file__).parent / "results"
NUM_IMAGES = 2048
CPU = torch.device("cpu")
Step = Callable[[], None]


def settings(precision: str, batch: int) -> Config:
    """Ours at the preset ``tiny``, but for precision and batch size."""
    return load_config(overrides={"training.mixed_precision": precision, "training.batch_size": batch})


def unet(config: Config, side: int) -> UNet2DModel:
    """The model of both sides, with the same fresh weights."""
    torch.manual_seed(0)
    return build_unet(config.model, resolution=side, channels=3, num_classes=None)


def our_step(precision: str, batch: int, side: int) -> Step:
    """One step as ``unrote.training.loop`` takes it."""
    config = settings(precision, batch)
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, side, side, 3), dtype=np.uint8)
    step = TrainingStep(config, in_memory_store(pixels, source="noise"), unet(config, side), CPU, proxy_steps=10_000)
    stream, shard, meter = SampleStream(0, 0), torch.arange(NUM_IMAGES), Meter(CPU)
    taken = 0

    def take() -> None:
        nonlocal taken
        indices = stream.take(shard, taken * batch, batch)
        taken += 1
        meter.add(*step(indices, proxy=0, step=taken))
        if taken % config.training.log_every_steps == 0:
            meter.read()

    return take


def their_step(precision: str, batch: int, side: int) -> Step:
    """One step as diffusers' example takes it, with its defaults."""
    # Accelerate keeps one precision for a process; the models prepared before keep theirs.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
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
            yield from loader

    batches = forever()

    def take() -> None:
        model.train()
        clean = next(batches)["input"]
        noise = torch.randn(clean.shape, dtype=clean.dtype)
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


def compare(side: int, batch: int, budget: float) -> dict[str, Any]:
    """All four variants in turn, for ``budget`` seconds and at least 5 turns."""
    makers = {"ours": our_step, "theirs": their_step}
    steps = {(who, p): make(p, batch, side) for p in ("no", "bf16") for who, make in makers.items()}
    for step in list(steps.values()) * 2:
        step()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    end = time.monotonic() + budget
    while time.monotonic() < end or len(times["ours", "no"]) < 5:
        turn = len(times["ours", "no"])
        # Who goes first changes from turn to turn.
        for key in list(steps) if turn % 2 else list(steps)[::-1]:
            times[key].append(timed(steps[key]))
    return {
        "resolution": side,
        "batch_size": batch,
        "turns": len(times["ours", "no"]),
        "steps": {f"{who} {'fp32' if p == 'no' else p}": summary(values) for (who, p), values in times.items()},
        "speedup_fp32": paired_ratio(times["theirs", "no"], times["ours", "no"]),
        "speedup_bf16": paired_ratio(times["theirs", "bf16"], times["ours", "bf16"]),
        "speedup_defaults": paired_ratio(times["theirs", "no"], times["ours", "bf16"]),
    }


def gate_cost(num_samples: int, batch: int = 64) -> float:
    """Median seconds that gate and ledger take of a step."""
    gate = LossGate(1000, 0.5, ledger=Ledger(num_samples))
    seconds = []
    for turn in range(300):
        draw = torch.Generator().manual_seed(turn)
        losses = torch.rand(batch, generator=draw)
        timesteps = torch.randint(1000, (batch,), generator=draw)
        indices = torch.randint(num_samples, (batch,), generator=draw)

        def judge(losses: Any = losses, timesteps: Any = timesteps, indices: Any = indices) -> None:
            gate.record(gate.decide(losses, timesteps), losses, timesteps, indices)
            gate.any_kept()

        seconds.append(timed(judge))
    return statistics.median(seconds[20:])


def machine() -> dict[str, Any]:
    """Where and when."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="per combination of resolution and batch size")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.json")
    args = parser.parse_args()
    before = machine()
    cells = [compare(side, batch, args.seconds) for side in (16, 32) for batch in (16, 64)]
    gates = []
    for num_samples in (50_000, 1_000_000):
        cost = gate_cost(num_samples)
        shares = {
            f"share_of_{cell['resolution']}x{cell['resolution']}_{precision}_step": 1e3
            * cost
            / cell["steps"][f"ours {precision}"]["median_ms"]
            for cell in cells
            if cell["batch_size"] == 64
            for precision in ("fp32", "bf16")
        }
        gates.append({"num_samples": num_samples, "batch_size": 64, "median_ms": 1e3 * cost, **shares})
    worst = min(min(cell["speedup_fp32"], cell["speedup_bf16"]) for cell in cells)
    defaults = min(cell["speedup_defaults"] for cell in cells)
    share = max(value for row in gates for key, value in row.items() if key.startswith("share"))
    result = {
        "machine": before,
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
        "shared_machine": max(before["load_average"][0], os.getloadavg()[0]) > 1.3 * math.ceil(os.cpu_count() or 1),
        "step": cells,
        "gate_and_ledger": gates,
        "goals": {
            "never slower at the same precision": {"worst_speedup": worst, "reached": worst >= 1},
            "our defaults at least 1.5x theirs": {"worst_speedup": defaults, "reached": defaults >= 1.5},
            "gate and ledger at most 1 % of a step": {"largest_share": share, "reached": share <= 0.01},
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
