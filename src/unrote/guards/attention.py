"""Cross-attention reweighting (Ren et al., ECCV 2024, arXiv 2403.11052): away from the tokens that memorization uses.

In memorized samples attention concentrates on the *summary tokens*, the end of the text and the padding after it. They
are masked, and the logits of the beginning token are multiplied; the words of the prompt share the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.text.guarded import guidance_of


class AttentionReweighting:
    """Masks the summary tokens in cross-attention and scales the beginning token.

    Args:
        scale: C, what the logits of the beginning token are multiplied by; the paper's is 1.25.

    Raises:
        InputError: ``scale`` is not above 0.
    """

    def __init__(self, scale: float = 1.25) -> None:
        if not 0 < scale < math.inf:
            raise InputError(f"--guard attention: scale must be above 0 and finite, not {scale:g}")
        self.scale = scale

    @contextmanager
    def on(self, pipeline: Any, prompts: Sequence[str]) -> Iterator[None]:
        """Reweight the attention of a pipeline's UNet to ``prompts`` [B] of a call, inside the block.

        A batch with classifier-free guidance has the empty text in its first half, which is left as it is. Of several
        images per prompt, those of one prompt follow each other, as diffusers has it.

        Raises:
            InputError: while the UNet is called, if its images are no multiple of ``prompts``.
        """
        unet = pipeline.unet
        before = dict(unet.attn_processors)
        kept = _kept(pipeline.tokenizer, prompts)
        ours = {
            name: _Processor(one, kept, self.scale, lambda: guidance_of(pipeline) > 1) if ".attn2." in name else one
            for name, one in before.items()
        }
        unet.set_attn_processor(ours)
        try:
            yield
        finally:
            unet.set_attn_processor(before)

    def settings(self) -> dict[str, Any]:
        """The scale."""
        return {"guard": "attention", "scale": self.scale}


@contextmanager
def unweighted(unet: Any) -> Iterator[None]:
    """Attention without this guard inside the block, for calls with another batch."""
    now = dict(unet.attn_processors)
    unet.set_attn_processor({name: one.usual if isinstance(one, _Processor) else one for name, one in now.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(now)


def _kept(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Which tokens are the beginning or words: bool [B, L]."""
    length = tokenizer.model_max_length
    read = tokenizer(list(prompts), truncation=True, max_length=length).input_ids
    # Of each text the first is the beginning, the last the end.
    counts = torch.tensor([max(1, len(ids) - 1) for ids in read])
    return torch.arange(length) < counts[:, None]


class _Processor:
    """Cross-attention with logits changed; otherwise as diffusers computes it for Stable Diffusion's UNet."""

    def __init__(self, usual: Any, kept: Tensor, scale: float, guided: Callable[[], bool]) -> None:
        self.usual = usual
        self._kept, self._scale, self._guided = kept, scale, guided

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attention of [B', P, D] to the text [B', L, E]."""
        query, key, value = (
            attn.head_to_batch_dim(part)
            for part in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        # As the usual kernels: scaled before they could overflow fp16, and never rounded to it.
        logits = torch.einsum("bpd,bld->bpl", query.float() * attn.scale, key.float())
        logits = self._reweighted(logits.view(len(hidden_states), attn.heads, *logits.shape[1:]))
        weights = logits.flatten(0, 1).softmax(-1).to(value.dtype)
        hidden = attn.to_out[0](attn.batch_to_head_dim(weights @ value))
        mixed: Tensor = attn.to_out[1](hidden)
        whole = mixed + hidden_states if attn.residual_connection else mixed
        return whole / float(attn.rescale_output_factor)

    def _reweighted(self, logits: Tensor) -> Tensor:
        """Logits [B', heads, P, L] of the images with text; of a guided batch the second half."""
        free = len(logits) // 2 if self._guided() else 0
        images, left = divmod(len(logits) - free, len(self._kept))
        if left or not images:
            raise InputError(
                f"--guard attention: was made for {len(self._kept)} prompts, and the call makes {len(logits) - free} "
                "images: give it the prompts of the call"
            )
        kept = self._kept.to(logits.device).repeat_interleave(images, 0)
        steered = logits[free:].masked_fill(~kept[:, None, None], -torch.inf)
        first = steered[..., :1] * self._scale
        return torch.cat([logits[:free], torch.cat([first, steered[..., 1:]], -1)])
