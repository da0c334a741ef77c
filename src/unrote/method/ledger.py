"""The ledger: what the method saw of every training sample."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrote.method.bank import fold_in_order_

RUNNING_DECAY = 0.8
"""Decay of the running loss ratio, per visit: the bank's own default γ."""


class Ledger:
    """Per-sample counts and loss ratios, indexed by the sample's position in the data set.

    Args:
        num_samples: N.
        device: where the columns live; the device of the losses.

    Raises:
        ValueError: if ``num_samples`` is below 1.
    """

    COUNTS = ("visits", "skips", "augmented", "moves", "skips_since_move", "measured")
    RATIOS = ("last_ratio", "ratio_sum", "running_ratio")

    def __init__(self, num_samples: int, device: torch.device | str = "cpu") -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}: pass len(dataset)")
        self.num_samples = num_samples
        # One slot more than samples, for ratios that could not be measured: a mask would need a synchronisation.
        self._counts = torch.zeros(len(self.COUNTS), num_samples + 1, dtype=torch.int64, device=device)
        self._ratios = torch.zeros(len(self.RATIOS), num_samples + 1, device=device)

    def __getattr__(self, name: str) -> Tensor:
        """A column by its name, [N]."""
        if name in Ledger.COUNTS:
            return self._counts[Ledger.COUNTS.index(name), :-1]
        if name in Ledger.RATIOS:
            return self._ratios[Ledger.RATIOS.index(name), :-1]
        raise AttributeError(name)

    def record(self, indices: Tensor, ratios: Tensor, skipped: Tensor, augmented: Tensor | None = None) -> None:
        """Count one visit of each of ``indices``.

        Args:
            indices: int64 [B], positions in the data set; may repeat.
            ratios: float32 [B], r = L / b[t]; not finite where the bank knew nothing yet.
            skipped: bool [B].
            augmented: bool [B], whether the sample was trained on an augmented view.
        """
        measured = ratios.isfinite()
        zero = torch.zeros_like(indices)
        added = [
            torch.ones_like(indices),
            skipped.long(),
            zero if augmented is None else augmented.long(),
            zero,
            skipped.long(),
            measured.long(),
        ]
        self._counts.index_add_(1, indices, torch.stack(added))
        slots = torch.where(measured, indices, self.num_samples)
        values = torch.where(measured, ratios.float(), 0.0)
        last, total, running = self._ratios.unbind()
        fold_in_order_(last, slots, values, 0.0)
        total.index_add_(0, slots, values)
        fold_in_order_(running, slots, values, RUNNING_DECAY)

    def moved(self, indices: Tensor) -> None:
        """Count a redistribution of ``indices`` (int64 [M], no repeats); their skip counts restart at 0 (MSR)."""
        self.moves[indices] += 1
        self.skips_since_move[indices] = 0

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """What is known of ``indices`` (int64 [M], no repeats), for :meth:`put_rows`."""
        return {"counts": self._counts[:, indices], "ratios": self._ratios[:, indices]}

    def put_rows(self, indices: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`rows` gave."""
        self._counts[:, indices] = rows["counts"].to(self._counts.device)
        self._ratios[:, indices] = rows["ratios"].to(self._ratios.device)

    def share(self, indices: Tensor, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Make the ledgers of all processes equal: of each sample, the row of the process that visits it. Exact.

        Args:
            indices: int64 [M], the samples that this process visits; over all processes a partition of 0..N-1.
            sum_over_processes: of an int64 tensor on the CPU.
        """
        # Ratios go as the whole numbers that their bits are, so that one sum of whole numbers does it all.
        ratios = self._ratios[:, :-1].view(torch.int32).long()
        rows = torch.cat([self._counts[:, :-1], ratios]).cpu()
        own = torch.zeros_like(rows)
        own[:, indices] = rows[:, indices]
        counts, ratios = sum_over_processes(own).tensor_split([len(self.COUNTS)])
        self._counts[:, :-1] = counts.to(self._counts.device)
        self._ratios[:, :-1] = ratios.int().view(torch.float32).to(self._ratios.device)

    def running_ratio_of(self, indices: Tensor) -> Tensor:
        """Bias-corrected running loss ratio of ``indices`` (int64 [B]), float32 [B]; NaN where never measured."""
        seen = 1 - RUNNING_DECAY ** self.measured[indices]
        return self.running_ratio[indices] / seen

    def columns(self) -> dict[str, np.ndarray]:
        """The ledger as it is written with a run: name → array [N]; ratios are NaN where never measured."""
        everything = torch.arange(self.num_samples, device=self._counts.device)
        ratios = {
            "last_ratio": torch.where(self.measured > 0, self.last_ratio, torch.nan),
            "mean_ratio": self.ratio_sum / self.measured,
            "running_ratio": self.running_ratio_of(everything),
        }
        counts = {name: getattr(self, name) for name in ("visits", "skips", "augmented", "moves")}
        return {name: column.cpu().numpy() for name, column in (counts | ratios).items()}

    def to(self, device: torch.device) -> None:
        """Move the ledger to ``device``, in place."""
        if self._counts.device != device:
            self._counts, self._ratios = self._counts.to(device), self._ratios.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors that restore the ledger."""
        return {"counts": self._counts.clone(), "ratios": self._ratios.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. Raises RuntimeError if the number of samples differs."""
        self._counts.copy_(state["counts"])
        self._ratios.copy_(state["ratios"])
