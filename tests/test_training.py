"""Training as users start it: equal methods are equal, budgets are kept, every option trains, outputs are right."""

import copy
import json
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file

from toy import (
    SETTINGS,
    assert_same_run,
    everything_of,
    largest_difference,
    log_of,
    summary_of,
    toy_images,
    toy_run,
    weights_of,
)
from unrote.config import METHODS, ModelConfig
from unrote.errors import InputError
from unrote.models.denoiser import DenoisingLoss, build_schedule, build_unet
from unrote.seeding import derive_seed
from unrote.training.budget import Budget
from unrote.training.ema import EMA
from unrote.training.run import Run

ALL = list(METHODS)


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """Ordinary training, which much is compared with."""
    return toy_run(tmp_path_factory.mktemp("standard") / "run")


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    """The whole method."""
    return toy_run(tmp_path_factory.mktemp("plus") / "run", "iet-agc+")


def assert_same_training(found, expected):
    for variant in (None, "raw"):
        ours, theirs = weights_of(found, variant), weights_of(expected, variant)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


# What must be equal to ordinary training, or to itself.


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("iet", {"ensemble__num_shards": 1}),
        ("iet", {"ensemble__num_shards": 1, "ensemble__local_epochs": 0.7}),
        ("iet", {"ensemble__num_shards": 1, "ensemble__optimizer_state": "average"}),
        ("agc", {"gate__skip_ratio": 1e-30}),
        ("iet-agc", {"ensemble__num_shards": 1, "gate__skip_ratio": 1e-30}),
    ],
)
def test_a_method_without_effect_is_ordinary_training(tmp_path, standard, method, settings):
    run = toy_run(tmp_path / "run", method, **settings)
    assert_same_training(run, standard)
    assert everything_of(run)["ledger.csv"] == everything_of(standard)["ledger.csv"]
    rounds = [{key: value for key, value in line.items() if key != "round"} for line in log_of(run)]
    assert rounds == [{key: value for key, value in line.items() if key != "round"} for line in log_of(standard)]


@pytest.mark.parametrize("method", ["standard", "iet-agc+"])
def test_the_same_again_is_the_same_and_another_seed_is_not(tmp_path, request, method):
    first = request.getfixturevalue("standard" if method == "standard" else "plus")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert_same_run(toy_run(tmp_path / "again", method), first)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    other = weights_of(toy_run(tmp_path / "other", method, seed=1))
    assert largest_difference(other, weights_of(first)) > 1e-3


def test_the_whole_method_does_something_on_these_toys(plus, standard):
    summary = summary_of(plus)
    assert summary["skipped"] > 10
    assert summary["augmented"] > 10
    assert summary["moved"] > 1
    assert largest_difference(weights_of(plus), weights_of(standard)) > 1e-3


# The budget.


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (26, {}),
        (26, {"ensemble__local_epochs": 0.3, "training__epochs": 1.55}),
        (7, {"training__epochs": 5, "training__batch_size": 16}),
        (3, {"training__epochs": 3, "training__batch_size": 2, "ensemble__local_epochs": 1}),
    ],
    ids=["plain", "parts of epochs", "batch larger than the set", "a shard is one image"],
)
def test_the_budget_in_samples_seen_is_exact_for_every_method(tmp_path, method, count, settings):
    run = toy_run(tmp_path / "run", method, images=toy_images(count), **settings)
    budget = round(count * settings.get("training__epochs", SETTINGS["training.epochs"]))
    ledger = run.read_ledger()
    assert ledger["visits"].sum() == budget
    assert summary_of(run)["samples_seen"] == budget
    assert log_of(run)[-1]["samples"] == budget
    assert ledger["skips"].sum() == summary_of(run)["skipped"]
    assert (ledger["skips"] + ledger["augmented"] <= ledger["visits"]).all(), "what is skipped is not trained on"
    if method in ("standard", "agc"):
        assert ledger["visits"].max() - ledger["visits"].min() <= 1


def test_one_image_trains(tmp_path):
    run = toy_run(tmp_path / "run", "agc", images=toy_images(1), training__epochs=5)
    assert run.read_ledger()["visits"].tolist() == [5]


