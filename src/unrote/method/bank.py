"""The memory bank: how large the denoising loss usually is at each timestep (AGC, arXiv 2407.15328 §3.2)."""

from typing import Any

import torch
from torch import Tensor


def fold_in_order_(averages: Tensor, slots: Tensor, values: Tensor, decay: float) -> None:
    """Fold ``values`` one after another into the exponential averages they belong to, in place.

    Equal, to rounding, to a loop of ``averages[s] = decay * averages[s] + (1 - decay) * v``, also where a slot repeats:
    after m visits, ``b ← γ^m b + (1−γ) Σ_j γ^(m−j) v_(j)``. Costs O(B log B) whatever the number of averages, without a
    device synchronisation.

    Args:
        averages: float32 [S], updated in place.
        slots: int64 [B], each in 0..S-1.
        values: float32 [B].
        decay: γ in [0, 1]; 0 keeps the last value.
    """
    sorted_slots, order = torch.sort(slots, stable=True)
    position = torch.arange(len(slots), device=slots.device)
    group_end = torch.searchsorted(sorted_slots, sorted_slots, right=True)
    group_start = torch.searchsorted(sorted_slots, sorted_slots)
    gamma = torch.full((), decay, dtype=averages.dtype, device=averages.device)
    weighted = (1 - decay) * gamma ** (group_end - 1 - position) * values[order]
    # Sums stand at the first position of each group; every member reads it there, so the write repeats equal values.
    sums = torch.zeros_like(weighted).index_add_(0, group_start, weighted)
    averages[sorted_slots] = averages[sorted_slots] * gamma ** (group_end - group_start) + sums[group_start]


class LossBank:
    """Exponential average of the per-sample loss at each timestep: ``b[t] ← γ b[t] + (1−γ) L``.

    Args:
        num_timesteps: T; timesteps are 0..T-1.
        decay: γ in [0, 1).
        bins: how many bins the T timesteps are pooled into; ``None`` is one bin per timestep, as in the papers.
        smooth: half-width, in bins, of the window that pools neighbouring bins when the bank is read; 0 reads one bin.
            Bins count by how much they have seen, so a bin that was never visited is filled by its neighbours.
        warm_start: divide by 1 − γ^visits, so that the first visits are not averaged with the initial 0.
        device: where the bank lives; the device of the losses.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        decay: float = 0.8,
        bins: int | None = None,
        smooth: int = 0,
        warm_start: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, not {num_timesteps}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        if bins is not None and not 1 <= bins <= num_timesteps:
            raise ValueError(f"bins must be between 1 and num_timesteps = {num_timesteps}, not {bins}")
        if smooth < 0:
            raise ValueError(f"smooth must not be negative, but is {smooth}")
        self.num_timesteps = num_timesteps
        self.num_bins = bins or num_timesteps
        self.decay = decay
        self.smooth = smooth
        self.warm_start = warm_start
        # The last slot is a bin for what must not be counted: a mask would need a synchronisation.
        self._averages = torch.zeros(self.num_bins + 1, device=device)
        self._visits = torch.zeros(self.num_bins + 1, dtype=torch.int64, device=device)

    @property
    def values(self) -> Tensor:
        """The raw averages b, float32 [bins]."""
        return self._averages[:-1]

    @property
    def visits(self) -> Tensor:
        """How many losses each bin has seen, int64 [bins]."""
        return self._visits[:-1]

    def bin_of(self, timesteps: Tensor) -> Tensor:
        """The bin of each timestep, int64 [B]."""
        return timesteps if self.num_bins == self.num_timesteps else timesteps * self.num_bins // self.num_timesteps

    def expected(self, timesteps: Tensor) -> Tensor:
        """The usual loss b[t] at ``timesteps`` (int64 [B]), float32 [B]; 0 where nothing is known yet."""
        slots = self.bin_of(timesteps)
        if not (self.warm_start or self.smooth):
            return self._averages[slots]
        averages, seen = self.values, 1 - self.decay**self.visits
        if self.smooth:
            window = torch.ones(1, 1, 2 * self.smooth + 1, device=averages.device)
            both = torch.stack([averages, seen]).unsqueeze(1)
            averages, seen = torch.nn.functional.conv1d(both, window, padding=self.smooth).squeeze(1)
        return torch.where(seen > 0, averages / seen, 0.0)[slots]

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Fold ``losses`` (float32 [B]) at ``timesteps`` (int64 [B]) in batch order; non-finite losses are left out."""
        losses = losses.detach().float()
        finite = losses.isfinite()
        slots = torch.where(finite, self.bin_of(timesteps), self.num_bins)
        fold_in_order_(self._averages, slots, torch.where(finite, losses, 0.0), self.decay)
        self._visits.index_add_(0, slots, torch.ones_like(slots))

    def to(self, device: torch.device) -> None:
        """Move the bank to ``device``, in place."""
        if self._averages.device != device:
            self._averages, self._visits = self._averages.to(device), self._visits.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors that restore the bank."""
        return {"averages": self._averages.clone(), "visits": self._visits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. Raises RuntimeError if the number of bins differs."""
        self._averages.copy_(state["averages"])
        self._visits.copy_(state["visits"])
