"""Fine-tuning of a pretrained text-to-image pipeline: latents of images under the condition of their captions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrote.config import Config
from unrote.data.augmentations import augment, mirror
from unrote.data.build import cache_folder
from unrote.data.store import ImageStore
from unrote.encoders.cache import pixels_digest
from unrote.errors import InputError
from unrote.models.adapters import adapter_layers, add_adapters, average_products
from unrote.models.denoiser import autocast_dtype, memory_format
from unrote.models.encoding import LatentEncoder, Mirrored, Moments, TextEncoder
from unrote.models.families import family_of
from unrote.models.pixels import as_floats
from unrote.models.pretrained import base_weights, load_pretrained, text_side
from unrote.models.task import RAW_VARIANT, Condition
from unrote.models.views import Views, view_cache
from unrote.seeding import generator
from unrote.tensorfiles import weighted_average
from unrote.text.mitigations import TextPolicy

Embed = Callable[[Sequence[str]], dict[str, Tensor]]


class TextToImage:
    """The denoiser of a text-to-image pipeline on its latents; see :class:`unrote.models.task.Task`.

    Args:
        config: of the run; ``model.pretrained`` is set.
        images: the training set, with captions.
        device: where to compute.

    Raises:
        InputError: the pipeline can't be loaded, or does not fit the images.
    """

    def __init__(self, config: Config, images: ImageStore, device: torch.device) -> None:
        assert config.model.pretrained is not None and images.captions is not None
        self._config, self._images, self._device = config, images, device
        self._layout = memory_format(config.training)
        pipeline = load_pretrained(config.model.pretrained)
        self.base: Mapping[str, str] = base_weights(pipeline)
        self._family = family_of(type(pipeline).__name__, config.model.pretrained)
        dtype = autocast_dtype(config.training)
        self.denoiser = getattr(pipeline, self._family.part)
        self.trained: nn.Module = self.denoiser
        if config.model.train == "lora":
            # The frozen weights are only read under autocast, which would round them anyway.
            nn.Module.to(self.denoiser, dtype or torch.float32)
            self.trained = add_adapters(self.denoiser, config.model.lora)
        # A model that is held in parts may be too large for the device.
        self.denoiser.to("cpu" if config.training.fsdp else device, memory_format=self._layout)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        height, width = (side // factor for side in images.images.shape[1:3])
        self.loss = self._family.loss(pipeline, (height, width), device, dtype)
        self._prepare_latents(pipeline)
        self._prepare_texts(pipeline)

    def _prepare_latents(self, pipeline: Any) -> None:
        data = self._config.data
        self._latents = LatentEncoder(pipeline.vae, self._device)
        self._kept: list[np.ndarray] = []
        self._views: np.ndarray | None = None
        if data.cache_latents:
            images, folder, digest = self._images.images, cache_folder() / "latents", pixels_digest(self._images)
            self._kept = [self._latents.cached(images, digest, folder)]
            if data.random_flip:
                self._kept.append(self._latents.cached(Mirrored(images), f"{digest} mirrored", folder))
            plan = view_cache(self._config, len(images), self._kept[0][0, 0].size)
            if plan is not None and plan.kept:
                views = Views(images, self._config)
                self._views = self._latents.cached(views, f"{digest} {views.key}", folder)
            if plan is None or plan.kept:
                self._latents.release()

    def _prepare_texts(self, pipeline: Any) -> None:
        tokenizers, encoders = text_side(pipeline)
        zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        encoder = TextEncoder(self._family, tokenizers, encoders, self._device, zeros_for_empty=zeros)
        self._policy = TextPolicy(self._config.text, tokenizers[0], self._images.every_caption())
        self._empty = encoder([""])
        self._embed: Embed = encoder
        if self._config.data.cache_latents:
            folder = cache_folder() / "texts"
            self._embed = encoder.cached(self._policy.texts(), folder, others=self._config.text.varies)

    def clean(self, indices: Tensor, mirrored: Tensor | None, draw: torch.Generator) -> Tensor:
        """Scaled latents, one draw from each posterior."""
        return self._latents.drawn(self._moments(indices, mirrored), draw).contiguous(memory_format=self._layout)

    def _moments(self, indices: Tensor, mirrored: Tensor | None) -> Moments:
        if not self._kept:
            return self._latents.moments(self._pixels(indices, mirrored))
        rows = self._kept[0][indices.numpy()]
        if mirrored is not None:
            which = mirrored.cpu().numpy()
            rows[which] = self._kept[1][indices.numpy()[which]]
        return self._on_device(rows)

    def _on_device(self, moments: np.ndarray) -> Moments:
        mean, std = torch.from_numpy(moments).to(self._device, non_blocking=True).unbind(1)
        return mean, std

    def _pixels(self, indices: Tensor, mirrored: Tensor | None) -> Tensor:
        pixels = as_floats(self._images.images[indices.numpy()], self._device)
        return pixels if mirrored is None else mirror(pixels, mirrored)

    def augmented(
        self,
        clean: Tensor,
        condition: Condition,
        indices: Tensor,
        mirrored: Tensor | None,
        visits: Tensor,
        strength: Tensor,
        draw: torch.Generator,
    ) -> tuple[Tensor, Condition]:
        """Latents of augmented pixels: of the view that is this visit's turn, if they are kept, or encoded now."""
        rows = (strength > 0).nonzero().flatten()
        if not len(rows):
            return clean, condition
        if self._views is None:
            ops = self._config.augmentation.ops.model_dump()
            view, _ = augment(self._pixels(indices, mirrored), strength, draw, **ops)
            moments = self._latents.moments(view[rows])
        else:
            count, which = self._config.augmentation.cached_views, rows.cpu()
            numbers = indices[which] * count + visits.cpu()[which] % count
            moments = self._on_device(self._views[numbers.numpy()])
        return clean.index_copy(0, rows, self._latents.drawn(moments, draw)), condition

    def condition(self, indices: Tensor, proxy: int, step: int) -> Condition:
        """Embedded texts, and what else the family's denoiser is told."""
        seed = self._config.seed
        texts = self._policy.captions_for(indices, generator(seed, "text", proxy, step))
        outputs = self._embed(texts)
        noise = generator(seed, "text-noise", proxy, step, device=self._device)
        for name in (name for name in outputs if name.endswith("hidden_states")):
            outputs[name] = self._policy.noisy(outputs[name], noise)
        return self._arguments(outputs)

    def unsteered(self, condition: Condition) -> Condition:
        """The empty text for each sample."""
        count = len(condition["encoder_hidden_states"])
        return self._arguments({name: values.expand(count, *values.shape[1:]) for name, values in self._empty.items()})

    def _arguments(self, outputs: Mapping[str, Tensor]) -> Condition:
        """As the denoiser takes them."""
        height, width = self._images.images.shape[1:3]
        return self._family.condition(outputs, self.denoiser.config, (height, width))

    def average(self, states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
        """The mean of every number; or of the products of adapters, see :func:`average_products`."""
        product = self._config.model.train == "lora" and self._config.model.lora.average == "product"
        return (average_products if product else weighted_average)(states, weights)

    def save(self, folder: Path) -> None:
        """Write the whole pipeline, or ``pytorch_lora_weights.safetensors``."""
        if self._config.model.train == "lora":
            self._save_adapters(folder)
            return
        part = {self._family.part: self.denoiser}
        load_pretrained(str(self._config.model.pretrained), **part).save_pretrained(folder)

    def save_raw(self, folder: Path) -> None:
        """Write the denoiser as a variant, or the adapters into a folder of that name."""
        if self._config.model.train == "lora":
            self._save_adapters(folder / RAW_VARIANT)
        else:
            self.denoiser.save_pretrained(folder / self._family.part, variant=RAW_VARIANT)

    def pipeline(self) -> Any:
        """The whole pipeline around the denoiser as it is now; its other parts are loaded once more."""
        source, part = str(self._config.model.pretrained), self._family.part
        # A single file is read as one; a folder's own denoiser need not be read.
        pipeline = load_pretrained(source, **({} if Path(source).is_file() else {part: None}))
        pipeline.register_modules(**{part: self.denoiser})
        return pipeline.to(self._device)

    def sampled_as(self) -> Any:
        """The context to sample in: float32, but for adapters on weights that were rounded for training."""
        dtype = autocast_dtype(self._config.training) if self._config.model.train == "lora" else None
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)

    def _save_adapters(self, folder: Path) -> None:
        layers = adapter_layers(self.denoiser, self._config.model.lora)
        self._family.save_adapters(folder, layers)


def check_images(config: Config, images: ImageStore, factor: int) -> None:
    """Raise InputError unless the images can be trained on; ``factor`` is how many pixels are one latent or token."""
    _, height, width, channels = images.images.shape
    if images.captions is None:
        raise InputError(
            f"{images.source} has no captions: add metadata.jsonl with file_name and text, or a .txt beside each image"
        )
    if channels != 3:
        raise InputError("data.channels: a pretrained model takes colour images; use 3")
    if height % factor or width % factor:
        raise InputError(
            f"data.resolution: {height}x{width} must be multiples of {factor} for {config.model.pretrained}"
        )
