"""The Python blocks of the documentation: the names that each takes for granted, and what makes it small.

A block that begins with nothing but ``import unrote`` or its own imports still speaks of ``model`` or ``images``; what
they are is said here, by page and number of the block.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader

import unrote
from toy import SETTINGS, toy_images

AS_BEFORE = """
            noise, t = torch.randn_like(batch["image"]), torch.randint(1000, (len(batch["image"]),))
            prediction = model(schedule.add_noise(batch["image"], noise, t), t).sample
"""
LOOP = (("            ...  # t, noise, prediction: as before\n", AS_BEFORE.lstrip("\n")),)
SMALLER: dict[tuple[str, int], tuple[tuple[str, str], ...]] = {
    # Page and block: what stands there, and what is run instead.
    ("README.md", 0): (('{"data.resolution": 32}', "settings"), ("num=1_000", "num=4")),
    ("README.md", 1): LOOP,
    ("integrate.md", 0): LOOP,
    ("guards.md", 0): (("resolution=32", "resolution=8"), ("(len(noises),", "(len(noises), num_inference_steps=2,")),
    ("guards.md", 1): (("batch_size=16", "batch_size=2, num_inference_steps=2"),),
    ("guards.md", 2): (("generator=noises, ", "generator=noises, num_inference_steps=2, "),),
}

ENVIRONMENT = {
    # As torchrun sets it for the first of one process; searches by several are tested elsewhere.
    ("neighbours.md", 1): {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
}


def made_small(page: str, number: int, code: str) -> str:
    """The block as it is run."""
    for old, new in SMALLER.get((page, number), ()):
        assert old in code, f"{page}, block {number}: {old!r} is not in it any more"
        code = code.replace(old, new)
    return code


def names_for(page: str, number: int) -> dict[str, Any]:
    """What the block does not define itself, as its page means it; in the working directory are the toys."""
    torch.manual_seed(0)
    common = {"np": np, "torch": torch, "F": F, "DataLoader": DataLoader, "Path": Path, "unrote": unrote}
    return common | MAKERS[page, number]()


def _five_lines() -> dict[str, Any]:
    return {"settings": SETTINGS | {"training.epochs": 1, "data.resolution": 8}}


def _own_loop() -> dict[str, Any]:
    images = torch.from_numpy(toy_images(20).images).permute(0, 3, 1, 2) / 127.5 - 1
    model = UNet2DModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    dataset = [{"image": image} for image in images]
    return {"dataset": dataset, "model": model, "optimizer": optimizer, "schedule": DDPMScheduler(), "rounds": 2}


def _own_loop_made() -> dict[str, Any]:
    names = _own_loop()
    ledger = unrote.Ledger(len(names["dataset"]))
    gate = unrote.LossGate(num_timesteps=1000, skip_ratio=0.5, ledger=ledger)
    ensemble = unrote.ShardEnsemble(names["model"], names["optimizer"], names["dataset"], num_shards=10, gate=gate)
    return names | {"gate": gate, "ensemble": ensemble}


def _pixel_pipeline() -> dict[str, Any]:
    return {"pipeline": DDPMPipeline.from_pretrained("runs/a/model")}


def _guidance() -> dict[str, Any]:
    from unrote.guards.guidance import AntiMemorizationGuidance

    references = torch.rand(20, 3, 8, 8) * 2 - 1
    return _pixel_pipeline() | {"AntiMemorizationGuidance": AntiMemorizationGuidance, "references": references}


def _text_pipeline() -> dict[str, Any]:
    return {"pipeline": StableDiffusionPipeline.from_pretrained("models/sd15")}


def _few_images() -> dict[str, Any]:
    return {"images": toy_images(2).images}


def _features() -> dict[str, Any]:
    from unrote.encoders import load_encoder

    random = np.random.default_rng(0)
    sets = {name: random.normal(size=(30, 12)).astype(np.float32) for name in ("generated", "train", "holdout")}
    return sets | {"encoder": load_encoder("sscd"), "clusters": np.arange(30)}


def _vectors() -> dict[str, Any]:
    random = np.random.default_rng(0)
    np.save("features.npy", random.normal(size=(80, 6)).astype(np.float32))
    return {"queries": random.normal(size=(5, 6)).astype(np.float32)}


def _search_in_processes() -> dict[str, Any]:
    from unrote.neighbours.images import nearest_images

    images = toy_images(60).images
    return {"nearest_images": nearest_images, "queries": images[:4], "references": images}


def _captions() -> dict[str, Any]:
    pipeline = StableDiffusionPipeline.from_pretrained("models/sd15")
    pipeline.set_progress_bar_config(disable=True)

    def encode(texts: list[str]) -> torch.Tensor:
        return pipeline.encode_prompt(texts, "cpu", 1, False)[0]

    return {
        "tokenizer": pipeline.tokenizer,
        "captions": [["red cat", "a cat"], ["a dog"], []],
        "batch": {"index": torch.arange(3)},
        "generator": torch.Generator().manual_seed(0),
        "encode": encode,
        "unet": lambda x, t, text: pipeline.unet(x, t, text).sample,
        "x": torch.randn(3, 4, 8, 8),
        "t": torch.tensor([10, 500, 900]),
        "empty": encode([""] * 3),
        "threshold": 1.0,
    }


MAKERS = {
    ("README.md", 0): _five_lines,
    ("README.md", 1): _own_loop,
    ("encoders.md", 0): _few_images,
    ("guards.md", 0): _pixel_pipeline,
    ("guards.md", 1): _guidance,
    ("guards.md", 2): _text_pipeline,
    ("integrate.md", 0): _own_loop_made,
    ("metrics.md", 0): _features,
    ("neighbours.md", 0): _vectors,
    ("neighbours.md", 1): _search_in_processes,
    ("text.md", 0): _captions,
}
