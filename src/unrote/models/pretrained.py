"""Text-to-image pipelines as diffusers saves them: Stable Diffusion 1.x and 2.x, and SDXL."""

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from unrote.errors import InputError, first_line
from unrote.models.known import AUTOENCODER, DENOISERS, HUB_ID

PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}


def load_pretrained(source: str, **parts: Any) -> Any:
    """The pipeline in a folder, of a Hub id, or in a ``.safetensors`` file of the original layout, in float32.

    Weights are read from safetensors only. Where a folder has half-precision files alone (variant ``fp16``), those are
    read.

    Args:
        source: what ``model.pretrained`` says.
        parts: parts to put into the pipeline instead of its own, by name, such as ``unet``.

    Raises:
        InputError: there is none, or it is of another family.
    """
    check_source(source)
    if Path(source).is_file():
        return _in_float32(_attempt(source, lambda: _single_file(source, parts)))
    known = _attempt(source, lambda: DiffusionPipeline.load_config(source))
    pipeline = PIPELINES.get(str(known.get("_class_name")))
    if pipeline is None:
        names = ", ".join(PIPELINES)
        raise InputError(f"model.pretrained: {source} is a {known.get('_class_name')}; what can be trained: {names}")
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, **parts}
    try:
        return _in_float32(pipeline.from_pretrained(source, **options))
    except (OSError, ValueError) as error:
        try:
            return _in_float32(pipeline.from_pretrained(source, variant="fp16", **options))
        except (OSError, ValueError):
            raise InputError(f"model.pretrained: {source} can't be loaded: {first_line(error)}") from error


def check_source(source: str) -> None:
    """Raise InputError unless ``source`` may be a pipeline: a folder, a file, or a name like a Hub id."""
    path = Path(source)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise InputError(f"model.pretrained: {source} is no diffusers pipeline (it has no model_index.json)")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"model.pretrained: {source} is not .safetensors; files that must be unpickled are not read")
    if not path.exists() and not HUB_ID.fullmatch(source):
        raise InputError(f"model.pretrained: there is no {source}, and it is no Hub id like owner/name")


def part_config(source: str, part: str) -> dict[str, Any]:
    """The configuration of a pipeline's ``unet`` or ``vae``, without its weights.

    Raises:
        InputError: the pipeline is not there, and is not one of :data:`unrote.models.known.DENOISERS` either.
    """
    check_source(source)
    if Path(source).is_file():
        return dict(getattr(load_pretrained(source), part).config)
    if source in DENOISERS and not Path(source).is_dir():
        # Without asking the Hub, whose library tries for most of a minute where there is no network.
        return DENOISERS[source] if part == "unet" else AUTOENCODER
    kind: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
    try:
        return dict(kind.load_config(source, subfolder=part))
    except (OSError, ValueError) as error:
        raise InputError(f"model.pretrained: {source} can't be loaded: {first_line(error)}") from error


def noise_schedule(pipeline: Any) -> DDPMScheduler:
    """The noise that the pipeline was trained with, whatever sampler it comes with."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def text_side(pipeline: Any) -> tuple[list[Any], list[Any]]:
    """Its tokenizers and text encoders."""
    both = [(pipeline.tokenizer, pipeline.text_encoder)]
    if hasattr(pipeline, "text_encoder_2"):
        both.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return [tokenizer for tokenizer, _ in both], [encoder for _, encoder in both]


def _in_float32(pipeline: Any) -> Any:
    """Whatever precision the files have: what is trained and what is cached is computed in this one."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()
    return pipeline


def _single_file(source: str, options: dict[str, Any]) -> Any:
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        large = any(name.startswith("conditioner.embedders.1.") for name in file.keys())  # noqa: SIM118
    pipeline = StableDiffusionXLPipeline if large else StableDiffusionPipeline
    return pipeline.from_single_file(source, **options)


def _attempt(source: str, load: Any) -> Any:
    try:
        return load()
    except ImportError as error:
        raise InputError(f"{first_line(error)}; run: pip install 'unrote[text]'") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"model.pretrained: {source} can't be loaded: {first_line(error)}") from error
