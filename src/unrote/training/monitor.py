"""Looks at samples while training: how many are copies, when to stop, which weights to keep.

Bonnaire et al. (NeurIPS 2025) find that a model first learns to generate, and begins to memorize at a later time that
grows with the number of images: between the two there is a model that does one and not the other.
"""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from unrote.config import Config
from unrote.data import ImageStore
from unrote.errors import InputError
from unrote.files import write_json, write_text
from unrote.limits import StopRule, parse_stop_rule
from unrote.method.parts import put_back, take
from unrote.models.denoiser import DenoisingLoss, build_schedule
from unrote.models.task import Task
from unrote.seeding import generator
from unrote.tensorfiles import Stored, join_in, save_state
from unrote.training.budget import Budget
from unrote.training.images import watched_against
from unrote.training.journal import Journal
from unrote.training.looks import Looks
from unrote.training.looks_chart import looks_chart
from unrote.training.pace import Pace
from unrote.training.run import Run
from unrote.training.sharding import WholeModel
from unrote.versions import RESULT_VERSION

logger = logging.getLogger("unrote")

BATCH, PROMPTED_BATCH = 32, 4
"""Images sampled at once, as ``unrote sample`` does, so that both make the same images."""
DEFAULT_RULE = StopRule("mq", 0.5, 0.0)
"""What is logged where nothing is said about stopping."""


