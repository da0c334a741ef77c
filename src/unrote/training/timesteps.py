"""Which timesteps are trained on how often."""

import torch
from torch import Tensor

from unrote.config import TrainingConfig


def timestep_weights(training: TrainingConfig, num_timesteps: int) -> Tensor | None:
    """How often each timestep is drawn, float32 [T] that sums to 1; None if all alike.

    The biased timesteps are ``timestep_bias_multiplier`` times as frequent as the others, as in diffusers' training
    script for SDXL: the last or first ``timestep_bias_portion`` of them, or those from begin to before end.
    """
    count = int(training.timestep_bias_portion * num_timesteps)
    match training.timestep_bias_strategy:
        case "none":
            return None
        case "later":
            biased = slice(num_timesteps - count, None)
        case "earlier":
            biased = slice(count)
        case _:
            biased = slice(training.timestep_bias_begin, training.timestep_bias_end)
    weights = torch.ones(num_timesteps)
    weights[biased] *= training.timestep_bias_multiplier
    return weights / weights.sum()
