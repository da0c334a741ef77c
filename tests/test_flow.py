"""Flow matching families: the loss by its formula, the same exactness as Stable Diffusion, outputs for diffusers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file

from forking import Command
from test_text_to_image import SETTINGS, captioned, explicit, tuned
from tiny_pipelines import tiny_flux, tiny_stable_diffusion_3
from toy import assert_same_run, final_state, largest_difference, log_of, stop_in_step, summary_of
from unrote.config import load_config
from unrote.errors import InputError
from unrote.models.flow import FlowLoss, shift_of
from unrote.models.making import make_task
from unrote.models.pretrained import describe, load_pretrained
from unrote.models.sizing import size_of
from unrote.sampling import sample

pytestmark = pytest.mark.usefixtures("module_cache")
CPU = torch.device("cpu")
FAMILIES = ["sd3", "sd3-t5", "flux"]
TARGETS = {"model__lora__target_modules": ["to_q", "to_v", "add_k_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    tiny_stable_diffusion_3(folder / "tokenizer").save_pretrained(folder / "sd3")
    tiny_stable_diffusion_3(folder / "tokenizer", t5=True).save_pretrained(folder / "sd3-t5")
    tiny_flux(folder / "tokenizer").save_pretrained(folder / "flux")
    return folder


def saved(run, kind):
    name = "pytorch_lora_weights" if kind == "lora" else "transformer/diffusion_pytorch_model"
    return load_file(run.model_folder / f"{name}.safetensors")


def task_of(folder, images, **settings):
    config = load_config(method="standard", overrides=SETTINGS | {"model.pretrained": str(folder)} | settings)
    return make_task(config, images, CPU)


# The loss.


def test_the_loss_is_its_formula():
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(2))
    timesteps = torch.tensor([0.25, 437.5, 999.0])
    seen = []

    def network(denoiser, noisy, at, condition):
        seen.append((noisy, at, condition))
        return noisy * 0.5

    found = FlowLoss(1000, 3.0, CPU, network=network)(None, clean, noise, timesteps, {"text": 1})
    for i, t in enumerate(timesteps.tolist()):
        sigma, x, e = t / 1000, clean[i].double().numpy(), noise[i].double().numpy()
        noisy = (1 - sigma) * x + sigma * e
        np.testing.assert_allclose(seen[0][0][i].numpy(), noisy, rtol=1e-4, atol=1e-6)
        assert float(found[i]) == pytest.approx(np.mean((0.5 * noisy - (e - x)) ** 2), rel=1e-5)
    assert seen[0][1] is timesteps and seen[0][2] == {"text": 1}


def test_timesteps_are_logit_normal_shifted_and_within_the_bank():
    for shift in (1.0, 3.0):
        found = FlowLoss(1000, shift, CPU).draw(40_000, torch.Generator().manual_seed(0))
        theirs = compute_density_for_timestep_sampling(
            "logit_normal", 40_000, 0.0, 1.0, generator=torch.Generator().manual_seed(1)
        )
        schedule = FlowMatchEulerDiscreteScheduler(shift=shift)
        expected = schedule.timesteps[(theirs * 1000).long()]
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert float(found.quantile(q)) == pytest.approx(float(expected.quantile(q)), abs=12)
        assert found.dtype == torch.float32 and len(found.unique()) > 39_000, "continuous"
    extreme = FlowLoss(1000, 1e9, CPU).draw(1000, torch.Generator().manual_seed(0))
    assert int(extreme.long().max()) == 999


def test_the_shift_is_the_schedulers():
    for options in ({"time_shift_type": "exponential"}, {"time_shift_type": "linear"}):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.7, **options)
        sigma = torch.tensor([0.1, 0.5, 0.9])
        for tokens in (256, 1024, 4096):
            mu = 0.7 + (1.15 - 0.7) * (tokens - 256) / (4096 - 256)
            s = shift_of(scheduler.config, tokens)
            torch.testing.assert_close(s * sigma / (1 + (s - 1) * sigma), scheduler.time_shift(mu, 1.0, sigma))
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0).config, 99) == 3.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training_predicts_what_the_pipeline_predicts(folders, family):
    """Conditions, latents and the call of the transformer are those of diffusers' own pipeline."""
    images = captioned(4)
    tasks = [task_of(folders / family, images, **{"data.cache_latents": cached}) for cached in (True, False)]
    pipeline = load_pretrained(str(folders / family))
    timestep, seen = 437.5, {}

    def record(module, arguments, options):
        seen.update(options)

    hook = pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    guidance = {"guidance_scale": 1.0}
    for index, caption in enumerate(images.captions[:4]):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(index))
        given = latents if family != "flux" else pipeline._pack_latents(latents, 1, 4, 8, 8)
        pipeline(caption, latents=given, num_inference_steps=1, output_type="latent", height=16, width=16, **guidance)
        scale = 1 if family != "flux" else 1000
        asked = seen | {"timestep": torch.tensor([timestep / scale]), "return_dict": False}
        with torch.no_grad():
            expected = pipeline.transformer(**asked)[0]
        if family == "flux":
            expected = pipeline._unpack_latents(expected, 16, 16, 2)
        for task in tasks:
            condition = task.condition(torch.tensor([index]), 0, 1)
            with torch.no_grad():
                found = task.loss._network(task.denoiser.eval(), latents, torch.tensor([timestep]), condition)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    hook.remove()
    for task in tasks:
        clean = task.clean(torch.arange(4), None, torch.Generator().manual_seed(1))
        pixels = torch.from_numpy(images.images[:4]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        expected = (posterior.mean + posterior.std * noise - 0.06) * 1.5
        torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-5)


