"""Sampling with prompts: image i is a function of model, prompt, seed and i, and what plain diffusers gives."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from click.testing import CliRunner
from diffusers import DDIMScheduler, DiffusionPipeline

from forking import Command
from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl
from toy import toy_images, toy_run
from unrote.api import train
from unrote.cli import cli
from unrote.data import in_memory_store, open_images
from unrote.errors import InputError
from unrote.sampling import sample
from unrote.seeding import derive_seed
from unrote.text.prompts import Prompt, read_prompts

FEW = {"steps": 4, "batch_size": 2}
PROMPTS = ["red cat", "a dog", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(root / "tokenizer", vae_levels=2, safety_checker=True).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    root = tmp_path_factory.mktemp("xl")
    tiny_stable_diffusion_xl(root / "tokenizer").save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Velocity prediction, no safety checker, nothing but half-precision files."""
    root = tmp_path_factory.mktemp("half")
    pipeline = tiny_stable_diffusion(root / "tokenizer", prediction_type="v_prediction").to(torch.float16)
    pipeline.save_pretrained(root / "model", variant="fp16")
    assert not list((root / "model").glob("*/model.safetensors"))
    return root / "model"


@pytest.fixture(scope="module")
def seven(folder, tmp_path_factory):
    return sample(folder, 7, prompts=PROMPTS, out=tmp_path_factory.mktemp("seven") / "samples", **FEW)


def pixels_in(where):
    return {int(path.stem): np.asarray(Image.open(path)).astype(int) for path in sorted(where.glob("*.png"))}


def rows_of(where):
    return [json.loads(line) for line in (where / "samples.jsonl").read_text().splitlines()]


def assert_levels_apart(found, expected, most):
    assert found.keys() == expected.keys()
    assert max(int(np.abs(found[i] - expected[i]).max()) for i in expected) <= most


# Image i.


def test_image_i_does_not_depend_on_how_many_are_made_nor_on_the_other_prompts(folder, seven, tmp_path):
    expected = pixels_in(seven)
    few = pixels_in(sample(folder, 2, prompts=PROMPTS, out=tmp_path / "few", **FEW))
    assert_levels_apart(few, {i: expected[i] for i in range(2)}, 0)
    others = pixels_in(sample(folder, prompts=["red cat", "cat", "dog"], out=tmp_path / "others", **FEW))
    assert len(others) == 3, "one per prompt"
    assert_levels_apart({0: others[0]}, {0: expected[0]}, 0)
    assert (others[1] != expected[1]).any(), "the prompt matters"
    assert len({image.tobytes() for image in expected.values()}) == 7, "a prompt's second image is another one"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_another_batch_size_changes_a_pixel_by_one_level_at_most(folder, seven, tmp_path, batch_size):
    found = pixels_in(sample(folder, 7, prompts=PROMPTS, out=tmp_path / "s", steps=4, batch_size=batch_size))
    assert_levels_apart(found, pixels_in(seven), 1)


def test_after_images_were_lost_the_same_are_made_again(folder, seven, tmp_path):
    where = sample(folder, 5, prompts=PROMPTS, out=tmp_path / "s", **FEW)
    for index in (1, 4):
        (where / f"{index:06d}.png").unlink()
    kept = (where / "000002.png").stat().st_mtime_ns
    torch.manual_seed(99)
    sample(folder, 7, prompts=PROMPTS, out=where, **FEW)
    assert (where / "000002.png").stat().st_mtime_ns == kept
    assert_levels_apart(pixels_in(where), pixels_in(seven), 0)
    assert rows_of(where) == rows_of(seven)


@pytest.mark.parametrize("name", ["folder", "xl", "half"])
@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 5.0, "negative_prompt": "a cat"}])
def test_plain_diffusers_makes_the_same_image_from_the_seed_in_samples_jsonl(request, tmp_path, name, guidance):
    source = request.getfixturevalue(name)
    where = sample(source, prompts=PROMPTS, out=tmp_path / "s", steps=4, batch_size=1, **guidance)
    variant = {"variant": "fp16", "torch_dtype": torch.float32} if name == "half" else {}
    pipeline = DiffusionPipeline.from_pretrained(source, **variant)
    if name == "folder":
        pipeline.safety_checker = None
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    for row, image in zip(rows_of(where), pixels_in(where).values(), strict=True):
        draw = torch.Generator().manual_seed(row["generator_seed"])
        plain = pipeline(row["prompt"], num_inference_steps=4, generator=draw, **guidance).images[0]
        np.testing.assert_array_equal(np.asarray(plain).astype(int), image)
        assert image.std() > 1


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("dpm-solver++", 0.0)])
def test_the_samplers_own_noise_belongs_to_the_image_too(folder, tmp_path, sampler, eta):
    options = {"prompts": PROMPTS, "steps": 4, "sampler": sampler, "eta": eta}
    one = pixels_in(sample(folder, out=tmp_path / "one", batch_size=1, **options))
    assert_levels_apart(pixels_in(sample(folder, out=tmp_path / "three", batch_size=3, **options)), one, 1)


