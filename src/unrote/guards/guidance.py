"""Anti-memorization guidance (Chen et al., CVPR 2024, arXiv 2404.00922): denoising led away from training images.

At every step the model predicts a clean image. Where that is too like a training image, the prediction is changed, of
that image alone; where nothing is too like, nothing is touched. It is done in the UNet's output, so that it works under
any diffusers pipeline and sampler: a callback at the end of a step would see the prediction too late.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.text.guarded import guidance_of

NUM_NEIGHBORS = 50
GRADIENT_SCALE = 256.0
"""A power of two, which changes nothing in float32."""
Embed = Callable[[Sequence[int]], dict[str, Any]]
"""The UNet's text arguments for the captions of training images."""


class AntiMemorizationGuidance:
    """Leads predictions away from the training images that they come too near to.

    The similarity of a predicted clean image x̂₀ is σ = 1 − ratio, with the ``l2`` neighbour ratio (its distance to the
    nearest training image over the mean distance to the 50 nearest). Guidance acts where the ratio is below
    ``threshold`` · (1 − (t/T)²): a parabola, as x̂₀ is a blur at first and says nothing yet.

    Args:
        references: the training images as the denoiser takes them (pixels in [-1, 1] or latents), float32
            [N, C, H, W], each cluster of duplicates once.
        threshold: the ratio at t = 0 below which guidance acts.
        strength: of dissimilarity guidance, the step along ∇σ; as a share of the predicted noise's norm, so that it
            does not depend on the size of images as the paper's c₃ does. 0 for none.
        despecify: c₁ of despecification guidance: the guidance scale is lowered by c₁σ, to no less than 1. 0 for none.
        deduplicate: c₂ of caption deduplication guidance: c₂σ of the direction to the nearest image's caption is taken
            away. 0 for none.
        embed: the captions of the training images, for ``deduplicate``.
        clip: x̂₀ lies in [-1, 1]: true for pixels.
        train: fingerprint of the training images, for the settings.

    Raises:
        InputError: a number is out of range, there are fewer than two references, or ``deduplicate`` has no captions.
    """

    name = "amg"

    def __init__(
        self,
        references: Tensor,
        *,
        threshold: float = 0.7,
        strength: float = 0.3,
        despecify: float = 0.0,
        deduplicate: float = 0.0,
        embed: Embed | None = None,
        clip: bool = True,
        train: str = "",
    ) -> None:
        if not (0 < threshold <= 1 and all(0 <= each < math.inf for each in (strength, despecify, deduplicate))):
            raise InputError(
                "amg: threshold lies in (0, 1]; strength, despecify and deduplicate are finite and not negative"
            )
        if len(references) < 2:
            raise InputError("amg: needs two different training images or more")
        if deduplicate and embed is None:
            raise InputError("amg: deduplicate needs the captions of the training images")
        self.threshold, self.strength = threshold, strength
        self.despecify, self.deduplicate = despecify, deduplicate
        self._references, self._embed, self._clip, self._train = references.flatten(1), embed, clip, train

    @contextmanager
    def on(self, pipeline: Any) -> Iterator[None]:
        """Guide a diffusers pipeline with a ``unet`` inside the block."""
        handle = self.attach(pipeline.unet, pipeline.scheduler, lambda: guidance_of(pipeline))
        try:
            yield
        finally:
            handle.remove()

    def attach(self, unet: Any, scheduler: Any, guidance_scale: Callable[[], float] = lambda: 1.0) -> Any:
        """Guide a UNet until the returned handle's ``remove()``.

        Args:
            unet: a UNet2DModel or UNet2DConditionModel; of a batch with classifier-free guidance, the first half is
                without text, as diffusers has it.
            scheduler: of the noise schedule, with ``alphas_cumprod`` and a prediction type.
            guidance_scale: of classifier-free guidance, asked at each step; 1 and less is none.
        """

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            prediction = output[0]
            changed = self._changed(_Step(module, args, kwargs, prediction, scheduler, guidance_scale()))
            if changed is None:
                return None
            return (changed,) if isinstance(output, tuple) else type(output)(sample=changed)

        return unet.register_forward_hook(hook, with_kwargs=True)

    def settings(self) -> dict[str, Any]:
        """What the images depend on, JSON-able."""
        names = ("threshold", "strength", "despecify", "deduplicate")
        return {"guard": self.name, **{name: getattr(self, name) for name in names}, "train_fingerprint": self._train}

    def ratio(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The neighbour ratio of images [B, C, H, W], float [B], and their nearest references, int64 [B]."""
        flat = _full(clean.flatten(1))
        references = self._references.to(flat.device, flat.dtype)
        nearest = (
            torch.cdist(flat.detach(), references).topk(min(NUM_NEIGHBORS, len(references)), largest=False).indices
        )
        distances = (flat[:, None] - references[nearest]).norm(dim=2)
        return distances[:, 0] / distances.mean(1).clamp(min=1e-12), nearest[:, 0]

    def _changed(self, step: "_Step") -> Tensor | None:
        """The UNet's output with guidance; None where nothing is too like a training image."""
        ratio, nearest = self.ratio(self._clean(step, step.x, step.combined))
        limit = self.threshold * (1 - (step.timestep / step.num_timesteps) ** 2)
        rows = torch.nonzero(ratio < limit).flatten()
        if len(rows) == 0:
            return None
        part, similarity = step.at(rows), (1 - ratio[rows]).view(-1, 1, 1, 1)
        combined = part.combined.clone()
        if step.scale > 1:
            room = step.scale - 1
            lower = (self.despecify * similarity).clamp(max=room)
            combined -= lower * (part.steered - part.free)
            if self.deduplicate and self._embed is not None:
                own = part.predict(part.x, self._embed(nearest[rows].tolist()))
                combined -= torch.minimum(self.deduplicate * similarity, room - lower) * (own - part.free)
        if self.strength:
            combined += self._away(part)
        return step.with_combined(rows, combined)

    def _away(self, part: "_Step") -> Tensor:
        """The change of the prediction that lowers σ: along √(1−ᾱ) ∇σ in terms of the noise."""
        # The pipeline may run in inference mode, whose tensors know no gradient.
        with torch.inference_mode(False), torch.enable_grad():
            x = part.x.clone().requires_grad_()
            ratio, _ = self.ratio(self._clean(part, x, part.recombined(x)))
            # Only its direction counts; in half precision so small a gradient would be rounded to nothing.
            (gradient,) = torch.autograd.grad(-GRADIENT_SCALE * ratio.sum(), x)
        gradient = _full(gradient)
        direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        noise = _full(part.as_noise(part.combined)).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return part.from_noise_change(self.strength * part.sigma * noise * direction)

    def _clean(self, step: "_Step", x: Tensor, prediction: Tensor) -> Tensor:
        clean = step.as_clean(_full(x), _full(prediction))
        return clean.clamp(-1, 1) if self._clip else clean


class _Step:
    """One call of the UNet: its input, its output, and what they mean."""

    def __init__(
        self, unet: Any, args: Any, kwargs: dict[str, Any], prediction: Tensor, scheduler: Any, scale: float
    ) -> None:
        self.unet, self.kwargs, self.scheduler, self.prediction = unet, kwargs, scheduler, prediction
        sample: Tensor = args[0] if args else kwargs["sample"]
        self.time: Any = args[1] if len(args) > 1 else kwargs["timestep"]
        self.rest = {name: value for name, value in kwargs.items() if name not in ("sample", "timestep", "return_dict")}
        self.batch = len(sample)
        self.scale = scale if scale > 1 and self.batch % 2 == 0 else 1.0
        self.free = self.steered = prediction
        self.x = sample
        if self.scale > 1:
            self.free, self.steered = prediction.chunk(2)
            self.x = sample.chunk(2)[1]
        self.combined = self.free + self.scale * (self.steered - self.free) if self.scale > 1 else prediction
        self.timestep = float(torch.as_tensor(self.time).flatten()[0])
        self.num_timesteps = len(scheduler.alphas_cumprod)
        alpha = float(scheduler.alphas_cumprod[min(round(self.timestep), self.num_timesteps - 1)])
        self.signal, self.sigma = math.sqrt(max(alpha, 1e-8)), math.sqrt(1 - alpha)
        self.kind: str = scheduler.config.prediction_type

    def at(self, rows: Tensor) -> "_Step":
        """The images ``rows``, of both halves of a guided batch."""
        both = torch.cat([rows, rows + self.batch // 2]) if self.scale > 1 else rows
        kwargs = {name: _picked(value, both, self.batch) for name, value in self.rest.items()}
        sample = torch.cat([self.x[rows]] * 2) if self.scale > 1 else self.x[rows]
        time = _picked(self.time, both, self.batch)
        return _Step(self.unet, (sample, time), kwargs, self.prediction[both], self.scheduler, self.scale)

    def predict(self, x: Tensor, text: dict[str, Any]) -> Tensor:
        """What the UNet predicts of [b, C, H, W] with other text arguments, of a guided batch."""
        second = torch.arange(self.batch // 2, self.batch)
        time, rest = (_picked(value, second, self.batch) for value in (self.time, self.rest))
        prediction: Tensor = self.unet.forward(x, time, **(rest | text), return_dict=False)[0]
        return prediction

    def recombined(self, x: Tensor) -> Tensor:
        """The combined prediction of [b, C, H, W], computed again so that it has a gradient."""
        sample = torch.cat([x, x]) if self.scale > 1 else x
        rest = {name: _cloned(value) for name, value in self.rest.items()}
        prediction: Tensor = self.unet.forward(sample, _cloned(self.time), **rest, return_dict=False)[0]
        if self.scale <= 1:
            return prediction
        free, steered = prediction.chunk(2)
        combined: Tensor = free + self.scale * (steered - free)
        return combined

    def as_clean(self, x: Tensor, prediction: Tensor) -> Tensor:
        """x̂₀ of a prediction."""
        match self.kind:
            case "epsilon":
                return (x - self.sigma * prediction) / self.signal
            case "sample":
                return prediction
            case _:
                return self.signal * x - self.sigma * prediction

    def as_noise(self, prediction: Tensor) -> Tensor:
        """The noise that a prediction means."""
        match self.kind:
            case "epsilon":
                return prediction
            case "sample":
                return (self.x - self.signal * prediction) / max(self.sigma, 1e-8)
            case _:
                return self.sigma * self.x + self.signal * prediction

    def from_noise_change(self, change: Tensor) -> Tensor:
        """How the prediction changes where the noise that it means changes by ``change``."""
        match self.kind:
            case "epsilon":
                return change
            case "sample":
                return -self.sigma / self.signal * change
            case _:
                return change / self.signal

    def with_combined(self, rows: Tensor, combined: Tensor) -> Tensor:
        """The UNet's output that a pipeline combines to ``combined`` [b, …] at ``rows``, and to the same elsewhere."""
        changed = self.prediction.clone()
        if self.scale <= 1:
            changed[rows] = combined
        else:
            free = self.free[rows]
            changed[rows + self.batch // 2] = free + (combined - free) / self.scale
        return changed


def _full(value: Tensor) -> Tensor:
    """In float32 if it is in less: distances and small numbers are lost in half precision."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _picked(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of (mappings of) tensors that have one for each of the batch; anything else as it is."""
    if isinstance(value, dict):
        return {name: _picked(one, rows, batch) for name, one in value.items()}
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch:
        return value[rows.to(value.device)]
    return value


def _cloned(value: Any) -> Any:
    """Outside inference mode, a clone is an ordinary tensor."""
    if isinstance(value, dict):
        return {name: _cloned(one) for name, one in value.items()}
    return value.clone() if isinstance(value, Tensor) else value