# Training.


@pytest.mark.parametrize(("family", "kind"), [("sd3", "full"), ("sd3-t5", "lora"), ("flux", "lora")])
def test_a_gate_without_effect_changes_no_bit(tmp_path, folders, family, kind):
    base, settings = folders / family, {"training__epochs": 1, **TARGETS}
    standard = tuned(tmp_path / "standard", base, "standard", kind, **settings)
    gated = tuned(tmp_path / "agc", base, "agc", kind, gate__skip_ratio=1e-30, **settings)
    assert saved(gated, kind).keys() == saved(standard, kind).keys()
    assert all(torch.equal(value, saved(standard, kind)[name]) for name, value in saved(gated, kind).items())
    if kind == "lora":
        names = " ".join(saved(gated, kind))
        assert all(
            target in names for target in TARGETS["model__lora__target_modules"] if family != "flux" or "add" in target
        )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_ensemble_is_k_models_side_by_side(tmp_path, folders, kind):
    settings = {"training__use_ema": False, "text__dropout": 0.3}
    run = tuned(tmp_path / "run", folders / "sd3", "iet-agc", kind, **settings)
    found = final_state(run)["model"]
    expected = explicit(run.config, captioned(), rounds=3).model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("family", "kind"), [("sd3-t5", "full"), ("sd3", "lora"), ("flux", "lora")])
def test_stopped_and_gone_on_with_it_is_the_same_bit_for_bit(tmp_path, folders, family, kind, monkeypatch):
    settings = {"gate__skip_ratio": 0.97, "gate__bank__bins": 2}
    expected = tuned(tmp_path / "whole", folders / family, "iet-agc+", kind, **settings)
    assert summary_of(expected)["skipped"] > 0 and summary_of(expected)["augmented"] > 0
    stop_in_step(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "run", folders / family, "iet-agc+", kind, **settings)
    assert_same_run(tuned(tmp_path / "run", folders / family, "iet-agc+", kind, **settings), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"training__gradient_checkpointing": True},
        {"training__mixed_precision": "bf16"},
        {"augmentation__ratio_source": "lookahead", "text__max_prediction_norm": 1e-6},
        {"text__replace_tokens": 0.5, "text__embedding_noise": 0.1, "data__random_flip": True},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("family", ["sd3-t5", "flux"])
def test_options_train(tmp_path, folders, family, options):
    run = tuned(tmp_path / "run", folders / family, "iet-agc+", "lora", training__epochs=1, **options)
    assert run.read_ledger()["visits"].sum() == 18
    assert all(np.isfinite(row["loss"]) for row in log_of(run))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"training__min_snr_gamma": 5}, "training.min_snr_gamma: .* is a flow matching model"),
        ({"training__noise_offset": 0.1}, "training.noise_offset: .* is a flow matching model"),
        ({"data__resolution": 18}, "multiples of 4"),
        ({"data__resolution": 32}, "positions for 12 latents a side"),
    ],
    ids=["min-snr", "offset", "side", "positions"],
)
def test_what_can_not_work_is_refused_before_anything_is_written(tmp_path, folders, changed, message):
    with pytest.raises(InputError, match=message):
        tuned(tmp_path / "run", folders / "sd3", **changed)
    assert not (tmp_path / "run").exists()


# What comes out.

LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
base, model, kind, absent = sys.argv[1:]
absent = {name: None for name in absent.split()}
pipeline = DiffusionPipeline.from_pretrained(model if kind == "full" else base, **absent)
if kind == "lora":
    pipeline.load_lora_weights(model)