def test_a_seed_of_a_prompts_own_is_the_generators_and_no_image_comes_twice(folder, tmp_path):
    prompts = [Prompt("red cat", seed=7), Prompt("red cat"), Prompt("red cat", seed=8)]
    where = sample(folder, 6, prompts=prompts, out=tmp_path / "s", seed=3, **FEW)
    seeds = [row["generator_seed"] for row in rows_of(where)]
    again = [derive_seed(7, "again", 1), derive_seed(3, "sample", 4), derive_seed(8, "again", 1)]
    assert seeds == [7, derive_seed(3, "sample", 1), 8, *again]
    assert len({image.tobytes() for image in pixels_in(where).values()}) == 6


def test_guidance_size_and_negative_prompt_change_the_image(folder, seven, tmp_path):
    def first(**options):
        return pixels_in(sample(folder, 1, prompts=PROMPTS, out=tmp_path / str(options), **(FEW | options)))[0]

    plain = pixels_in(seven)[0]
    assert (first(guidance_scale=2.0) != plain).any() and (first(negative_prompt="a dog") != plain).any()
    assert plain.shape == (16, 16, 3) and first(resolution=24).shape == (24, 24, 3)


# Models of runs.


@pytest.fixture(scope="module", params=[("folder", "full"), ("folder", "lora"), ("xl", "lora")])
def tuned(request, tmp_path_factory):
    base, kind = request.getfixturevalue(request.param[0]), request.param[1]
    if kind == "lora":
        pytest.importorskip("peft")
    images = in_memory_store(toy_images(8, side=16).images, source="toy", captions=["red cat", "a dog"] * 4)
    settings = {
        "model.pretrained": str(base), "model.train": kind, "training.epochs": 3,
        "training.batch_size": 4, "training.learning_rate": 0.01, "training.ema_decay": 0.5,
        "training.lr_warmup_steps": 0, "training.mixed_precision": "no",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNROTE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train(images, out=tmp_path_factory.mktemp("tuned") / "run", method="standard", settings=settings)


def test_a_run_is_sampled_with_its_own_weights_averaged_or_raw_at_its_own_size(tuned, tmp_path):
    base, made = tuned.config.model.pretrained, {}
    untrained = sample(base, 1, prompts=PROMPTS, out=tmp_path / "base", **FEW)
    for weights in ("ema", "raw"):
        made[weights] = sample(tuned, 2, prompts=PROMPTS, out=tmp_path / weights, weights=weights, **FEW)
        pipeline = DiffusionPipeline.from_pretrained(base)
        pipeline.safety_checker = None
        if tuned.config.model.train == "lora":
            where = tuned.model_folder / ("raw" if weights == "raw" else "")
            pipeline.load_lora_weights(where, weight_name="pytorch_lora_weights.safetensors")
        else:
            variant = "raw" if weights == "raw" else None
            pipeline.unet = type(pipeline.unet).from_pretrained(tuned.model_folder, subfolder="unet", variant=variant)
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )
        draws = [torch.Generator().manual_seed(row["generator_seed"]) for row in rows_of(made[weights])]
        plain = pipeline(PROMPTS[:2], num_inference_steps=4, guidance_scale=7.5, generator=draws).images
        for image, expected in zip(pixels_in(made[weights]).values(), plain, strict=True):
            np.testing.assert_array_equal(np.asarray(expected).astype(int), image)
    assert (pixels_in(made["ema"])[0] != pixels_in(made["raw"])[0]).any()
    assert (pixels_in(made["ema"])[0] != pixels_in(untrained)[0]).any(), "training changed the model"
    settings = json.loads((made["ema"] / "sampling.json").read_text())
    assert settings["weights"] == "ema" and settings["size"] == [16, 16]
    with pytest.raises(InputError, match="give --prompts"):
        sample(tuned, 2, out=tmp_path / "without", **FEW)


# What is written.


