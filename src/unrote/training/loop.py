"""The training loop, for every method: rounds, shards, steps, checkpoints."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.method.ensemble import Redistribution, ShardEnsemble
from unrote.method.shards import SampleStream
from unrote.models.making import make_task
from unrote.seeding import derive_seed
from unrote.training.checkpoints import Checkpoints
from unrote.training.output import save_model, write_outputs
from unrote.training.run import Log, Run
from unrote.training.step import TrainingStep
from unrote.training.trackers import make_tracker

logger = logging.getLogger("unrote")


@dataclass
class Counter:
    """Samples seen and steps taken, of one proxy or of the run."""

    samples: int = 0
    steps: int = 0

    def count(self, samples: int) -> None:
        """One more step, on ``samples``."""
        self.samples += samples
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"samples": self.samples, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.samples, self.steps = state["samples"], state["steps"]


@dataclass
class Meter:
    """Sums over the steps since the last line of the log, kept on the device: reading them synchronises."""

    device: torch.device
    _sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, losses: Tensor, skipped: Tensor) -> None:
        """Count a batch."""
        self._sums += torch.stack([losses.double().sum(), skipped.sum(), torch.ones_like(losses).sum().double()])

    def read(self) -> dict[str, float]:
        """Mean loss and skipped share since the last reading."""
        loss, skipped, samples = self._sums.tolist()
        self._sums.zero_()
        return {"loss": loss / samples, "skipped": skipped / samples}

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._sums.copy_(state["sums"])


@dataclass(frozen=True)
class Budget:
    """How many samples are seen: epochs x N in all, shared over the proxies in proportion to their shards.

    >>> budget = Budget(total=100, local=30, sizes=(6, 4))
    >>> budget.num_rounds, budget.target(0, 3, 1.0), budget.target(1, 3, 1.0)
    (4, 60, 40)
    """

    total: int
    """Samples seen by all proxies."""
    local: float
    """Samples seen by all proxies in one round: E x N."""
    sizes: tuple[int, ...]
    """Shard sizes."""

    @property
    def num_rounds(self) -> int:
        """R; the last round may be shorter than the others."""
        # No empty last round where rounding leaves E x N just below a whole number.
        return math.ceil(self.total / self.local - 1e-9)

    def seen(self, rounds: float) -> int:
        """Samples that all proxies have seen after so many rounds."""
        return self.total if rounds >= self.num_rounds else min(self.total, math.floor(self.local * rounds))

    def target(self, proxy: int, round_index: int, part: float) -> int:
        """Samples that ``proxy`` has seen when ``part`` (in (0, 1]) of round ``round_index`` is over."""
        seen = self.seen(round_index + part)
        # Whole numbers do not grow evenly: a proxy's share of a part can be one more than its share of all.
        return min(self._share(proxy, seen), self._share(proxy, self.total))

    def _share(self, proxy: int, seen: int) -> int:
        before, size, total = sum(self.sizes[:proxy]), self.sizes[proxy], sum(self.sizes)
        return seen * (before + size) // total - seen * before // total


def make_budget(config: Config, num_samples: int, sizes: tuple[int, ...]) -> Budget:
    """The budget of a run on ``num_samples`` images in shards of ``sizes``."""
    total = max(1, round(config.training.epochs * num_samples))
    # Without an ensemble a round changes nothing; its end is where a snapshot is taken.
    alone = total / max(1, config.training.snapshots)
    local = config.ensemble.local_epochs * num_samples if config.ensemble.enabled else alone
    return Budget(total, local, sizes)


def train(config: Config, images: ImageStore, run: Run, device: torch.device) -> None:
    """Train until the budget is used up, from the newest checkpoint if there is one, and write the outputs.

    A run that was interrupted and goes on gives the same weights, ledger and log as an undisturbed one, bit for bit on
    the same machine with the same number of threads.

    Raises:
        InputError: if the folder holds another run, or the loss is no longer finite.
    """
    with run.locked():
        run.start(config, images)
        if run.finished:
            logger.info("%s is finished; nothing to do", run.path)
            return
        with torch.random.fork_rng(), _stop_requests() as stop:
            _train(config, images, run, device, stop)


def _train(config: Config, images: ImageStore, run: Run, device: torch.device, stop: list[int]) -> None:
    training = config.training
    torch.manual_seed(derive_seed(config.seed, "init"))
    task = make_task(config, images, device)
    run.keep_base(task.base)
    model = task.trained

    proxy, whole, meter = Counter(), Counter(), Meter(device)
    largest_shard = math.ceil(len(images) / config.num_shards)
    proxy_steps = math.ceil(training.epochs * largest_shard / training.batch_size)
    step = TrainingStep(config, task, len(images), device, proxy_steps)
    msr = config.redistribution
    ensemble = ShardEnsemble(
        model,
        step.optimizer,
        images,
        config.num_shards,
        gate=step.gate,
        ema=step.ema,
        kept={"counter": proxy, "lr_scheduler": step.lr_scheduler, "scaler": step.scaler},
        split=config.ensemble.split,
        labels=None if images.labels is None else torch.from_numpy(images.labels.copy()),
        optimizer_state=config.ensemble.optimizer_state,
        redistribution=Redistribution(msr.fraction, msr.topology, msr.every) if msr.enabled else None,
        seed=config.seed,
        folder=run.path / "proxies",
        average=task.average,
    )
    budget = make_budget(config, len(images), tuple(len(shard) for shard in ensemble.shards))
    streams = [SampleStream(config.seed, k) for k in range(config.num_shards)]

    parts = {"model": model, "optimizer": step.optimizer, "lr_scheduler": step.lr_scheduler, "scaler": step.scaler}
    parts |= {"gate": step.gate, "ensemble": ensemble, "proxy": proxy, "whole": whole, "meter": meter}
    parts |= {"ema": step.ema} if step.ema is not None else {}
    checkpoints = Checkpoints(run.path / "checkpoints", ensemble.slots, training.checkpoints_total_limit)
    state = checkpoints.load_newest()
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        logger.info("going on at %s of %s samples", f"{whole.samples:,}", f"{budget.total:,}")
    log = Log(run.path / "log.jsonl", state["log_length"] if state else 0)
    tracker = make_tracker(training.report_to, run.path, config, whole.steps)

    def checkpoint() -> None:
        everything = {name: part.state_dict() for name, part in parts.items()}
        log.sync()
        checkpoints.save(whole.steps, everything | {"log_length": log.length})

    started, samples_before = time.monotonic(), whole.samples
    bar = tqdm(total=budget.total, initial=whole.samples, unit="img", desc=config.method, leave=False, disable=None)
    with bar, closing(log), closing(tracker):
        while ensemble.round_index < budget.num_rounds:
            for shard in ensemble.round():
                k, r = shard.proxy, ensemble.round_index
                target = budget.target(k, r, (ensemble.phase + 1) / ensemble.num_phases)
                end = budget.target(k, budget.num_rounds, 1.0)
                while proxy.samples < target:
                    # Batches are whole until the very end, so that rounds do not change how ordinary training batches.
                    size = min(training.batch_size, end - proxy.samples)
                    indices = streams[k].take(shard.indices, proxy.samples, size)
                    losses, skipped = step(indices, proxy=k, step=proxy.steps + 1)
                    proxy.count(size)
                    whole.count(size)
                    meter.add(losses, skipped)
                    bar.update(size)

                    # The last step too, so that no run ends well whose loss was never looked at.
                    if whole.steps % training.log_every_steps == 0 or whole.samples == budget.total:
                        record: dict[str, Any] = {"step": whole.steps, "samples": whole.samples, "round": r, "proxy": k}
                        record |= meter.read() | {"learning_rate": step.lr_scheduler.get_last_lr()[0]}
                        _check_finite(record, run)
                        seconds = time.monotonic() - started
                        rate = {"images_per_second": round((whole.samples - samples_before) / seconds, 2)}
                        log.write(record | rate | {"time": round(time.time(), 3)})
                        tracker.log(record | rate, whole.steps)
                        bar.set_postfix(loss=f"{record['loss']:.4f}", skipped=f"{record['skipped']:.0%}")
                    # Not after the last step: the checkpoint of the end would overwrite this one, of the same step.
                    due = stop or whole.steps % training.checkpointing_steps == 0
                    if due and whole.samples < budget.total:
                        checkpoint()
                        if stop:
                            raise KeyboardInterrupt
            seen, before = (training.snapshots * budget.seen(n) // budget.total for n in (r + 1, r))
            if seen > before:
                save_model(run.snapshot_folder(whole.samples), task, step.ema)

        checkpoint()
    assert step.gate.ledger is not None
    write_outputs(run, config, images, task, step.ema, step.gate.ledger, whole.steps)


def _check_finite(record: dict[str, Any], run: Run) -> None:
    if not math.isfinite(record["loss"]):
        raise InputError(
            f"{run.path}: the loss is {record['loss']} at step {record['step']}: training has diverged. Lower "
            "training.learning_rate, or set training.mixed_precision=bf16 or no, and train into a new folder"
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM fill the list; the loop then writes a checkpoint and stops. A second one stops at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are its business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
