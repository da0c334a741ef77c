"""Text-to-image pipelines as diffusers saves them: Stable Diffusion 1.x to 3.x, SDXL and FLUX."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn

from unrote.errors import InputError, first_line
from unrote.models.families import StableDiffusion, family_of
from unrote.models.known import KNOWN, check_source, known_autoencoder, why_not_loaded
from unrote.tensorfiles import weights_hash


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
    load = _single_file if Path(source).is_file() else _folder
    return _in_float32(_attempt(source, lambda: load(source, parts)))


@dataclass(frozen=True)
class Description:
    """A pipeline without its weights."""

    family: StableDiffusion
    denoiser: dict[str, Any]
    """Configuration of the denoiser."""
    autoencoder: dict[str, Any]
    """Configuration of the AutoencoderKL."""
    has_t5: bool
    """Whether the encoders that may be left out are there."""
    scheduler: Any = None
    """What it samples with, which says how it was trained; None of one that is not here yet."""


def describe(source: str) -> Description:
    """What a pipeline consists of.

    Raises:
        InputError: the pipeline is not there, and is not one of :data:`unrote.models.known.KNOWN` either; or it is of
            another family.
    """
    check_source(source)
    if Path(source).is_file():
        pipeline = load_pretrained(source)
        family = family_of(type(pipeline).__name__, source)
        denoiser, autoencoder = (dict(getattr(pipeline, part).config) for part in (family.part, "vae"))
        has_t5 = getattr(pipeline, "text_encoder_3", None) is not None
        return Description(family, denoiser, autoencoder, has_t5, pipeline.scheduler)
    if source in KNOWN and not Path(source).is_dir():
        # Without asking the Hub, whose library tries for most of a minute where there is no network.
        name, denoiser = KNOWN[source]
        return Description(family_of(name, source), denoiser, known_autoencoder(name), has_t5=True)

    def read() -> Description:
        index = DiffusionPipeline.load_config(source)
        family = family_of(str(index.get("_class_name")), source)
        denoiser = family.denoiser.load_config(source, subfolder=family.part)
        autoencoder = AutoencoderKL.load_config(source, subfolder="vae")
        has_t5 = index.get("text_encoder_3", [None])[0] is not None
        return Description(family, dict(denoiser), dict(autoencoder), has_t5, _scheduler(source, index))

    return cast(Description, _attempt(source, read))


def _scheduler(source: str, index: Any) -> Any:
    """By its configuration; None where the pipeline names none of diffusers', which loading it will refuse."""
    named = index.get("scheduler")
    kind = getattr(diffusers, str(named[-1]), None) if isinstance(named, list | tuple) and named else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        return None
    scheduler: Any = kind
    return scheduler.from_config(scheduler.load_config(source, subfolder="scheduler"))


def base_weights(pipeline: Any) -> dict[str, str]:
    """SHA-256 of the weights of each network that training or its results depend on, by its name in the pipeline."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: weights_hash(part) for name, part in sorted(networks.items()) if name != "safety_checker"}


def text_side(pipeline: Any) -> tuple[list[Any], list[Any]]:
    """Its tokenizers and text encoders; of Stable Diffusion 3 without T5, those of CLIP."""
    family = family_of(type(pipeline).__name__, "the pipeline")
    both = [(getattr(pipeline, tokenizer), getattr(pipeline, encoder)) for tokenizer, encoder in family.text_parts]
    there = [(tokenizer, encoder) for tokenizer, encoder in both if encoder is not None]
    return [tokenizer for tokenizer, _ in there], [encoder for _, encoder in there]


def _in_float32(pipeline: Any) -> Any:
    """Whatever precision the files have: what is trained and what is cached is computed in this one."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()
    return pipeline


def _folder(source: str, parts: dict[str, Any]) -> Any:
    """Also of a Hub id."""
    known = DiffusionPipeline.load_config(source)
    family = family_of(str(known.get("_class_name")), source)
    # A pipeline that was saved without its T5 is loaded only if diffusers is told so.
    text_parts = (name for pair in family.text_parts for name in pair)
    absent: dict[str, Any] = {name: None for name in text_parts if not known.get(name, [None])[0]}
    options = {"low_cpu_mem_usage": False, **absent, **parts}
    try:
        return family.pipeline.from_pretrained(source, use_safetensors=True, **options)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            return family.pipeline.from_pretrained(source, variant="fp16", use_safetensors=True, **options)
        raise


def _single_file(source: str, options: dict[str, Any]) -> Any:
    """A file has weights only; what else a pipeline needs is in the folder beside it, or on the Hub."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        names = set(file.keys())
    if any(".joint_blocks." in name or name.startswith("double_blocks.") for name in names):
        raise InputError(
            f"model.pretrained: {source} is a Stable Diffusion 3 or FLUX, which are read as folders or Hub ids only"
        )
    large = any(name.startswith("conditioner.embedders.1.") for name in names)
    pipeline = StableDiffusionXLPipeline if large else StableDiffusionPipeline
    beside = configuration_of(source)
    try:
        return pipeline.from_single_file(source, **options, **({"config": str(beside)} if beside.is_dir() else {}))
    except SingleFileComponentError as error:
        raise InputError(f"model.pretrained: {source} can't be loaded: {first_line(error)}") from None
    except OSError as error:
        if beside.is_dir():
            raise
        raise InputError(
            f"model.pretrained: {source} has no configuration and the Hub was not reached ({first_line(error)}). Put a "
            f"pipeline of the same architecture, which needs no weights, beside it as {beside}/ with its "
            "model_index.json, tokenizer and configuration files"
        ) from None


def configuration_of(source: str) -> Path:
    """Where the configuration of a single file is looked for: a folder of its name without the ending."""
    return Path(source).with_suffix("")


def _attempt(source: str, load: Any) -> Any:
    try:
        return load()
    except ImportError as error:
        raise InputError(f"{first_line(error)}; run: pip install 'unrote[text]'") from None
    except InputError:
        raise
    except Exception as error:  # what reads untrusted files raises anything
        raise InputError(f"model.pretrained: {source} can't be loaded: {why_not_loaded(source, error)}") from error
