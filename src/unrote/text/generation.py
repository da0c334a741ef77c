"""Images from prompts, by diffusers' own text-to-image pipelines."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from unrote.data.sources import digest_of
from unrote.errors import InputError
from unrote.seeding import derive_seed
from unrote.text.guarded import PromptGuards, guidance_of, latent_size
from unrote.text.prompts import Prompt
from unrote.training.run import Run

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What the images depend on, besides tokenizer and scheduler."""

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives a file of adapters."""


def load_text_to_image(source: Path | str, run: Run | None, variant: str | None) -> Any:
    """The pipeline to sample from, in float32 on the CPU.

    Args:
        source: a run's model folder, or a pipeline's folder, file or Hub id.
        run: the run that ``source`` belongs to. If it trained adapters, the model that it fine-tuned is loaded, and
            they are put into it.
        variant: of the run's weights; None for those saved under the plain name.

    Raises:
        InputError: it can't be loaded.
    """
    from unrote.models.pretrained import (  # half of diffusers, which other models need not
        base_weights,
        describe,
        load_pretrained,
    )

    if run is None:
        return load_pretrained(str(source))
    if run.config.model.train == "lora":
        pipeline = load_pretrained(str(run.config.model.pretrained))
        run.keep_base(base_weights(pipeline))
        # Not load_lora_weights, which warns that the text encoders get none.
        part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
        folder = run.model_folder / (variant or "")
        denoiser = getattr(pipeline, part)
        denoiser.load_lora_adapter(folder, weight_name=LORA_WEIGHTS, prefix=part, use_safetensors=True)
        return pipeline
    if variant is None:
        return load_pretrained(str(source))
    family = describe(str(source)).family
    options = {"subfolder": family.part, "variant": variant, "low_cpu_mem_usage": False}
    denoiser = family.denoiser.from_pretrained(source, use_safetensors=True, **options)
    return load_pretrained(str(source), **{family.part: denoiser})


class PromptDenoiser:
    """A text-to-image pipeline with its prompts: image i is made from prompt i, beginning again after the last.

    Args:
        pipeline: Stable Diffusion 1 to 3, XL or FLUX, with the scheduler to sample with. Its safety checker is taken
            out: a blackened image would hide what the model made.
        prompts: the texts; P of them.
        seed: of the images whose prompt has no seed of its own.
        steps: denoising steps.
        eta: DDIM's share of fresh noise.
        guidance_scale: of classifier-free guidance; 1 and less is none. FLUX is told it, having learned guidance.
        negative_prompt: what guidance leads away from; by default the empty text.
        size: height and width in pixels; by default the pipeline's own.

    Raises:
        InputError: the pipeline is of another kind or can't make this size, or a negative prompt is given without
            guidance.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Prompt],
        *,
        seed: int = 0,
        steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        _check_pipeline(pipeline)
        _check_size(pipeline, size)
        if negative_prompt is not None and guidance_scale <= 1:
            raise InputError(f"--negative-prompt needs guidance: --guidance-scale is {guidance_scale:g}, not above 1")
        accepted = inspect.signature(pipeline.__call__).parameters
        if negative_prompt is not None and "true_cfg_scale" in accepted:
            raise InputError(f"--negative-prompt: a {type(pipeline).__name__} has learned guidance, away from nothing")
        pipeline.safety_checker = None
        pipeline.set_progress_bar_config(disable=True)
        self._prompts, self._seed = prompts, seed
        self._negative = negative_prompt
        height, width = size or (None, None)
        guidance = {"guidance_scale": guidance_scale}
        self._options: dict[str, Any] = {**guidance, "num_inference_steps": steps, "height": height, "width": width}
        self._options |= {"eta": eta} if "eta" in accepted else {}
        self.guards, self.pipeline = PromptGuards(), pipeline
        self.guided = (getattr(pipeline, "unet", None), pipeline.scheduler, lambda: guidance_of(pipeline))
        self.networks = tuple(part for name in NETWORKS if (part := getattr(pipeline, name, None)) is not None)
        texts = digest_of([(prompt.text, prompt.seed) for prompt in prompts])
        self.settings = {**guidance, "negative_prompt": negative_prompt, "size": size and list(size)}
        self.settings |= {"prompts": len(prompts), "prompts_sha256": texts}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        height, width = (self.pipeline.vae_scale_factor * n for n in latent_size(self.pipeline))
        asked = self._options
        return asked["height"] or height, asked["width"] or width, self.pipeline.vae.config.out_channels

    def label_of(self, index: int, attempt: int = 0) -> dict[str, Any]:
        """Prompt of image ``index``, its origin if known, and the generator's seed that gives it in plain diffusers."""
        prompt = self._prompt(index)
        origin = {} if prompt.origin is None else {"origin": prompt.origin}
        used = self._text(index, attempt)
        changed = {} if used == prompt.text else {"guarded_prompt": used}
        return {"prompt": prompt.text, **changed, **origin, "generator_seed": self._generator_seed(index, attempt)}

    @torch.inference_mode()
    def __call__(self, indices: Sequence[int], attempt: int = 0) -> NDArray[np.uint8]:
        """The images ``indices``, uint8 [B, H, W, 3]; another ``attempt`` gives others."""
        texts = [self._text(index, attempt) for index in indices]
        seeds = [self._generator_seed(index, attempt) for index in indices]
        with self.guards.on(self.pipeline, texts):
            result = self.pipeline(
                **self.guards.read(self.pipeline, texts, seeds, self._negative, self._options),
                # On the CPU whatever the device, so that noise does not depend on it.
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
                **self._options,
            )
        return cast(NDArray[np.uint8], (result.images * 255).round().astype(np.uint8))

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index % len(self._prompts)]

    def _text(self, index: int, attempt: int) -> str:
        return self.guards.text(self._prompt(index).text, self._generator_seed(index, attempt))

    def _generator_seed(self, index: int, attempt: int) -> int:
        own = self._prompt(index).seed
        again = index // len(self._prompts)
        if own is None:
            first = derive_seed(self._seed, "sample", index)
        else:  # counted on, it would be the seed of a neighbour in a list of seeds
            first = derive_seed(own, "again", again) if again else own
        return derive_seed(first, "attempt", attempt) if attempt else first


