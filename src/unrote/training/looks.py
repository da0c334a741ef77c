"""How often a monitored training is looked at: settled before it begins, by counting passes of the network."""

import math
from dataclasses import dataclass

from unrote.config import Config
from unrote.errors import InputError

TRAINING_PASSES = {"full": 3, "lora": 2}
"""Forward passes that a training sample costs: one, and a backward of twice the work, of frozen weights of as much."""
FULL_PRECISION = 1.5
"""What a forward pass in float32, as of a look, costs in passes of training in bf16 or fp16: at least."""
DECODING = 4
"""Passes of the denoiser that decoding an image costs: Stable Diffusion 1.5 multiplies 402 G times in a pass, 1,257 G
times in decoding; later denoisers are larger."""
FEW_AT_ONCE = 1.5
"""What a pass of the four images that a look at a text-to-image model makes at once costs in passes of training's
batches: 1.4 measured with 1.2 M parameters on a CPU, where calls count; of large denoisers less."""


@dataclass(frozen=True)
class Looks:
    """When a run is looked at.

    Attributes:
        every: rounds from one look to the next, counted back from the end.
        asked: ``monitor.every``.
        count: looks in all.
        overhead: their forward passes, as a share of what training costs in forward passes.
    """

    every: int
    asked: int
    count: int
    overhead: float

    def __str__(self) -> str:
        stretched = f" instead of every {self.asked}, to stay within monitor.max_overhead"
        often = f"every {self.every} rounds{stretched if self.every > self.asked else ''}" if self.count > 1 else ""
        only = f"at the end only{stretched if self.every > self.asked else ''}"
        return f"{self.count} looks, {often or only}: {self.overhead:.1%} of training's work"


def plan_looks(config: Config, images_per_round: float, rounds: int, reading: float = 0.0) -> Looks | None:
    """As ``monitor.every`` asks, or rarer, so that all looks together stay within ``monitor.max_overhead``.

    A look costs samples · steps forward passes, with guidance twice as many, and the decoding of latents; texts are
    read once for all looks, at ``reading`` passes each; a run costs 2 or 3 passes for each of ``images_per_round`` ·
    ``rounds`` samples. All are known before the run begins. :class:`unrote.training.pace.Pace` corrects the plan where
    looks take more.

    Returns:
        The plan; None where nothing is monitored.

    Raises:
        InputError: a single look would cost more.
    """
    monitor = config.monitor
    if not monitor.every:
        return None
    run = training_passes(config) * images_per_round * rounds
    look, once = look_passes(config), reading_passes(config, reading)
    most = math.floor((monitor.max_overhead * run - once) / look + 1e-9)
    if most < 1:
        share = (look + once) / run
        raise InputError(
            f"monitor.max_overhead: a single look of {monitor.samples} samples in {monitor.steps} steps is "
            f"{share:.1%} of this run's work, more than {monitor.max_overhead:.1%}: lower monitor.samples or "
            f"monitor.steps, train longer, or allow more (monitor.max_overhead={math.ceil(100 * share) / 100:g})"
        )
    every = max(monitor.every, math.ceil(rounds / most))
    count = (rounds - 1) // every + 1
    return Looks(every, monitor.every, count, (count * look + once) / run)


def look_passes(config: Config) -> float:
    """Forward passes of one look."""
    monitor = config.monitor
    if config.model.pretrained is None:
        return monitor.samples * monitor.steps
    return FEW_AT_ONCE * monitor.samples * (_guided(config) * monitor.steps + DECODING)


def reading_passes(config: Config, reading: float) -> float:
    """Forward passes that reading the captions of all looks costs; with guidance the empty text is read with each."""
    return FEW_AT_ONCE * config.monitor.samples * _guided(config) * reading


def _guided(config: Config) -> int:
    return 2 if config.monitor.guidance_scale > 1 else 1


def training_passes(config: Config) -> float:
    """Such passes as those of a look that a training sample costs."""
    passes = TRAINING_PASSES[config.model.train]
    # Adapters are looked at in the precision of training, see TextToImage.sampled_as.
    full = config.training.mixed_precision in ("bf16", "fp16") and config.model.train == "full"
    return passes / FULL_PRECISION if full else passes
