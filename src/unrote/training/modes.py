"""What a pretrained model takes in each mode of training, and how much there is to compute."""

from dataclasses import dataclass
from itertools import product

from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.models.sizing import Size, size_of
from unrote.training.placement import StateSize


@dataclass(frozen=True)
class Mode:
    """A way to train a model, and the memory of the device that it takes."""

    train: str
    """``full`` or ``lora``."""
    mixed_precision: str
    gradient_checkpointing: bool
    bytes: int
    """Of state, weights that are only read, and activations."""


def modes_of(config: Config, images: ImageStore, size: Size) -> tuple[Mode, ...]:
    """What the pretrained model of ``config`` takes with all weights or adapters, in bf16, under checkpointing.

    Adapters are those of ``model.lora``; everything else is as in ``config``, whose model is of ``size``.
    """
    modes = []
    for kind in ("full", "lora"):
        model = config.model.model_copy(update={"train": kind})
        # To measure a model takes seconds.
        own = size if model == config.model else size_of(config.model_copy(update={"model": model}), images)
        state = StateSize.of(config, own.trained).training()
        for precision, checkpointing in product(("no", "bf16"), (False, True)):
            changed = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
            training = config.training.model_copy(update=changed)
            needed = state + own.frozen(training) + own.forward.kept(training)
            modes.append(Mode(kind, precision, checkpointing, needed))
    return tuple(modes)


def operations_of(config: Config, size: Size) -> int:
    """Floating point operations of the denoiser for one sample.

    A backward pass is two forward passes, or one where most weights are frozen and get no gradient; gradient
    checkpointing is one more, and so are looking ahead and the prediction norm. Skipped samples are counted as trained.
    """
    passes = 2 if size.halved else 3
    passes += config.training.gradient_checkpointing
    passes += config.augmentation.enabled and config.augmentation.ratio_source == "lookahead"
    passes += config.text.max_prediction_norm is not None
    return passes * size.forward.flops // size.batch
