"""What a model will need, counted on the meta device: no weights, no memory, no arithmetic."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from unrote.config import Config, TrainingConfig
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.models.denoiser import Network, autocast_dtype, blocks_of, build_unet, unet_prediction
from unrote.models.views import ViewCache, view_cache

RECOMPUTED = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)
"""What diffusers computes again in the backward pass under gradient checkpointing."""


@dataclass(frozen=True)
class Forward:
    """A forward pass of one part of a batch, in float32."""

    saved: int
    """Bytes that autograd keeps of it."""
    checkpointed: int
    """The same under gradient checkpointing."""
    flops: int
    """Floating point operations: of convolutions, products of matrices and attention."""

    def kept(self, training: TrainingConfig) -> int:
        """Bytes that are kept of it under these settings."""
        kept = self.checkpointed if training.gradient_checkpointing else self.saved
        return kept if autocast_dtype(training) is None else kept // 2


@dataclass(frozen=True)
class Size:
    """Of a model and of one part of a batch. Sizes are in bytes."""

    trained: int
    """Parameters that are trained."""
    denoiser: int
    """Parameters of the whole network."""
    largest_block: int
    """Of these, what the block with most has, or what is outside of blocks: see :func:`blocks_of`."""
    frozen_bytes: int
    """Weights that are only read, in float32: beside adapters, and autoencoder and text encoders that each step needs.

    Text encoders whose files are not in a folder here are not among them.
    """
    halved: int
    """Parameters among them that are kept in half precision under mixed precision."""
    forward: Forward
    """What the forward pass keeps for the backward pass, and computes."""
    batch: int
    """Samples in a part of a batch."""
    cache_bytes: int
    """Latents and text embeddings in the cache folder."""
    model_bytes: int
    """The finished model on disk."""
    views: ViewCache | None = None
    """How a pretrained model gets augmented views; None without."""
    reading: float = 0.0
    """Passes of the denoiser that a text encoder's reading of one caption costs: at most, where its files are here."""

    def frozen(self, training: TrainingConfig, parts: int = 1) -> int:
        """Bytes of weights that are only read under these settings, of a denoiser that is held in so many parts."""
        beside = self.frozen_bytes - 4 * self.halved
        return beside + math.ceil((4 if autocast_dtype(training) is None else 2) * self.halved / parts)


def size_of(config: Config, images: ImageStore) -> Size:
    """The size of what ``config`` trains on ``images``.

    Raises:
        InputError: they do not fit together, or the pretrained model is not there.
    """
    return _pixels_size(config, images) if config.model.pretrained is None else _pretrained_size(config, images)


def _pixels_size(config: Config, images: ImageStore) -> Size:
    _, height, width, channels = images.images.shape
    if height != width:
        raise InputError(f"{images.source}: images of {height}x{width} are not square; give --resolution")
    classes = len(images.class_names or ()) if config.model.class_conditional else None
    with torch.device("meta"):
        try:
            unet = build_unet(config.model, resolution=height, channels=channels, num_classes=classes)
        except ValueError as error:
            raise InputError(str(error)) from None
        batch = _part_of_batch(config, images)
        labels = {"class_labels": torch.zeros(batch, dtype=torch.int64)} if classes is not None else {}
        forward = _forward(unet, torch.zeros(batch, channels, height, width), labels)
    trained = _count(unet)
    return Size(trained, trained, _largest_block(unet), 0, 0, forward, batch, 0, 8 * trained)


