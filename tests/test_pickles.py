"""Models whose weights must be unpickled, and code beside a model: neither is read, and the way out is said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from tiny_pipelines import tiny_stable_diffusion
from toy import toy_images, toy_run
from unrote.detection.prompts import load_pipeline
from unrote.encoders.vision_models import VisionModel
from unrote.errors import InputError
from unrote.measures import membership
from unrote.models.pretrained import load_pretrained
from unrote.sampling import load_unet, sample


class Trap:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return Path.write_text, (Path("unpickled"), "it ran")


def pickled(folder, part, name="diffusion_pytorch_model"):
    """The same weights in a .bin file, as old models have them."""
    from safetensors.torch import load_file

    file = folder / part / f"{name}.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    return file.with_suffix(".bin")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_pickled_unet_is_refused_and_the_advice_works(folder, tmp_path):
    file = pickled(folder, "unet")
    assert DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False).unet is not None, "diffusers reads it"
    with pytest.raises(InputError, match=f"{re.escape(str(file))} must be unpickled") as refused:
        sample(folder, 1, out=tmp_path / "samples")
    assert not (tmp_path / "samples").exists()
    advice = re.search(r"DiffusionPipeline\..*", str(refused.value)).group()
    exec(advice.replace("FOLDER", "'safe'"), {"DiffusionPipeline": DiffusionPipeline})
    load_unet(tmp_path / "safe", None, "ema")


def test_what_is_in_a_pickle_does_not_run(folder, tmp_path):
    torch.save(Trap(), pickled(folder, "unet"))
    for load in (lambda: load_unet(folder, None, "ema"), lambda: load_pipeline(str(folder), torch.device("cpu"))):
        with pytest.raises(InputError, match="must be unpickled"):
            load()
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(("part", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_a_pickled_part_of_a_text_to_image_pipeline_is_refused(tmp_path, part, name):
    tiny_stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    file = pickled(tmp_path / "sd", part, name)
    if part == "text_encoder":
        file = file.rename(file.with_name("pytorch_model.bin"))
    for load in (lambda: load_pretrained(str(tmp_path / "sd")), lambda: load_pipeline(str(tmp_path / "sd"), "cpu")):
        with pytest.raises(InputError, match=f"{re.escape(str(file))} must be unpickled.*convert the folder"):
            load()


def test_pickled_weights_of_a_run_are_refused(tmp_path):
    """By sampling, and by membership inference, which reads the same model."""
    np.savez(tmp_path / "toy.npz", images=toy_images().images)
    run = toy_run(tmp_path / "run", images=tmp_path / "toy.npz", training__epochs=1)
    for file in (run.model_folder / "unet").glob("*.safetensors"):
        pickled(run.model_folder, "unet", file.stem)
    with pytest.raises(InputError, match="must be unpickled"):
        sample(run, 1, steps=2)
    with pytest.raises(InputError, match="must be unpickled"):
        membership(run, toy_images(seed=5).images)


def test_code_beside_a_model_does_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/own.py").write_text("open('ran', 'w')\nclass C: pass\nclass M: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    torch.save({"x": torch.zeros(1)}, tmp_path / "model/pytorch_model.bin")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(InputError, match=r"trust_remote_code|custom code"):
        VisionModel("dinov2", str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()
