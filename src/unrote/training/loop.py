"""The training loop, for every method: rounds, shards, steps, checkpoints."""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.method.ensemble import Redistribution, ShardEnsemble
from unrote.method.outer import OuterOptimizer
from unrote.method.shards import SampleStream, split_shards
from unrote.models.making import make_task
from unrote.seeding import derive_seed
from unrote.tensorfiles import own_part
from unrote.training.budget import Counter, Progress, make_budget, total
from unrote.training.checkpoints import Checkpoints
from unrote.training.distributed import Single, launched
from unrote.training.journal import Journal
from unrote.training.looks import Looks
from unrote.training.monitor import make_monitor
from unrote.training.output import save_model, write_outputs
from unrote.training.reference import reference_of
from unrote.training.run import Run
from unrote.training.same_run import is_finished
from unrote.training.sharding import whole_model
from unrote.training.step import TrainingStep

logger = logging.getLogger("unrote")


@dataclass
class Meter:
    """Sums over the live proxy's steps since its last line in the log, on the device: reading them synchronises."""

    device: torch.device
    _sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, losses: Tensor, skipped: Tensor) -> None:
        """Count a batch."""
        self._sums += torch.stack([losses.double().sum(), skipped.sum(), torch.ones_like(losses).sum().double()])

    def read(self) -> dict[str, float]:
        """Mean loss and skipped share since the last line."""
        loss, skipped, samples = self._sums.tolist()
        return {"loss": loss / max(samples, 1), "skipped": skipped / max(samples, 1)}

    def clear(self) -> None:
        """There is a new line."""
        self._sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._sums.copy_(state["sums"])


def train(config: Config, images: ImageStore, run: Run, device: torch.device, looks: Looks | None) -> None:
    """Train until the budget is used up, from the newest checkpoint if there is one, and write the outputs.

    A run that was interrupted and goes on gives the same weights, ledger and log as an undisturbed one, bit for bit on
    the same machine with the same number of threads; so does a run in several processes, and one that goes on in more
    or fewer processes than before. With more processes than proxies it is the same to rounding, and not bit for bit.

    Args:
        config: of the run.
        images: what it trains on.
        run: its folder.
        device: where it computes.
        looks: when the monitor looks; None for never.

    Raises:
        InputError: if the folder holds another run, the loss is no longer finite, or another process has failed.
    """
    with _stop_requests() as stop, launched(stop) as peers, run.locked() if peers.rank == 0 else nullcontext():
        if peers.rank == 0:
            run.start(config, images)
        if is_finished(run, config, images, peers):
            logger.info("%s is finished; nothing to do", run.path)
            return
        with torch.random.fork_rng():
            _train(config, images, run, device, looks, peers)