def _pretrained_size(config: Config, images: ImageStore) -> Size:
    from unrote.models.adapters import add_adapters
    from unrote.models.families import CLIP_LENGTH
    from unrote.models.pretrained import describe
    from unrote.models.text_to_image import check_images

    source, lora = str(config.model.pretrained), config.model.train == "lora"
    pipeline = describe(source)
    family = pipeline.family
    factor = 2 ** (len(pipeline.autoencoder["block_out_channels"]) - 1)
    check_images(config, images, factor * family.patch)
    height, width = (side // factor for side in images.images.shape[1:3])
    family.check(config, pipeline.denoiser, height, width)
    if pipeline.scheduler is not None:
        family.check_noise(pipeline.scheduler)
    channels = pipeline.autoencoder["latent_channels"]
    with torch.device("meta"):
        denoiser = family.denoiser.from_config(pipeline.denoiser)
        whole, largest = _count(denoiser), _largest_block(denoiser)
        trained = _count(add_adapters(denoiser, config.model.lora)) if lora else whole
        batch = _part_of_batch(config, images)
        latents = torch.zeros(batch, channels, height, width)
        text = family.placeholder(denoiser.config, batch, t5=pipeline.has_t5)
        condition = family.condition(text, denoiser.config, (height * factor, width * factor))
        forward = _forward(denoiser, latents, condition, family.network)
        vae = _count(AutoencoderKL.from_config(pipeline.autoencoder))
    halved = whole * lora
    views = view_cache(config, len(images), channels * height * width)
    needs_vae = not config.data.cache_latents or (views is not None and not views.kept)
    needs_text = config.text.varies or not config.data.cache_latents
    frozen = 4 * halved + 4 * vae * needs_vae + 4 * _text_parameters(source, family.text_parts) * needs_text
    cache = 0
    if config.data.cache_latents:
        cache = 8 * channels * height * width * len(images) * (1 + config.data.random_flip)
        cache += views.bytes if views is not None and views.kept else 0
        texts = len({"", *(text for texts in images.every_caption() for text in texts)})
        cache += 4 * texts * sum(values[0].numel() for values in text.values())
    copies = 1 + config.training.use_ema
    model = 4 * trained * copies if lora else 4 * whole * copies + 2 * _folder_bytes(source)
    reading = batch * _reading_flops(source, family.text_parts, family.t5_length or CLIP_LENGTH) / forward.flops
    return Size(trained, whole, largest, frozen, halved, forward, batch, cache, model, views, reading)


def _folder_bytes(source: str) -> int:
    """The files of a pipeline here; 0 of one that is not here yet."""
    return sum(path.stat().st_size for path in Path(source).rglob("*") if path.is_file())


def _reading_flops(source: str, text_parts: Sequence[tuple[str, str]], longest: int) -> int:
    """Operations of a pipeline's text encoders for one text: two for each token and each weight that multiplies it.

    0 of one that is not in a folder here: of the released ones it is few passes in a hundred of their denoiser's.
    """
    folder, operations = Path(source), 0
    for tokenizer, encoder in text_parts:
        settings = folder / tokenizer / "tokenizer_config.json"
        own = json.loads(settings.read_text("utf-8")).get("model_max_length") if settings.is_file() else None
        weights = sum(map(_multiplying, _weight_files(folder / encoder)))
        operations += 2 * min(longest, own or longest) * weights
    return operations


def _text_parameters(source: str, text_parts: Sequence[tuple[str, str]]) -> int:
    """Of a pipeline's text encoders; 0 of one that is not in a folder here."""
    folders = [Path(source) / encoder for _, encoder in text_parts]
    return sum(
        math.prod(shape) for folder in folders for path in _weight_files(folder) for shape in _shapes(path).values()
    )


def _weight_files(folder: Path) -> list[Path]:
    """Of a network, each weight once: without the half-precision files if there are others."""
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if ".fp16" not in path.name] or files


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _multiplying(path: Path) -> int:
    """Weights in a file that multiply every token: matrices, but tables that tokens are looked up in."""
    shapes = _shapes(path)
    looked_up = re.compile(r"embed|shared\.")
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not looked_up.search(name))


def _part_of_batch(config: Config, images: ImageStore) -> int:
    return math.ceil(min(config.training.batch_size, len(images)) / config.training.gradient_accumulation_steps)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _largest_block(denoiser: nn.Module) -> int:
    blocks = list(map(_count, blocks_of(denoiser)))
    return max(*blocks, _count(denoiser) - sum(blocks))


class _FusedAttention(TorchFunctionMode):
    """Attention as devices compute it. On the meta device it would keep the weights of every token for every other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | named
        query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]


def _forward(
    denoiser: Any, images: Tensor, condition: Mapping[str, Any], network: Network = unet_prediction
) -> Forward:
    """A forward pass on the meta device, with what autograd saves of it counted, and what it computes.

    Under gradient checkpointing that is: what is saved outside the recomputed blocks, their inputs, and the largest
    block.
    """
    weights = {id(p.untyped_storage()) for p in denoiser.parameters()}
    saved: dict[int, tuple[Any, int, int]] = {}
    block, inputs = 0, 0

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            saved[storage._cdata] = (storage, storage.nbytes(), block)
        return tensor

    def enter(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal block, inputs
        block += 1
        states = arguments[:1] or (named["hidden_states"], named["encoder_hidden_states"])
        inputs += sum(state.untyped_storage().nbytes() for state in states)

    for module in denoiser.modules():
        if type(module).__name__ in RECOMPUTED:
            module.register_forward_pre_hook(enter, with_kwargs=True)
    operations = FlopCounterMode(display=False)
    with operations, _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(denoiser, images, torch.zeros(len(images), dtype=torch.int64), condition)
    sizes: dict[int, int] = {}
    for _, size, owner in saved.values():
        sizes[owner] = sizes.get(owner, 0) + size
    whole, outside = sum(sizes.values()), sizes.pop(0, 0)
    return Forward(whole, outside + inputs + max(sizes.values(), default=0), operations.get_total_flops())
