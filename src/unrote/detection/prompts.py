"""Which prompts make a text-to-image model recite? The prediction-norm detector, which needs no training images."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unrote.errors import InputError, first_line
from unrote.models.known import check_source, why_not_loaded
from unrote.seeding import generator
from unrote.text import prompts as prompt_files
from unrote.text.mitigations import prediction_norm
from unrote.text.tokens import padded_tokens, reads_mask

PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class PromptScore:
    """How strongly the text steers the denoiser.

    Attributes:
        prompt: the text.
        score: mean L2 norm of ε(x_t, prompt) − ε(x_t, empty) over seeds and steps; high for memorized prompts.
        per_seed: the mean over steps for each seed.
        tokens: the prompt's tokens and how much each contributes (norm of the gradient of the first step's norm by the
            text encoder's output at it, Wen et al. §4); empty unless asked for.
        truncated: whether the text encoder did not see the end of the text.
    """

    prompt: str
    score: float
    per_seed: tuple[float, ...]
    tokens: tuple[tuple[str, float], ...] = ()
    truncated: bool = False


@torch.no_grad()
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
    text-conditional part of the prediction is measured at each, as the model predicts it (noise or velocity). More
    steps are surer. Scores depend on the model and the image size: compare prompts of one model, and set a threshold on
    prompts known to be fine. The score of a prompt does not depend on the other prompts.

    Args:
        pipeline: a diffusers pipeline with ``unet``, ``text_encoder``, ``tokenizer``, ``scheduler`` (Stable Diffusion
            1 and 2 and what is fine-tuned from them). It is left as it was.
        prompts: the texts.
        seeds: initial noises per prompt, the same for all prompts.
        steps: denoising steps measured.
        tokens: attribute the score to tokens (one backward pass per prompt through the first step).
        seed: of the noises.
        num_inference_steps: of the sampling whose beginning is taken.
        guidance_scale: of that sampling.

    Returns:
        One score per prompt, in their order.

    Raises:
        InputError: the pipeline lacks a part or needs more than a text, or numbers out of range.
    """
    _check_pipeline(pipeline)
    if seeds < 1 or not 1 <= steps <= num_inference_steps:
        raise InputError(f"seeds must be at least 1 (not {seeds}), and steps 1 to {num_inference_steps} (not {steps})")
    if isinstance(prompts, str):
        raise InputError("prompts is one text; give a list of texts")
    with _frozen(pipeline):
        probe = _Probe(pipeline, seeds, steps, tokens, seed, num_inference_steps, guidance_scale)
        return [probe.score(prompt) for prompt in tqdm(prompts, unit="prompt", leave=False, disable=None)]


def _check_pipeline(pipeline: Any) -> None:
    for part in PARTS:
        if getattr(pipeline, part, None) is None:
            raise InputError(f"the pipeline has no {part}: the detector needs a text-to-image pipeline with a UNet")
    config = pipeline.unet.config
    if getattr(config, "cross_attention_dim", None) is None:
        raise InputError("the pipeline's unet takes no text")
    if getattr(pipeline, "text_encoder_2", None) is not None or config.addition_embed_type is not None:
        raise InputError("the pipeline's unet needs more than one text embedding (such as SDXL): not supported")
    if config.in_channels != config.out_channels:
        raise InputError("the pipeline's unet needs an image beside the text (such as inpainting): not supported")


@contextmanager
def _frozen(pipeline: Any) -> Iterator[None]:
    """Evaluation mode and weights without gradients for a while."""
    modules = (pipeline.unet, pipeline.text_encoder)
    before = [(m, [(part, part.training) for part in m.modules()], list(m.parameters())) for m in modules]
    wanted = [[parameter.requires_grad for parameter in parameters] for _, _, parameters in before]
    for module in modules:
        module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for (_, parts, parameters), flags in zip(before, wanted, strict=True):
            for part, training in parts:
                part.training = training
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)


