"""Checkpoints of one file in the original layout: the weights, under the names that the original code gave them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

from PIL import Image

from original_layout import in_original_layout
from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl
from toy import toy_images, toy_run
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.models.pretrained import describe, load_pretrained
from unrote.sampling import sample

pytestmark = pytest.mark.usefixtures("module_cache")


def in_one_file(pipeline, folder, family="1"):
    """A checkpoint with the pipeline's configuration, without its weights, beside it."""
    pipeline.save_pretrained(folder / "tiny")
    save_file(in_original_layout(pipeline, family), folder / "tiny.safetensors")
    for weights in (folder / "tiny").rglob("*.safetensors"):
        weights.unlink()
    return folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Of Stable Diffusion 1."""
    folder = tmp_path_factory.mktemp("single")
    return in_one_file(tiny_stable_diffusion(folder / "tokenizer", vae_levels=2), folder)


def test_a_file_has_the_same_weights_as_the_pipeline(file, tmp_path):
    loaded, expected = load_pretrained(str(file)), tiny_stable_diffusion(tmp_path / "tokenizer", vae_levels=2)
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(pipeline, part).state_dict() for pipeline in (loaded, expected))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], value.half().float()), name
    assert loaded.scheduler.config.prediction_type == "epsilon" and loaded.safety_checker is None
    assert describe(str(file)).denoiser["cross_attention_dim"] == 16


@pytest.mark.parametrize("family", ["2", "xl"])
def test_files_of_other_families_have_the_same_weights_and_are_tuned(tmp_path, family):
    """Stable Diffusion 2 with velocity as the target, and SDXL: text encoders of OpenCLIP, in its layout."""
    if family == "2":
        pipeline = tiny_stable_diffusion(tmp_path / "tokenizer", vae_levels=2, prediction_type="v_prediction")
    else:
        # The two encoders are told apart by their width.
        pipeline = tiny_stable_diffusion_xl(tmp_path / "tokenizer", second_width=24)
    file = in_one_file(pipeline, tmp_path, family)
    loaded = load_pretrained(str(file))
    assert type(loaded) is type(pipeline)
    networks = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    assert len(networks) == (3 if family == "2" else 4)
    for part in networks:
        found, wanted = (getattr(one, part).state_dict() for one in (loaded, pipeline))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value.half().float()) for name, value in wanted.items()), part
    assert loaded.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    images = in_memory_store(toy_images(8, side=16).images, source="toy", captions=["red cat", "a dog"] * 4)
    settings = {"model__pretrained": str(file), "model__train": "lora", "training__epochs": 1}
    assert toy_run(tmp_path / "run", "agc", images=images, **settings).read_ledger()["visits"].sum() == 8


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_file_is_tuned_and_sampled(file, tmp_path, kind):
    images = in_memory_store(toy_images(8, side=16).images, source="toy", captions=["red cat", "a dog"] * 4)
    settings = {
        "model__pretrained": str(file),
        "model__train": kind,
        "training__learning_rate": 0.01,
        "training__lr_warmup_steps": 0,
        "training__use_ema": False,
    }
    run = toy_run(tmp_path / "run", "iet-agc+", images=images, **settings)
    assert run.read_ledger()["visits"].sum() == 4 * 8
    options = {"prompts": ["red cat"], "steps": 2, "guidance_scale": 2.0}
    before, after = (
        np.asarray(Image.open(sample(model, 1, out=tmp_path / name, resolution=16, **options) / "000000.png"))
        for name, model in (("before", file), ("after", run))
    )
    assert before.shape == after.shape == (16, 16, 3) and (before != after).any()


def test_a_file_that_can_not_be_read_says_what_is_missing(file, tmp_path):
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match=r"Put a pipeline of the same architecture.* beside it as .*alone/"):
        load_pretrained(str(alone))
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(InputError, match=r"flux\.safetensors is a Stable Diffusion 3 or FLUX"):
        load_pretrained(str(tmp_path / "flux.safetensors"))
    weights = load_file(file)
    (tmp_path / "part.safetensors").touch()
    save_file({n: v for n, v in weights.items() if "cond_stage" not in n}, tmp_path / "part.safetensors")
    shutil.copytree(file.with_suffix(""), tmp_path / "part")
    with pytest.raises(InputError, match=r"part\.safetensors can't be loaded: .*CLIPTextModel"):
        load_pretrained(str(tmp_path / "part.safetensors"))
