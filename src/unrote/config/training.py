"""What the training loop can be told."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from unrote.config.base import Decay, Fraction, Section
from unrote.limits import parse_stop_rule

# YAML reads a plain `no` as false.
Precision = Annotated[
    Literal["no", "bf16", "fp16", "auto"], BeforeValidator(lambda value: "no" if value is False else value)
]


class TrainingConfig(Section):
    """The loop. Step counts are a proxy's own steps."""

    epochs: PositiveFloat = 100.0
    """The budget: epochs x images is how many samples are seen, whatever the method."""
    batch_size: PositiveInt = 64
    """Samples per optimizer step."""
    gradient_accumulation_steps: PositiveInt = 1
    """Parts a batch is computed in, to save memory; the result is the same up to rounding."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Both from torch, fused."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.999
    """Decay of the second moment."""
    adam_weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator of Adam's update."""
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """How the learning rate goes on after the warm-up."""
    lr_warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0 does not clip."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, which is what is sampled from."""
    ema_decay: Fraction = 0.999
    """Decay of the moving average per step; lower in the first steps."""
    min_snr_gamma: PositiveFloat | None = None
    """γ of min-SNR weights (arXiv 2303.09556), such as 5; none weighs all alike. The gate sees losses unweighted."""
    noise_offset: NonNegativeFloat = 0.0
    """Share of noise that is one number per channel, which lets a model learn overall brightness; such as 0.05."""
    input_perturbation: NonNegativeFloat = 0.0
    """Std of extra noise that the network gets and is not asked for (arXiv 2301.11706, Algorithm 1), such as 0.1."""
    timestep_bias_strategy: Literal["none", "later", "earlier", "range"] = "none"
    """Draw some timesteps more often: the last, noisiest, or first portion of them, or from begin to end."""
    timestep_bias_portion: Fraction = 0.25
    """Which share of the timesteps is later or earlier."""
    timestep_bias_multiplier: PositiveFloat = 1.0
    """How many times as often as the others they are drawn."""
    timestep_bias_begin: NonNegativeInt = 0
    """First timestep of the range."""
    timestep_bias_end: PositiveInt | None = None
    """End of the range, itself outside of it; none is T."""
    ambient_timestep: NonNegativeInt | None = None
    """From this timestep on, see only one fixed noisy version of each image (arXiv 2502.21278); none never does."""
    dp_noise_multiplier: PositiveFloat | None = None
    """σ of DP-SGD (arXiv 1607.00133), by Opacus: noise in units of dp_max_grad_norm; none is ordinary training."""
    dp_max_grad_norm: PositiveFloat = 1.0
    """C of DP-SGD: each sample's gradient is scaled down to this norm, in place of max_grad_norm."""
    dp_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """δ at which DP-SGD's ε is reported; below 1 / images."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, slower."""
    mixed_precision: Precision = "no"
    """Precision of the forward and backward pass; weights and losses stay fp32. auto: bf16 where the device has it."""
    channels_last: bool = False
    """Memory format of weights and images."""
    compile: bool = False
    """Run the model through torch.compile."""
    fsdp: bool = False
    """Where several processes share a proxy, each holds a part of its weights and moments (FSDP2), not all of them."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of log.jsonl."""
    checkpointing_steps: PositiveInt = 500
    """Steps between two checkpoints."""
    checkpoints_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least 2, so that one can be lost."""
    snapshots: NonNegativeInt = 0
    """Models kept along the way in snapshots/, evenly spaced, at the end of a round; the last is the finished one."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the log there."""


class MonitorConfig(Section):
    """Looking at samples while training. Nothing of it changes what is learned."""

    every: NonNegativeInt = 0
    """Rounds between two looks; 0 never looks. Without an ensemble a round is ensemble.local_epochs all the same."""
    samples: PositiveInt = 64
    """Images that a look samples, always from the same noise; with text, of the captions of so many images."""
    steps: PositiveInt = 25
    """DDIM steps of a look (Euler's, of flow matching models); must divide model.num_train_timesteps."""
    guidance_scale: PositiveFloat = 7.5
    """With text: of classifier-free guidance; 1 and less is none, at half the cost."""
    max_overhead: Annotated[float, Field(gt=0)] = 0.05
    """Looks are rarer than every says where they would take more than this share of training's work, or of its time."""
    stop_when: str | None = None
    """Stop at a look where this holds, such as mq@0.5 > 0.01; none never stops."""
    keep_best: Literal["none", "pareto"] = "none"
    """pareto finishes with the weights of the look of least Fréchet distance among those not beyond stop_when."""
    holdout: str | None = None
    """Images that are not trained on, which the Fréchet distance is measured to; NAME[:SPLIT], folder or .npz."""

    @model_validator(mode="after")
    def _rules_fit_together(self) -> "MonitorConfig":
        if self.stop_when is not None:
            try:
                parse_stop_rule(self.stop_when)
            except ValueError as error:
                raise ValueError(f"stop_when: {error}") from None
        if self.every == 0 and (self.stop_when is not None or self.keep_best != "none"):
            raise ValueError("stop_when and keep_best need looks: set every to 1 or more")
        if self.keep_best == "pareto" and (self.stop_when is None or self.holdout is None):
            raise ValueError("keep_best: pareto needs stop_when, which says what is too much, and holdout")
        return self
