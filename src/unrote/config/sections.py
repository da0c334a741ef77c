"""What a training run can be told: every field is documented where it is declared."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from unrote.config.base import Decay, Fraction, Section
from unrote.config.gate import GateConfig
from unrote.config.older import CONFIG_VERSION
from unrote.config.training import MonitorConfig, TrainingConfig

PARTS = ("ensemble", "gate", "redistribution", "augmentation")
"""IET, AGC, MSR, TAA."""

METHODS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "agc": ("gate",),
    "iet": ("ensemble",),
    "iet-agc": ("ensemble", "gate"),
    "iet-agc+": ("ensemble", "gate", "redistribution", "augmentation"),
    "gap": ("gate",),
    "gap+": ("gate", "augmentation"),
}
"""Which parts each method turns on."""

_UNSEEN = {"reference": 0.125, "signal": "history", "bank": {"bins": 20, "decay": 0.95, "warm_start": True}}

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "gap": {"gate": {"skip_ratio": 0.8, **_UNSEEN}},
    "gap+": {
        "gate": {"skip_ratio": 0.7, **_UNSEEN},
        "augmentation": {"labels": True, "beta": 1.3, "ops": {"shift": 0.125}},
    },
}
"""What a method sets besides: over a preset's values (but for ``augmentation.ops``), under those of a file and of
single settings."""


class DataConfig(Section):
    """What is trained on."""

    source: str = "emoji"
    """Image folder, .npz file, or NAME[:SPLIT] of a named set."""
    resolution: PositiveInt | None = None
    """Height and width in pixels; none takes the images' own size."""
    center_crop: bool = True
    """Crop the centre square after resizing the shorter side; false stretches to a square."""
    channels: Literal[1, 3] = 3
    """1 trains on grey images, 3 on RGB."""
    limit: PositiveInt | None = None
    """Train on this many images only, a fixed random choice."""
    include: str | None = None
    """File with the names of the images to train on, one a line, such as the keep.txt of a scan; none takes all."""
    random_flip: bool = False
    """Show each image mirrored half of the time."""
    cache_latents: bool = True
    """Encode images once and keep the latents on disk; false encodes them at every step. For a pretrained model."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), by peft."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveFloat | None = None
    """Adapters are scaled by alpha / rank; none is the rank, which scales by 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before an adapter."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    """Modules that get an adapter, by the ends of their names; add_… are how transformers attend to text."""
    average: Literal["factors", "product"] = "factors"
    """How proxies are averaged: both factors on their own, or their product, cut back to the rank."""


class ModelConfig(Section):
    """The denoiser and its noise schedule: a new diffusers UNet2DModel, or a pretrained text-to-image pipeline."""

    pretrained: str | None = None
    """Folder, single file or Hub id of a text-to-image pipeline to fine-tune; its architecture and schedule apply."""
    train: Literal["full", "lora"] = "full"
    """Of a pretrained pipeline: all weights of the denoiser, or low-rank adapters beside them."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""

    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 64)
    """Channels at each resolution; each level but the last halves it."""
    layers_per_block: PositiveInt = 1
    """Residual blocks per level."""
    attention_levels: tuple[NonNegativeInt, ...] = ()
    """Levels (0 = full resolution) that have self-attention."""
    attention_head_dim: PositiveInt = 8
    """Channels per attention head."""
    dropout: Fraction = 0.0
    """Dropout in the residual blocks."""
    class_conditional: bool = False
    """Condition on the images' labels."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the model predicts: the noise, the velocity, or the clean image."""
    num_train_timesteps: PositiveInt = 1000
    """T, the number of noise levels."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """How the noise grows; linear is β from 1e-4 to 0.02 as in the papers."""


class TextConfig(Section):
    """Which text a pretrained model sees with an image; mitigations of Somepalli et al. 2023 and Wen et al. 2024."""

    caption: Literal["first", "random"] = "first"
    """Of several captions of an image: the first, or one drawn anew at each visit."""
    dropout: Fraction = 0.0
    """Chance of the empty text, which guidance needs."""
    replace_caption: Fraction = 0.0
    """Chance that the caption is replaced by random words."""
    replace_tokens: Fraction = 0.0
    """Chance of each word to be replaced by a random one."""
    add_tokens: NonNegativeInt = 0
    """How many random tokens are put in at random places."""
    repeat_words: Fraction = 0.0
    """Chance that two words of the caption are repeated at random places."""
    embedding_noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise that is added to the text embeddings."""
    max_prediction_norm: PositiveFloat | None = None
    """Skip samples whose text changes the prediction by more than this L2 norm; none skips none so."""

    @property
    def varies(self) -> bool:
        """Whether there are texts that are made at a visit, so that they can't be embedded before."""
        return bool(self.replace_caption or self.replace_tokens or self.add_tokens or self.repeat_words)


