"""The denoisers of well-known Hub ids, so that a run can be planned without them and without a network."""

import re
from typing import Any

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What a name on the Hub looks like: ``owner/name``."""

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

DENOISERS: dict[str, dict[str, Any]] = {
    "CompVis/stable-diffusion-v1-4": _SD_1,
    "runwayml/stable-diffusion-v1-5": _SD_1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD_1,
    "stabilityai/stable-diffusion-2-base": _SD_2,
    "stabilityai/stable-diffusion-2-1-base": _SD_2,
    "stabilityai/stable-diffusion-2": _SD_2 | {"sample_size": 96},
    "stabilityai/stable-diffusion-2-1": _SD_2 | {"sample_size": 96},
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
}
"""Configurations of UNet2DConditionModel by Hub id."""

AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The configuration of AutoencoderKL that all of them go with: 8 pixels per latent."""