draw = torch.Generator().manual_seed(0)
options = {"generator": draw, "output_type": "np", "height": 16, "width": 16, "guidance_scale": 2.0}
image = pipeline("red cat", num_inference_steps=3, **options).images
assert not [name for name in sys.modules if name.split(".")[0] == "unrote"]
torch.save(torch.from_numpy(image), model + "/../image.pt")
"""


@pytest.mark.parametrize(("family", "kind"), [("sd3", "full"), ("sd3-t5", "lora"), ("flux", "full"), ("flux", "lora")])
def test_plain_diffusers_loads_it_and_makes_the_images_that_we_make(tmp_path, folders, elsewhere, family, kind):
    settings = {"training__epochs": 3, "training__learning_rate": 0.01, "training__use_ema": False}
    run = tuned(tmp_path / "run", folders / family, "standard", kind, **settings)
    absent = "text_encoder_3 tokenizer_3" if family == "sd3" else ""
    elsewhere(LOAD, folders / family, run.model_folder, kind, absent)
    theirs = (torch.load(run.path / "image.pt", weights_only=True)[0] * 255).round().numpy()
    prompts, options = [SimpleNamespace(text="red cat", seed=0, origin=None)], {"steps": 3, "guidance_scale": 2.0}
    made = sample(run, prompts=prompts, out=tmp_path / "samples", batch_size=1, **options)
    ours = np.asarray(Image.open(made / "000000.png"))
    assert np.abs(ours - theirs).max() <= 1
    plain = sample(folders / family, prompts=prompts, out=tmp_path / "plain", resolution=16, batch_size=1, **options)
    assert (np.asarray(Image.open(plain / "000000.png")) != ours).any(), "training changed the model"
    assert json.loads((made / "sampling.json").read_text())["sampler"] == "euler"


def test_averaged_and_raw_weights_are_both_sampled(tmp_path, folders):
    settings = {"training__learning_rate": 0.01, "training__ema_decay": 0.5}
    run = tuned(tmp_path / "run", folders / "sd3", "standard", "full", **settings)
    images = [
        np.asarray(Image.open(sample(run, 1, prompts=["cat"], weights=w, steps=2, out=tmp_path / w) / "000000.png"))
        for w in ("ema", "raw")
    ]
    assert (images[0] != images[1]).any()
    raw = load_file(run.model_folder / "transformer" / "diffusion_pytorch_model.raw.safetensors")
    assert largest_difference(raw, saved(run, "full")) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sampler": "ddim"}, "sampled by euler"), ({"negative_prompt": "cat"}, "learned guidance")],
)
def test_samplers_and_guidance_of_another_kind_are_refused(tmp_path, folders, base, options, message):
    with pytest.raises(InputError, match=message):
        sample(folders / "flux", 1, prompts=["cat"], out=tmp_path / "s", **options)
    with pytest.raises(InputError, match="euler: is for flow matching"):
        sample(base, 1, prompts=["cat"], out=tmp_path / "s", sampler="euler")
    assert not (tmp_path / "s").exists()


def test_the_command_tunes_and_samples(tmp_path, folders):
    images = captioned()
    (tmp_path / "pictures").mkdir()
    for index, (pixels, caption) in enumerate(zip(images.images, images.captions, strict=True)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(caption)
    words = ["train", "--pretrained", folders / "sd3", "--data", tmp_path / "pictures", "--out", tmp_path / "run"]
    words += ["--method", "iet-agc+", "--set", "model.train=lora", "--json"]
    fixed = {key: value for key, value in SETTINGS.items() if not isinstance(value, list)}
    words += [word for key, value in fixed.items() for word in ("--set", f"{key}={value}")]
    command = ["-m", "unrote", *words]
    plan, done = (json.loads(Command([*command, *more]).finish().stdout) for more in (["--dry-run"], []))
    assert done["samples_seen"] == plan["samples_seen"] == 54
    layers = load_file(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors")
    assert plan["parameters"] == sum(tensor.numel() for tensor in layers.values())
    assert plan["frozen_bytes"] > 0 and plan["activation_bytes"] > 0 and plan["cache_bytes"] > 0
    (tmp_path / "prompts.txt").write_text("red cat\n")
    words = ["sample", tmp_path / "run", "--num", "2", "--steps", "2", "--prompts", tmp_path / "prompts.txt"]
    assert Command(["-m", "unrote", *words]).finish().returncode == 0
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520),
        ("stabilityai/stable-diffusion-3.5-large", 8_056_627_520),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
    ],
)
def test_known_models_are_those_that_were_released(name, parameters):
    """By their numbers of parameters, counted without weights."""
    pipeline = describe(name)
    with torch.device("meta"):
        denoiser = pipeline.family.denoiser.from_config(pipeline.denoiser)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters
    assert pipeline.has_t5 and pipeline.autoencoder["latent_channels"] == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_counted_with_and_without_checkpointing(folders, family):
    settings = {"model.pretrained": str(folders / family), "model.train": "full", "training.mixed_precision": "no"}
    size = size_of(load_config(method="standard", overrides=settings), captioned(8))
    pipeline = load_pretrained(str(folders / family))
    assert size.trained == sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    assert 0 < size.forward.checkpointed < size.forward.saved
    # 6 captions, one of them empty; the latents' means and deviations of 8 images, 8x8 of 4 channels.
    tokens = {"sd3": 77 * 32 + 32, "sd3-t5": 77 * 32 + 256 * 48 + 32, "flux": 512 * 48 + 16}[family]
    assert size.cache_bytes == 4 * 6 * tokens + 4 * 8 * 2 * 4 * 8 * 8
