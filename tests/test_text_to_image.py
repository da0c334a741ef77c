"""Fine-tuning text-to-image pipelines: the same exactness as for pixels, and outputs that plain diffusers loads."""

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl
from toy import assert_same_run, largest_difference, log_of, summary_of, toy_images
from unrote.api import train
from unrote.data.store import in_memory_store

CAPTIONS = ["red cat", "a dog", "cat", "a red dog", "", "a cat"]
SETTINGS = {
    "data.resolution": 16,
    "training.epochs": 3,
    "training.batch_size": 8,
    "training.learning_rate": 1e-3,
    "training.lr_warmup_steps": 0,
    "training.log_every_steps": 2,
    "training.checkpointing_steps": 4,
    "ensemble.num_shards": 3,
    "ensemble.local_epochs": 1,
    "gate.skip_ratio": 0.9,
    "gate.bank.bins": 4,
    "model.lora.rank": 4,
    "model.lora.target_modules": ["to_q", "to_v"],
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNROTE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion(folder / "tokenizer", vae_levels=2).save_pretrained(folder / "sd")
    return folder / "sd"


def captioned(count=18, seed=0):
    pixels = toy_images(count, side=16, seed=seed).images
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    return in_memory_store(pixels, source="toy", captions=captions)


def tuned(out, base, method="standard", kind="full", images=None, **settings):
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    fixed = SETTINGS | {"model.pretrained": str(base), "model.train": kind}
    return train(images or captioned(), out=out, method=method, settings=fixed | changed)


def saved(run, kind="full"):
    name = "pytorch_lora_weights" if kind == "lora" else "unet/diffusion_pytorch_model"
    return load_file(run.model_folder / f"{name}.safetensors")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_trains_and_the_same_again_is_the_same(tmp_path, base, kind):
    first = tuned(tmp_path / "first", base, "iet-agc+", kind)
    assert_same_run(tuned(tmp_path / "second", base, "iet-agc+", kind), first)
    assert summary_of(first)["samples_seen"] == 3 * 18
    assert summary_of(first)["augmented"] > 0 and summary_of(first)["skipped"] > 0