class Monitor:
    """Looks at samples at the ends of rounds; all that it decides is in its state.

    Args:
        config: of the run.
        images: the training images.
        run: where the best weights are kept.
        task: the model in training.
        model: its whole weights, the averaged ones if there are any; None in a process that has no part in looks.
        plan: when looks are made.
        budget: of the run, from whose last round looks are counted back.

    Attributes:
        stopped: whether ``monitor.stop_when`` has held.
    """

    def __init__(
        self,
        config: Config,
        images: ImageStore,
        run: Run,
        task: Task,
        model: WholeModel | None,
        plan: Looks,
        budget: Budget,
    ) -> None:
        from unrote.guards.quick import QuickAudit  # the searches of an audit, which training alone does not need

        self._config, self._size = config, images.images.shape[1:3]
        self._settings, self._run, self._task, self._model = config.monitor, run, task, model
        self._plan, most = plan, config.monitor.max_overhead
        self.pace = Pace(plan, budget.num_rounds, budget.total, most, run.path / "monitor" / "pace.json")
        self._settling_in = 0.0
        rule = config.monitor.stop_when
        self._rule = DEFAULT_RULE if rule is None else parse_stop_rule(rule)
        self._audit = QuickAudit(images, watched_against(config, images))
        self._prompts = None if config.model.pretrained is None else prompts_of(images, config)
        self.stopped = False
        self._looks: list[dict[str, Any]] = []
        self._best: dict[str, Any] | None = None
        # By each of the checkpoints that are kept, newest last: after how many samples the weights were the best.
        self._named = deque[int | None](maxlen=config.training.checkpoints_total_limit)

    def look(self, rounds: int, samples: int, step: int, journal: Journal) -> None:
        """Look at the model after ``rounds`` rounds if it is due, log what is seen, and decide.

        All that hold a part of it call it; the first of them sees.
        """
        if not self.pace.due(rounds):
            return
        began = time.monotonic()
        images = self._sampled()
        if images is None:
            return
        counts, distance = self._audit(images, self._rule.measure, self._rule.threshold)
        measured, copied = counts["measured"], counts["copied"]
        share = measured["fraction"]
        seen = {self._rule.label: share, "copied": copied["fraction"]}
        seen |= {} if distance is None else {"frechet": distance}
        self.stopped = self._settings.stop_when is not None and share > self._rule.greatest
        kept = self._is_best({"samples": samples, "share": share, "frechet": distance})
        found = {**seen, "interval": measured["interval"], "kept": kept, "stop": self.stopped}
        record = {"step": step, "samples": samples, "round": rounds, "monitor": found}
        self._looks.append(record)
        scalars = {f"monitor/{name}": value for name, value in seen.items()}
        self._draw(None)
        spent = time.monotonic() - began
        self.pace.looked(rounds, samples, spent, self._settling_in)
        clock = {"time": round(time.time(), 3), "seconds": round(spent, 3), "overhead": round(self.pace.overhead, 4)}
        journal.note(record | clock, scalars)
        words = ", ".join(f"{name} {value:.4g}" for name, value in seen.items())
        logger.info("look after %s samples: %s (%.1f s)", f"{samples:,}", words, spent)
        if self.stopped:
            logger.info("stopping: monitor.stop_when is %s", self._settings.stop_when)

    def put_back_best(self, samples: int) -> int:
        """Give the model the weights to finish with, and write ``monitor.json`` and ``monitor.svg``: what was seen.

        ``samples`` is how many those weights have seen that the model has now; returned, how many those that it gets.
        """
        used = samples
        if self._best is not None and self._best["samples"] != used:
            used = self._best["samples"]
            put_back(self._parts(), Stored.at(self._file(used)))
            logger.info("finishing with the weights after %s samples", f"{used:,}")
        if not self._whole.first:
            return used
        summary: dict[str, Any] = {"schema_version": RESULT_VERSION}
        summary |= {"stop_when": self._settings.stop_when, "stopped": self.stopped}
        summary |= {"model_samples": used, "every": self._plan.every, "planned_overhead": self._plan.overhead}
        summary |= {"overhead": self.pace.overhead, "prompts": self._prompts}
        write_json(self._run.path / "monitor.json", summary | {"looks": self._looks})
        self._draw(used)
        return used

    def _draw(self, used: int | None) -> None:
        """The looks so far as a picture."""
        if self._looks:
            limit = None if self._settings.stop_when is None else self._rule.greatest
            write_text(self._run.path / "monitor.svg", looks_chart(self._looks, self._rule.label, limit, used))

    @cached_property
    def _denoise(self) -> Any:
        """What makes images as ``unrote sample`` does; of text-to-image models it holds a second autoencoder."""
        from unrote.sampling import Denoiser, text_sampler

        steps, seed = self._settings.steps, self._config.seed
        if self._prompts is None:
            return Denoiser(self._task.denoiser, build_schedule(self._config.model), "ddim", steps, 0.0, seed)
        from unrote.text.generation import PromptDenoiser, reading_once
        from unrote.text.prompts import Prompt

        pipeline = reading_once(self._task.pipeline())  # type: ignore[attr-defined]
        pipeline.scheduler = text_sampler(pipeline.scheduler, None, steps)[1]
        options: dict[str, Any] = {"guidance_scale": self._settings.guidance_scale, "size": self._size}
        return PromptDenoiser(pipeline, [Prompt(text) for text in self._prompts], seed=seed, steps=steps, **options)

    @property
    def _whole(self) -> WholeModel:
        assert self._model is not None
        return self._model

    def _sampled(self) -> Any:
        """The images of a look; None in a process that only joins in."""
        import numpy as np

        size = min(BATCH if self._prompts is None else PROMPTED_BATCH, self._settings.samples)
        starts = range(0, self._settings.samples, size)
        with self._whole.weights(sampled=True), self._task.sampled_as():
            if not self._whole.first:
                return None
            self._task.denoiser.eval()
            began, denoise = time.monotonic(), self._denoise
            self._settling_in = time.monotonic() - began
            parts = [denoise(range(start, start + size)) for start in starts]
        return np.concatenate(parts)[: self._settings.samples]

    def _is_best(self, look: dict[str, Any]) -> bool:
        """Whether no earlier look was better: less beyond what is allowed, then nearer to real images."""
        if self._settings.keep_best != "pareto" or (
            self._best is not None and self._rank(self._best) <= self._rank(look)
        ):
            return False
        self._best = look
        return True

    def keep_best(self, samples: int) -> None:
        """Keep the weights if the look after ``samples`` samples was the best; see :meth:`look`."""
        if self._best is None or self._best["samples"] != samples:
            return
        state = take(self._parts())
        if not self._whole.first:
            join_in(state)
            return
        save_state(self._file(samples), state)
        self._remove_others()

    def named(self) -> dict[str, Any]:
        """The state for a checkpoint, which names the best weights from now on; see :meth:`state_dict`."""
        self._named.append(None if self._best is None else self._best["samples"])
        return self.state_dict()

    def checkpointed(self) -> None:
        """A checkpoint is written: weights that none of those that are kept names are removed.

        A run that goes back to an older checkpoint must find what that one names, also where the same look, on another
        device, would not find the same to be the best.
        """
        if self._model is not None and self._whole.first:
            self._remove_others()

    def _remove_others(self) -> None:
        """Remove what neither is the best nor is named by a checkpoint that is kept."""
        wanted = [*self._named, None if self._best is None else self._best["samples"]]
        for file in set(self._kept()) - {self._file(samples) for samples in wanted if samples is not None}:
            file.unlink()

    def _kept(self) -> list[Path]:
        return sorted((self._run.path / "monitor").glob("*.safetensors"))

    def _rank(self, look: Mapping[str, Any]) -> tuple[float, float]:
        return max(0.0, look["share"] - self._rule.greatest), look["frechet"]

    def _parts(self) -> dict[str, Any]:
        ema = self._whole.ema
        return {"model": self._task.trained} | ({} if ema is None else {"ema": ema})

    def _file(self, samples: int) -> Path:
        return self._run.path / "monitor" / f"{samples:012d}.safetensors"

    def state_dict(self) -> dict[str, Any]:
        """What was seen and decided."""
        seen = {"stopped": self.stopped, "looks": list(self._looks), "best": self._best}
        return seen | {"pace": self.pace.state_dict(), "named": list(self._named)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.stopped, self._looks, self._best = state["stopped"], list(state["looks"]), state["best"]
        self.pace.load_state_dict(state.get("pace", {"decided": []}))  # of an earlier version: as planned
        self._named.clear()
        # A state of an earlier version does not say: any of them. Only then, as every round comes by here.
        self._named.extend(state["named"] if "named" in state else (int(file.stem) for file in self._kept()))


def make_monitor(
    config: Config,
    images: ImageStore,
    run: Run,
    task: Task,
    model: WholeModel | None,
    plan: Looks | None,
    budget: Budget,
) -> Monitor | None:
    """The monitor of a run that looks as planned; None where nothing is.

    Raises:
        InputError: the held-out images can't be read or are of another size, or a look's steps can't be spread evenly.
    """
    if plan is None:
        return None
    if isinstance(task.loss, DenoisingLoss) and task.loss.num_timesteps % config.monitor.steps:
        raise InputError(f"monitor.steps: must divide the model's {task.loss.num_timesteps} timesteps")
    logger.log(logging.WARNING if plan.count == 1 < budget.num_rounds else logging.INFO, "monitor: %s", plan)
    return Monitor(config, images, run, task, model, plan, budget)


def prompts_of(images: ImageStore, config: Config) -> list[str]:
    """The captions of ``monitor.samples`` images that the seed chooses, or of all that have one; they are used in turn.

    Raises:
        InputError: no image has a caption.
    """
    captions: Sequence[str] = [text for text in images.captions or () if text]
    if not captions:
        raise InputError(f"monitor.every: no image of {images.source} has a caption to ask the model for")
    draw = generator(config.seed, "monitor-prompts")
    order = torch.randperm(len(captions), generator=draw)[: config.monitor.samples]
    return [captions[place] for place in order.tolist()]
