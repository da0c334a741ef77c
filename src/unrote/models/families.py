"""What differs between the kinds of text-to-image pipelines: their text, their denoiser, their loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from unrote.config import Config
from unrote.errors import InputError
from unrote.models.denoiser import DenoisingLoss, Network, PerSampleLoss, unet_prediction
from unrote.models.flow import FlowLoss, shift_of
from unrote.models.task import Condition

CLIP_LENGTH = 77
"""Tokens that CLIP's text encoders read."""

FLUX_GUIDANCE = 1.0
"""What FLUX models with distilled guidance are told in training: 1, since images are the target as they are."""


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet under one text encoder."""

    pipeline: Any = StableDiffusionPipeline
    denoiser: Any = UNet2DConditionModel
    part = "unet"
    """Name of the denoiser in the pipeline."""
    patch = 1
    """Side, in latents, of what the denoiser takes as one token."""
    text_parts: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"),)
    """Names of the tokenizers and text encoders."""
    t5_length: int | None = None
    """Tokens that a T5 among the encoders reads when the pipeline samples."""
    flow = False
    """Whether it is flow matching."""
    network: Network = staticmethod(unet_prediction)

    def check(self, config: Config, denoiser: Mapping[str, Any], height: int, width: int) -> None:
        """Raise InputError unless the denoiser can be trained so on latents of this size."""

    def check_noise(self, scheduler: Any) -> None:
        """Raise InputError unless a pipeline's scheduler says how the model was trained."""
        said, its = scheduler.config, f"model.pretrained: its scheduler, a {type(scheduler).__name__}"
        if "beta_schedule" not in said:
            raise InputError(
                f"{its}, does not say which betas the model was trained with; put the DDPM or DDIM scheduler of the "
                "original model into the pipeline's folder"
            )
        if said.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise InputError(
                f"{its}, says that the model predicts {said.prediction_type!r}; known are epsilon, sample and "
                "v_prediction"
            )

    def loss(
        self, pipeline: Any, latents: tuple[int, int], device: torch.device, dtype: torch.dtype | None
    ) -> PerSampleLoss:
        """The loss under the noise that the pipeline was trained with, whatever sampler it comes with."""
        return DenoisingLoss(DDPMScheduler.from_config(pipeline.scheduler.config), device, dtype)

    def embedded(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """What is kept of the text encoders' outputs: ``…hidden_states`` [B, L, D], perhaps ``text_embeds`` [B, P]."""
        return {"encoder_hidden_states": outputs[0][0]}

    def condition(self, embedded: Mapping[str, Tensor], denoiser: Any, size: tuple[int, int]) -> Condition:
        """Embedded texts as the denoiser takes them.

        Args:
            embedded: what :meth:`embedded` gave.
            denoiser: its configuration.
            size: height and width of the images in pixels.
        """
        return dict(embedded)

    def placeholder(self, denoiser: Any, batch: int, *, t5: bool) -> dict[str, Tensor]:
        """Zeros in the shapes of :meth:`embedded`."""
        width = denoiser.cross_attention_dim
        hidden = width if isinstance(width, int) else max(width)
        return {"encoder_hidden_states": torch.zeros(batch, CLIP_LENGTH, hidden)}

    def save_adapters(self, folder: Path, layers: dict[str, Tensor]) -> None:
        """Write ``pytorch_lora_weights.safetensors``."""
        self.pipeline.save_lora_weights(folder, **{f"{self.part}_lora_layers": layers})


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, the pooled text and the image's size."""

    pipeline = StableDiffusionXLPipeline
    text_parts = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    def embedded(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """The last layer but one of both, and the second one's projection of the whole text."""
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return {"encoder_hidden_states": hidden, "text_embeds": outputs[1][0]}

    def condition(self, embedded: Mapping[str, Tensor], denoiser: Any, size: tuple[int, int]) -> Condition:
        """With original size, crop and target size: images are known at the size that they are trained in."""
        hidden = embedded["encoder_hidden_states"]
        sizes = torch.tensor([*size, 0, 0, *size], device=hidden.device).expand(len(hidden), 6)
        added = {"text_embeds": embedded["text_embeds"], "time_ids": sizes}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    def placeholder(self, denoiser: Any, batch: int, *, t5: bool) -> dict[str, Tensor]:
        """Of two encoders."""
        pooled = denoiser.projection_class_embeddings_input_dim - 6 * denoiser.addition_time_embed_dim
        return super().placeholder(denoiser, batch, t5=t5) | {"text_embeds": torch.zeros(batch, pooled)}


def sd3_prediction(denoiser: Any, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """What the transformer of Stable Diffusion 3 predicts."""
    prediction: Tensor = denoiser(hidden_states=noisy, timestep=timesteps, **condition).sample
    return prediction


class StableDiffusion3(StableDiffusion):
    """Stable Diffusion 3 and 3.5: flow matching by a transformer; two CLIP text encoders, and T5 if it is there."""

    pipeline = StableDiffusion3Pipeline
    denoiser = SD3Transformer2DModel
    part = "transformer"
    patch = 2
    text_parts: tuple[tuple[str, str], ...] = (*StableDiffusionXL.text_parts, ("tokenizer_3", "text_encoder_3"))
    t5_length = 256
    flow = True
    network: Network = staticmethod(sd3_prediction)

    def check(self, config: Config, denoiser: Mapping[str, Any], height: int, width: int) -> None:
        """No settings of denoising diffusion, and no image beyond the table of positions."""
        _check_flow(config)
        largest = denoiser["pos_embed_max_size"] * denoiser["patch_size"]
        if max(height, width) > largest:
            raise InputError(
                f"data.resolution: {config.model.pretrained} knows positions for {largest} latents a side, "
                f"and images of this size have {max(height, width)}"
            )

    def check_noise(self, scheduler: Any) -> None:
        """Flow matching knows one noise only."""

    def loss(
        self, pipeline: Any, latents: tuple[int, int], device: torch.device, dtype: torch.dtype | None
    ) -> PerSampleLoss:
        """Flow matching with the pipeline's own shift."""
        schedule = pipeline.scheduler.config
        tokens = latents[0] * latents[1] // self.patch**2
        return FlowLoss(schedule.num_train_timesteps, shift_of(schedule, tokens), device, dtype, self.network)

    def embedded(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """The last layer but one of both CLIPs, their projections of the whole text, and T5's last layer."""
        clips = outputs[:2]
        found = {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in clips], -1),
            "text_embeds": torch.cat([output[0] for output in clips], -1),
        }
        return found if len(outputs) == 2 else found | {"t5_hidden_states": outputs[2][0]}

    def condition(self, embedded: Mapping[str, Tensor], denoiser: Any, size: tuple[int, int]) -> Condition:
        """CLIP's tokens, padded to the width of T5's, and T5's; zeros where there is no T5."""
        clip, t5 = embedded["encoder_hidden_states"], embedded.get("t5_hidden_states")
        if t5 is None:
            t5 = clip.new_zeros(len(clip), self.t5_length, denoiser.joint_attention_dim)
        text = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1)
        return {"encoder_hidden_states": text, "pooled_projections": embedded["text_embeds"]}

    def placeholder(self, denoiser: Any, batch: int, *, t5: bool) -> dict[str, Tensor]:
        """As wide as the pooled texts, which it is in all released models."""
        width = denoiser.pooled_projection_dim
        found = {
            "encoder_hidden_states": torch.zeros(batch, CLIP_LENGTH, width),
            "text_embeds": torch.zeros(batch, width),
        }
        long = {"t5_hidden_states": torch.zeros(batch, self.t5_length, denoiser.joint_attention_dim)}
        return found | long if t5 else found


def flux_prediction(denoiser: Any, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """What FLUX predicts: squares of 2x2 latents are its tokens, each with its row and column."""
    batch, channels, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    squares = noisy.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    text_length, device = condition["encoder_hidden_states"].shape[1], noisy.device
    grid = torch.cartesian_prod(
        *(torch.arange(side, device=device, dtype=torch.float32) for side in (1, rows, columns))
    )
    guided = denoiser.config.guidance_embeds
    prediction: Tensor = denoiser(
        hidden_states=squares.reshape(batch, rows * columns, 4 * channels),
        # The transformer multiplies by 1000 again.
        timestep=timesteps / 1000,
        guidance=torch.full((batch,), FLUX_GUIDANCE, device=device) if guided else None,
        img_ids=grid,
        txt_ids=torch.zeros(text_length, 3, device=device),
        **condition,
    ).sample
    squares = prediction.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(noisy.shape)


class Flux(StableDiffusion3):
    """FLUX.1: CLIP's pooled text and T5's tokens."""

    pipeline = FluxPipeline
    denoiser = FluxTransformer2DModel
    text_parts = StableDiffusionXL.text_parts
    t5_length = 512
    network: Network = staticmethod(flux_prediction)

    def check(self, config: Config, denoiser: Mapping[str, Any], height: int, width: int) -> None:
        """No settings of denoising diffusion."""
        _check_flow(config)

    def embedded(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """The whole text by CLIP, its tokens by T5."""
        return {"encoder_hidden_states": outputs[1][0], "text_embeds": outputs[0].pooler_output}

    def condition(self, embedded: Mapping[str, Tensor], denoiser: Any, size: tuple[int, int]) -> Condition:
        """Under the transformer's names."""
        return {
            "encoder_hidden_states": embedded["encoder_hidden_states"],
            "pooled_projections": embedded["text_embeds"],
        }

    def placeholder(self, denoiser: Any, batch: int, *, t5: bool) -> dict[str, Tensor]:
        """Of T5 and CLIP."""
        return {
            "encoder_hidden_states": torch.zeros(batch, self.t5_length, denoiser.joint_attention_dim),
            "text_embeds": torch.zeros(batch, denoiser.pooled_projection_dim),
        }


def _check_flow(config: Config) -> None:
    name = config.model.pretrained
    if config.training.min_snr_gamma is not None:
        raise InputError(
            f"training.min_snr_gamma: {name} is a flow matching model, whose timesteps are drawn logit-normal "
            "instead of losses being weighted; leave it out"
        )
    if config.training.noise_offset:
        raise InputError(
            f"training.noise_offset: {name} is a flow matching model, which starts from noise alone; leave it out"
        )
    if config.training.timestep_bias_strategy != "none":
        raise InputError(
            f"training.timestep_bias_strategy: {name} is a flow matching model, whose timesteps are drawn "
            "logit-normal; leave it out"
        )


FAMILIES: dict[str, StableDiffusion] = {
    family.pipeline.__name__: family for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())
}
"""By the class names of diffusers' pipelines."""


def family_of(class_name: str, source: str) -> StableDiffusion:
    """The family of a pipeline. Raises InputError, naming ``source``, if it is none that can be trained."""
    if class_name not in FAMILIES:
        raise InputError(f"model.pretrained: {source} is a {class_name}; what can be trained: {', '.join(FAMILIES)}")
    return FAMILIES[class_name]
