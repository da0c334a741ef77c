"""One optimizer step of the live proxy: batch → per-sample loss → gate → step."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from unrote.config import Config
from unrote.data.augmentations import coin, mirror
from unrote.errors import InputError
from unrote.method.augment import augmentation_strength
from unrote.method.bank import LossBank
from unrote.method.gate import Decision, LossGate, gated_sum
from unrote.method.ledger import Ledger
from unrote.models.ambient import Ambient
from unrote.models.denoiser import DenoisingLoss
from unrote.models.task import Condition, Task, rows_of
from unrote.seeding import derive_seed, generator
from unrote.tensorfiles import own_part, whole
from unrote.text.mitigations import prediction_norm
from unrote.training.ema import EMA
from unrote.training.heap import keep_freed_memory
from unrote.training.privacy import PrivateGradients
from unrote.training.sharding import hold, load_in_parts
from unrote.training.team import Team
from unrote.training.timesteps import timestep_weights


@dataclass
class Batch:
    """What a step draws before it looks at the model."""

    indices: Tensor
    """int64 [B], positions in the data set."""
    clean: Tensor
    """float32 [B, C, H, W], without noise, as the denoiser takes it."""
    condition: Condition
    """What else the denoiser is told."""
    augmented: Tensor
    """bool [B], whether ``clean`` is an augmented view."""
    noise: Tensor
    """What the denoiser is to find."""
    timesteps: Tensor
    """[B], int64 or, of flow matching, continuous."""
    shown: Tensor
    """The noise that is in what the denoiser sees; ``noise`` itself but for some baselines."""
    fixed: Tensor | None
    """The images' own noise, see :class:`unrote.models.ambient.Ambient`."""

    @property
    def whole_timesteps(self) -> Tensor:
        """int64 [B]; a continuous timestep belongs to the whole one below it, and so to its bin of the bank."""
        return self.timesteps.long()

    def at(self, rows: Tensor | slice) -> "Batch":
        """The samples at ``rows``."""
        condition = rows_of(self.condition, rows)
        return Batch(
            self.indices[rows], self.clean[rows], condition, self.augmented[rows], self.noise[rows],
            self.timesteps[rows], self.shown[rows], None if self.fixed is None else self.fixed[rows],
        )  # fmt: skip

    def parts(self, count: int) -> "list[Batch]":
        """The batch in ``count`` parts, or fewer if it has fewer samples; none if it has none."""
        samples = len(self.indices)
        if count == 1 or not samples:
            return [self][:samples]
        rows = torch.arange(samples, device=self.clean.device)
        return [self.at(part) for part in rows.tensor_split(min(count, samples))]


@dataclass
class Retry:
    """How often the live proxy has diverged and begun its turn again: then it draws otherwise."""

    count: int = 0

    @property
    def salt(self) -> tuple[int, ...]:
        """What seeds are made of besides proxy and step; nothing at first."""
        return (self.count,) if self.count else ()

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.count = state["count"]


