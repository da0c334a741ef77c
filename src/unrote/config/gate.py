"""What AGC's gate can be told."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from unrote.config.base import Decay, Fraction, Section


class BankConfig(Section):
    """AGC's memory bank of the usual loss per timestep."""

    decay: Decay = 0.8
    """γ, decay of the bank per visit."""
    bins: PositiveInt | None = None
    """Pool the timesteps into this many bins; none is one bin per timestep."""
    smooth: NonNegativeInt = 0
    """Half-width, in bins, of the window the bank is read through."""
    warm_start: bool = False
    """Correct the bank for having started at 0."""


class GateConfig(Section):
    """AGC, anti-gradient control (arXiv 2407.15328 §3.2)."""

    enabled: bool = False
    """Skip samples with an abnormally low loss."""
    skip_ratio: PositiveFloat = 0.5
    """λ: skip below λ times the usual loss at the timestep. 0.5 from scratch, 0.8 for fine-tuning."""
    reference: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the images that is never trained on and fills the bank; 0 fills it with what is trained on."""
    bank: BankConfig = BankConfig()
    """The memory bank."""
    signal: Literal["sample", "history"] = "sample"
    """Judge by this draw's loss ratio, or by the image's running one: over its earlier visits and their timesteps."""
    soft: bool = False
    """Weigh what is below the threshold by loss / threshold, not by 0; the ledger counts it as skipped all the same."""
    timesteps: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Skip at these timesteps only, both ends included; none skips at all."""
    absolute: PositiveFloat | None = None
    """Skip below this loss at every timestep, without λ and bank; none goes by the loss ratio."""
    target_skip_rate: Fraction | None = None
    """Adapt λ, which starts at skip_ratio, so that this share of the samples is skipped; none keeps λ fixed."""
    adaptation_rate: PositiveFloat = 0.05
    """η of the adaptive λ: after a batch, λ ← λ · exp(η · (target_skip_rate − skipped share))."""

    @model_validator(mode="after")
    def _rules_fit_together(self) -> "GateConfig":
        if self.timesteps is not None and self.timesteps[0] > self.timesteps[1]:
            raise ValueError(f"timesteps: the first, {self.timesteps[0]}, is after the last, {self.timesteps[1]}")
        if self.absolute is not None and (self.signal == "history" or self.target_skip_rate is not None):
            raise ValueError("absolute: is a fixed limit of this draw's loss; leave out signal and target_skip_rate")
        return self

    @property
    def rule(self) -> dict[str, Any]:
        """How :class:`unrote.method.gate.LossGate` is to judge, as its arguments; the plain rule if not enabled."""
        names = {"signal", "soft", "timesteps", "absolute", "target_skip_rate", "adaptation_rate"}
        return self.model_dump(include=names) if self.enabled else {}
