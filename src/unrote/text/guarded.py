"""What a pipeline reads of prompts, with or without guards (:mod:`unrote.guards`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unrote.errors import InputError


@dataclass
class PromptGuards:
    """Guards at work around a text-to-image pipeline; without any, it is given the prompts as they are.

    Attributes:
        texts: :class:`unrote.guards.prompts.TextGuard` s, in the order in which they change a prompt.
        embeddings: :class:`unrote.guards.prompts.EmbeddingGuard` s, likewise.
        attention: :class:`unrote.guards.attention.AttentionReweighting`; None for none.
    """

    texts: list[Any] = field(default_factory=list)
    embeddings: list[Any] = field(default_factory=list)
    attention: Any = None

    def text(self, prompt: str, seed: int) -> str:
        """The prompt that is used for the image of ``seed``."""
        for guard in self.texts:
            prompt = guard.text(prompt, seed)
        return prompt

    @contextmanager
    def on(self, pipeline: Any, texts: Sequence[str]) -> Iterator[None]:
        """Attention guarded inside the block, to ``texts`` of one batch."""
        if self.attention is None:
            yield
        else:
            with self.attention.on(pipeline, texts):
                yield

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        seeds: Sequence[int],
        negative: str | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """The pipeline's arguments for ``texts`` and the ``negative`` text: themselves, or their embeddings.

        Args:
            pipeline: that is called.
            texts: one an image.
            seeds: of the images.
            negative: what guidance leads away from; None for the empty text.
            options: the pipeline's other arguments.
        """
        against = None if negative is None else [negative] * len(texts)
        if not self.embeddings:
            return {"prompt": list(texts), "negative_prompt": against}
        pipeline.scheduler.set_timesteps(options["num_inference_steps"], device=pipeline.unet.device)
        device, guided = pipeline.unet.device, options["guidance_scale"] > 1
        embedded, free = pipeline.encode_prompt(list(texts), device, 1, guided, against)
        start = _latent_shape(pipeline, options["height"], options["width"])
        return {"prompt_embeds": self.changed(pipeline, embedded, seeds, start), "negative_prompt_embeds": free}

    def changed(self, pipeline: Any, embedded: Tensor, seeds: Sequence[int], start: tuple[int, ...]) -> Tensor:
        """Embeddings [B, L, D] as the guards change them; ``start`` is the shape of the noise of one image."""
        if not self.embeddings:
            return embedded
        empty = pipeline.encode_prompt("", embedded.device, 1, False)[0][0]
        rows = []
        for row, seed in zip(embedded, seeds, strict=True):
            for guard in self.embeddings:
                noise = torch.randn(start, generator=torch.Generator().manual_seed(seed))
                row = guard.embedding(pipeline, row, empty, noise, seed)
            rows.append(row)
        return torch.stack(rows)


def guidance_of(pipeline: Any) -> float:
    """The scale of classifier-free guidance in a call; 1 where the batch is not doubled, as without text.

    Raises:
        InputError: see :func:`check_guidance`.
    """
    check_guidance(pipeline)
    guided = getattr(pipeline, "tokenizer", None) is not None and pipeline.do_classifier_free_guidance
    return float(pipeline.guidance_scale) if guided else 1.0


def check_guidance(pipeline: Any) -> None:
    """What finds the images with text in a batch must know how it is put together: those without, and those with text.

    Raises:
        InputError: the pipeline puts its batches together in another way, as those do that edit images.
    """
    kind, unet = type(pipeline), getattr(pipeline, "unet", None)
    doubled = hasattr(kind, "do_classifier_free_guidance") and not hasattr(kind, "do_perturbed_attention_guidance")
    beside = unet is not None and unet.config.in_channels != unet.config.out_channels
    if getattr(pipeline, "tokenizer", None) is not None and (beside or not doubled):
        raise InputError(
            f"guards: a {kind.__name__} puts its batches together in a way of its own; take diffusers' "
            "StableDiffusionPipeline, change the prompts before the call, or put CopyFilter around it"
        )


def latent_size(pipeline: Any) -> tuple[int, int]:
    """Height and width, in latents, of the images that a pipeline makes unless it is asked for others."""
    unet = getattr(pipeline, "unet", None)
    # FLUX's transformer does not know a size, its pipeline does.
    side = pipeline.default_sample_size if unet is None else unet.config.sample_size
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _latent_shape(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Of what a pipeline starts an image of this size from."""
    own, scale = latent_size(pipeline), pipeline.vae_scale_factor
    rows, columns = (asked // scale if asked else usual for asked, usual in zip((height, width), own, strict=True))
    return pipeline.unet.config.in_channels, rows, columns
