"""AGC, anti-gradient control: skip samples whose loss is abnormally low (arXiv 2407.15328 §3.2, Eq. 4-6)."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unrote.method.bank import LossBank
from unrote.method.ledger import Ledger
from unrote.method.skip_ratio import AdaptiveSkipRatio

Signal = Literal["sample", "history"]


class Decision(NamedTuple):
    """What the gate says of a batch."""

    weight: Tensor
    """float32 [B] in [0, 1]: how much each sample counts; 0 is skipped. Between the two only by a soft gate."""
    ratio: Tensor
    """float32 [B]: r = L / b[t], inf or NaN where the bank knew nothing yet."""

    @property
    def keep(self) -> Tensor:
        """bool [B]: trained on."""
        return self.weight > 0

    @property
    def skipped(self) -> Tensor:
        """bool [B]: found below the threshold, so not trained on, or by a soft gate with less weight."""
        return self.weight < 1


def weigh(values: Tensor, thresholds: Tensor | float, soft: bool = False) -> Tensor:
    """How much a sample counts: 0 (if ``soft``, value / threshold) below its threshold, else 1.

    A value that is not a number counts 1, so that a diverging model is seen and what is not known is not skipped.

    >>> weigh(torch.tensor([0.1, 0.4, 0.5]), 0.4), weigh(torch.tensor([0.1, 0.4, 0.5]), 0.4, soft=True)
    (tensor([0., 1., 1.]), tensor([0.2500, 1.0000, 1.0000]))

    Args:
        values: float32 [B], ≥ 0.
        thresholds: float32 [B], or one for all.
        soft: whether to weigh in proportion.

    Returns:
        float32 [B] in [0, 1].
    """
    return torch.where(values < thresholds, values / thresholds if soft else 0.0, 1.0)


def decide(losses: Tensor, expected: Tensor, skip_ratio: Tensor | float, soft: bool = False) -> Decision:
    """Keep a sample unless its loss is below ``skip_ratio`` times the usual one: ``keep = [L ≥ λ b[t]]``.

    Args:
        losses: float32 [B].
        expected: float32 [B], the bank's b[t] as it was before this batch.
        skip_ratio: λ ≥ 0; 0 keeps everything.
        soft: see :func:`weigh`.
    """
    losses = losses.detach().float()
    return Decision(weigh(losses, skip_ratio * expected, soft), losses / expected)


def gated_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Sum of the losses under their weights, a scalar; skipped samples get no gradient."""
    return torch.where(weight > 0, losses * weight, 0.0).sum()


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
        update_bank: fold the losses of judged batches into the bank; false leaves the bank to the caller, who fills it
            with :meth:`LossBank.update`, for example with the losses of images that are never trained on.
        signal: ``sample`` judges by this draw's loss ratio; ``history`` by the running ratio of the sample's earlier
            visits, which needs the ledger, and keeps what was never measured.
        soft: weigh instead of skipping, see :func:`weigh`; what is below the threshold still counts as skipped.
        timesteps: first and last timestep at which anything is skipped; None is all.
        absolute: skip below this loss, whatever λ and bank say.
        target_skip_rate: adapt λ to skip this share, see :class:`unrote.method.skip_ratio.AdaptiveSkipRatio`.
        adaptation_rate: η of the adaptive λ.

    Attributes:
        batches: how many batches were recorded by this object.

    Raises:
        ValueError: if ``skip_ratio`` is negative, the bank is for another number of timesteps, or there is no ledger to
            know the history from.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        skip_ratio: float = 0.5,
        *,
        bank: LossBank | None = None,
        ledger: Ledger | None = None,
        update_bank: bool = True,
        signal: Signal = "sample",
        soft: bool = False,
        timesteps: tuple[int, int] | None = None,
        absolute: float | None = None,
        target_skip_rate: float | None = None,
        adaptation_rate: float = 0.05,
    ) -> None:
        if not skip_ratio >= 0:  # nan neither
            raise ValueError(f"skip_ratio must not be negative, but is {skip_ratio}")
        if bank is not None and bank.num_timesteps != num_timesteps:
            raise ValueError(f"the bank is for {bank.num_timesteps} timesteps, the gate for {num_timesteps}")
        if signal == "history" and ledger is None:
            raise ValueError("signal='history' goes by the samples' earlier visits: pass ledger=Ledger(len(dataset))")
        self._skip_ratio, self._signal, self._soft = skip_ratio, signal, soft
        self._timesteps, self._absolute = timesteps, absolute
        self.adaptive = (
            None if target_skip_rate is None else AdaptiveSkipRatio(skip_ratio, target_skip_rate, adaptation_rate)
        )
        self.bank = bank or LossBank(num_timesteps)
        self.ledger = ledger
        self.update_bank = update_bank
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
        decision = self.decide(losses, timesteps, indices)
        self.record(decision, losses, timesteps, indices)
        return gated_sum(losses, decision.weight) / self.num_kept.clamp(min=1)

    @property
    def skip_ratio(self) -> Tensor | float:
        """λ: as given, or as adapted so far."""
        return self._skip_ratio if self.adaptive is None else self.adaptive.value

    def decide(self, losses: Tensor, timesteps: Tensor, indices: Tensor | None = None) -> Decision:
        """Judge a batch by bank and ledger as they stand; changes nothing."""
        if losses.ndim != 1:
            raise ValueError(
                f"the gate needs one loss per sample, shape [B], but got shape {list(losses.shape)}: "
                'compute it with reduction="none" and take the mean over all dimensions but the first'
            )
        if timesteps.shape != losses.shape:
            raise ValueError(f"timesteps {list(timesteps.shape)} and losses {list(losses.shape)} differ in shape")
        _check_range("timesteps", timesteps, self.bank.num_timesteps)
        self._move_to(losses.device)
        decision = decide(losses, self.bank.expected(timesteps), self.skip_ratio, self._soft)
        if self._absolute is not None:
            decision = decision._replace(weight=weigh(losses.detach().float(), self._absolute, self._soft))
        elif self._signal == "history":
            assert self.ledger is not None
            history = self.ledger.running_ratio_of(self._positions(indices, losses.device))
            decision = decision._replace(weight=weigh(history, self.skip_ratio, self._soft))
        if self._timesteps is not None:
            decision = decision._replace(weight=torch.where(self._at_its_timesteps(timesteps), decision.weight, 1.0))
        return decision

    def _at_its_timesteps(self, timesteps: Tensor) -> Tensor:
        first, last = self._timesteps or (0, self.bank.num_timesteps - 1)
        return (timesteps >= first) & (timesteps <= last)

    def record(
        self,
        decision: Decision,
        losses: Tensor,
        timesteps: Tensor,
        indices: Tensor | None = None,
        augmented: Tensor | None = None,
    ) -> None:
        """Fold a judged batch, kept or skipped, into the bank and the ledger."""
        known = decision.ratio.isfinite()
        if self.ledger is not None:
            positions = self._positions(indices, losses.device)
            if self._signal == "history":
                known = self.ledger.measured[positions] > 0
            self.ledger.record(positions, decision.ratio, decision.skipped, augmented)
        if self.adaptive is not None:
            self.adaptive.update(decision.skipped, known & self._at_its_timesteps(timesteps))
        if self.update_bank:
            self.bank.update(timesteps, losses)
        self.batches += 1
        self._note_kept(decision.weight.sum())

    def _positions(self, indices: Tensor | None, device: torch.device) -> Tensor:
        assert self.ledger is not None
        if indices is None:
            raise ValueError("the gate keeps a ledger: pass the samples' positions in the data set as indices")
        _check_range("indices", indices, self.ledger.num_samples)
        return indices.to(device, non_blocking=True)

    @property
    def num_kept(self) -> Tensor:
        """How many samples of the last recorded batch were kept, by their weights; a scalar on the losses' device."""
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
        for part in (self.bank, self.ledger, self.adaptive):
            if part is not None:
                part.to(device)

    def of_proxy(self) -> dict[str, LossBank | AdaptiveSkipRatio]:
        """What each proxy of an ensemble has of its own: the bank, and λ if it adapts."""
        return {"bank": self.bank} | ({} if self.adaptive is None else {"skip_ratio": self.adaptive})

    def readings(self) -> dict[str, float]:
        """What the log says of the gate: λ, if it adapts."""
        return {} if self.adaptive is None else {"skip_ratio": float(self.adaptive.value)}

    def state_dict(self) -> dict[str, Any]:
        """Tensors that restore bank and ledger, and λ if it adapts."""
        ledger = {} if self.ledger is None else {"ledger": self.ledger.state_dict()}
        return {name: part.state_dict() for name, part in self.of_proxy().items()} | ledger

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for name, part in self.of_proxy().items():
            part.load_state_dict(state[name])
        if self.ledger is not None:
            self.ledger.load_state_dict(state["ledger"])


def _check_range(name: str, values: Tensor, size: int) -> None:
    if values.is_floating_point():
        raise ValueError(f"{name} must be whole numbers, not {values.dtype}")
    # On the CPU only: elsewhere to look at the values is to wait for them.
    if values.device.type == "cpu" and not 0 <= int(values.min()) <= int(values.max()) < size:
        raise ValueError(f"{name} must be in 0..{size - 1}, but include {values.tolist()}")
