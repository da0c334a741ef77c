"""What a pipeline may be named by, and the denoisers of well-known Hub ids, to plan runs without them and a network."""

import re
from pathlib import Path
from typing import Any

from unrote.errors import InputError, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What a name on the Hub looks like: ``owner/name``."""


def check_source(source: str, what: str = "is no diffusers pipeline (it has no model_index.json)") -> None:
    """Raise InputError unless ``source`` may be a pipeline: a folder, a file, or a name like a Hub id.

    Args:
        source: as the user wrote it.
        what: is said of a folder that is none.
    """
    path = Path(source)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise InputError(f"{source}: {what}")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"{source}: is not .safetensors; files that must be unpickled are not read")
    if not path.exists() and not HUB_ID.fullmatch(source):
        raise InputError(f"{source}: there is no such folder, and it is no Hub id like owner/name")


def why_not_loaded(source: Path | str, error: BaseException) -> str:
    """Why a pipeline could not be loaded; with the way out where its weights are there, but must be unpickled."""
    for folder in sorted(part for part in Path(source).glob("*") if part.is_dir()):
        if not any(folder.glob("*.safetensors")) and (files := sorted(folder.glob("*.bin"))):
            return (
                f"{first_line(error)}; {files[0]} must be unpickled, which can run a program, and is not read. If you "
                "trust it, convert the folder: "
                f"DiffusionPipeline.from_pretrained('{source}', use_safetensors=False).save_pretrained(FOLDER)"
            )
    return first_line(error)


_CROSS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_COMMON: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": _CROSS,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_SD_1 = _COMMON | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD_2 = _COMMON | {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SDXL = _COMMON | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_SD_3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD_35_MEDIUM = _SD_3 | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
_SD_35_LARGE = _SD_3 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}

_SD, _XL, _SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": (_SD, _SD_1),
    "runwayml/stable-diffusion-v1-5": (_SD, _SD_1),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (_SD, _SD_1),
    "stabilityai/stable-diffusion-2-base": (_SD, _SD_2),
    "stabilityai/stable-diffusion-2-1-base": (_SD, _SD_2),
    "stabilityai/stable-diffusion-2": (_SD, _SD_2 | {"sample_size": 96}),
    "stabilityai/stable-diffusion-2-1": (_SD, _SD_2 | {"sample_size": 96}),
    "stabilityai/stable-diffusion-xl-base-1.0": (_XL, _SDXL),
    "stabilityai/stable-diffusion-3-medium-diffusers": (_SD3, _SD_3),
    "stabilityai/stable-diffusion-3.5-medium": (_SD3, _SD_35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": (_SD3, _SD_35_LARGE),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", _FLUX),
    "black-forest-labs/FLUX.1-schnell": ("FluxPipeline", _FLUX | {"guidance_embeds": False}),
}
"""Class of the pipeline and configuration of the denoiser by Hub id."""

_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def known_autoencoder(pipeline: str) -> dict[str, Any]:
    """The configuration of AutoencoderKL of those pipelines: 8 pixels per latent in all of them."""
    if pipeline in (_SD, _XL):
        return _AUTOENCODER
    return _AUTOENCODER | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