def _train(
    config: Config, images: ImageStore, run: Run, device: torch.device, looks: Looks | None, peers: Single
) -> None:
    training, reference = config.training, reference_of(config, images)
    split: dict[str, Any] = {
        "split": config.ensemble.split,
        "seed": config.seed,
        "labels": None if images.labels is None else torch.from_numpy(images.labels.copy()),
        "left_out": reference,
    }
    shards = split_shards(len(images), config.num_shards, **split)
    peers.deal([len(shard) for shard in shards], device.type if training.fsdp else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP parts a model over the current ones
    if training.fsdp and peers.rank == 0 and not peers.parted:
        logger.info("training.fsdp changes nothing: no processes share a proxy, whose weights they would part")
    torch.manual_seed(derive_seed(config.seed, "init"))
    with peers.one_per_machine_first():
        task = make_task(config, images, device)
    if peers.rank == 0:
        run.keep_base(task.base)
    # Of the processes, the first writes and samples the model, and those that hold parts of it join in.
    model = whole_model(task, peers.team, device, first=peers.rank == 0)

    proxy, meter = Counter(), Meter(device)
    largest_shard = math.ceil(len(images) / config.num_shards)
    proxy_steps = math.ceil(training.epochs * largest_shard / training.batch_size)
    step = TrainingStep(config, task, len(images), device, proxy_steps, reference, peers.team)
    if model is not None:
        model.ema = step.ema
    ledger = step.gate.ledger
    assert ledger is not None
    msr = config.redistribution
    ensemble = ShardEnsemble(
        task.trained,
        step.optimizer,
        images,
        config.num_shards,
        gate=step.gate,
        ema=step.ema,
        kept={
            "counter": proxy,
            "meter": meter,
            "retry": step.retry,
            "lr_scheduler": step.lr_scheduler,
            "scaler": step.scaler,
        },
        optimizer_state=config.ensemble.optimizer_state,
        redistribution=Redistribution(msr.fraction, msr.topology, msr.every) if msr.enabled else None,
        outer=OuterOptimizer(*config.ensemble.outer) if config.ensemble.outer else None,
        folder=run.path / "proxies",
        average=task.average,
        peers=peers,
        **split,
    )
    budget = make_budget(config, len(images), tuple(len(shard) for shard in ensemble.shards))
    progress = Progress(budget, training.batch_size)
    streams = [SampleStream(config.seed, k) for k in range(config.num_shards)]

    monitor = make_monitor(config, images, run, task, model, looks, budget)
    checkpoints = Checkpoints(run.path / "checkpoints", ensemble.slots, training.checkpoints_total_limit, peers)
    state = checkpoints.load_newest()
    stood = {k: Counter() for k in ensemble.mine}
    if state is not None:
        if "proxies" not in state:
            raise InputError(
                f"{run.path}: was begun by an earlier version, whose checkpoints can't be gone on from; finish it with "
                "that version, or train into a new folder"
            )
        ensemble.load(state["ensemble"])
        ledger.load_state_dict(state["ledger"])
        progress.load_state_dict(state["progress"])
        if monitor is not None:
            monitor.load_state_dict(state["monitor"])
        stood = {k: Counter(**state["proxies"][k]) for k in ensemble.mine}
        logger.info("going on at %s of %s samples", f"{state['samples']:,}", f"{budget.total:,}")
    checkpoints.clear_away()
    peers.ticks = saved = state["steps"] if state else 0
    journal = Journal(peers, run, config, peers.ticks, state.pop("log") if state else None)

    def checkpoint(last: bool) -> None:
        nonlocal saved
        if ensemble.live is not None:
            stood[ensemble.live] = replace(proxy)
        everyone = peers.gather([(k, asdict(counter)) for k, counter in stood.items()])
        proxies = {k: counter for one in everyone for k, counter in one}
        whole = total(Counter(**counter) for counter in proxies.values())
        # One of the same step is as good; and when all is seen, the last one, of the same step, is about to come.
        if whole.steps > saved and (last or whole.samples < budget.total):
            if peers.rank == 0:
                run.ownership.check()
            with peers.working("writing a checkpoint"):
                parts = {"ensemble": ensemble.save(), "ledger": ledger.state_dict(), "log": journal.save()}
                parts |= {"progress": progress.state_dict()}
                parts |= {} if monitor is None else {"monitor": monitor.named()}
                checkpoints.save(whole.steps, parts | asdict(whole) | {"proxies": proxies})
                if monitor is not None:
                    monitor.checkpointed()
            saved = whole.steps

    @contextmanager
    def together(doing: str) -> Iterator[None]:
        """Around what the first process does with the whole model, and those that hold parts of it with it."""
        with peers.working(doing), peers.team.computing():
            yield

    def settle() -> None:
        progress.advance(ensemble.round_index, ensemble.part)
        journal.settle()

    peers.checkpoint, peers.settle = checkpoint, settle
    started, samples_here = time.monotonic(), 0
    if monitor is not None:
        monitor.pace.start(state["samples"] if state else 0)
    share = sum(budget.target(k, budget.num_rounds, 1.0) for k in ensemble.mine)
    bar = tqdm(
        total=share, initial=total(stood.values()).samples, unit="img", desc=config.method, leave=False,
        disable=True if peers.rank else None,
    )  # fmt: skip
    with bar, closing(journal):
        while ensemble.round_index < budget.num_rounds and not (monitor and monitor.stopped):
            for shard in ensemble.round():
                k, r = shard.proxy, ensemble.round_index
                target, end = budget.target(k, r, ensemble.part), budget.target(k, budget.num_rounds, 1.0)
                others = progress.of_others(k, r, ensemble.part)
                while proxy.samples < target:
                    # Batches are whole until the very end, so that rounds do not change how ordinary training batches.
                    size = min(training.batch_size, end - proxy.samples)
                    indices = streams[k].take(shard.indices, proxy.samples, size)
                    with peers.team.computing():
                        losses, skipped = step(indices, proxy=k, step=proxy.steps + 1)
                    proxy.count(size)
                    whole = others + proxy
                    meter.add(losses, skipped)
                    bar.update(size)
                    samples_here += size

                    due = whole.steps % training.log_every_steps == 0 or whole.samples == budget.total
                    # At the end of a turn too, so that nothing is averaged that was never looked at.
                    if due or proxy.samples >= target:
                        record: dict[str, Any] = {"step": whole.steps, "samples": whole.samples, "round": r, "proxy": k}
                        record |= meter.read() | step.gate.readings()
                        record |= {"learning_rate": step.lr_scheduler.get_last_lr()[0]}
                        if not (math.isfinite(record["loss"]) and peers.team.every(_all_finite(task.trained))):
                            _go_back(run, ensemble, step, record | {"own_step": proxy.steps}, first=peers.leads)
                            bar.update(proxy.samples + others.samples - whole.samples)
                            continue
                    if due:
                        meter.clear()
                        rate = {"images_per_second": round(samples_here / (time.monotonic() - started), 2)}
                        journal.add(k, record | rate | {"time": round(time.time(), 3)})
                        bar.set_postfix(loss=f"{record['loss']:.4f}", skipped=f"{record['skipped']:.0%}")
                    if peers.step(f"proxy {k}, step {proxy.steps}") or peers.ticks % training.checkpointing_steps == 0:
                        peers.meet()
                stood[k] = replace(proxy)
            finished = ensemble.round_index
            before, after = (training.snapshots * n // budget.num_rounds for n in (finished - 1, finished))
            if after > before and model is not None:
                with together("writing a snapshot"):
                    save_model(run.snapshot_folder(progress.whole.samples), model)

            if monitor is not None:
                if model is not None:
                    with together("looking at the model"):
                        monitor.look(ensemble.round_index, progress.whole.samples, progress.whole.steps, journal)
                monitor.load_state_dict(peers.gather(monitor.state_dict())[0])
                if model is not None:
                    with together("keeping the best"):
                        monitor.keep_best(progress.whole.samples)

        checkpoint(last=True)
    if peers.rank == 0:
        run.ownership.check()
        checkpoints.finish()
    if model is not None:
        with together("writing the outputs"):
            samples = progress.whole.samples
            used = samples if monitor is None else monitor.put_back_best(samples)
            left = None if used == samples else used
            write_outputs(run, config, images, model, ledger, progress.whole.steps, left)
    # The first process says that all is written.
    peers.gather(None)


def _all_finite(model: torch.nn.Module) -> bool:
    return bool(torch.stack([own_part(weight).isfinite().all() for weight in model.parameters()]).all())


def _go_back(run: Run, ensemble: ShardEnsemble, step: TrainingStep, record: dict[str, Any], *, first: bool) -> None:
    """The live proxy has diverged: it begins its turn again, once, and draws otherwise.

    So do all that share it; the ``first`` of them notes it.

    Raises:
        InputError: if it did so before, or there is one shard, which has nothing to go back to.
    """
    if first:
        with (run.path / "diverged.jsonl").open("a") as file:
            file.write(json.dumps(record | {"loss": str(record["loss"]), "retries": step.retry.count}) + "\n")
    finite = math.isfinite(record["loss"])
    found = "has weights that are no numbers" if finite else f"has a loss of {record['loss']:g}"
    what = f"proxy {record['proxy']} {found} at step {record['step']}"
    if ensemble.num_shards == 1 or step.retry.count:
        again = ", for the second time in this run" if step.retry.count else ""
        raise InputError(
            f"{run.path}: {what}{again}: training has diverged (see diverged.jsonl). Lower training.learning_rate, or "
            "set training.mixed_precision=bf16 or no, and train into a new folder"
        )
    ensemble.rewind()
    step.retry.count += 1
    logger.warning("%s: it goes back to where its turn began and draws otherwise", what)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM fill the list; the loop then writes a checkpoint and stops.

    A second one stops at once, but where there is a launcher, which sees to that.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        # A launcher passes on what the terminal has sent to all.
        if received and "RANK" not in os.environ:
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
