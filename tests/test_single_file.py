"""Checkpoints of one file in the original layout: the weights, under the names that the original code gave them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

from PIL import Image

from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl
from toy import toy_images, toy_run
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.models.pretrained import describe, load_pretrained
from unrote.sampling import sample

pytestmark = pytest.mark.usefixtures("module_cache")

UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
"""The UNet of :func:`tiny_pipelines.tiny_unet`: diffusers' modules and the original ones."""

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip

VAE = {
    "encoder.down_blocks.0.resnets.": "encoder.down.0.block.",
    "encoder.down_blocks.1.resnets.": "encoder.down.1.block.",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "decoder.up_blocks.0.resnets.": "decoder.up.1.block.", "decoder.up_blocks.1.resnets.": "decoder.up.0.block.",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
"""Parts of names in the autoencoder of two levels, which counts the decoder's from the other end."""


OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip
"""Parts of names in OpenCLIP's text encoder, which has queries, keys and values in one."""


def as_clip(encoder, prefix):
    """A text encoder of CLIP, which has transformers' own names in those files."""
    state = encoder.state_dict()
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": v for name, v in state.items()}


def as_open_clip(encoder, prefix):
    """A text encoder under OpenCLIP's names."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    found = {"text_projection": state.pop("text_projection.weight", torch.eye(16)).T}
    for name in [name for name in state if "self_attn.q_proj" in name]:
        joined = torch.cat([state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = joined
    for name, value in state.items():
        for theirs, ours in OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return {f"{prefix}model.{name}": value for name, value in found.items()}


def texts_of(pipeline, family):
    """The text side of a file of Stable Diffusion 1, 2 or XL."""
    first = pipeline.text_encoder
    if family == "xl":
        second = as_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.")
        return as_clip(first, "conditioner.embedders.0.") | second
    return as_open_clip(first, "cond_stage_model.") if family == "2" else as_clip(first, "cond_stage_model.")


def in_original_layout(pipeline, family="1"):
    """All weights of a tiny Stable Diffusion under the names of the original code, half precision as published."""
    found = {}
    for name, value in pipeline.unet.state_dict().items():
        module = max((module for module in UNET if name.startswith(module + ".")), key=len)
        rest = name[len(module) + 1 :]
        if "resnets" in module:
            part, kind = rest.split(".")
            rest = f"{UNET_RESNET[part]}.{kind}"
        found[f"model.diffusion_model.{UNET[module]}.{rest}"] = value
    for name, value in pipeline.vae.state_dict().items():
        original = name
        for theirs, ours in VAE.items():
            original = original.replace(theirs, ours)
        convolved = "attn_1" in original and original.endswith("weight") and value.ndim == 2
        found[f"first_stage_model.{original}"] = value[:, :, None, None] if convolved else value
    found |= texts_of(pipeline, family)
    return {name: value.half().contiguous() for name, value in found.items()}


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
