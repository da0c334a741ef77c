"""Prompt-embedding optimisation (Wen et al., ICLR 2024, §5.1): loosen what steers the first step too strongly."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.guards.attention import unweighted
from unrote.text.mitigations import prediction_norm


@dataclass(frozen=True)
class PromptOptimization:
    """Changes a prompt's embedding until the text steers the first step by less than ``target``.

    Adam lowers ‖ε(x_T, e) − ε(x_T, ∅)‖₂ over the embedding e, for each image by itself, and stops as soon as the norm
    is below the target; an embedding that is below it from the start is left as it is. ``unrote prompts`` says which
    norms a model's prompts have. Not for SDXL.

    Attributes:
        target: of the norm; it belongs to one model and size.
        steps: at most so many; each costs a forward pass and a backward one.
        lr: learning rate; the paper's is 0.05.
    """

    target: float
    steps: int = 10
    lr: float = 0.05

    def __post_init__(self) -> None:
        if not (0 < self.target < math.inf and self.steps >= 1 and 0 < self.lr < math.inf):
            raise InputError("--guard prompt-optimization: target, steps and lr must be above 0 and finite")

    def embedding(self, pipeline: Any, embedding: Tensor, empty: Tensor, noise: Tensor, seed: int) -> Tensor:
        """The embedding [L, D] that steers less; see :class:`unrote.guards.prompts.EmbeddingGuard`."""
        unet, scheduler = pipeline.unet, pipeline.scheduler
        time = scheduler.timesteps[0]
        x = scheduler.scale_model_input(noise[None].to(unet.device, unet.dtype) * scheduler.init_noise_sigma, time)
        with torch.inference_mode(False), torch.enable_grad(), unweighted(unet):
            x, time, empty = x.clone(), time.clone(), empty.clone()
            # Adam's steps would be lost to rounding, or to overflow, in half precision.
            changed = embedding.float().clone().requires_grad_()
            optimizer = torch.optim.Adam([changed], lr=self.lr)
            free = unet(x, time, encoder_hidden_states=empty[None]).sample.detach()
            for _ in range(self.steps):
                steered = unet(x, time, encoder_hidden_states=changed[None].to(embedding.dtype)).sample
                norm = prediction_norm(steered, free)
                if float(norm.detach()) < self.target:
                    break
                (changed.grad,) = torch.autograd.grad(norm.sum(), changed)
                optimizer.step()
            return changed.detach().to(embedding.dtype)

    def settings(self) -> dict[str, Any]:
        """Target, steps and learning rate."""
        return {"guard": "prompt-optimization", "target": self.target, "steps": self.steps, "lr": self.lr}