class TrainingStep:
    """Everything a step needs, around the one model in which the proxies take turns.

    Args:
        config: of the run.
        task: the model and what a batch of it is made of.
        num_samples: N.
        device: where to compute.
        proxy_steps: how many steps the longest-running proxy takes, for the learning-rate schedule.
        reference: int64 [M], images that are never trained on; if there are any, the bank holds their losses.
        team: the ranks that train the same proxy; by default this one alone.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        num_samples: int,
        device: torch.device,
        proxy_steps: int,
        reference: Tensor | None = None,
        team: Team | None = None,
    ) -> None:
        training, bank = config.training, config.gate.bank
        self.config, self.task, self.device = config, task, device
        self.retry, self.team = Retry(), team or Team()
        hold(task, self.team, device)
        self.model, self.loss = task.trained, task.loss
        self._reference = torch.empty(0, dtype=torch.int64) if reference is None else reference
        try:
            averages = LossBank(self.loss.num_timesteps, **bank.model_dump(), device=device)
        except ValueError as error:  # it begins with the name of the setting
            raise InputError(f"gate.bank.{error}") from None
        self.gate = LossGate(
            self.loss.num_timesteps,
            config.skip_ratio,
            bank=averages,
            ledger=Ledger(num_samples, device),
            update_bank=len(self._reference) == 0,
            **config.gate.rule,
        )
        self._ambient: Ambient | None = None
        if training.ambient_timestep is not None:
            assert isinstance(self.loss, DenoisingLoss)  # the configuration refuses it with a pretrained model
            self._ambient = Ambient(self.loss, training.ambient_timestep, config.seed)
        weights = timestep_weights(training, self.loss.num_timesteps)
        self._timestep_weights = None if weights is None else weights.to(device)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = EMA(self.model, training.ema_decay) if training.use_ema else None
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        self.optimizer = kind(
            self.model.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            weight_decay=training.adam_weight_decay,
            eps=training.adam_epsilon,
            fused=device.type in ("cpu", "cuda"),
        )
        if self.team.mesh is not None:
            load_in_parts(self.optimizer)
        self.lr_scheduler = get_scheduler(
            training.lr_scheduler,
            self.optimizer,
            num_warmup_steps=training.lr_warmup_steps,
            num_training_steps=proxy_steps,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16")
        if training.gradient_checkpointing:
            task.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self._private = None if training.dp_noise_multiplier is None else PrivateGradients(self.model, training)
        self._forward: Any = torch.compile(task.denoiser) if training.compile else task.denoiser
        # To seed everything is to ask every kind of accelerator, which takes longer than the gate does.
        self._seed: Any = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        # Of weights in parts, what one block frees the next one can't use.
        if device.type == "cpu" and self.team.mesh is None:
            keep_freed_memory()

    def __call__(self, indices: Tensor, *, proxy: int, step: int) -> tuple[Tensor, Tensor]:
        """Train on the samples ``indices`` (int64 [B], on the CPU).

        Everything random is a function of (seed, proxy, step), so a resumed run draws what an undisturbed one would. A
        team draws the whole batch in each member, which then computes its part; only dropout depends on the parts.

        Returns:
            The per-sample losses, float32 [B], and which were skipped, bool [B]; of the whole batch.
        """
        # It walks through all modules, so not at every step.
        if not self.task.denoiser.training:
            self.task.denoiser.train()
        draw = generator(self.config.seed, "batch", proxy, step, *self.retry.salt, device=self.device)
        self._seed(derive_seed(self.config.seed, "dropout", proxy, step, *self.retry.salt, *self.team.salt))
        mirrored = coin(len(indices), draw) if self.config.data.random_flip else None
        batch = self._draw(indices, mirrored, self.task.condition(indices, proxy, step), draw)
        if len(self._reference):
            self._watch_reference(max(1, round(self.config.gate.reference * len(indices))), proxy, step)
        lookahead = self.config.augmentation.enabled and self.config.augmentation.ratio_source == "lookahead"
        if lookahead:
            losses, decision = self._train_on_kept(batch, indices, mirrored, draw)
        else:
            losses, decision = self._train_gated(batch)
        if self._private is not None:
            self._private.finish(len(indices), self.config.seed, proxy, step, add_up=self.team.add_up)
        # The team agrees, since all have recorded the whole batch.
        if self.gate.any_kept():
            if self._private is None:
                self.team.add_up(self._parameters)
            self._update(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        return losses, decision.skipped

    def _draw(self, indices: Tensor, mirrored: Tensor | None, condition: Condition, draw: torch.Generator) -> Batch:
        taa = self.config.augmentation
        clean = self.task.clean(indices, mirrored, draw)
        moved = indices.to(self.device, non_blocking=True)
        augmented = torch.zeros(len(moved), dtype=torch.bool, device=self.device)
        if taa.enabled and taa.ratio_source == "ledger":
            ledger = self.gate.ledger
            assert ledger is not None
            strength, visits = self._strength(ledger.running_ratio_of(moved)), ledger.visits[moved]
            clean, condition = self.task.augmented(clean, condition, indices, mirrored, visits, strength, draw)
            augmented = strength > 0
        return Batch(moved, clean, condition, augmented, *self._noise_for(clean, indices, mirrored, draw))

    def _watch_reference(self, count: int, proxy: int, step: int) -> None:
        """Fold the losses of ``count`` images that are never trained on into the bank."""
        draw = generator(self.config.seed, "reference", proxy, step, device=self.device)
        chosen = torch.randint(
            len(self._reference), (count,), generator=generator(self.config.seed, "chosen", proxy, step)
        )
        indices = self._reference[chosen]
        mirrored = coin(count, draw) if self.config.data.random_flip else None
        clean, condition = self.task.clean(indices, mirrored, draw), self.task.condition(indices, proxy, step)
        untouched = torch.zeros(count, dtype=torch.bool, device=self.device)
        noised = self._noise_for(clean, indices, mirrored, draw)
        batch = Batch(indices.to(self.device), clean, condition, untouched, *noised)
        with torch.no_grad():
            passed = [
                (self._errors(self._predict(part, part.condition), part), own) for part, own in self._passes(batch, 1)
            ]
        own = [errors for errors, counts in passed if counts]
        (losses,) = self.team.whole(count, torch.cat([torch.empty(0, device=self.device), *own]))
        self.gate.bank.update(batch.whole_timesteps, losses)

    def _noise_for(
        self, clean: Tensor, indices: Tensor, mirrored: Tensor | None, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The last four fields of a batch."""
        noise = torch.randn(clean.shape, generator=draw, device=self.device)
        timesteps = self._timesteps(len(clean), draw)
        if offset := self.config.training.noise_offset:
            noise += offset * torch.randn((*clean.shape[:2], 1, 1), generator=draw, device=self.device)
        shown, fixed = noise, None
        if self._ambient is not None:
            fixed = self._ambient.fixed_noise(indices, clean.shape, self.device)
            # A mirrored image is to have its noise mirrored, or two noisy versions of it would be seen.
            fixed = fixed if mirrored is None else mirror(fixed, mirrored)
            shown = self._ambient.noise(noise, fixed, timesteps)
        if std := self.config.training.input_perturbation:
            shown = shown + std * torch.randn(clean.shape, generator=draw, device=self.device)
        return noise, timesteps, shown, fixed

    def _timesteps(self, count: int, draw: torch.Generator) -> Tensor:
        if self._timestep_weights is None:
            return self.loss.draw(count, draw)
        return torch.multinomial(self._timestep_weights, count, replacement=True, generator=draw)

    def _strength(self, ratio: Tensor) -> Tensor:
        """TAA: how strongly each sample is augmented, by how near its ratio is to the threshold."""
        taa = self.config.augmentation
        # λ of the settings, so that there is one without a gate too; or as it has adapted.
        skip_ratio = self.config.gate.skip_ratio if self.gate.adaptive is None else self.gate.skip_ratio
        return augmentation_strength(ratio, policy=taa.policy, skip_ratio=skip_ratio, beta=taa.beta)

    def _predict(self, batch: Batch, condition: Condition) -> Tensor:
        return self.loss.predict(self._forward, batch.clean, batch.shown, batch.timesteps, condition)

    def _errors(self, prediction: Tensor, batch: Batch) -> Tensor:
        if self._ambient is None or batch.fixed is None:
            return self.loss.errors(prediction, batch.clean, batch.noise, batch.timesteps)
        return self._ambient.errors(prediction, batch.clean, batch.noise, batch.fixed, batch.timesteps)

    def _judge(self, batch: Batch) -> tuple[Tensor, Decision]:
        """The loss of each sample, and whether it is kept: by the gate, and by what the text changes."""
        prediction = self._predict(batch, batch.condition)
        loss = self._errors(prediction, batch)
        decision = self.gate.decide(loss, batch.whole_timesteps, batch.indices)
        if (limit := self.config.text.max_prediction_norm) is not None:
            with torch.no_grad():
                free = self._predict(batch, self.task.unsteered(batch.condition))
            # What is not a number is kept, so that a diverging model is seen.
            decision = Decision(decision.weight * ~(prediction_norm(prediction, free) >= limit), decision.ratio)
        return loss, decision

    def _weighted(self, loss: Tensor, timesteps: Tensor) -> Tensor:
        """What is minimized; the gate has seen the loss without weights."""
        gamma = self.config.training.min_snr_gamma
        return loss if gamma is None else loss * self.loss.min_snr_weights(timesteps, gamma)

    def _parts(self, batch: Batch, count: int) -> list[Batch]:
        """What this rank computes of a batch, in ``count`` parts; none where there are more ranks than samples."""
        return batch.at(self.team.span(len(batch.indices))).parts(count)

    def _passes(self, batch: Batch, count: int) -> list[tuple[Batch, bool]]:
        """The parts of :meth:`_parts`, and whether they count.

        Where members must compute at once, whoever has fewer parts than others first computes one that does not.
        """
        parts = self._parts(batch, count)
        others = self.team.passes(len(batch.indices), count) - len(parts)
        return [(batch.at(slice(0, 1)), False)] * others + [(part, True) for part in parts]

    def _whole(self, count: int, judged: list[tuple[Tensor, Decision]]) -> tuple[Tensor, Decision]:
        """Losses and decisions of the whole batch of ``count``, from those of this rank's parts."""
        nothing = torch.empty(0, device=self.device)
        columns = zip((nothing, nothing, nothing), *((loss, *decision) for loss, decision in judged), strict=True)
        loss, weight, ratio = self.team.whole(count, *(torch.cat(column) for column in columns))
        return loss, Decision(weight, ratio)

    def _train_gated(self, batch: Batch) -> tuple[Tensor, Decision]:
        """AGC: judge and train in one forward pass; skipped samples get no gradient."""
        count, passes = len(batch.indices), self._passes(batch, self.config.training.gradient_accumulation_steps)
        judged: list[tuple[Tensor, Decision]] = []

        def record() -> tuple[Tensor, Decision]:
            losses, whole = self._whole(count, judged)
            self.gate.record(whole, losses, batch.whole_timesteps, batch.indices, batch.augmented & whole.keep)
            return losses, whole

        for number, (part, counts) in enumerate(passes, 1):
            loss, decision = self._judge(part)
            judged += [(loss.detach(), decision)] if counts else []
            if number == len(passes):
                # Before the last backward pass, so that the wait for what was kept is over when that pass is queued.
                result = record()
            # The batch's number of kept samples is known only after its last part: then gradients are rescaled below.
            divisor = self.gate.num_kept.clamp(min=1) if len(passes) == 1 else count
            weighted = self._weighted(loss, part.timesteps)
            total = gated_sum(weighted, decision.weight) / divisor if self._private is None else weighted.sum()
            self._backward(total, counts)
            if self._private is not None:
                self._private.add()
        if self._private is None and len(passes) > 1:
            gradients = [own_part(p.grad) for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(gradients, count / self.gate.num_kept.clamp(min=1))
        return result if passes else record()

    def _backward(self, total: Tensor, counts: bool) -> None:
        factor = self.team.scale * counts
        self.scaler.scale(total if factor == 1 else total * factor).backward()  # type: ignore[no-untyped-call]

    def _train_on_kept(
        self, batch: Batch, indices: Tensor, mirrored: Tensor | None, draw: torch.Generator
    ) -> tuple[Tensor, Decision]:
        """TAA by look-ahead: judge the clean views without gradient, then train on what is kept.

        Samples near the threshold are trained on an augmented view with fresh timestep and noise.
        """
        accumulation = self.config.training.gradient_accumulation_steps
        with torch.no_grad():
            judged = [(self._judge(part), own) for part, own in self._passes(batch, accumulation)]
        loss, decision = self._whole(len(indices), [found for found, counts in judged if counts])
        strength = self._strength(decision.ratio)
        assert self.gate.ledger is not None
        seen = (batch.clean, batch.condition, indices, mirrored, self.gate.ledger.visits[batch.indices])
        clean, condition = self.task.augmented(*seen, strength, draw)
        augmented = (strength > 0) & decision.keep
        noise, timesteps, shown, fixed = self._noise_for(clean, indices, mirrored, draw)
        fresh = augmented.view(-1, 1, 1, 1)
        view = Batch(
            batch.indices,
            torch.where(fresh, clean, batch.clean),
            condition,
            augmented,
            torch.where(fresh, noise, batch.noise),
            torch.where(augmented, timesteps, batch.timesteps),
            torch.where(fresh, shown, batch.shown),
            fixed,
        )
        self.gate.record(decision, loss, batch.whole_timesteps, batch.indices, augmented)
        # One synchronisation a step buys the whole cost of the skipped samples.
        kept = decision.keep.nonzero().flatten()
        passes, weights = self._passes(view.at(kept), accumulation), decision.weight[kept]
        number = sum(counts for _, counts in passes)
        own = weights[self.team.span(len(kept))].tensor_split(max(1, number))[:number]
        for (part, counts), weight in zip(passes, (*(weights[:1],) * (len(passes) - number), *own), strict=True):
            losses = self._errors(self._predict(part, part.condition), part)
            total = (self._weighted(losses, part.timesteps) * weight).sum() / self.gate.num_kept.clamp(min=1)
            self._backward(total, counts)
        return loss, decision

    def _update(self, step: int) -> None:
        norm = self.config.training.max_grad_norm
        if norm and self._private is None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            # To multiply all gradients by 1 takes as long as to clip them; to look first is a wait on other devices.
            if self.device.type != "cpu" or not whole(total) + 1e-6 <= norm:
                nn.utils.clip_grads_with_norm_(parameters, norm, total)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(step)
