"""AGC, anti-gradient control: skip samples whose loss is abnormally low (arXiv 2407.15328 §3.2, Eq. 4-6)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrote.method.bank import LossBank
from unrote.method.ledger import Ledger


class Decision(NamedTuple):
    """What the gate says of a batch."""

    keep: Tensor
    """bool [B]: trained on, not skipped."""
    ratio: Tensor
    """float32 [B]: r = L / b[t], inf or NaN where the bank knew nothing yet."""


def decide(losses: Tensor, expected: Tensor, skip_ratio: float) -> Decision:
    """Keep a sample unless its loss is below ``skip_ratio`` times the usual one: ``keep = [L ≥ λ b[t]]``.

    A loss that is not a number is kept, so that a diverging model is seen and not silently skipped.

    Args:
        losses: float32 [B].
        expected: float32 [B], the bank's b[t] as it was before this batch.
        skip_ratio: λ ≥ 0; 0 keeps everything.
    """
    losses = losses.detach().float()
    return Decision(~(losses < skip_ratio * expected), losses / expected)


def gated_sum(losses: Tensor, keep: Tensor) -> Tensor:
    """Sum of the kept losses, a scalar; skipped samples get no gradient."""
    return torch.where(keep, losses, 0.0).sum()


class LossGate:
    """Skips samples that the model already knows unusually well, in any training loop.

    >>> import torch
    >>> gate = LossGate(num_timesteps=10, skip_ratio=0.5)
    >>> t = torch.tensor([3, 3])
    >>> gate(torch.tensor([1.0, 1.0], requires_grad=True), t).item()  # the first visit of a timestep never skips
    1.0
    >>> gate(torch.tensor([1.0, 0.1], requires_grad=True), t).item()  # 0.1 < 0.5 · b[3]: skipped
    1.0

    Args:
        num_timesteps: T.
        skip_ratio: λ; 0.5 from scratch, 0.8 for fine-tuning (the papers' code writes 1/λ). 0 never skips.
        bank: the memory bank; by default one bin per timestep, γ = 0.8.
        ledger: where to count visits, skips and ratios per sample.

    Attributes:
        batches: how many batches were recorded by this object.

    Raises:
        ValueError: if ``skip_ratio`` is negative or the bank is for another number of timesteps.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        skip_ratio: float = 0.5,
        *,
        bank: LossBank | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        if skip_ratio < 0:
            raise ValueError(f"skip_ratio must not be negative, but is {skip_ratio}")
        if bank is not None and bank.num_timesteps != num_timesteps:
            raise ValueError(f"the bank is for {bank.num_timesteps} timesteps, the gate for {num_timesteps}")
        self.skip_ratio = skip_ratio
        self.bank = bank or LossBank(num_timesteps)
        self.ledger = ledger
        self.batches = 0
        self._kept: Tensor = torch.tensor(0)
        self._kept_ready: torch.cuda.Event | None = None

    def __call__(self, losses: Tensor, timesteps: Tensor, indices: Tensor | None = None) -> Tensor:
        """The loss to call ``backward`` on: the mean over the kept samples, 0 if none is kept.

        Args:
            losses: float [B], one denoising loss per sample (mean over C, H, W), with gradient.
            timesteps: int64 [B], in 0..T-1.
            indices: int64 [B], the samples' positions in the data set; needed to keep a ledger.

        Raises:
            ValueError: if the loss is already reduced, shapes differ, a timestep or an index is out of range, or the
                gate keeps a ledger and there are no indices. Ranges are checked on the CPU only.
        """
        decision = self.decide(losses, timesteps)
        self.record(decision, losses, timesteps, indices)
        return gated_sum(losses, decision.keep) / self.num_kept.clamp(min=1)

    def decide(self, losses: Tensor, timesteps: Tensor) -> Decision:
        """Judge a batch by the bank as it stands; changes nothing."""
        if losses.ndim != 1:
            raise ValueError(
                f"the gate needs one loss per sample, shape [B], but got shape {list(losses.shape)}: "
                'compute it with reduction="none" and take the mean over all dimensions but the first'
            )
        if timesteps.shape != losses.shape:
            raise ValueError(f"timesteps {list(timesteps.shape)} and losses {list(losses.shape)} differ in shape")
        _check_range("timesteps", timesteps, self.bank.num_timesteps)
        self._move_to(losses.device)
        return decide(losses, self.bank.expected(timesteps), self.skip_ratio)

    def record(
        self,
        decision: Decision,
        losses: Tensor,
        timesteps: Tensor,
        indices: Tensor | None = None,
        augmented: Tensor | None = None,
    ) -> None:
        """Fold a judged batch, kept or skipped, into the bank and the ledger."""
        if self.ledger is not None:
            if indices is None:
                raise ValueError("the gate keeps a ledger: pass the samples' positions in the data set as indices")
            _check_range("indices", indices, self.ledger.num_samples)
            indices = indices.to(losses.device, non_blocking=True)
            self.ledger.record(indices, decision.ratio, ~decision.keep, augmented)
        self.bank.update(timesteps, losses)
        self.batches += 1
        self._note_kept(decision.keep.sum())

    @property
    def num_kept(self) -> Tensor:
        """How many samples of the last recorded batch were kept, a scalar on the losses' device."""
        return self._kept

    def any_kept(self) -> bool:
        """Whether the last recorded batch kept anything; if not, take no optimizer step.

        On an accelerator call it after ``backward``: it waits for the forward pass only, which is done by then, while
        the backward pass still keeps the device busy.
        """
        if self._kept_ready is None:
            return bool(self._kept)
        self._kept_ready.synchronize()
        return bool(self._kept_on_host)

    def _note_kept(self, kept: Tensor) -> None:
        self._kept = kept
        if kept.device.type == "cuda":
            self._kept_on_host = torch.empty((), dtype=kept.dtype, pin_memory=True)
            self._kept_on_host.copy_(kept, non_blocking=True)
            self._kept_ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._kept_ready.record()

    def _move_to(self, device: torch.device) -> None:
        for part in (self.bank, self.ledger):
            if part is not None:
                part.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors that restore bank and ledger."""
        ledger = {} if self.ledger is None else {"ledger": self.ledger.state_dict()}
        return {"bank": self.bank.state_dict()} | ledger

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.bank.load_state_dict(state["bank"])
        if self.ledger is not None:
            self.ledger.load_state_dict(state["ledger"])


def _check_range(name: str, values: Tensor, size: int) -> None:
    # On the CPU only: elsewhere to look at the values is to wait for them.
    if values.device.type == "cpu" and not 0 <= int(values.min()) <= int(values.max()) < size:
        raise ValueError(f"{name} must be in 0..{size - 1}, but include {values.tolist()}")
