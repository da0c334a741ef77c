"""Latents and text embeddings: computed once and memory-mapped, or at each step; both ways give the same."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrote.encoders.cache import features
from unrote.models.families import StableDiffusion
from unrote.models.pixels import as_floats
from unrote.tensorfiles import weights_hash
from unrote.text.tokens import padded_tokens, reads_mask

Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation of the latents, each float32 [B, C, h, w]."""


class _Whole:
    """What :func:`unrote.encoders.cache.features` asks of an encoder, for the outputs of a whole network."""

    copy_detection = False
    is_fid_inception = False

    def __init__(self, key: str, name: str, weights: str, preprocessing: str, encode: Any) -> None:
        self.key, self.name, self.weights_sha256, self.preprocessing = key, name, weights, preprocessing
        self._encode = encode

    def __call__(self, images: np.ndarray) -> np.ndarray:
        outputs: Tensor = self._encode(images)
        return outputs.flatten(1).cpu().numpy()


class Mirrored:
    """Images [N, H, W, C] mirrored when they are read."""

    def __init__(self, images: Any) -> None:
        self._images, self.shape = images, images.shape

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self._images[rows])[:, :, ::-1])


class LatentEncoder:
    """An image encoder (AutoencoderKL) in float32.

    Args:
        vae: the autoencoder.
        device: where to compute.
    """

    batch_size = 8
    """Images encoded at once when all of them are."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae, self._device = vae.to(device).eval().requires_grad_(False), device
        config = vae.config
        self._scale: float = config.scaling_factor
        self._shift: float = getattr(config, "shift_factor", None) or 0.0

    def release(self) -> None:
        """Let go of the autoencoder, when everything is cached."""
        self.vae = None

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Moments:
        """Of images float32 [B, 3, H, W] in [-1, 1]."""
        with torch.autocast(self._device.type, enabled=False):
            posterior = self.vae.encode(pixels.float()).latent_dist
        return posterior.mean, posterior.std

    def drawn(self, moments: Moments, draw: torch.Generator) -> Tensor:
        """Latents as the denoiser takes them, float32 [B, C, h, w]: one draw from each posterior, scaled."""
        mean, std = moments
        latents = mean + std * torch.randn(mean.shape, generator=draw, device=self._device)
        return (latents - self._shift) * self._scale

    def cached(self, rows: Any, digest: str, folder: Path) -> np.ndarray:
        """Mean and standard deviation of images, a memory map float32 [N, 2, C, h, w].

        Args:
            rows: [N, H, W, C], uint8 or float32 in [-1, 1].
            digest: of their content and shape.
            folder: of the cache.
        """
        encoder = _Whole("vae", type(self.vae).__name__, _identity(self.vae), "to [-1, 1]", self._all_moments)
        kept = features(encoder, rows, digest=digest, cache=folder, progress="latents")
        with torch.no_grad():
            shape = self.moments(self._pixels(np.array(rows[:1])))[0].shape[1:]
        return kept.reshape(len(kept), 2, *shape)

    def _all_moments(self, rows: np.ndarray) -> Tensor:
        parts = []
        for start in range(0, len(rows), self.batch_size):
            pixels = self._pixels(rows[start : start + self.batch_size])
            parts.append(torch.stack(self.moments(pixels), 1))
        return torch.cat(parts)

    def _pixels(self, rows: np.ndarray) -> Tensor:
        if rows.dtype == np.uint8:
            return as_floats(rows, self._device)
        return torch.from_numpy(rows).to(self._device).permute(0, 3, 1, 2).contiguous()


def _identity(network: Any) -> str:
    """Of weights, and of a configuration but for where it came from: what the network computes."""
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    origin = ("transformers_version", "dtype", "torch_dtype", "architectures")
    said = {key: value for key, value in config.items() if not key.startswith("_") and key not in origin}
    return f"{weights_hash(network)} {json.dumps(said, sort_keys=True, default=str)}"


class TextEncoder:
    """The text side of a pipeline, in float32.

    Args:
        family: which outputs of the encoders are kept.
        tokenizers: one for each encoder.
        encoders: one or more.
        device: where to compute.
        zeros_for_empty: the empty text is embedded as zeros, as SDXL does it when sampling.
    """

    batch_size = 32
    """Texts encoded at once when all of them are."""

    def __init__(
        self,
        family: StableDiffusion,
        tokenizers: Sequence[Any],
        encoders: Sequence[Any],
        device: torch.device,
        *,
        zeros_for_empty: bool,
    ) -> None:
        self.tokenizers, self.encoders = list(tokenizers), [e.eval().requires_grad_(False) for e in encoders]
        self._family, self._device, self._zeros_for_empty = family, device, zeros_for_empty
        self._lengths: list[int] = []
        self.to(device)

    def to(self, device: torch.device) -> None:
        """Move the encoders."""
        self.encoders = [encoder.to(device) for encoder in self.encoders]

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the family keeps of each text: ``encoder_hidden_states`` float32 [B, L, D] and more."""
        outputs = self._encoded(self.tokens(texts))
        return _without_empty(outputs, texts) if self._zeros_for_empty else outputs

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids and whether they are text, int64 [B, 2, L], of all encoders one after the other."""
        pairs = zip(self.tokenizers, self.encoders, strict=True)
        found = [padded_tokens(tokenizer, encoder, texts, self._family.t5_length) for tokenizer, encoder in pairs]
        self._lengths = [ids.shape[1] for ids, _ in found]
        return np.concatenate([np.stack(pair, 1) for pair in found], 2)

    @torch.no_grad()
    def _encoded(self, ids: np.ndarray) -> dict[str, Tensor]:
        tokens = torch.split(torch.from_numpy(ids).to(self._device), self._lengths, 2)
        outputs = []
        for encoder, part in zip(self.encoders, tokens, strict=True):
            mask = part[:, 1] if reads_mask(encoder) else None
            with torch.autocast(self._device.type, enabled=False):
                outputs.append(encoder(part[:, 0], attention_mask=mask, output_hidden_states=True))
        return {name: values.float() for name, values in self._family.embedded(outputs).items()}

    def cached(self, texts: Sequence[str], folder: Path, *, others: bool) -> "CachedTexts":
        """The embeddings of ``texts``, all different, memory-mapped; those of ``others`` computed when asked for."""
        ids = self.tokens(texts)
        shapes = {name: values.shape[1:] for name, values in self(texts[:1]).items()}
        weights = " ".join(map(_identity, self.encoders))
        names = ", ".join(type(encoder).__name__ for encoder in self.encoders)
        encoder = _Whole("text", names, weights, "token ids", self._all_flat)
        kind = f"{type(self._family).__name__} {self._lengths} {ids.shape}"
        digest = hashlib.sha256(kind.encode() + ids.tobytes()).hexdigest()
        kept = features(encoder, ids, digest=digest, cache=folder, progress="texts")
        rows = {text: row for row, text in enumerate(texts)}
        zeros = self._zeros_for_empty
        return CachedTexts(kept, rows, shapes, self._device, self if others else None, zeros_for_empty=zeros)

    def _all_flat(self, ids: np.ndarray) -> Tensor:
        parts = [self._encoded(ids[start : start + self.batch_size]) for start in range(0, len(ids), self.batch_size)]
        return torch.cat([torch.cat([values.flatten(1) for values in part.values()], 1) for part in parts])


class CachedTexts:
    """Embeddings by text, as :class:`TextEncoder` gives them; what is not kept comes from ``others``."""

    def __init__(
        self,
        kept: np.ndarray,
        rows: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        others: TextEncoder | None,
        *,
        zeros_for_empty: bool,
    ) -> None:
        self._kept, self._rows, self._shapes = kept, rows, shapes
        self._device, self._others, self._zeros_for_empty = device, others, zeros_for_empty

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of ``texts``."""
        rows = [self._rows.get(text) for text in texts]
        new = [place for place, row in enumerate(rows) if row is None]
        flat = torch.from_numpy(np.asarray(self._kept[[row or 0 for row in rows]])).to(self._device)
        parts = torch.split(flat, [math.prod(shape) for shape in self._shapes.values()], 1)
        named = zip(self._shapes.items(), parts, strict=True)
        outputs = {name: part.reshape(-1, *shape) for (name, shape), part in named}
        if new:
            assert self._others is not None, "a text that is not kept, and nothing to read it"
            for name, values in self._others([texts[place] for place in new]).items():
                outputs[name][new] = values
        return _without_empty(outputs, texts) if self._zeros_for_empty else outputs


def _without_empty(outputs: dict[str, Tensor], texts: Sequence[str]) -> dict[str, Tensor]:
    """Zeros for the empty texts."""
    full = torch.tensor([bool(text) for text in texts], device=next(iter(outputs.values())).device)
    return {name: values * full.view(-1, *[1] * (values.ndim - 1)) for name, values in outputs.items()}