def reading_once(pipeline: Any) -> Any:
    """The pipeline, made to keep on the host what its text encoders, which must not change, say of the same texts."""
    read, kept = pipeline.encode_prompt, {}

    def remembered(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        if any(isinstance(value, torch.Tensor) for value in (*arguments, *named.values())):
            return tuple(read(*arguments, **named))  # embeddings that were given: nothing is read
        key = repr((arguments, sorted(named.items())))
        if key not in kept:
            kept[key] = [None if part is None else (part.cpu(), part.device) for part in read(*arguments, **named)]
        return tuple(None if part is None else part[0].to(part[1]) for part in kept[key])

    pipeline.encode_prompt = remembered
    return pipeline


def _check_pipeline(pipeline: Any) -> None:
    kind = type(pipeline).__name__
    if kind in ("StableDiffusion3Pipeline", "FluxPipeline"):
        return
    unet = getattr(pipeline, "unet", None)
    if unet is None or getattr(unet.config, "cross_attention_dim", None) is None:
        raise InputError(f"prompts: a {kind} is no text-to-image pipeline of Stable Diffusion or FLUX")
    if unet.config.in_channels != unet.config.out_channels:
        raise InputError(f"prompts: the unet of this {kind} needs an image beside the text (such as inpainting)")


def _check_size(pipeline: Any, size: tuple[int, int] | None) -> None:
    """FLUX's pipeline would make a smaller image without an error, the others end in diffusers' own."""
    unet = getattr(pipeline, "unet", None)
    multiple = 2 * pipeline.vae_scale_factor if unet is None else 8
    if size is not None and any(side < multiple or side % multiple for side in size):
        raise InputError(
            f"--resolution: {size[0]}x{size[1]} are no multiples of {multiple}, which a {type(pipeline).__name__} needs"
        )