def test_prompts_and_origins_are_kept_and_captions_come_back(folder, tmp_path):
    file = tmp_path / "metadata.jsonl"
    rows = [
        {"file_name": "cats/red.png", "text": "red cat"},
        {"file_name": "./b.png", "text": ["a dog", "a red\ndog"], "seed": 4},
        {"prompt": "cat"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(file)
    assert prompts == [
        Prompt("red cat", None, "cats/red.png"), Prompt("a dog", 4, "b.png"), Prompt("a red\ndog", 4, "b.png"),
        Prompt("cat"),
    ]  # fmt: skip
    where = sample(folder, prompts=file, out=tmp_path / "s", **FEW)
    found = [(row["file"], row["prompt"], row.get("origin")) for row in rows_of(where)]
    assert found == [(f"{i:06d}.png", prompt.text, prompt.origin) for i, prompt in enumerate(prompts)]
    texts = [prompt.text for prompt in prompts]
    assert open_images(where, resolution=None).captions == texts
    packed = open_images(sample(folder, prompts=file, out=tmp_path / "s.npz", **FEW), resolution=None)
    assert list(packed.captions) == texts
    np.testing.assert_array_equal(np.stack(list(pixels_in(where).values())), packed.images[:])
    settings = json.loads((where / "sampling.json").read_text())
    assert settings["guidance_scale"] == 7.5 and settings["prompts"] == 4 and settings["negative_prompt"] is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompts": [*PROMPTS[:2], "cat"]}, "prompts_sha256"),
        ({"guidance_scale": 2.0}, r"guidance_scale: 7\.5 -> 2"),
        ({"negative_prompt": "cat"}, "negative_prompt: None -> cat"),
        ({"resolution": 24}, r"size: None -> \[24, 24\]"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(folder, seven, changed, named):
    before = {path: path.stat().st_mtime_ns for path in seven.iterdir()}
    with pytest.raises(InputError, match=named):
        sample(folder, 7, out=seven, **({"prompts": PROMPTS} | FEW | changed))
    assert {path: path.stat().st_mtime_ns for path in seven.iterdir()} == before


def test_what_cannot_be_is_refused(folder, tmp_path):
    out = tmp_path / "s"
    run = toy_run(tmp_path / "run", training__epochs=1)
    for model, options, message in (
        (folder, {}, "text-to-image model; give --prompts"),
        (run, {"prompts": PROMPTS}, "takes no text"),
        (run.model_folder, {"prompts": PROMPTS}, "takes no text"),
        (tmp_path, {"prompts": PROMPTS}, "neither a run folder nor a diffusers pipeline"),
        (run, {"negative_prompt": "cat"}, "with --prompts"),
        (folder, {"prompts": []}, "at least one text"),
        (folder, {"prompts": PROMPTS, "negative_prompt": "x", "guidance_scale": 1.0}, "needs guidance"),
        (folder, {"prompts": PROMPTS, "steps": 7}, "--steps 7.*use 5"),
        (folder, {"prompts": tmp_path / "none.txt"}, r"none\.txt"),
    ):
        with pytest.raises(InputError, match=message):
            sample(model, out=out, **(FEW | options))
        assert not out.exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": 3}', '"text"'),
        ('{"text": []}', '"text"'),
        ('{"text": "x", "seed": -1}', "seed"),
        ('{"text": "x", "seed": true}', "seed"),
        ('{"text": "x", "file_name": 1}', "file_name"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, message):
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(InputError, match=f"line 2.*{message}"):
        read_prompts(file)


def test_the_commands_take_training_captions_to_an_audit_of_what_they_bring_back(folder, tmp_path):
    photos, samples = tmp_path / "photos", tmp_path / "samples"
    photos.mkdir()
    for index, image in enumerate(toy_images(6, side=16).images):
        Image.fromarray(image).save(photos / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": PROMPTS[index % 3]} for index in range(6)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ["sample", str(folder), "--prompts", str(photos / "metadata.jsonl"), "--out", str(samples)]
    made = CliRunner().invoke(
        cli, [*sampling, "--steps", "4", "--guidance-scale", "3", "--device", "cpu"], catch_exceptions=False
    )
    assert f"{samples}: 6 images" in made.stdout
    audited = CliRunner().invoke(
        cli, ["audit", str(samples), "--train", str(photos), "--max-shift", "0", "--json"], catch_exceptions=False
    )
    prompted = json.loads(audited.stdout)["prompted"]
    assert prompted["paired"] == prompted["images"] == 6
    assert audited.exit_code == 0 and "prompt_train_name" in (tmp_path / "samples-report" / "pairs.csv").read_text()
    missing = CliRunner().invoke(cli, ["sample", str(folder), "--out", str(tmp_path / "x")])
    assert missing.exit_code != 0 and "--prompts FILE" in str(missing.exception)


def test_killed_and_given_again_the_command_ends_as_undisturbed(folder, tmp_path):
    out, file = tmp_path / "killed", tmp_path / "p.jsonl"
    rows = [{"text": text, "file_name": f"{number}.png"} for number, text in enumerate(PROMPTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--steps", "20", "--batch-size", "1", "--num", "16", "--device", "cpu"]
    command = ["-m", "unrote", "sample", folder, "--prompts", file, "--out", out, *settings]
    process = Command(command)
    while len(list(out.glob("[0-9]*.png"))) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.finish()
    made = len(list(out.glob("[0-9]*.png")))
    assert 2 <= made < 16 and not (out / "samples.jsonl").exists()
    assert Command(command).finish().returncode == 0
    whole = sample(folder, 16, prompts=file, out=tmp_path / "whole", steps=20, batch_size=1)
    assert_levels_apart(pixels_in(out), pixels_in(whole), 0)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