class EnsembleConfig(Section):
    """IET, iterative ensemble training (arXiv 2407.15328 §3.1)."""

    enabled: bool = False
    """Train one proxy per shard and average them; false is one shard."""
    num_shards: PositiveInt = 4
    """K, the number of shards and proxies."""
    local_epochs: PositiveFloat = 4.0
    """E, how often a proxy sees its shard between two averagings."""
    split: Literal["iid", "stratified", "contiguous"] = "iid"
    """How shards are drawn: shuffled, balanced over labels, or in order."""
    optimizer_state: Literal["per-proxy", "reset", "average"] = "per-proxy"
    """What becomes of the optimizer's moments when the weights are averaged."""
    outer_learning_rate: PositiveFloat = 1.0
    """How far a round moves the weights towards the proxies' average (DiLoCo, arXiv 2311.08105); 1 is there."""
    outer_momentum: Decay = 0.0
    """Nesterov momentum of these moves from round to round; DiLoCo has 0.9, with outer_learning_rate 0.7."""

    @property
    def outer(self) -> tuple[float, float] | None:
        """Learning rate and momentum of the outer optimizer; None where it is plain averaging."""
        plain = self.outer_learning_rate == 1 and self.outer_momentum == 0
        return None if plain else (self.outer_learning_rate, self.outer_momentum)


class RedistributionConfig(Section):
    """MSR, memory-samples redistribution (arXiv 2502.09434)."""

    enabled: bool = False
    """Move the most-skipped samples to the next shard in the middle of a round."""
    fraction: Fraction = 0.25
    """ρ, the share of a shard that may move."""
    topology: Literal["ring", "shuffled-ring"] = "ring"
    """Which shard is next."""
    every: PositiveInt = 1
    """Rounds from one redistribution to the next."""


class OpsConfig(Section):
    """What an augmentation may do at full strength."""

    flip: bool = True
    """Mirror, half of the time. Wrong for digits and text."""
    shift: Fraction = 0.0625
    """Largest shift, as a share of the image's side; whole pixels, reflected at the border."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of size."""
    brightness: Fraction = 0.0
    """Largest change of brightness, as a share of the range."""
    contrast: Fraction = 0.0
    """Largest relative change of contrast."""
    saturation: Fraction = 0.0
    """Largest relative change of saturation."""
    cutout: Fraction = 0.0
    """Side of the square that is greyed out, as a share of the image's side."""


class AugmentationConfig(Section):
    """TAA, threshold-aware augmentation (arXiv 2502.09434)."""

    enabled: bool = False
    """Train on an augmented view of samples whose loss ratio is near the threshold."""
    policy: Literal["band", "proximity", "all"] = "band"
    """band augments below β·λ; proximity the more, the nearer to λ; all augments every sample, whatever its ratio."""
    labels: bool = False
    """Tell the denoiser what was done to a sample, so that it does not show when sampling (arXiv 2206.00364 §5)."""
    ratio_source: Literal["ledger", "lookahead"] = "ledger"
    """Take the loss ratio from the sample's earlier visits, or from an extra forward pass."""
    beta: Annotated[float, Field(ge=1)] = 1.5
    """β, the upper end of the band in units of λ."""
    cache_budget: NonNegativeFloat = 0.0
    """GiB on disk for encoded views, of a pretrained model: if they fit, they are encoded once; else at each visit."""
    cached_views: PositiveInt = 8
    """V, views of each image that are encoded once; its visits see them in turn."""
    ops: OpsConfig = OpsConfig()
    """What an augmentation may do."""


