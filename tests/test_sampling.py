"""Sampling: image i is a function of model, seed and i; the way from noise to a clean image, against plain formulas."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from toy import toy_images, toy_run, weights_of
from unrote.config import ModelConfig
from unrote.errors import InputError
from unrote.models.denoiser import build_schedule, build_unet
from unrote.sampling import Denoiser, sample, to_uint8, weights_hash
from unrote.seeding import generator

FEW = {"steps": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("run") / "run", training__ema_decay=0.5)


def pixels_in(folder):
    """Image by number."""
    return {int(path.stem): np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def assert_same_pixels(found, expected):
    assert found.keys() == expected.keys()
    for index, image in expected.items():
        np.testing.assert_array_equal(found[index], image)


def levels_apart(found, expected):
    return max(int(np.abs(found[i].astype(int) - expected[i].astype(int)).max()) for i in expected)


# Image i.


@pytest.fixture(scope="module")
def forty(run, tmp_path_factory):
    return sample(run, 40, out=tmp_path_factory.mktemp("forty") / "samples", **FEW)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_image_i_does_not_depend_on_how_many_are_made(run, tmp_path, sampler):
    many = pixels_in(sample(run, 20, out=tmp_path / "many", sampler=sampler, **FEW))
    few = pixels_in(sample(run, 3, out=tmp_path / "few", sampler=sampler, **FEW))
    assert_same_pixels(few, {index: many[index] for index in range(3)})
    assert all(image.std() > 0 for image in many.values())
    assert len({image.tobytes() for image in many.values()}) == 20


def test_in_two_goes_and_after_files_were_lost_it_is_the_same(run, forty, tmp_path):
    expected = pixels_in(forty)
    folder = tmp_path / "samples"
    for num in (5, 11, 40):
        sample(run, num, out=folder, **FEW)
    assert_same_pixels(pixels_in(folder), expected)
    for index in (0, 13, 14, 39):
        (folder / f"{index:06d}.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("00003[0-8].png")}
    sample(run, 40, out=folder, **FEW)
    assert_same_pixels(pixels_in(folder), expected)
    for index in range(16, 32):
        path = folder / f"{index:06d}.png"
        assert kept.get(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "its whole batch was there"


def test_what_is_there_is_not_made_again(run, tmp_path):
    folder = sample(run, 10, out=tmp_path / "samples", **FEW)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    sample(run, 10, out=folder, **FEW)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.png")} == before


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_another_batch_size_changes_a_pixel_by_one_level_at_most(run, forty, tmp_path, batch_size):
    found = pixels_in(sample(run, 6, out=tmp_path / "samples", steps=4, batch_size=batch_size))
    expected = pixels_in(forty)
    assert levels_apart(found, {index: expected[index] for index in range(6)}) <= 1


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_the_samplers_own_noise_belongs_to_the_image_too(run, tmp_path, sampler, eta):
    options = {"steps": 4, "sampler": sampler, "eta": eta}
    one = pixels_in(sample(run, 5, out=tmp_path / "one", batch_size=1, **options))
    five = pixels_in(sample(run, 5, out=tmp_path / "five", batch_size=5, **options))
    assert levels_apart(one, five) <= 1


def test_the_seed_and_the_number_decide_the_noise_whatever_torch_was_seeded_with(run, forty, tmp_path):
    torch.manual_seed(99)
    same = pixels_in(sample(run, 2, out=tmp_path / "same", **FEW))
    expected = pixels_in(forty)
    assert_same_pixels(same, {index: expected[index] for index in range(2)})
    other = pixels_in(sample(run, 2, out=tmp_path / "other", seed=1, **FEW))
    assert all((other[index] != same[index]).any() for index in range(2))


# The way from noise to image.


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_unet(ModelConfig(block_out_channels=(32, 32)), resolution=8, channels=3, num_classes=None).eval()


POWER = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class Recorder(torch.nn.Module):
    """The right answer for images that are noise of deviation 1/2, and a little of a network; notes the timesteps.

    Of an untrained network alone, rounding would grow into another image on the way.
    """

    def __init__(self, model, prediction_type="sample"):
        super().__init__()
        self.model, self.config, self.device, self.timesteps = model, model.config, torch.device("cpu"), []
        self.prediction_type = prediction_type

    def forward(self, images, timestep, class_labels=None):
        self.timesteps.append(int(timestep))
        a, s = float(POWER[timestep]) ** 0.5, float(1 - POWER[timestep]) ** 0.5
        clean = images * (a / 4) / (a * a / 4 + s * s) + 0.3 * self.model(images, timestep).sample
        epsilon = (images - a * clean) / s
        answer = {"sample": clean, "epsilon": epsilon, "v_prediction": a * epsilon - s * clean}[self.prediction_type]
        return SimpleNamespace(sample=answer)


def plain_ddim(model, noise, steps, prediction_type):
    """Song et al. 2021, Eq. 12 with η = 0, in float64, from T-1 down to the clean image; x0 clipped as in training."""
    times = [1000 - 1000 // steps * j - 1 for j in range(steps)]
    x = noise.double()
    for t, following in zip(times, [*times[1:], None], strict=True):
        a, s = POWER[t].sqrt(), (1 - POWER[t]).sqrt()
        output = model(x.float(), torch.tensor(t)).sample.double()
        clean = {"epsilon": (x - s * output) / a, "sample": output, "v_prediction": a * x - s * output}[prediction_type]
        epsilon = {"epsilon": output, "sample": (x - a * output) / s, "v_prediction": a * output + s * x}
        clean = clean.clamp(-1, 1)
        after = torch.tensor(1.0, dtype=torch.float64) if following is None else POWER[following]
        x = after.sqrt() * clean + (1 - after).sqrt() * epsilon[prediction_type]
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_ddim_equals_the_paper(tiny, prediction_type, steps):
    schedule = build_schedule(ModelConfig(prediction_type=prediction_type))
    recorder = Recorder(tiny, prediction_type)
    found = Denoiser(recorder, schedule, "ddim", steps, 0.0, seed=7)(range(3))
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator(7, "sample", i)) for i in range(3)])
    with torch.no_grad():
        expected = to_uint8(plain_ddim(Recorder(tiny, prediction_type), noise, steps, prediction_type))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 10
    assert recorder.timesteps[0] == 999
    assert len(recorder.timesteps) == steps


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("timesteps", [1000, 120])
def test_every_count_of_steps_that_is_not_refused_goes_from_the_last_timestep_to_the_clean_image(
    tiny, sampler, timesteps
):
    schedule = build_schedule(ModelConfig(num_train_timesteps=timesteps))
    accepted = 0
    for steps in range(1, timesteps + 2):
        try:
            scheduler = Denoiser(tiny, schedule, sampler, steps, 0.0, 0)._scheduler
        except InputError as error:
            fitting = int(str(error).rpartition("use ")[2])
            Denoiser(tiny, schedule, sampler, fitting, 0.0, 0)
            continue
        accepted += 1
        times = scheduler.timesteps.tolist()
        assert (len(times), times[0]) == (steps, timesteps - 1)
        assert times == sorted(set(times), reverse=True)
        assert times[-1] >= 0
        if isinstance(scheduler, DDIMScheduler):
            # What diffusers takes for the next timestep, here the one it really goes to and at the end none.
            following = [t - timesteps // steps for t in times]
            assert following[:-1] == times[1:]
            assert following[-1] < 0
            assert scheduler.final_alpha_cumprod == 1
        elif isinstance(scheduler, DPMSolverMultistepScheduler):
            assert scheduler.sigmas[-1] == 0
        else:
            assert scheduler.previous_timestep(times[-1]) < 0
    assert accepted >= 16, "at least the divisors"


def test_a_model_that_knows_the_answer_samples_it(tiny):
    """A denoiser that always predicts one clean image: every sampler must end at that image exactly."""
    answer = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)

    class Oracle(Recorder):
        def forward(self, images, timestep, class_labels=None):
            return SimpleNamespace(sample=answer.expand_as(images))

    schedule = build_schedule(ModelConfig(prediction_type="sample"))
    for sampler in ("ddim", "ddpm", "dpm-solver++"):
        found = Denoiser(Oracle(tiny), schedule, sampler, 10, 0.0, 0)(range(2))
        assert np.abs(found.astype(int) - to_uint8(answer.expand(2, -1, -1, -1)).astype(int)).max() <= 1


def test_levels_are_rounded_to_the_nearest():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.1]).view(6, 1, 1, 1)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 140]
    every = torch.arange(256).view(256, 1, 1, 1) / 127.5 - 1
    assert to_uint8(every).ravel().tolist() == list(range(256)), "what training reads comes back"


# Which weights, which classes, which form.


def test_averaged_and_raw_weights_are_the_right_ones_and_recorded(run, tmp_path):
    folders = {weights: sample(run, 3, out=tmp_path / weights, weights=weights, **FEW) for weights in ("ema", "raw")}
    assert levels_apart(*(pixels_in(folder) for folder in folders.values())) > 1
    for weights, folder in folders.items():
        settings = json.loads((folder / "sampling.json").read_text())
        unet = build_unet(run.config.model, resolution=8, channels=3, num_classes=None)
        unet.load_state_dict(weights_of(run, "raw" if weights == "raw" else None))
        assert (settings["weights"], settings["model_sha256"]) == (weights, weights_hash(unet))
        by_hand = Denoiser(unet.eval(), build_schedule(run.config.model), "ddim", 4, 0.0, 0)(range(8))
        assert_same_pixels(pixels_in(folder), dict(enumerate(by_hand[:3])))
    default = sample(run, 3, out=tmp_path / "default", **FEW)
    assert_same_pixels(pixels_in(default), pixels_in(folders["ema"]))


def test_a_run_without_average_samples_its_raw_weights_and_has_no_others(tmp_path):
    raw = toy_run(tmp_path / "run", training__use_ema=False, training__epochs=1)
    folder = sample(raw, 2, **FEW)
    assert folder == raw.path / "samples"
    assert json.loads((folder / "sampling.json").read_text())["weights"] == "raw"
    with pytest.raises(InputError, match="without EMA"):
        sample(raw, 2, out=tmp_path / "ema", weights="ema", **FEW)


def test_a_pipeline_folder_samples_as_the_run_does(run, forty, tmp_path):
    folder = sample(run.model_folder, 3, out=tmp_path / "samples", **FEW)
    expected = pixels_in(forty)
    assert_same_pixels(pixels_in(folder), {index: expected[index] for index in range(3)})
    with pytest.raises(InputError, match="no run folder"):
        sample(run.model_folder, 3, out=tmp_path / "raw", weights="raw", **FEW)


def test_classes_in_turn(tmp_path):
    images = toy_images(classes=3, channels=1)
    settings = {"model__class_conditional": True, "data__channels": 1, "model__block_out_channels": [64, 64]}
    conditional = toy_run(tmp_path / "run", images=images, **settings)
    folder = sample(conditional, 5, **FEW)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1]
    assert pixels_in(folder)[0].shape == (8, 8)
    unet = build_unet(conditional.config.model, resolution=8, channels=1, num_classes=3)
    unet.load_state_dict(weights_of(conditional))
    denoise = Denoiser(unet.eval(), build_schedule(conditional.config.model), "ddim", 4, 0.0, 0)
    denoise.label_of = lambda index: {"label": 2}
    assert (denoise(range(8))[2].squeeze() == pixels_in(folder)[2]).all()
    assert (denoise(range(8))[0].squeeze() != pixels_in(folder)[0]).any(), "the class matters"


def test_samples_jsonl_lists_every_image_that_is_there(run, tmp_path):
    folder = sample(run, 10, out=tmp_path / "samples", seed=5, **FEW)
    rows = [{"index": i, "seed": 5, "file": f"{i:06d}.png"} for i in range(10)]
    assert [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] == rows
    sample(run, 4, out=folder, seed=5, **FEW)
    assert [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] == rows


def test_one_npz(run, forty, tmp_path):
    path = sample(run, 10, out=tmp_path / "ten.npz", **FEW)
    with np.load(path, allow_pickle=False) as file:
        assert (file["images"].dtype, file["images"].shape) == (np.uint8, (10, 8, 8, 3))
        expected = pixels_in(forty)
        assert_same_pixels(dict(enumerate(file["images"])), {index: expected[index] for index in range(10)})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "ten.npz",
        "ten.samples.jsonl",
        "ten.sampling.json",
    ]
    assert len((tmp_path / "ten.samples.jsonl").read_text().splitlines()) == 10
    with pytest.raises(InputError, match="exists already"):
        sample(run, 10, out=path, **FEW)


def test_an_interrupted_npz_goes_on(run, tmp_path):
    parts = sample(run, 9, out=tmp_path / "samples.npz.parts", **FEW)
    (parts / "000003.png").unlink()
    path = sample(run, 4, out=tmp_path / "samples.npz", **FEW)
    assert np.load(path, allow_pickle=False)["images"].shape == (4, 8, 8, 3)
    assert len((tmp_path / "samples.samples.jsonl").read_text().splitlines()) == 4
    assert not parts.exists()


# What is refused.


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"steps": 5}, "steps: 4 -> 5"),
        ({"sampler": "ddpm"}, "sampler: ddim -> ddpm"),
        ({"weights": "raw"}, "weights: ema -> raw"),
        ({"batch_size": 4}, "batch_size: 8 -> 4"),
        ({"eta": 0.5}, r"eta: 0\.0 -> 0\.5"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(run, forty, changed, named):
    before = sorted(forty.iterdir())
    with pytest.raises(InputError, match=named):
        sample(run, 40, out=forty, **(FEW | changed))
    assert sorted(forty.iterdir()) == before


def test_the_model_may_move_but_not_change(run, forty, tmp_path):
    other = toy_run(tmp_path / "other", training__epochs=1)
    with pytest.raises(InputError, match="model_sha256"):
        sample(other, 40, out=forty, **FEW)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "run.json", "model"):
        (moved / name).symlink_to(run.path / name)
    sample(moved, 40, out=forty, **FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"steps": 2000}, "--steps 2000.*use 1000"),
        ({"steps": 7}, "--steps 7.*use 5"),
        ({"steps": 61, "sampler": "dpm-solver++"}, "--steps 61.*use 50"),
        ({"eta": -0.1}, "eta"),
        ({"eta": 1.5}, "eta"),
        ({"sampler": "euler"}, "dpm-solver"),
        ({"weights": "best"}, "ema and raw"),
    ],
)
def test_impossible_settings_are_refused_and_nothing_is_written(run, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        sample(run, out=tmp_path / "samples", **({"num": 2} | FEW | options))
    assert not (tmp_path / "samples").exists()


def test_what_is_no_model_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="neither a run folder nor a diffusers pipeline"):
        sample(tmp_path, 2, **FEW)
    with pytest.raises(InputError, match="not empty"):
        sample(run, 2, out=tmp_path, **FEW)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(InputError, match="not finished"):
        sample(unfinished, 2, **FEW)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="no diffusers pipeline"):
        sample(broken, 2, out=tmp_path / "out", **FEW)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
