"""One optimizer step of the live proxy: batch → per-sample loss → gate → step."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from unrote.config import Config
from unrote.data.augmentations import augment, random_flip
from unrote.data.store import ImageStore
from unrote.method.augment import augmentation_strength
from unrote.method.bank import LossBank
from unrote.method.gate import Decision, LossGate, gated_sum
from unrote.method.ledger import Ledger
from unrote.models.denoiser import DenoisingLoss, build_schedule
from unrote.seeding import derive_seed, generator
from unrote.training.ema import EMA
from unrote.training.heap import keep_freed_memory

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Batch:
    """What a step draws before it looks at the model."""

    indices: Tensor
    """int64 [B], positions in the data set."""
    clean: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    labels: Tensor | None
    """int64 [B]."""
    augmented: Tensor
    """bool [B], whether ``clean`` is an augmented view."""
    noise: Tensor
    timesteps: Tensor

    def at(self, rows: Tensor) -> "Batch":
        """The samples at ``rows``."""
        labels = None if self.labels is None else self.labels[rows]
        return Batch(
            self.indices[rows], self.clean[rows], labels, self.augmented[rows], self.noise[rows], self.timesteps[rows]
        )

    def parts(self, count: int) -> "list[Batch]":
        """The batch in ``count`` parts, or fewer if it has fewer samples."""
        if count == 1:
            return [self]
        rows = torch.arange(len(self.indices), device=self.clean.device)
        return [self.at(part) for part in rows.tensor_split(min(count, len(rows)))]


class TrainingStep:
    """Everything a step needs, around the one model in which the proxies take turns.

    Args:
        config: of the run.
        images: the training set.
        model: the denoiser, on ``device``.
        device: where to compute.
        proxy_steps: how many steps the longest-running proxy takes, for the learning-rate schedule.
    """

    def __init__(
        self, config: Config, images: ImageStore, model: nn.Module, device: torch.device, proxy_steps: int
    ) -> None:
        training, bank = config.training, config.gate.bank
        self.config, self.images, self.model, self.device = config, images, model, device
        self.labels = torch.from_numpy(images.labels.copy()) if config.model.class_conditional else None  # type: ignore[union-attr]
        self.loss = DenoisingLoss(build_schedule(config.model), device, DTYPES[training.mixed_precision])
        self.gate = LossGate(
            config.model.num_train_timesteps,
            config.skip_ratio,
            bank=LossBank(config.model.num_train_timesteps, **bank.model_dump(), device=device),
            ledger=Ledger(len(images), device),
        )
        self.ema = EMA(model, training.ema_decay) if training.use_ema else None
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        self.optimizer = kind(
            model.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            weight_decay=training.adam_weight_decay,
            eps=training.adam_epsilon,
            fused=device.type in ("cpu", "cuda"),
        )
        self.lr_scheduler = get_scheduler(
            training.lr_scheduler,
            self.optimizer,
            num_warmup_steps=training.lr_warmup_steps,
            num_training_steps=proxy_steps,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16")
        self._forward: Any = torch.compile(model) if training.compile else model
        self._memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        # To seed everything is to ask every kind of accelerator, which takes longer than the gate does.
        self._seed: Any = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        if device.type == "cpu":
            keep_freed_memory()

    def __call__(self, indices: Tensor, *, proxy: int, step: int) -> tuple[Tensor, Tensor]:
        """Train on the samples ``indices`` (int64 [B], on the CPU).

        Everything random is a function of (seed, proxy, step), so a resumed run draws what an undisturbed one would.

        Returns:
            The per-sample losses, float32 [B], and which were skipped, bool [B].
        """
        # It walks through all modules, so not at every step.
        if not self.model.training:
            self.model.train()
        draw = generator(self.config.seed, "batch", proxy, step, device=self.device)
        self._seed(derive_seed(self.config.seed, "dropout", proxy, step))
        batch = self._draw(indices, draw)
        lookahead = self.config.augmentation.enabled and self.config.augmentation.ratio_source == "lookahead"
        losses, decision = self._train_on_kept(batch, draw) if lookahead else self._train_gated(batch)
        if self.gate.any_kept():
            self._update(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        return losses, ~decision.keep

    def _draw(self, indices: Tensor, draw: torch.Generator) -> Batch:
        config = self.config
        pixels = torch.from_numpy(self.images.images[indices.numpy()])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        clean = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        clean = clean.to(torch.float32, memory_format=self._memory_format) / 127.5 - 1
        labels = None if self.labels is None else self.labels[indices].to(self.device, non_blocking=True)
        indices = indices.to(self.device, non_blocking=True)
        if config.data.random_flip:
            clean = random_flip(clean, draw)
        augmented = torch.zeros(len(indices), dtype=torch.bool, device=self.device)
        if config.augmentation.enabled and config.augmentation.ratio_source == "ledger":
            assert self.gate.ledger is not None
            clean, augmented = self._augment(clean, self.gate.ledger.running_ratio_of(indices), draw)
        return Batch(indices, clean, labels, augmented, *self._noise_for(clean, draw))

    def _noise_for(self, clean: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(clean.shape, generator=draw, device=self.device)
        steps = self.config.model.num_train_timesteps
        return noise, torch.randint(steps, (len(clean),), generator=draw, device=self.device)

    def _augment(self, clean: Tensor, ratio: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """TAA: an augmented view of the samples whose ratio is near the threshold, and which they are."""
        taa = self.config.augmentation
        strength = augmentation_strength(
            ratio, policy=taa.policy, skip_ratio=self.config.gate.skip_ratio, beta=taa.beta
        )
        # Picking pixels changes how they lie in memory, and convolutions are slower in another layout than the weights.
        view = augment(clean, strength, draw, **taa.ops.model_dump()).contiguous(memory_format=self._memory_format)
        return view, strength > 0

    def _losses(self, batch: Batch) -> Tensor:
        return self.loss(self._forward, batch.clean, batch.noise, batch.timesteps, batch.labels)

    def _train_gated(self, batch: Batch) -> tuple[Tensor, Decision]:
        """AGC: judge and train in one forward pass; skipped samples get no gradient."""
        parts = batch.parts(self.config.training.gradient_accumulation_steps)
        losses: list[Tensor] = []
        decisions: list[Decision] = []
        for part in parts:
            loss = self._losses(part)
            decision = self.gate.decide(loss, part.timesteps)
            losses.append(loss.detach())
            decisions.append(decision)
            if part is parts[-1]:
                # Before the last backward pass, so that the wait for what was kept is over when that pass is queued.
                whole = Decision(*(torch.cat(column) for column in zip(*decisions, strict=True)))
                augmented = batch.augmented & whole.keep
                self.gate.record(whole, torch.cat(losses), batch.timesteps, batch.indices, augmented)
            # The batch's number of kept samples is known only after its last part: then gradients are rescaled below.
            divisor = self.gate.num_kept.clamp(min=1) if len(parts) == 1 else len(batch.indices)
            self.scaler.scale(gated_sum(loss, decision.keep) / divisor).backward()  # type: ignore[no-untyped-call]
        if len(parts) > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, len(batch.indices) / self.gate.num_kept.clamp(min=1))
        return torch.cat(losses), whole

    def _train_on_kept(self, batch: Batch, draw: torch.Generator) -> tuple[Tensor, Decision]:
        """TAA by look-ahead: judge the clean views without gradient, then train on what is kept.

        Samples near the threshold are trained on an augmented view with fresh timestep and noise.
        """
        accumulation = self.config.training.gradient_accumulation_steps
        with torch.no_grad():
            loss = torch.cat([self._losses(part) for part in batch.parts(accumulation)])
        decision = self.gate.decide(loss, batch.timesteps)
        clean, augmented = self._augment(batch.clean, decision.ratio, draw)
        augmented &= decision.keep
        noise, timesteps = self._noise_for(clean, draw)
        fresh = augmented.view(-1, 1, 1, 1)
        view = Batch(
            batch.indices,
            torch.where(fresh, clean, batch.clean),
            batch.labels,
            augmented,
            torch.where(fresh, noise, batch.noise),
            torch.where(augmented, timesteps, batch.timesteps),
        )
        self.gate.record(decision, loss, batch.timesteps, batch.indices, augmented)
        # One synchronisation a step buys the whole cost of the skipped samples.
        kept = decision.keep.nonzero().flatten()
        if len(kept):
            for part in view.at(kept).parts(accumulation):
                self.scaler.scale(self._losses(part).sum() / len(kept)).backward()  # type: ignore[no-untyped-call]
        return loss, decision

    def _update(self, step: int) -> None:
        if norm := self.config.training.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(step)