@pytest.mark.parametrize("total", [1, 7, 100, 105, 1001])
@pytest.mark.parametrize("local", [0.5, 3.3, 28.999999999999996, 30.0, 104.0, 5000.0])
@pytest.mark.parametrize("sizes", [(1,), (4, 3), (9, 9, 8), (1,) * 20])
def test_shares_of_the_budget_add_up(total, local, sizes):
    budget = Budget(total, local, sizes)
    for k, size in enumerate(sizes):
        whole = budget.target(k, budget.num_rounds - 1, 1.0)
        assert whole == budget.target(k, budget.num_rounds, 1.0)
        assert abs(whole - total * size / sum(sizes)) < 1
        targets = [budget.target(k, r, part) for r in range(budget.num_rounds) for part in (0.5, 1.0)]
        assert all(0 <= target <= whole for target in targets), "nobody is asked for more than its share"
    assert sum(budget.target(k, budget.num_rounds - 1, 1.0) for k in range(len(sizes))) == total
    if budget.num_rounds > 1:
        before = sum(budget.target(k, budget.num_rounds - 2, 1.0) for k in range(len(sizes)))
        assert before < total, "no empty last round"


def test_a_share_of_a_round_larger_than_that_of_the_run(tmp_path):
    """2 of 3 samples in the first round: the third of five proxies would see one of them, but none of the three."""
    settings = {"ensemble__num_shards": 5, "ensemble__local_epochs": 0.4, "training__batch_size": 1}
    run = toy_run(tmp_path / "run", "iet", images=toy_images(5), training__epochs=0.6, **settings)
    assert run.read_ledger()["visits"].sum() == 3


