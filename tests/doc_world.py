"""A folder with everything that the commands of the docs name: photos/, held-out/, runs/a, models/sd15, … as toys."""

import json
import shutil
from pathlib import Path

import numpy as np
import transformers
import yaml
from PIL import Image

from doc_commands import ROOT
from tiny_pipelines import LENGTH, tiny_stable_diffusion, tiny_tokenizer
from toy import SETTINGS, toy_images
from unrote.api import train
from unrote.data import open_images
from unrote.measures import audit

SIDE = 16
CAPTIONS = ["red cat", "a dog", "a cat", "red dog"]
IMAGES = {
    # Folder: images, classes, seed. Equal seeds are equal images.
    "photos": (32, 0, 1),
    "training-images": (32, 0, 1),
    "pictures": (32, 0, 1),
    "scans": (24, 0, 3),
    "flowers": (24, 2, 4),
    "held-out": (24, 0, 5),
    "other-images": (24, 0, 5),
    "other-patients": (24, 0, 6),
    "data/cifar10/train": (80, 10, 7),
    "data/cifar100/train": (200, 100, 8),
    "data/afhq-dog/train": (24, 0, 9),
    "data/laion-10k/train": (24, 0, 10),
}
FILES = {"photos.npz": (32, 1), "held-out.npz": (128, 5), "many.npz": (256, 1)}
"""File: images, seed."""
HUB = ("models/sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5")
"""Folders and Hub ids where a pipeline is; a folder of that name is taken before the Hub is asked."""

RUNS = {
    # Run: method, images of 8 x 8. runs/a has as many as guards.md names by their index.
    "runs/a": ("agc", "many.npz"),
    "runs/standard": ("standard", "photos.npz"),
    "runs/agc": ("agc", "photos.npz"),
}
INSTEAD = {
    "first-model.md": {"photos": "uncaptioned"},
    "text.md": {"runs/a": "runs/text"},
    "fine-tuning.md": {"runs/baseline": "runs/text"},
}
"""By page: what a name stands for there, if not for what it does elsewhere."""


def build_world(folder: Path) -> None:
    """Fill the folder."""
    for name, (count, classes, seed) in IMAGES.items():
        save_images(folder / name, toy_images(count, side=SIDE, classes=classes, seed=seed), classes)
    for name, (count, seed) in FILES.items():
        np.savez(folder / name, images=toy_images(count, side=SIDE, seed=seed).images)
    shutil.copytree(folder / "photos", folder / "uncaptioned", ignore=shutil.ignore_patterns("metadata.jsonl"))
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    build_models(folder)
    for name, (method, images) in RUNS.items():
        settings = SETTINGS | {"training.epochs": 1, "data.resolution": 8}
        train(folder / images, out=folder / name, method=method, settings=settings)
    shutil.copytree(folder / "runs/standard", folder / "runs/baseline")
    text = {"training.epochs": 1, "training.batch_size": 8, "training.mixed_precision": "no"}
    text |= {"model.pretrained": str(folder / HUB[0]), "model.train": "lora", "data.resolution": SIDE}
    train(folder / "photos", out=folder / "runs/text", method="standard", settings=text)
    build_samples(folder)
    build_studies(folder)


def save_images(folder: Path, store, classes: int) -> None:
    """A folder of captioned images, in subfolders if there are classes."""
    rows = []
    for index, image in enumerate(store.images):
        name = f"{index % classes:02d}/{index:03d}.png" if classes else f"{index:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": CAPTIONS[index % len(CAPTIONS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def build_models(folder: Path) -> None:
    """A Stable Diffusion of 16 x 16 pixels, and a CLIP."""
    pipeline = tiny_stable_diffusion(folder / "tokenizer", vae_levels=2)
    for name in HUB:
        pipeline.save_pretrained(folder / name)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    end = len(tokenizer) - 1
    words = {"vocab_size": end + 1, "eos_token_id": end, "bos_token_id": end - 1, "max_position_embeddings": LENGTH}
    vision = size | {"image_size": SIDE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=size | words, vision_config=vision)
    clip = folder / "openai/clip-vit-base-patch32"
    transformers.CLIPModel(config).save_pretrained(clip)
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(clip)
    tokenizer.save_pretrained(clip)


def build_samples(folder: Path) -> None:
    """Copies of training images with a little noise; of those of runs/a also the report that finds them."""
    for name, of, count, side in (("samples", "photos.npz", 3, SIDE), ("copies", "many.npz", 8, 8)):
        images = open_images(folder / of, resolution=side).images[:count]
        noise = np.random.default_rng(0).integers(-2, 3, images.shape)
        (folder / name).mkdir()
        for index, image in enumerate(np.clip(images + noise, 0, 255).astype(np.uint8)):
            Image.fromarray(image).save(folder / name / f"{index:06d}.png")
    audit(folder / "copies", folder / "runs/a").save(folder / "samples-report")


def build_studies(folder: Path) -> None:
    """The study files of the repository with images and budgets of seconds; methods and settings as they are."""
    for file in ("pilot", "study"):
        study = yaml.safe_load((ROOT / f"benchmarks/study/{file}.yaml").read_text())
        for regime in study["regimes"].values():
            regime["images"] |= {"resolution": 8, "train": 12, "reference": 8}
            regime |= {"samples_seen": 64, "snapshots": 2, "sampling": {"num": 8, "steps": 2}}
            regime["settings"]["model.block_out_channels"] = [32]
        target = folder / f"benchmarks/study/{file}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(study))
