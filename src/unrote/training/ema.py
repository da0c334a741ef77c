"""The exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unrote.tensorfiles import own_part


class EMA:
    """``shadow ← d shadow + (1−d) weights`` in one fused call.

    Args:
        model: whose parameters are averaged.
        decay: d; in the first steps it is (1 + step)/(10 + step) if that is lower.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._names = [name for name, _ in model.named_parameters()]
        weights = [weight.detach() for weight in model.parameters()]
        self._averages = [weight.clone() for weight in weights]
        # Of weights that are held in parts, the parts.
        self._weights, self._shadow = list(map(own_part, weights)), list(map(own_part, self._averages))

    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step ``step`` = 1, 2, …"""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._shadow, self._weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its own again after it."""
        own = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._shadow)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        torch._foreach_copy_(self._shadow, [own_part(state[name]) for name in self._names])
