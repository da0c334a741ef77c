"""Which prompts make a text-to-image model recite? The prediction-norm detector, which needs no training images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.seeding import generator


@dataclass(frozen=True)
class PromptScore:
    """How strongly the text steers the denoiser.

    Attributes:
        prompt: the text.
        score: mean L2 norm of ε(x_t, prompt) − ε(x_t, empty) over seeds and steps; high for memorized prompts.
        per_seed: the mean over steps for each seed.
        tokens: the prompt's tokens and how much each contributes (norm of the gradient of the score by its
            embedding, Wen et al. §4); empty unless asked for.
    """

    prompt: str
    score: float
    per_seed: tuple[float, ...]
    tokens: tuple[tuple[str, float], ...] = ()


def prompt_scores(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int = 4,
    steps: int = 1,
    tokens: bool = False,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
) -> list[PromptScore]:
    """Score prompts by how strongly they steer the denoiser (Wen et al., ICLR 2024).

    From pure noise, the first ``steps`` of a ``num_inference_steps`` sampling with guidance are taken; the
    text-conditional part of the prediction is measured at each. More steps are surer. Scores depend on the
    model and the image size: compare prompts of one model, and set a threshold on prompts known to be fine.

    Args:
        pipeline: a diffusers pipeline with ``unet``, ``text_encoder``, ``tokenizer``, ``scheduler`` (Stable Diffusion
            1 and 2 and what is fine-tuned from them).
        prompts: the texts.
        seeds: initial noises per prompt, the same for all prompts.
        steps: denoising steps measured.
        tokens: attribute the score to tokens (one backward pass per prompt through the first step).
        seed: of the noises.
        num_inference_steps: of the sampling whose beginning is taken.
        guidance_scale: of that sampling.

    Raises:
        InputError: the pipeline lacks a part.
    """
    for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise InputError(f"the pipeline has no {part}: the detector needs a text-to-image pipeline with a UNet")
    if seeds < 1 or not 1 <= steps <= num_inference_steps:
        raise InputError("seeds must be at least 1, and steps between 1 and num_inference_steps")
    with _frozen(pipeline):
        empty = _embedded(pipeline, "")[0]
        return [
            _score(pipeline, prompt, empty, seeds, steps, tokens, seed, num_inference_steps, guidance_scale)
            for prompt in prompts
        ]


@contextmanager
def _frozen(pipeline: Any) -> Iterator[None]:
    """Evaluation mode and weights without gradients for a while."""
    modules = (pipeline.unet, pipeline.text_encoder)
    before = [(m, m.training, [(p, p.requires_grad) for p in m.parameters()]) for m in modules]
    for module in modules:
        module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training, parameters in before:
            module.train(training)
            for parameter, wanted in parameters:
                parameter.requires_grad_(wanted)


@torch.no_grad()
def _embedded(pipeline: Any, prompt: str) -> tuple[Tensor, list[int]]:
    """Hidden states [1, L, D] and token ids."""
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    hidden: Tensor = pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0]
    return hidden, ids[0].tolist()


def _score(
    pipeline: Any,
    prompt: str,
    empty: Tensor,
    seeds: int,
    steps: int,
    tokens: bool,
    seed: int,
    total: int,
    guidance: float,
) -> PromptScore:
    unet, scheduler = pipeline.unet, type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    text, ids = _embedded(pipeline, prompt)
    text.requires_grad_(tokens)
    side, device = unet.config.sample_size, unet.device
    height, width = (side, side) if isinstance(side, int) else side
    shape = (unet.config.in_channels, height, width)
    noise = [torch.randn(shape, generator=generator("prompt-norm", seed, index)) for index in range(seeds)]
    scheduler.set_timesteps(total, device=device)
    x = torch.stack(noise).to(device, unet.dtype) * scheduler.init_noise_sigma
    norms, attribution = [], None
    for number, timestep in enumerate(scheduler.timesteps[:steps]):
        with torch.set_grad_enabled(tokens and number == 0):
            scaled = scheduler.scale_model_input(x, timestep)
            conditional = unet(scaled, timestep, encoder_hidden_states=text.expand(seeds, -1, -1)).sample
            with torch.no_grad():
                free = unet(scaled, timestep, encoder_hidden_states=empty.expand(seeds, -1, -1)).sample
            difference = conditional - free
            norm = difference.float().flatten(1).norm(dim=1)
        if tokens and number == 0:
            (gradient,) = torch.autograd.grad(norm.mean(), text)
            attribution = gradient[0].float().norm(dim=1).tolist()
        norms.append(norm.detach())
        if number + 1 < steps:
            with torch.no_grad():
                x = scheduler.step(free + guidance * difference.detach(), timestep, x).prev_sample
    per_seed = torch.stack(norms).mean(0)
    named = () if attribution is None else _named(pipeline.tokenizer, ids, attribution)
    return PromptScore(prompt, float(per_seed.mean()), tuple(per_seed.tolist()), named)


def _named(tokenizer: Any, ids: list[int], values: list[float]) -> tuple[tuple[str, float], ...]:
    """The prompt's own tokens; start, end and padding are left out."""
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(ids)
    return tuple((word, value) for word, value, token in zip(words, values, ids, strict=True) if token not in special)
