"""Guards as a callback: ``pipeline(prompts, callback_on_step_end=GuardCallback(pipeline, [...], prompts, seeds))``."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from unrote.errors import InputError
from unrote.guards.making import make_guards
from unrote.text.guarded import PromptGuards, check_guidance, guidance_of, latent_size


@dataclass
class _Around:
    """What :func:`unrote.guards.making.make_guards` asks of what denoises, for somebody else's pipeline."""

    pipeline: Any
    shape: tuple[int, int, int]
    guards: PromptGuards = field(default_factory=PromptGuards)

    @property
    def guided(self) -> tuple[Any, Any, Any]:
        """The UNet, the sampler and the guidance scale of the call."""
        return self.pipeline.unet, self.pipeline.scheduler, lambda: guidance_of(self.pipeline)


class GuardCallback(PipelineCallback):  # type: ignore[misc]
    """Guards around the next call of a Stable Diffusion pipeline, which gives what ``unrote sample --guard`` gives.

    diffusers calls back at the end of a step: too late to change the text or the prediction of the first one. So
    the guards are hooked into the UNet when the callback is made, and taken out again at the end of the call's last
    step; for another call make another one. It goes with other callbacks in diffusers' ``MultiPipelineCallbacks``.

    Args:
        pipeline: a pipeline with a UNet and one text encoder (Stable Diffusion 1 and 2); of SDXL, ``amg`` and
            ``attention`` only. With its own sampler.
        guards: ``NAME[:key=value,…]`` each, as of ``unrote sample``; not ``copy-filter``, which looks at finished
            images: see :class:`unrote.guards.copy_filter.CopyFilter`.
        prompts: those of the call, one an image.
        seeds: one an image, of the guards' own randomness. Prompt optimization starts from the noise of
            ``torch.Generator().manual_seed(seed)``: give the call such generators.
        size: height and width in pixels; by default the pipeline's own.
        train: the training images where a guard names none: anything :func:`unrote.open_images` takes.

    Raises:
        InputError: a guard is unknown, out of range, can't be a callback, or needs something that is not there.
    """

    tensor_inputs = ["latents"]  # noqa: RUF012  (as diffusers declares it)

    def __init__(
        self,
        pipeline: Any,
        guards: Sequence[str],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        train: Any = None,
    ) -> None:
        super().__init__()
        _check(pipeline, guards, prompts, seeds)
        self._prompts, self._seeds = list(prompts), list(seeds)
        self._pipeline = pipeline
        around = _Around(pipeline, _shape(pipeline, size))
        made = make_guards(guards, around, None, train=train, device=pipeline.unet.device)
        self._guards, self._stack = around.guards, ExitStack()
        for handle in made.handles:
            self._stack.callback(handle.remove)
        self._texts = [self._guards.text(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        self._changed: Tensor | None = None
        self._embedding = False
        self._changes = bool(self._guards.texts or self._guards.embeddings)
        hook = pipeline.unet.register_forward_pre_hook(self._with_text, with_kwargs=True)
        self._stack.callback(hook.remove)
        self._stack.enter_context(self._guards.on(pipeline, self._texts))

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        """At the end of the last step the guards go; the call's tensors stay as they are."""
        if step_index == pipeline.num_timesteps - 1:
            self.close()
        return callback_kwargs

    def close(self) -> None:
        """Take the guards out of the UNet; for a call that has failed or was never made."""
        self._stack.close()

    def _with_text(self, unet: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The UNet's arguments with the changed text, of a guided batch in its second half; None leaves them."""
        if self._embedding:  # prompt optimization calls the UNet itself
            return None
        given = kwargs["encoder_hidden_states"]
        free = given[: len(given) // 2] if guidance_of(self._pipeline) > 1 else given[:0]
        images, wanted = len(given) - len(free), len(self._prompts)
        if images != wanted:
            self.close()
            raise InputError(
                f"the callback was made for {wanted} images, and the call makes {images}: give it a prompt and a seed "
                "for each image of one call"
            )
        if not self._changes:
            return None
        if self._changed is None:
            self._embedding = True
            try:
                self._changed = self._embedded(kwargs["sample"] if "sample" in kwargs else args[0])
            except BaseException:
                self.close()
                raise
            finally:
                self._embedding = False
        return args, kwargs | {"encoder_hidden_states": torch.cat([free, self._changed.to(given)])}

    @torch.no_grad()
    def _embedded(self, noisy: Tensor) -> Tensor:
        """The changed embeddings of the prompts, [B, L, D]."""
        embedded = self._pipeline.encode_prompt(self._texts, noisy.device, 1, False)[0]
        return self._guards.changed(self._pipeline, embedded, self._seeds, tuple(noisy.shape[1:]))


def _check(pipeline: Any, guards: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if getattr(pipeline, "unet", None) is None or getattr(pipeline, "vae_scale_factor", None) is None:
        raise InputError(
            f"guards: a {type(pipeline).__name__} has no UNet under text to hook them into; change its prompts before "
            "the call, and put CopyFilter around it"
        )
    check_guidance(pipeline)
    if len(prompts) != len(seeds) or not prompts:
        raise InputError(f"guards: {len(prompts)} prompts and {len(seeds)} seeds; give one of each an image")
    names = [text.partition(":")[0] for text in guards]
    if "copy-filter" in names:
        raise InputError(
            "--guard copy-filter: looks at finished images and makes copies again, which no callback of a call can: "
            "put CopyFilter around the call"
        )
    if getattr(pipeline, "text_encoder_2", None) is not None and set(names) - {"amg", "attention"}:
        raise InputError("guards: the text of SDXL is in two embeddings; change its prompts before the call")


def _shape(pipeline: Any, size: tuple[int, int] | None) -> tuple[int, int, int]:
    height, width = size or tuple(pipeline.vae_scale_factor * n for n in latent_size(pipeline))
    return height, width, pipeline.vae.config.out_channels
