"""Looks at samples while training: how many are copies, when to stop, which weights to keep.

Bonnaire et al. (NeurIPS 2025) find that a model first learns to generate, and begins to memorize at a later time that
grows with the number of images: between the two there is a model that does one and not the other.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unrote.config import Config
from unrote.config.limits import StopRule, parse_stop_rule
from unrote.data import ImageStore, open_images
from unrote.errors import InputError
from unrote.files import write_json
from unrote.models.denoiser import build_schedule
from unrote.models.task import Task
from unrote.tensorfiles import load_state, save_state
from unrote.training.ema import EMA
from unrote.training.journal import Journal
from unrote.training.run import Run

logger = logging.getLogger("unrote")

BATCH = 32
"""Images sampled at once, as ``unrote sample`` does, so that both make the same images."""
TRAINING_WORK = {"no": 3, "bf16": 2, "fp16": 2}
"""Forward passes in float32, as of a look, that a training sample costs: one forward, a backward of twice the work."""
DEFAULT_RULE = StopRule("mq", 0.5, 0.0)
"""What is logged where nothing is said about stopping."""


def rounds_between(config: Config, images_per_round: float, rounds: int) -> int:
    """Rounds from one look to the next: ``monitor.every``, or more, to stay within ``monitor.max_overhead``.

    Looks are counted back from the end, which is always looked at. A look costs samples · steps forward passes, a run
    2 or 3 · ``images_per_round`` · ``rounds``, by its precision; the looks' share is the overhead.
    """
    monitor = config.monitor
    work = TRAINING_WORK[config.training.mixed_precision] * images_per_round * rounds
    most = max(1, math.floor(monitor.max_overhead * work / (monitor.samples * monitor.steps) + 1e-9))
    return max(monitor.every, math.ceil(rounds / most))


class Monitor:
    """Looks at samples at the ends of rounds; all that it decides is in its state.

    Args:
        config: of the run.
        images: the training images.
        run: where the best weights are kept.
        task: the model.
        ema: its averaged weights, which are looked at if there are any.
        every: rounds between two looks.
        last: the number of rounds, from which looks are counted back.

    Attributes:
        stopped: whether ``monitor.stop_when`` has held.
    """

    def __init__(
        self, config: Config, images: ImageStore, run: Run, task: Task, ema: EMA | None, every: int, last: int
    ) -> None:
        # They import diffusers' samplers and the searches, which training alone does not need.
        from unrote.guards.quick import QuickAudit
        from unrote.sampling import Denoiser

        self._settings, self._run, self._task, self._ema = config.monitor, run, task, ema
        self._every, self._last = every, last
        rule = config.monitor.stop_when
        self._rule = DEFAULT_RULE if rule is None else parse_stop_rule(rule)
        self._audit = QuickAudit(images, _holdout(config, images))
        schedule = build_schedule(config.model)
        self._denoise = Denoiser(task.denoiser, schedule, "ddim", config.monitor.steps, 0.0, config.seed)
        self.stopped = False
        self._looks: list[dict[str, Any]] = []
        self._best: dict[str, Any] | None = None

    def look(self, rounds: int, samples: int, step: int, journal: Journal) -> None:
        """Look at the model after ``rounds`` rounds if it is due, log what is seen, and decide."""
        if (self._last - rounds) % self._every:
            return
        began = time.monotonic()
        counts, distance = self._audit(self._sampled(), self._rule.measure, self._rule.threshold)
        measured, copied = counts["measured"], counts["copied"]
        share = measured["fraction"]
        seen = {self._rule.label: share, "copied": copied["fraction"]}
        seen |= {} if distance is None else {"frechet": distance}
        self.stopped = self._settings.stop_when is not None and share > self._rule.greatest
        kept = self._keep({"samples": samples, "share": share, "frechet": distance})
        found = {**seen, "interval": measured["interval"], "kept": kept, "stop": self.stopped}
        record = {"step": step, "samples": samples, "round": rounds, "monitor": found}
        self._looks.append(record)
        scalars = {f"monitor/{name}": value for name, value in seen.items()}
        journal.note(record | {"time": round(time.time(), 3)}, scalars)
        words = ", ".join(f"{name} {value:.4g}" for name, value in seen.items())
        logger.info("look after %s samples: %s (%.1f s)", f"{samples:,}", words, time.monotonic() - began)
        if self.stopped:
            logger.info("stopping: monitor.stop_when is %s", self._settings.stop_when)

    def put_back_best(self) -> None:
        """Give the model the weights to finish with, and write ``monitor.json``: the looks, and what came of them."""
        used = self._looks[-1]["samples"] if self._looks else None
        if self._best is not None and self._best["samples"] != used:
            used = self._best["samples"]
            for name, state in load_state(self._file(used)).items():
                self._parts()[name].load_state_dict(state)
            logger.info("finishing with the weights after %s samples", f"{used:,}")
        summary = {"stop_when": self._settings.stop_when, "stopped": self.stopped, "model_samples": used}
        write_json(self._run.path / "monitor.json", summary | {"looks": self._looks})

    def _sampled(self) -> Any:
        """The images of a look."""
        import numpy as np

        size = min(BATCH, self._settings.samples)
        starts = range(0, self._settings.samples, size)
        self._task.denoiser.eval()
        if self._ema is None:
            parts = [self._denoise(range(start, start + size)) for start in starts]
        else:
            with self._ema.applied():
                parts = [self._denoise(range(start, start + size)) for start in starts]
        return np.concatenate(parts)[: self._settings.samples]

    def _keep(self, look: dict[str, Any]) -> bool:
        """Keep the weights if no earlier look was better: less beyond what is allowed, then nearer to real images."""
        if self._settings.keep_best != "pareto" or (
            self._best is not None and self._rank(self._best) <= self._rank(look)
        ):
            return False
        self._best = look
        save_state(self._file(look["samples"]), {name: part.state_dict() for name, part in self._parts().items()})
        for file in self._file(0).parent.glob("*.safetensors"):
            if file != self._file(look["samples"]):
                file.unlink()
        return True

    def _rank(self, look: Mapping[str, Any]) -> tuple[float, float]:
        return max(0.0, look["share"] - self._rule.greatest), look["frechet"]

    def _parts(self) -> dict[str, Any]:
        return {"model": self._task.trained} | ({} if self._ema is None else {"ema": self._ema})

    def _file(self, samples: int) -> Path:
        return self._run.path / "monitor" / f"{samples:012d}.safetensors"

    def state_dict(self) -> dict[str, Any]:
        """What was seen and decided."""
        return {"stopped": self.stopped, "looks": list(self._looks), "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.stopped, self._looks, self._best = state["stopped"], list(state["looks"]), state["best"]


def make_monitor(
    config: Config, images: ImageStore, run: Run, task: Task, ema: EMA | None, budget: Any
) -> Monitor | None:
    """The monitor that ``config`` asks for; None where it asks for none.

    Raises:
        InputError: the held-out images can't be read or are of another size.
    """
    if not config.monitor.every:
        return None
    every = rounds_between(config, budget.local, budget.num_rounds)
    if every >= budget.num_rounds > 1:
        logger.warning(
            "only the end is looked at: raise monitor.max_overhead, or lower monitor.samples or monitor.steps"
        )
    elif every > config.monitor.every:
        logger.info("looks are made every %d rounds, not %d: monitor.max_overhead", every, config.monitor.every)
    return Monitor(config, images, run, task, ema, every, budget.num_rounds)


def _holdout(config: Config, images: ImageStore) -> ImageStore | None:
    source = config.monitor.holdout
    if source is None:
        return None
    try:
        return open_images(source, resolution=images.images.shape[1], channels=config.data.channels)
    except InputError as error:
        raise InputError(f"monitor.holdout: {error}") from None
