"""What a run takes in each mode, counted without weights: against what really is kept and computed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
pytest.importorskip("peft")

from test_text_to_image import SETTINGS, captioned
from tiny_pipelines import tiny_stable_diffusion_3
from toy import toy_images
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.models.denoiser import build_unet
from unrote.models.making import make_task
from unrote.models.pretrained import load_pretrained
from unrote.models.sizing import size_of
from unrote.training.modes import operations_of
from unrote.training.plan import make_plan

pytestmark = pytest.mark.usefixtures("module_cache")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny_stable_diffusion_3(folder / "tokenizer").save_pretrained(folder / "sd3")
    return folder / "sd3"


def config_of(base, method="standard", **settings):
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(method=method, overrides=SETTINGS | {"model.pretrained": str(base)} | changed)


@pytest.mark.parametrize("family", ["base", "sd3"])
def test_activations_are_those_that_a_forward_pass_keeps(request, family):
    config, images, kept = config_of(request.getfixturevalue(family), training__batch_size=8), captioned(8), {}
    task = make_task(config, images, CPU)
    weights = {weight.untyped_storage().data_ptr() for weight in task.denoiser.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    # Tokens are padded to CLIP's 77 in the plan; this tokenizer has 12.
    condition = task.condition(torch.arange(8), 0, 1)
    clean = task.clean(torch.arange(8), None, torch.Generator())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss.predict(task.denoiser.train(), clean, clean, torch.full((8,), 500), condition)
    real, planned = sum(storage.nbytes() for storage in kept.values()), size_of(config, images).forward.saved
    assert 0.95 * real < planned < 2 * real


def test_attention_keeps_no_weights_of_every_token_for_every_other(base):
    """So that memory grows with the number of tokens and not with its square."""
    saved = [size_of(config_of(base, data__resolution=side), captioned_at(side)).forward.saved for side in (32, 64)]
    assert saved[1] < 4.1 * saved[0]


def captioned_at(side):
    return in_memory_store(toy_images(8, side=side).images, source="toy", captions=["a cat"] * 8)


def test_each_mode_is_what_the_plan_of_that_mode_says(tmp_path, base):
    images = captioned()
    plan = make_plan(config_of(base, "iet-agc+"), images, tmp_path / "run", only_plan=True)
    assert len(plan.modes) == 8
    for mode in plan.modes[1::2]:
        settings = {
            "model__train": mode.train,
            "training__mixed_precision": mode.mixed_precision,
            "training__gradient_checkpointing": mode.gradient_checkpointing,
        }
        alone = make_plan(config_of(base, "iet-agc+", **settings), images, tmp_path / "run")
        assert mode.bytes == alone.state_bytes + alone.frozen_bytes + alone.activation_bytes
        assert alone.modes == ()
    text = str(plan)
    assert "modes        full float32 " in text and "             lora float32 " in text
    assert text.count("with gradient checkpointing") == 4


def test_operations_are_those_of_a_step():
    config = load_config(preset="tiny", method="standard", overrides={"training.batch_size": 2})
    size = size_of(config, toy_images(8, side=16))
    unet = build_unet(config.model, resolution=16, channels=3, num_classes=None)
    with FlopCounterMode(display=False) as counted:
        unet(torch.zeros(2, 3, 16, 16), 5).sample.sum().backward()
    # The first convolution passes nothing back to the images.
    assert counted.get_total_flops() / 2 <= operations_of(config, size) < 1.1 * counted.get_total_flops() / 2


def test_passes_are_counted(tmp_path, base):
    images = captioned()

    def passes(method="standard", **settings):
        config = config_of(base, method, **settings)
        return operations_of(config, (size := size_of(config, images))) * size.batch / size.forward.flops

    assert passes() == 3 and passes(model__train="lora") == 2
    assert passes(training__gradient_checkpointing=True) == 4
    assert passes("iet-agc+", augmentation__ratio_source="lookahead", text__max_prediction_norm=1.0) == 5
    plan = make_plan(config_of(base), images, tmp_path / "run")
    assert plan.flops == plan.samples_seen * operations_of(config_of(base), size_of(config_of(base), images))
    assert "computing" not in str(plan), "nothing to say of so little"


def test_reading_a_caption_is_counted_in_passes_of_the_denoiser(base, tmp_path):
    config, images = config_of(base), captioned()
    size, pipeline = size_of(config, images), load_pretrained(str(base))
    tokens = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    with FlopCounterMode(display=False) as operations:
        pipeline.text_encoder(tokens)
    counted = size.reading * size.forward.flops / size.batch
    assert 0.8 < counted / operations.get_total_flops() < 1.01, "all but attention's own products"
    look = {"monitor__every": 1, "monitor__samples": 4, "monitor__steps": 5, "monitor__max_overhead": 3.0}
    config = config_of(base, **look, monitor__guidance_scale=1)
    looks = make_plan(config, images, tmp_path / "run").looks
    passes = 1.5 * 4 * (looks.count * (5 + 4) + size.reading)
    assert looks.overhead == pytest.approx(passes / (3 * 18 * config.training.epochs))
