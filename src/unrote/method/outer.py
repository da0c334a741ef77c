"""An outer optimizer over the rounds of an ensemble, as in DiLoCo (arXiv 2311.08105, Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterOptimizer:
    """SGD with Nesterov momentum whose gradient is what a round changed: ``Δ = θ − θ̄``.

    ``v ← μ v + Δ`` and ``θ ← θ − η (Δ + μ v)``; η = 1 and μ = 0 is plain averaging, θ ← θ̄.

    >>> outer = OuterOptimizer(learning_rate=0.5, momentum=0.0)
    >>> outer.step({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, {})[0]["w"]
    tensor(2.)
    """

    learning_rate: float = 1.0
    """η > 0; DiLoCo uses 0.7."""
    momentum: float = 0.0
    """μ in [0, 1); DiLoCo uses 0.9."""

    def step(
        self, start: Mapping[str, Tensor], average: Mapping[str, Tensor], velocity: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Where the next round starts, and the new velocity.

        Args:
            start: θ, where this round started, by name.
            average: θ̄, the average of the proxies; what is no floating-point tensor is taken as it is there.
            velocity: v; empty before the first step.
        """
        trained = {name: value for name, value in average.items() if value.is_floating_point()}
        change = {name: start[name] - value for name, value in trained.items()}
        moved = {name: self.momentum * velocity.get(name, torch.zeros_like(d)) + d for name, d in change.items()}
        steps = {name: self.learning_rate * (change[name] + self.momentum * moved[name]) for name in trained}
        return dict(average) | {name: start[name] - step for name, step in steps.items()}, moved
