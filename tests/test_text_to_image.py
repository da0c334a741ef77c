"""Fine-tuning text-to-image pipelines: the same exactness as for pixels, and outputs that plain diffusers loads."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

from forking import Command
from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl
from toy import assert_same_run, final_state, largest_difference, log_of, stop_in_step, summary_of, toy_images
from unrote.api import train
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.method.shards import SampleStream, split_shards
from unrote.models.adapters import average_products
from unrote.models.denoiser import DenoisingLoss
from unrote.models.making import make_task
from unrote.models.pretrained import load_pretrained
from unrote.publishing import files_to_push
from unrote.sampling import sample
from unrote.seeding import derive_seed, generator
from unrote.training.budget import make_budget
from unrote.training.plan import make_plan
from unrote.training.run import Run
from unrote.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("module_cache")
CPU = torch.device("cpu")
CAPTIONS = ["red cat", "a dog", "cat", "a red dog", "", "a cat"]
SETTINGS = {
    "training.mixed_precision": "no",
    "training.gradient_checkpointing": False,
    "text.dropout": 0,
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


def captioned(count=18, seed=0):
    pixels = toy_images(count, side=16, seed=seed).images
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    return in_memory_store(pixels, source="toy", captions=captions)


def tuned(out, base, method="standard", kind="full", images=None, **settings):
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    fixed = SETTINGS | {"model.pretrained": str(base), "model.train": kind}
    return train(captioned() if images is None else images, out=out, method=method, settings=fixed | changed)


def saved(run, kind="full"):
    name = "pytorch_lora_weights" if kind == "lora" else "unet/diffusion_pytorch_model"
    return load_file(run.model_folder / f"{name}.safetensors")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_trains_and_the_same_again_is_the_same(tmp_path, base, kind):
    first = tuned(tmp_path / "first", base, "iet-agc+", kind)
    assert_same_run(tuned(tmp_path / "second", base, "iet-agc+", kind), first)
    assert summary_of(first)["samples_seen"] == 3 * 18
    assert summary_of(first)["augmented"] > 0 and summary_of(first)["skipped"] > 0


def test_another_base_is_another_run(tmp_path, base):
    other = tmp_path / "other"
    tiny_stable_diffusion(tmp_path / "tokenizer", vae_levels=2, prediction_type="v_prediction").save_pretrained(other)
    first = tuned(tmp_path / "a", base, training__epochs=1)
    second = tuned(tmp_path / "b", other, training__epochs=1)
    assert log_of(first)[0]["loss"] != log_of(second)[0]["loss"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_gate_without_effect_and_caching_change_nothing(tmp_path, base, kind):
    standard = tuned(tmp_path / "standard", base, "standard", kind, data__random_flip=True)
    gated = tuned(tmp_path / "agc", base, "agc", kind, data__random_flip=True, gate__skip_ratio=1e-30)
    assert saved(gated, kind).keys() == saved(standard, kind).keys()
    assert all(torch.equal(value, saved(standard, kind)[name]) for name, value in saved(gated, kind).items())
    fresh = tuned(tmp_path / "fresh", base, "standard", kind, data__random_flip=True, data__cache_latents=False)
    # Adam can make a full step of what is rounding where a gradient is nearly 0: single weights may differ by that.
    again, expected = saved(fresh, kind), saved(standard, kind)
    assert max(float((again[name] - expected[name]).abs().mean()) for name in expected) < 1e-5
    for ours, theirs in zip(log_of(fresh), log_of(standard), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
base, model, kind = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(model if kind == "full" else base)
if kind == "lora":
    pipeline.load_lora_weights(model)
draw = torch.Generator().manual_seed(0)
image = pipeline("red cat", num_inference_steps=2, generator=draw, output_type="np", height=16, width=16).images
assert image.shape == (1, 16, 16, 3), image.shape
assert not [name for name in sys.modules if name.split(".")[0] == "unrote"]
torch.manual_seed(0)
latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 16)
torch.save(pipeline.unet.eval()(latents, 500, text).sample.detach(), model + "/../prediction.pt")
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_plain_diffusers_loads_it_and_computes_the_same(tmp_path, base, elsewhere, kind):
    settings = {"training__epochs": 1, "model__lora__alpha": 2.0, "training__use_ema": False}
    run = tuned(tmp_path / "run", base, "standard", kind, **settings)
    elsewhere(LOAD, base, run.model_folder, kind)
    found = torch.load(run.path / "prediction.pt", weights_only=True)

    torch.manual_seed(derive_seed(0, "init"))
    task = make_task(run.config, captioned(), torch.device("cpu"))
    state = final_state(run)["model"]
    task.trained.load_state_dict(state)
    torch.manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 16)
    with torch.no_grad():
        expected = task.denoiser.eval()(latents, 500, text).sample
        untrained = tiny_stable_diffusion(tmp_path / "t", vae_levels=2).unet.eval()(latents, 500, text).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - untrained).abs().max() > 1e-3


# K models side by side, by plain code, are the ensemble.


def explicit(config, images, rounds):
    """IET-AGC without half-rounds: K whole tasks, each with its optimizer, bank and schedule; one shared ledger."""
    shards = split_shards(len(images), config.num_shards, seed=config.seed)
    budget = make_budget(config, len(images), tuple(map(len, shards)))
    steps, ledger = [], None
    for _ in shards:
        torch.manual_seed(derive_seed(config.seed, "init"))
        step = TrainingStep(config, make_task(config, images, CPU), len(images), CPU, proxy_steps=1000)
        ledger = ledger or step.gate.ledger
        step.gate.ledger = ledger
        steps.append(step)
    seen, taken = [0] * len(shards), [0] * len(shards)
    for round_index in range(rounds):
        for k, (step, shard) in enumerate(zip(steps, shards, strict=True)):
            stream, end = SampleStream(config.seed, k), budget.target(k, budget.num_rounds, 1.0)
            while seen[k] < budget.target(k, round_index, 1.0):
                size = min(config.training.batch_size, end - seen[k])
                taken[k] += 1
                step(stream.take(shard, seen[k], size), proxy=k, step=taken[k])
                seen[k] += size
        states = [step.model.state_dict() for step in steps]
        shares = [len(shard) / len(images) for shard in shards]
        mean = {
            name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True)).float()
            for name in states[0]
        }
        for step in steps:
            step.model.load_state_dict(mean)
    return steps[0]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_ensemble_is_k_models_side_by_side(tmp_path, base, kind):
    run = tuned(tmp_path / "run", base, "iet-agc", kind, training__use_ema=False, text__dropout=0.3)
    found = final_state(run)["model"]
    expected = explicit(run.config, captioned(), rounds=3).model.state_dict()
    assert found.keys() == expected.keys()
    assert kind == "full" or all("/lora_" in name for name in found), "proxies are small files"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_proxies_of_adapters_are_small(tmp_path, base):
    sizes = {}
    for kind in ("full", "lora"):
        run = tuned(tmp_path / kind, base, "iet", kind, training__epochs=1)
        sizes[kind] = max(path.stat().st_size for path in (run.path / "proxies").iterdir())
    assert sizes["lora"] < sizes["full"] / 4


def test_the_product_average_is_the_nearest_of_its_rank():
    draw = torch.Generator().manual_seed(0)
    name = ("x/lora_A/default/weight", "x/lora_B/default/weight")
    for out, rank, into in [(12, 3, 9), (2, 4, 9), (12, 4, 2)]:
        states = []
        for _ in range(3):
            down, up = torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw)
            states.append(dict(zip(name, (down, up), strict=True)))
        weights = [0.5, 0.3, 0.2]
        average = average_products(iter(states), weights)
        mean = sum(w * s[name[1]].double() @ s[name[0]].double() for w, s in zip(weights, states, strict=True))
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        nearest = u[:, :rank] * s[:rank] @ v[:rank]
        assert average[name[0]].shape == (rank, into) and average[name[1]].shape == (out, rank)
        torch.testing.assert_close((average[name[1]] @ average[name[0]]).double(), nearest, rtol=1e-4, atol=1e-4)


def test_a_product_of_nothing_leaves_what_can_learn():
    """B is 0 at the start: the rows of A keep their length and their span, and the product stays 0."""
    draw = torch.Generator().manual_seed(0)
    name = ("x/lora_A/default/weight", "x/lora_B/default/weight")
    states = [dict(zip(name, (torch.randn(3, 9, generator=draw), torch.zeros(12, 3)), strict=True)) for _ in range(2)]
    average = average_products(states, [0.5, 0.5])
    assert not average[name[1]].any()
    length = torch.cat([state[name[0]] for state in states]).norm(dim=1).mean()
    torch.testing.assert_close(average[name[0]].norm(dim=1), length.expand(3))
    assert torch.linalg.matrix_rank(average[name[0]]) == 3


def test_products_are_averaged_in_training(tmp_path, base):
    runs = [tuned(tmp_path / how, base, "iet", "lora", model__lora__average=how) for how in ("factors", "product")]
    factors, product = (saved(run, "lora") for run in runs)
    assert largest_difference(factors, product) > 0
    assert all(tensor.isfinite().all() for tensor in product.values())


# Killed and gone on with.


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_stopped_and_gone_on_with_it_is_the_same_bit_for_bit(tmp_path, base, kind, monkeypatch):
    expected = tuned(tmp_path / "whole", base, "iet-agc+", kind)
    stop_in_step(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "run", base, "iet-agc+", kind)
    assert list((tmp_path / "run" / "checkpoints").glob("*.json")), "a checkpoint to go on from"
    assert_same_run(tuned(tmp_path / "run", base, "iet-agc+", kind), expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_base_model_under_the_same_path_is_refused_by_its_part(tmp_path, base, kind, monkeypatch):
    copied = shutil.copytree(base, tmp_path / "base")

    with monkeypatch.context() as patch:
        stop_in_step(1, patch)
        with pytest.raises(KeyboardInterrupt):
            tuned(tmp_path / "run", copied, "iet-agc+", kind)
    unet = UNet2DConditionModel.from_pretrained(copied / "unet")
    with torch.no_grad():
        unet.conv_out.bias.add_(1e-3)
    unet.save_pretrained(copied / "unet")
    with pytest.raises(InputError, match=r"base is not the model that .*run was started from \(unet differ\)"):
        tuned(tmp_path / "run", copied, "iet-agc+", kind)
    shutil.rmtree(copied)
    shutil.copytree(base, copied)
    run = tuned(tmp_path / "run", copied, "iet-agc+", kind, training__epochs=3)
    if kind == "lora":
        unet.save_pretrained(copied / "unet")
        with pytest.raises(InputError, match="unet differ"):
            sample(run, 1, prompts=["cat"], steps=2, out=tmp_path / "samples")


# What else it trains, and what is refused.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    tiny_stable_diffusion_xl(folder / "tokenizer").save_pretrained(folder / "sdxl")
    return folder / "sdxl"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sdxl_trains_and_plain_diffusers_loads_it(tmp_path, large, elsewhere, kind):
    run = tuned(tmp_path / "run", large, "iet-agc+", kind, training__epochs=2, text__dropout=0.5)
    assert run.read_ledger()["visits"].sum() == 36
    elsewhere(LOAD[: LOAD.index("torch.manual_seed")], large, run.model_folder, kind)


@pytest.mark.parametrize("family", ["base", "large"])
def test_conditions_are_what_the_pipeline_itself_computes(request, family):
    folder = request.getfixturevalue(family)
    images = captioned(4)
    settings = SETTINGS | {"model.pretrained": str(folder)}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for cached in (True, False):
        config = load_config(method="standard", overrides=settings | {"data.cache_latents": cached})
        task = make_task(config, images, CPU)
        found = task.condition(torch.arange(4), 0, 1)
        for index, caption in enumerate(images.captions[:4]):
            expected, _, *pooled = pipeline.encode_prompt(caption, device="cpu", num_images_per_prompt=1,
                                                          do_classifier_free_guidance=False)  # fmt: skip
            torch.testing.assert_close(found["encoder_hidden_states"][index], expected[0], rtol=1e-4, atol=1e-5)
            if pooled:
                text = found["added_cond_kwargs"]["text_embeds"][index]
                torch.testing.assert_close(text, pooled[0][0], rtol=1e-4, atol=1e-5)
        clean = task.clean(torch.arange(4), None, torch.Generator().manual_seed(1))
        pixels = torch.from_numpy(images.images[:4]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        expected = (posterior.mean + posterior.std * noise) * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["base", "large"])
def test_of_texts_that_vary_only_those_not_seen_before_are_read(request, family):
    images, read = captioned(12), []
    settings = SETTINGS | {"model.pretrained": str(request.getfixturevalue(family))}
    settings |= {"text.replace_caption": 0.5, "text.dropout": 0.3}
    configs = [load_config(method="standard", overrides=settings | {"data.cache_latents": c}) for c in (True, False)]
    kept, fresh = (make_task(config, images, CPU) for config in configs)
    kept._embed._others.encoders[0].register_forward_pre_hook(lambda _, arguments: read.append(len(arguments[0])))
    for step in range(1, 4):
        rows = torch.arange(12).roll(step)
        texts = kept._policy.captions_for(rows, generator(configs[0].seed, "text", 0, step))
        new = [text for text, row in zip(texts, rows, strict=True) if text not in ("", images.captions[row])]
        assert 0 < len(new) < len(texts) - texts.count("") < len(texts)
        found, expected = kept.condition(rows, 0, step), fresh.condition(rows, 0, step)
        assert read == [len(new)]
        read.clear()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_files_and_a_safety_checker(tmp_path):
    pipeline = tiny_stable_diffusion(tmp_path / "tokenizer", vae_levels=2, safety_checker=True)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "sd", variant="fp16")
    assert (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    run = tuned(tmp_path / "run", tmp_path / "sd", training__epochs=1)
    assert saved(run)["conv_in.weight"].dtype == torch.float32
    again = DiffusionPipeline.from_pretrained(run.model_folder)
    assert again.safety_checker is not None and again.feature_extractor is not None


@pytest.mark.parametrize(
    "options",
    [
        {"training__gradient_checkpointing": True},
        {"training__mixed_precision": "bf16", "model__lora__dropout": 0.1},
        {"training__gradient_accumulation_steps": 2},
        {"augmentation__ratio_source": "lookahead", "text__max_prediction_norm": 1e-6},
        {"text__replace_tokens": 0.5, "text__embedding_noise": 0.1, "training__noise_offset": 0.1},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_train(tmp_path, base, options):
    run = tuned(tmp_path / "run", base, "iet-agc+", "lora", training__epochs=2, **options)
    assert run.read_ledger()["visits"].sum() == 36
    if "text__max_prediction_norm" in options:
        named = [bool(caption) for caption in captioned().captions]
        skips, visits = (run.read_ledger()[name][named] for name in ("skips", "visits"))
        assert (skips == visits).all(), "whatever the text changes at all is skipped"


def test_gradient_checkpointing_changes_nothing(tmp_path, base):
    plain = tuned(tmp_path / "plain", base, training__epochs=1)
    again = tuned(tmp_path / "again", base, training__epochs=1, training__gradient_checkpointing=True)
    assert largest_difference(saved(again), saved(plain)) < 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_are_their_formula(kind):
    schedule = DDPMScheduler(prediction_type=kind)
    found = DenoisingLoss(schedule, CPU).min_snr_weights(torch.tensor([0, 300, 999]), 5.0)
    for weight, t in zip(found.tolist(), (0, 300, 999), strict=True):
        alpha = float(schedule.alphas_cumprod[t])
        snr = alpha / (1 - alpha)
        divisor = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[kind]
        assert weight == pytest.approx(min(snr, 5.0) / divisor, rel=1e-4)


def test_min_snr_weighs_what_is_minimized_and_not_what_the_gate_sees(tmp_path, base):
    settings = {"training__epochs": 8 / 18, "gate__skip_ratio": 1e-30}
    plain = tuned(tmp_path / "plain", base, "agc", **settings)
    weighted = tuned(tmp_path / "weighted", base, "agc", **settings, training__min_snr_gamma=0.1)
    assert largest_difference(saved(plain), saved(weighted)) > 0
    banks = [final_state(run)["bank"]["averages"] for run in (plain, weighted)]
    torch.testing.assert_close(*banks)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": toy_images(4, side=16)}, "no captions"),
        ({"data__resolution": 15}, "multiples of 2"),
        ({"model__lora__target_modules": ["to_nowhere"]}, "target_modules"),
        ({"model__pretrained": "no such folder"}, "no Hub id"),
        ({"model__pretrained": str(Path(__file__))}, "safetensors"),
        ({"model__pretrained": str(Path(__file__).parent)}, "model_index"),
        ({"model__pretrained": "flow"}, "a FlowMatchEulerDiscreteScheduler, does not say which betas"),
        ({"model__pretrained": "kind"}, "predicts 'flow_prediction'; known are epsilon"),
    ],
    ids=["captions", "side", "modules", "name", "file", "folder", "noise", "prediction"],
)
def test_what_can_not_work_is_refused_before_anything_is_written(tmp_path, base, changed, message):
    strange = {
        "flow": FlowMatchEulerDiscreteScheduler(),
        "kind": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
    if (scheduler := strange.get(changed.get("model__pretrained"))) is not None:
        shutil.copytree(base, tmp_path / "strange")
        shutil.rmtree(tmp_path / "strange/scheduler")
        scheduler.save_pretrained(tmp_path / "strange/scheduler")
        index = json.loads((tmp_path / "strange/model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (tmp_path / "strange/model_index.json").write_text(json.dumps(index))
        changed = {"model__pretrained": str(tmp_path / "strange")}
    with pytest.raises(InputError, match=message):
        tuned(tmp_path / "run", base, "standard", "lora", **({"images": captioned()} | changed))
    assert not (tmp_path / "run").exists()


def test_the_same_weights_of_another_configuration_are_encoded_anew(tmp_path, base, monkeypatch):
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    tuned(tmp_path / "first", base, training__epochs=1)
    kept = len(list((tmp_path / "cache/texts").glob("*.npy")))
    shutil.copytree(base, tmp_path / "other")
    config = tmp_path / "other/text_encoder/config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"hidden_act": "relu"}))
    tuned(tmp_path / "again", base, training__epochs=1)
    assert len(list((tmp_path / "cache/texts").glob("*.npy"))) == kept
    tuned(tmp_path / "second", tmp_path / "other", training__epochs=1)
    assert len(list((tmp_path / "cache/texts").glob("*.npy"))) == 2 * kept
    shutil.copytree(tmp_path / "other", tmp_path / "elsewhere")
    tuned(tmp_path / "third", tmp_path / "elsewhere", training__epochs=1)
    assert len(list((tmp_path / "cache/texts").glob("*.npy"))) == 2 * kept, "where it is from is no matter"


def test_text_encoders_that_stay_are_counted(tmp_path, base):
    plans = {}
    for name, more in (("once", {}), ("each", {"text.add_tokens": 2}), ("no", {"data.cache_latents": False})):
        settings = SETTINGS | {"model.pretrained": str(base), "model.train": "lora"} | more
        plans[name] = make_plan(load_config(method="standard", overrides=settings), captioned(), tmp_path / name)
    pipeline = load_pretrained(str(base))
    text, vae = (4 * sum(w.numel() for w in part.parameters()) for part in (pipeline.text_encoder, pipeline.vae))
    assert plans["each"].frozen_bytes - plans["once"].frozen_bytes == text
    assert plans["no"].frozen_bytes - plans["once"].frozen_bytes == text + vae


def test_the_command_tunes_a_folder_of_captioned_pictures(tmp_path, base):
    """The whole method with adapters, as users start it, and the same command again after it was finished."""
    images = captioned()
    (tmp_path / "pictures").mkdir()
    rows = []
    for index, (pixels, caption) in enumerate(zip(images.images, images.captions, strict=True)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    words = ["train", "--pretrained", base, "--data", tmp_path / "pictures", "--out", tmp_path / "run"]
    words += ["--method", "iet-agc+", "--set", "model.train=lora", "--json"]
    fixed = {key: value for key, value in SETTINGS.items() if not isinstance(value, list)}
    words += [word for key, value in fixed.items() for word in ("--set", f"{key}={value}")]
    command = ["-m", "unrote", *words]
    planned = Command([*command, "--dry-run"]).finish()
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert not (tmp_path / "run").exists()
    for _ in range(2):
        done = Command(command).finish()
        assert done.returncode == 0, done.stderr
    summary, run = json.loads(done.stdout), Run(tmp_path / "run")
    assert (summary["samples_seen"], summary["steps"]) == (plan["samples_seen"], plan["steps"]) == (54, plan["steps"])
    assert summary["skipped"] > 0 and summary["augmented"] > 0
    assert plan["parameters"] == sum(tensor.numel() for tensor in saved(run, "lora").values())
    assert sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) <= plan["disk_bytes"] + 100_000
    card = (run.path / "README.md").read_text()
    assert "base_model:" not in card and str(base) not in card and "load_lora_weights" in card
    pushed = files_to_push(run.path, "me/style")
    assert {"pytorch_lora_weights.safetensors", "raw/pytorch_lora_weights.safetensors", "README.md"} == set(pushed)
    for content in pushed.values():
        assert str(base).encode() not in (content if isinstance(content, bytes) else content.read_bytes())


def test_the_papers_recipe_is_planned_on_a_folder_in_that_layout(tmp_path, base):
    """Images anywhere in the archive, one JSON object of captions, as the data set is published; no network."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "laion-10k.zip", "w") as archive:
        table = {}
        for index in range(12):
            content = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (300, 280, 3), dtype=np.uint8)).save(content, "PNG")
            archive.writestr(f"laion/raw_images/{index}.png", content.getvalue())
            table[f"laion/raw_images/{index}.png"] = [f"a picture of {index}", "a picture"]
        archive.writestr("laion/laion_combined_captions.json", json.dumps(table))
    here = {"UNROTE_DATA": str(tmp_path / "data"), "HF_HUB_OFFLINE": "1"}
    words = ["data", "get", "laion-10k", "--from", str(tmp_path / "laion-10k.zip")]
    assert Command(["-m", "unrote", *words], **here).finish().returncode == 0
    words = ["train", "--preset", "laion-10k", "--method", "iet-agc+", "--out", str(tmp_path / "run"), "--json"]
    found = Command(["-m", "unrote", *words, "--dry-run"], **here).finish()
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    assert (plan["images"], plan["shape"], plan["rounds"]) == (12, [256, 256, 3], 25)
    assert plan["parameters"] == 865_910_724, "the denoiser of Stable Diffusion 2.1"
    assert plan["samples_seen"] == 160 * 12
    assert plan["state_bytes"] == 16 * 865_910_724