# Every option trains, and does what it says.


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("options", "classes", "channels"),
    [
        ({"augmentation__ratio_source": "lookahead", "augmentation__policy": "proximity"}, 0, 3),
        ({"ensemble__split": "stratified", "model__class_conditional": True, "data__random_flip": True}, 3, 1),
        ({"training__optimizer": "adam", "training__lr_scheduler": "cosine", "training__use_ema": False}, 0, 3),
    ],
    ids=["lookahead", "classes", "adam"],
)
def test_targets_and_options_train(tmp_path, prediction_type, options, classes, channels):
    settings = {"model__prediction_type": prediction_type, "training__epochs": 2} | options
    images = toy_images(classes=classes, channels=channels)
    run = toy_run(tmp_path / "run", "iet-agc+", images=images, data__channels=channels, **settings)
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    assert json.loads((run.model_folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == (
        prediction_type
    )


@pytest.mark.parametrize(
    "options",
    [
        {"training__channels_last": True},
        {"training__mixed_precision": "bf16"},
        {"training__mixed_precision": "fp16"},
        {"model__dropout": 0.2},
        {"model__attention_levels": [1], "training__max_grad_norm": 0},
        {"augmentation__ratio_source": "lookahead", "training__gradient_accumulation_steps": 3},
        {"redistribution__topology": "shuffled-ring", "redistribution__every": 2, "ensemble__local_epochs": 1},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_computing_otherwise_changes_little_and_loses_nothing(tmp_path, plus, options):
    run = toy_run(tmp_path / "run", "iet-agc+", **options)
    assert run.read_ledger()["visits"].sum() == 26 * 4
    found, expected = log_of(run)[0], log_of(plus)[0]
    # A line is of one proxy: the first one of a single batch, of which look-ahead may have seen other views.
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.3), "the first steps of the same run"
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())


@pytest.mark.parametrize("method", ["standard", "agc"])
def test_accumulation_is_the_same_up_to_rounding(tmp_path, method):
    plain = toy_run(tmp_path / "plain", method, training__epochs=2)
    parts = toy_run(tmp_path / "parts", method, training__epochs=2, training__gradient_accumulation_steps=4)
    assert largest_difference(weights_of(parts, "raw"), weights_of(plain, "raw")) < 2e-3
    ours, theirs = parts.read_ledger(), plain.read_ledger()
    for name in ("visits", "skips", "augmented", "moves"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    np.testing.assert_allclose(ours["mean_ratio"], theirs["mean_ratio"], rtol=1e-2)
    assert [line["skipped"] for line in log_of(parts)] == [line["skipped"] for line in log_of(plain)]


def test_lookahead_with_nothing_kept_takes_no_step(tmp_path):
    """λ so high that all but the first visits are skipped: the weights then stay as they are."""
    settings = {"augmentation__ratio_source": "lookahead", "gate__skip_ratio": 1e9, "gate__bank__bins": 1}
    short = toy_run(tmp_path / "short", "iet-agc+", ensemble__num_shards=2, training__epochs=8 / 13, **settings)
    long = toy_run(tmp_path / "long", "iet-agc+", ensemble__num_shards=2, **settings)
    assert summary_of(short)["skipped"] == 0, "one batch for each proxy, at an empty bank"
    assert summary_of(long)["skipped"] == 26 * 4 - 16
    assert largest_difference(weights_of(long, "raw"), weights_of(short, "raw")) < 1e-6


@pytest.mark.parametrize("ratio_source", ["ledger", "lookahead"])
def test_augmentation_depends_on_where_ratios_come_from(tmp_path, ratio_source):
    run = toy_run(tmp_path / "run", "iet-agc+", augmentation__ratio_source=ratio_source, augmentation__beta=100)
    ledger = run.read_ledger()
    trained = ledger["visits"] - ledger["skips"]
    assert (ledger["augmented"] <= trained).all()
    assert 0.25 * trained.sum() < ledger["augmented"].sum() < trained.sum(), "nothing is known at the first visits"


def test_a_compiled_model_is_saved_and_averaged_as_any_other(tmp_path, standard):
    """With the compiler told to hand back what it is given, which is fast and exact."""
    with torch.compiler.set_stance("force_eager"):
        run = toy_run(tmp_path / "run", training__compile=True)
    assert_same_training(run, standard)
    assert log_of(run) == log_of(standard)


@pytest.mark.slow
@pytest.mark.skipif("UNROTE_TEST_COMPILE" not in os.environ, reason="takes minutes on a CPU: set UNROTE_TEST_COMPILE=1")
def test_compiled_computes_the_same_up_to_rounding(tmp_path, standard):
    run = toy_run(tmp_path / "run", training__compile=True)
    for found, expected in zip(log_of(run), log_of(standard), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = toy_run(tmp_path / "run", training__report_to="tensorboard")
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [line["step"] for line in log_of(run)]
    np.testing.assert_allclose([value for _, value in found], [line["loss"] for line in log_of(run)], rtol=1e-6)


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"unrote\[wandb\]"):
            toy_run(tmp_path / "run", training__report_to="wandb")


# The outputs.


def test_the_model_loads_with_diffusers_alone(plus, elsewhere):
    code = f"""
import sys, torch
from diffusers import DDPMPipeline
averaged = DDPMPipeline.from_pretrained({str(plus.model_folder)!r})
raw = DDPMPipeline.from_pretrained({str(plus.model_folder)!r}, variant="raw")
difference = max(float((a - b).abs().max()) for a, b in zip(averaged.unet.parameters(), raw.unet.parameters()))
image = averaged(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
assert image.shape == (1, 8, 8, 3), image.shape
assert averaged.scheduler.config.timestep_spacing == "trailing"
assert not [name for name in sys.modules if name.split(".")[0] == "unrote"]
print(difference)
"""
    assert float(elsewhere(code)) > 1e-4, "averaged and raw weights differ"


def test_averaged_and_raw_weights_are_what_they_are_called(tmp_path):
    """The raw weights do not depend on whether there is an average; the average is one, by a plain loop."""
    images, folder = toy_images(), tmp_path / "with"
    averaged = toy_run(folder, images=images, training__ema_decay=0.5, training__epochs=8 / 13)
    without = toy_run(tmp_path / "without", images=images, training__use_ema=False, training__epochs=8 / 13)
    raw = weights_of(averaged, "raw")
    for name, tensor in weights_of(without).items():
        assert torch.equal(raw[name], tensor)
    states = []
    for steps in (1, 2):  # 13 images seen are 2 steps; the weights after the first, by a shorter run
        short = toy_run(tmp_path / f"{steps}", images=images, training__use_ema=False, training__epochs=steps * 8 / 26)
        states.append(weights_of(short))
    torch.manual_seed(derive_seed(0, "init"))
    config = ModelConfig(block_out_channels=(32, 32))
    start = build_unet(config, resolution=8, channels=3, num_classes=None).state_dict()
    expected = start
    for step, state in enumerate(states, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in state}
    assert largest_difference(weights_of(averaged), expected) < 1e-6


def test_the_average_is_put_in_and_taken_out_again():
    model = torch.nn.Linear(3, 3)
    ema, own = EMA(model, 0.9), copy.deepcopy(model.state_dict())
    torch._foreach_add_([p.detach() for p in model.parameters()], 1.0)
    ema.update(1000)
    with pytest.raises(KeyError), ema.applied():
        torch.testing.assert_close(model.weight.detach(), own["weight"] + 0.1)
        raise KeyError
    torch.testing.assert_close(model.weight.detach(), own["weight"] + 1)


def test_a_run_folder_says_what_it_is(plus):
    assert Run(plus.path).config.method == "iet-agc+"
    assert plus.data["count"] == 26
    card = (plus.path / "README.md").read_text()
    assert "iet-agc+" in card
    assert "differential-privacy" in card
    assert DDPMPipeline.from_pretrained(plus.model_folder).unet.config.sample_size == 8
    header, *rows = (plus.path / "ledger.csv").read_text().splitlines()
    assert header == "index,name,visits,skips,augmented,moves,last_ratio,mean_ratio,running_ratio"
    assert [row.split(",")[1] for row in rows] == list(toy_images().names)
    assert not list(plus.path.rglob("*.tmp"))


# The loss.


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_loss_of_each_sample_by_an_independent_formula(prediction_type, beta_schedule):
    config = ModelConfig(block_out_channels=(32, 32), prediction_type=prediction_type, beta_schedule=beta_schedule)
    torch.manual_seed(0)
    unet = build_unet(config, resolution=8, channels=3, num_classes=None).eval()
    clean, noise, t = torch.rand(5, 3, 8, 8) * 2 - 1, torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 500, 998, 999])
    with torch.no_grad():
        found = DenoisingLoss(build_schedule(config), torch.device("cpu"))(unet, clean, noise, t, None)
    betas = {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "scaled_linear": np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2,
        "squaredcos_cap_v2": [
            min(1 - np.cos(((i + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
                / np.cos((i / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2, 0.999)
            for i in range(1000)
        ],
    }  # fmt: skip
    signal_power = np.cumprod(1 - np.asarray(betas[beta_schedule]))
    for i in range(5):
        a, s = signal_power[t[i]] ** 0.5, (1 - signal_power[t[i]]) ** 0.5
        with torch.no_grad():
            prediction = unet((a * clean[i] + s * noise[i])[None].float(), t[i]).sample[0]
        target = {"epsilon": noise[i], "sample": clean[i], "v_prediction": a * noise[i] - s * clean[i]}[prediction_type]
        assert found[i].item() == pytest.approx(((prediction - target) ** 2).mean().item(), rel=1e-3)


def test_the_loss_stays_fp32_under_autocast_and_one_sample_does_not_touch_another():
    config = ModelConfig(block_out_channels=(32, 32))
    torch.manual_seed(0)
    unet = build_unet(config, resolution=8, channels=3, num_classes=None).eval()
    clean, noise, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor([1, 200, 700, 999])
    for dtype in (None, torch.bfloat16):
        loss = DenoisingLoss(build_schedule(config), torch.device("cpu"), dtype)
        with torch.no_grad():
            whole = loss(unet, clean, noise, t, None)
            parts = torch.cat([loss(unet, clean[i : i + 1], noise[i : i + 1], t[i : i + 1], None) for i in range(4)])
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole, parts, rtol=1e-5 if dtype is None else 3e-2, atol=1e-6)


@pytest.mark.parametrize("channels", [(32, 32), (64, 64)])
def test_the_model_sees_its_timestep_and_its_class(channels):
    """The embedding is added to whole channels: a normalization of single channels takes it out again."""
    torch.manual_seed(0)
    config = ModelConfig(block_out_channels=channels)
    unet = build_unet(config, resolution=8, channels=3, num_classes=3).eval()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        early, late, other = (
            unet(images, torch.tensor(t), class_labels=torch.tensor([label])).sample
            for t, label in [(10, 0), (900, 0), (10, 1)]
        )
    assert (early - late).std() > 1e-3
    assert (early - other).std() > 1e-3


@pytest.mark.parametrize("resolution", [8, 12])
def test_a_model_is_a_function_of_its_configuration(resolution):
    config = ModelConfig(block_out_channels=(32, 32), attention_levels=(1,), attention_head_dim=16)
    unet = build_unet(config, resolution=resolution, channels=1, num_classes=5)
    assert isinstance(unet, UNet2DModel)
    assert (unet.config.num_class_embeds, unet.config.sample_size, unet.config.in_channels) == (5, resolution, 1)
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D")
    with pytest.raises(ValueError, match="multiple of 2"):
        build_unet(config, resolution=resolution + 1, channels=1, num_classes=None)


# What is refused.


def test_a_finished_run_is_left_as_it_is(plus, caplog):
    before = {path: path.stat().st_mtime_ns for path in plus.path.rglob("*") if path.name != ".lock"}
    with caplog.at_level(logging.INFO, "unrote"):
        toy_run(plus.path, "iet-agc+")
    assert "finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in plus.path.rglob("*") if path.name != ".lock"} == before


def test_another_configuration_or_other_data_are_refused(plus):
    with pytest.raises(InputError, match=r"training\.epochs: 4\.0 -> 5\.0; gate\.skip_ratio: 0\.9 -> 0\.8"):
        toy_run(plus.path, "iet-agc+", training__epochs=5, gate__skip_ratio=0.8)
    with pytest.raises(InputError, match=r"method: iet-agc\+ -> iet-agc"):
        toy_run(plus.path, "iet-agc")
    with pytest.raises(InputError, match=r"26 then, 27 now"):
        toy_run(plus.path, "iet-agc+", images=toy_images(27))
    with pytest.raises(InputError, match=r"not those the run was started on"):
        toy_run(plus.path, "iet-agc+", images=toy_images(seed=1))


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not a run folder"):
        toy_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="not a run folder"):
        toy_run(tmp_path / "thesis.tex")


def test_a_start_that_was_killed_before_the_configuration_was_written_is_gone_on_with(tmp_path, standard):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "data.json").write_text("{}")
    assert_same_run(toy_run(folder), standard)


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    run = Run(tmp_path / "run")
    code = f"""
from pathlib import Path
from unrote.training.run import Run
try:
    with Run(Path({str(run.path)!r})).locked(): print("got in")
except ValueError as error: print(error)
"""
    with run.locked():
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process" in other.stdout
    with run.locked():
        pass


@pytest.mark.parametrize("log_every", [3, 1000])
@pytest.mark.parametrize("method", ["standard", "iet-agc+"])
def test_diverging_is_said_and_leaves_no_model(tmp_path, method, log_every):
    with pytest.raises(InputError, match=r"diverged.*training\.learning_rate"):
        toy_run(tmp_path / "run", method, training__learning_rate=1e30, training__log_every_steps=log_every)
    assert not (tmp_path / "run" / "model").exists()
    assert not Run(tmp_path / "run").finished


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (toy_images(2), {"ensemble__num_shards": 3}, "between 1 and the number of samples, 2"),
        (toy_images(), {"ensemble__split": "stratified"}, "needs a label"),
        (toy_images(), {"model__class_conditional": True}, "no labels"),
        (toy_images(side=9), {}, r"multiple of 2"),
        (np.zeros((4, 8, 10, 3), np.uint8), {}, "not square"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "an array of images"),
    ],
    ids=["N < K", "no labels to balance", "no classes", "odd side", "not square", "nothing"],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_written(tmp_path, images, settings, message):
    with pytest.raises(InputError, match=message):
        toy_run(tmp_path / "run", "iet-agc+", images=images, **settings)
    assert not (tmp_path / "run").exists()


def test_outside_the_main_thread_it_trains_too(tmp_path, standard):
    thread = threading.Thread(target=toy_run, args=(tmp_path / "run",))
    thread.start()
    thread.join()
    assert_same_run(Run(tmp_path / "run"), standard)


@pytest.mark.parametrize("method", ["standard", "iet-agc+"])
def test_snapshots_are_models_of_the_way_and_change_nothing(tmp_path, standard, plus, method):
    run = toy_run(tmp_path / "run", method, training__snapshots=2)
    without = standard if method == "standard" else plus
    assert_same_training(run, without)
    folders = sorted((run.path / "snapshots").iterdir())
    # Half of the budget in whole batches, and all of it.
    assert [52 <= int(folder.name) <= 64 for folder in folders] == [True, False] and folders[1].name.endswith("104")
    first, last = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in folders)
    final = weights_of(run)
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert any(not torch.equal(first[name], final[name]) for name in final)


def test_as_many_snapshots_as_asked_for_where_the_budget_does_not_divide(tmp_path):
    run = toy_run(tmp_path / "run", training__snapshots=5, training__epochs=3.97)
    assert len(list((run.path / "snapshots").iterdir())) == 5
