"""λ that adapts itself, so that a wanted share of the samples is skipped."""

from typing import Any

import torch
from torch import Tensor

LIMITS = (1e-3, 1e3)
"""λ stays between these, also where the wanted share can't be had."""


class AdaptiveSkipRatio:
    """``λ ← λ exp(η Σ_i (target − skipped_i) / B)`` after each batch, over the samples i that could be skipped.

    It comes to rest where the wanted share of those is skipped. Where nothing is known yet, or skipping is not allowed,
    a sample says nothing about λ.

    >>> ratio = AdaptiveSkipRatio(0.5, target=0.25, rate=1.0)
    >>> ratio.update(torch.tensor([True, True, False, False]), torch.ones(4, dtype=torch.bool))
    >>> round(float(ratio.value / 0.5), 4)  # exp(0.25 - 0.5)
    0.7788

    Args:
        start: λ at the start, > 0.
        target: the share to skip, in [0, 1].
        rate: η > 0.
    """

    def __init__(self, start: float, target: float, rate: float) -> None:
        if not start > 0 or not 0 <= target <= 1 or not rate > 0:
            raise ValueError(f"start {start} and rate {rate} must be above 0, target {target} must be in [0, 1]")
        self.target, self.rate = target, rate
        self.value = torch.tensor(start, dtype=torch.float32)

    def update(self, skipped: Tensor, judged: Tensor) -> None:
        """Adapt λ to a batch: ``skipped`` and ``judged`` (could have been), bool [B]."""
        excess = torch.where(judged, self.target - skipped.float(), 0.0).mean()
        self.value = (self.value * torch.exp(self.rate * excess)).clamp(*LIMITS)

    def to(self, device: torch.device) -> None:
        """Move λ to ``device``, in place."""
        self.value = self.value.to(device)

    def state_dict(self) -> dict[str, Any]:
        """λ."""
        return {"value": self.value.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.value = state["value"].to(self.value.device, copy=True)
