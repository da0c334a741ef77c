"""Our fine-tuning step, with latents and text cached, against the loop of diffusers' text-to-image example.

Both sides train all weights of the same small Stable Diffusion (channels a quarter of 1.5's in UNet and autoencoder, so
that these two stand to each other about as there) on the same pictures and captions, in fp32 and without EMA, one step
each in turn in one process: whatever else the machine does meets both. Their side is the published example's loop
(accelerate, AdamW, autoencoder and text encoder at every step, gradients clipped, loss read every step) without image
transforms, progress bar and trackers; ours is the step of ``agc``, with gate and ledger. How long each side prepares
before its first step, which for us includes encoding all pictures and captions once, is given beside it.

    python benchmarks/fine_tuning_step.py --steps 12
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unrote.config import load_config
from unrote.data.store import ImageStore, in_memory_store
from unrote.files import write_json
from unrote.method.shards import SampleStream
from unrote.models.making import make_task
from unrote.models.pretrained import load_pretrained
from unrote.training.loop import Meter
from unrote.training.step import TrainingStep

RESULTS = Path(__file__).parent / "results" / "fine_tuning_step.json"
CPU = torch.device("cpu")
SIDE, BATCH, NUM_IMAGES, LENGTH = 128, 2, 32, 77
LEARNING_RATE = 1e-5


def make_base(folder: Path) -> None:
    """A Stable Diffusion with a quarter of 1.5's channels; few layers of text, which is as little beside the rest."""
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer-files").mkdir(parents=True)
    vocabulary, merges = folder / "tokenizer-files" / "vocab.json", folder / "tokenizer-files" / "merges.txt"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=LENGTH, eos_token_id=len(words) - 1, bos_token_id=len(words) - 2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        unet=UNet2DConditionModel(
            sample_size=SIDE // 8, block_out_channels=(80, 160, 320, 320), norm_num_groups=16, cross_attention_dim=192,
            attention_head_dim=8,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=LENGTH),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "base")


def pictures(side: int = SIDE) -> ImageStore:
    """Noise with a caption of its own for each image."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (NUM_IMAGES, side, side, 3), dtype=np.uint8)
    captions = ["".join(random.choice(list("abcdefgh "), 30)) for _ in range(NUM_IMAGES)]
    return in_memory_store(pixels, source="noise", captions=captions)


class OurStep:
    """One step as the training loop takes it."""

    def __init__(self, base: Path) -> None:
        settings = {
            "model.pretrained": str(base), "training.batch_size": BATCH, "training.use_ema": False,
            "training.mixed_precision": "no", "training.gradient_checkpointing": False, "text.dropout": 0.0,
            "training.learning_rate": LEARNING_RATE, "training.lr_warmup_steps": 0,
        }  # fmt: skip
        config = load_config(method="agc", preset="fine-tune", overrides=settings)
        started = time.perf_counter()
        task = make_task(config, pictures(), CPU)
        self.preparation = time.perf_counter() - started
        self._step = TrainingStep(config, task, NUM_IMAGES, CPU, proxy_steps=10_000)
        self._stream, self._shard, self._meter, self._taken = (
            SampleStream(0, 0),
            torch.arange(NUM_IMAGES),
            Meter(CPU),
            0,
        )

    def __call__(self) -> None:
        """Take it."""
        indices = self._stream.take(self._shard, self._taken * BATCH, BATCH)
        self._taken += 1
        self._meter.add(*self._step(indices, proxy=0, step=self._taken))


class TheirStep:
    """One step as diffusers' text-to-image example takes it."""

    def __init__(self, base: Path) -> None:
        started = time.perf_counter()
        pipeline = load_pretrained(str(base))
        self._vae, self._text = pipeline.vae.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
        self._noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        images = pictures()
        assert images.captions is not None
        pixels = torch.from_numpy(np.array(images.images[:])).permute(0, 3, 1, 2) / 127.5 - 1
        ids = pipeline.tokenizer(
            list(images.captions), max_length=LENGTH, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        rows = [{"pixel_values": pixel, "input_ids": tokens} for pixel, tokens in zip(pixels, ids, strict=True)]
        self._accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=10_000)
        loader: Any = DataLoader(rows, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
        self._unet, self._optimizer, self._loader, self._schedule = self._accelerator.prepare(
            pipeline.unet.train(), optimizer, loader, schedule
        )
        self._batches = iter(self._loader)
        self.preparation = time.perf_counter() - started

    def __call__(self) -> None:
        """Take it."""
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        with self._accelerator.accumulate(self._unet):
            with torch.no_grad():
                latents = self._vae.encode(batch["pixel_values"]).latent_dist.sample() * self._vae.config.scaling_factor
                hidden = self._text(batch["input_ids"], return_dict=False)[0]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(self._noise.config.num_train_timesteps, (len(latents),))
            noisy = self._noise.add_noise(latents, noise, timesteps)
            prediction = self._unet(noisy, timesteps, hidden, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
            self._accelerator.gather(loss.repeat(BATCH)).mean().item()
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(self._unet.parameters(), 1.0)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()


def compare(base: Path, steps: int) -> dict[str, Any]:
    """Medians of alternating steps, and of the ratios of neighbouring ones."""
    sides = {"ours": OurStep(base), "theirs": TheirStep(base)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(steps + 2):
        for name, step in sides.items():
            # Of processor time, which other processes on the machine do not lengthen; there is one thread.
            wall, busy = time.perf_counter(), time.process_time()
            step()
            if number >= 2:
                times[name].append(time.process_time() - busy)
                times.setdefault(f"{name}_wall", []).append(time.perf_counter() - wall)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [theirs / ours for theirs, ours in zip(times["theirs"], times["ours"], strict=True)]
    return {
        "steps": steps,
        "seconds_per_step": medians,
        "ratio": medians["theirs"] / medians["ours"],
        "ratio_wall": medians["theirs_wall"] / medians["ours_wall"],
        "ratio_of_pairs": [min(ratios), statistics.median(ratios), max(ratios)],
        "preparation_seconds": {name: step.preparation for name, step in sides.items()},
    }


def main() -> None:
    """Measure, write, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each side")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["UNROTE_CACHE"] = str(Path(temporary) / "cache")
        make_base(Path(temporary))
        base = Path(temporary) / "base"
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "side": SIDE,
            "batch": BATCH,
            "step": compare(base, arguments.steps),
            "load_average": os.getloadavg()[0],
        }
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