class _Probe:
    """What is the same for all prompts: the noises, the schedule, the empty text."""

    def __init__(
        self, pipeline: Any, seeds: int, steps: int, tokens: bool, seed: int, total: int, guidance: float
    ) -> None:
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.seeds, self.steps, self.tokens, self.seed = seeds, steps, tokens, seed
        self.total, self.guidance = total, guidance
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        shape = (self.unet.config.in_channels, height, width)
        noise = [torch.randn(shape, generator=generator("prompt-norm", seed, index)) for index in range(seeds)]
        self.noise = torch.stack(noise).to(self.unet.device, self.unet.dtype)
        self.empty = self._embedded("")[0].expand(seeds, -1, -1)

    def score(self, prompt: str) -> PromptScore:
        """Walk the first steps from each noise and measure."""
        text, ids, truncated = self._embedded(prompt)
        scheduler = self._scheduler()
        noises = [generator("prompt-norm-step", self.seed, index) for index in range(self.seeds)]
        takes_noises = "generator" in inspect.signature(scheduler.step).parameters
        x = self.noise * scheduler.init_noise_sigma
        norms: list[Tensor] = []
        named: tuple[tuple[str, float], ...] = ()
        for number, timestep in enumerate(scheduler.timesteps[: self.steps]):
            scaled = scheduler.scale_model_input(x, timestep)
            if self.tokens and number == 0:
                named = self._named(ids, self._attribution(scaled, timestep, text))
            free = self._predicted(scaled, timestep, self.empty)
            steered = self._predicted(scaled, timestep, text.expand(self.seeds, -1, -1))
            norms.append(prediction_norm(steered, free))
            if number + 1 < self.steps:
                options = {"generator": noises} if takes_noises else {}
                x = scheduler.step(free + self.guidance * (steered - free), timestep, x, **options).prev_sample
        per_seed = torch.stack(norms).mean(0)
        return PromptScore(prompt, float(per_seed.mean()), tuple(per_seed.tolist()), named, truncated)

    def _scheduler(self) -> Any:
        # Not from_config: that loses what the pipeline has set in the scheduler, such as steps_offset.
        scheduler = deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(self.total, device=self.unet.device)
        return scheduler

    def _predicted(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        predicted: Tensor = self.unet(x, timestep, encoder_hidden_states=text).sample
        return predicted

    def _attribution(self, x: Tensor, timestep: Tensor, text: Tensor) -> list[float]:
        """Norm of the gradient of the mean norm by each place of the text [1, L, D]."""
        free = self._predicted(x, timestep, self.empty)
        with torch.enable_grad():
            text = text.clone().requires_grad_()
            steered = self._predicted(x, timestep, text.expand(self.seeds, -1, -1))
            # Where the text changes nothing the norm has no gradient; autograd says 0 there.
            (gradient,) = torch.autograd.grad(prediction_norm(steered, free).mean(), text)
        norms: list[float] = gradient[0].float().norm(dim=1).tolist()
        return norms

    def _embedded(self, prompt: str) -> tuple[Tensor, list[int], bool]:
        """Hidden states [1, L, D], token ids, and whether the end was cut off."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        ids, mask = (torch.from_numpy(part).to(encoder.device) for part in padded_tokens(tokenizer, encoder, [prompt]))
        hidden: Tensor = encoder(ids, attention_mask=mask if reads_mask(encoder) else None)[0]
        whole = len(tokenizer(prompt).input_ids)
        return hidden.to(self.unet.device, self.unet.dtype), ids[0].tolist(), whole > ids.shape[1]

    def _named(self, ids: list[int], values: list[float]) -> tuple[tuple[str, float], ...]:
        """The prompt's own tokens; start, end and padding are left out."""
        special = set(self.pipeline.tokenizer.all_special_ids)
        words = self.pipeline.tokenizer.convert_ids_to_tokens(ids)
        pairs = zip(words, values, ids, strict=True)
        return tuple((word, value) for word, value, token in pairs if token not in special)


def read_prompts(file: Path) -> list[str]:
    """The texts of a file of prompts; see :func:`unrote.text.prompts.read_prompts`."""
    return [prompt.text for prompt in prompt_files.read_prompts(file)]


def load_pipeline(source: str, device: torch.device) -> Any:
    """The diffusers pipeline in a folder or of a Hub id.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    check_source(source)
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False)
    except ImportError as error:
        raise InputError(f"{source}: needs another package ({first_line(error)}); pip install transformers") from None
    except Exception as error:
        reason = why_not_loaded(source, error)
        raise InputError(f"{source}: cannot be loaded as a diffusers pipeline ({reason})") from error
    return pipeline.to(device)