class Config(Section):
    """A whole training run."""

    method: str = "gap+"
    """standard, agc, iet, iet-agc, iet-agc+, gap or gap+: which of four parts are on, unless they say otherwise."""
    preset: str = "tiny"
    """Where the values that you did not set came from."""
    seed: NonNegativeInt = 0
    """Of everything random."""
    data: DataConfig = DataConfig()
    """What is trained on."""
    model: ModelConfig = ModelConfig()
    """The denoiser."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""
    text: TextConfig = TextConfig()
    """What the model reads."""
    ensemble: EnsembleConfig = EnsembleConfig()
    """IET."""
    gate: GateConfig = GateConfig()
    """AGC."""
    redistribution: RedistributionConfig = RedistributionConfig()
    """MSR."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """TAA."""
    monitor: MonitorConfig = MonitorConfig()
    """Looks at samples along the way."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Config":
        levels = len(self.model.block_out_channels)
        if any(level >= levels for level in self.model.attention_levels):
            raise ValueError(f"model.attention_levels: there are {levels} levels, 0 to {levels - 1}")
        if any(channels % 32 for channels in self.model.block_out_channels):
            raise ValueError("model.block_out_channels: each must be a multiple of 32")
        if self.model.attention_levels:
            # The block in the middle attends too, at the lowest resolution.
            attending = {self.model.block_out_channels[level] for level in (*self.model.attention_levels, -1)}
            if any(channels % self.model.attention_head_dim for channels in attending):
                raise ValueError(f"model.attention_head_dim: must divide the attending channels, {sorted(attending)}")
        bins, timesteps = self.gate.bank.bins, self.model.num_train_timesteps
        if bins is not None and bins > timesteps:
            raise ValueError(f"gate.bank.bins: {bins} bins for {timesteps} timesteps; use at most {timesteps}")
        if self.gate.timesteps is not None and self.gate.timesteps[1] >= timesteps:
            raise ValueError(f"gate.timesteps: {self.gate.timesteps[1]} is beyond the last timestep, {timesteps - 1}")
        self._check_noise(timesteps)
        self._check_privacy()
        self._check_fsdp()
        if self.redistribution.enabled and not (self.ensemble.enabled and self.ensemble.num_shards > 1):
            raise ValueError(
                "redistribution.enabled moves samples between shards: enable ensemble, with num_shards > 1"
            )
        if self.model.train == "lora" and self.model.lora.average == "product" and self.ensemble.outer:
            raise ValueError(
                "ensemble.outer_learning_rate and outer_momentum move factors: use model.lora.average=factors"
            )
        if self.model.train == "lora" and self.model.pretrained is None:
            raise ValueError("model.train: lora needs a model to adapt; set model.pretrained")
        if self.augmentation.enabled and self.augmentation.labels and self.model.pretrained is not None:
            raise ValueError("augmentation.labels: a pretrained model can't be told; set augmentation.labels=false")
        own = self.model.pretrained is None
        if self.monitor.every and own and self.model.num_train_timesteps % self.monitor.steps:
            raise ValueError(f"monitor.steps: must divide model.num_train_timesteps, {self.model.num_train_timesteps}")
        if self.redistribution.enabled and not self.gate.enabled:
            raise ValueError("redistribution.enabled goes by skips: enable gate too")
        return self

    def _check_privacy(self) -> None:
        training = self.training
        if training.dp_noise_multiplier is None:
            return
        parts = [part for part in ("ensemble", "gate") if getattr(self, part).enabled]
        parts += ["augmentation"] if self.augmentation.enabled and self.augmentation.policy != "all" else []
        parts += ["model.pretrained"] if self.model.pretrained is not None else []
        parts += [f"training.{name}" for name in ("compile", "gradient_checkpointing") if getattr(training, name)]
        parts += ["training.mixed_precision=fp16"] if training.mixed_precision == "fp16" else []
        if parts:
            raise ValueError(f"training.dp_noise_multiplier: DP-SGD does not go with {', '.join(parts)}")

    def _check_fsdp(self) -> None:
        training = self.training
        parts = [f"training.{name}" for name in ("compile", "channels_last") if getattr(training, name)]
        parts += ["training.dp_noise_multiplier"] if training.dp_noise_multiplier is not None else []
        parts += ["ensemble.outer_learning_rate and outer_momentum"] if self.ensemble.outer else []
        if training.fsdp and parts:
            raise ValueError(f"training.fsdp: weights that are held in parts do not go with {', '.join(parts)}")

    def _check_noise(self, timesteps: int) -> None:
        training = self.training
        end = timesteps if training.timestep_bias_end is None else training.timestep_bias_end
        if not training.timestep_bias_begin < end <= timesteps:
            raise ValueError(f"training.timestep_bias_end: must lie above timestep_bias_begin, up to {timesteps}")
        if training.ambient_timestep is None:
            return
        if training.ambient_timestep >= timesteps:
            raise ValueError(f"training.ambient_timestep: must be below {timesteps}, the number of timesteps")
        if self.model.pretrained is not None or self.augmentation.enabled or training.noise_offset:
            raise ValueError(
                "training.ambient_timestep: needs each image to be one and the noise to be Gaussian: leave out "
                "model.pretrained, training.noise_offset and augmentation (augmentation.enabled=false)"
            )

    @property
    def num_shards(self) -> int:
        """K; 1 without IET."""
        return self.ensemble.num_shards if self.ensemble.enabled else 1

    @property
    def skip_ratio(self) -> float:
        """λ; 0, which never skips, without AGC."""
        return self.gate.skip_ratio if self.gate.enabled else 0.0

    def to_yaml(self) -> str:
        """The configuration as it is kept in a run folder."""
        return yaml.safe_dump({"version": CONFIG_VERSION} | self.model_dump(mode="json"), sort_keys=False)
