"""Baselines and variants on the one loop: each trains, follows its formula, is saved plainly and resumes exactly."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from toy import assert_same_run, final_state, largest_difference, log_of, summary_of, toy_images, toy_run, weights_of
from unrote.config import ModelConfig
from unrote.data.augmentations import LABELS
from unrote.errors import InputError
from unrote.method.outer import OuterOptimizer
from unrote.models.augmentation_labels import tell_of_augmentation, without_augmentation
from unrote.models.denoiser import build_unet
from unrote.seeding import derive_seed

AUGMENT = {"augmentation__enabled": True, "augmentation__policy": "all"}
OPERATIONS = {"augmentation__ops__brightness": 0.3, "augmentation__ops__shift": 0.25}


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """Ordinary training."""
    return toy_run(tmp_path_factory.mktemp("standard") / "run")


def interrupted_run(out, method, *, after=5, **settings):
    """Train, be asked to stop when the log has reached step ``after``, and go on by the same call."""
    settings = {"training__log_every_steps": 1, "training__checkpointing_steps": 10_000} | settings

    def ask_to_stop():
        log = out / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < after:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        toy_run(out, method, **settings)
    thread.join()
    assert not (out / "run.json").exists()
    return toy_run(out, method, **settings)


def assert_resumes(tmp_path, method, *, after=5, **settings):
    undisturbed = toy_run(tmp_path / "undisturbed", method, training__log_every_steps=1, **settings)
    # The log of an undisturbed run does not depend on when checkpoints are written.
    assert_same_run(interrupted_run(tmp_path / "interrupted", method, after=after, **settings), undisturbed)
    return undisturbed


# Augmenting everything, and telling of it.


@pytest.mark.parametrize("method", ["standard", "iet-agc+"])
def test_everything_is_augmented_whatever_its_ratio(tmp_path, method):
    run = toy_run(tmp_path / "run", method, **AUGMENT)
    ledger = run.read_ledger()
    np.testing.assert_array_equal(ledger["augmented"], ledger["visits"] - ledger["skips"])
    assert summary_of(run)["augmented"] > 50


def test_a_model_that_is_told_nothing_was_done_is_the_plain_model():
    torch.manual_seed(0)
    unet = build_unet(ModelConfig(block_out_channels=(32, 32)), resolution=8, channels=3, num_classes=3).eval()
    images, t, classes = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([2, 0])
    with torch.no_grad():
        expected = unet(images, t, class_labels=classes).sample
        tell_of_augmentation(unet, 5)
        labels = torch.rand(2, 5)
        at_start = unet(images, t, class_labels={"classes": classes, "augmentation": labels}).sample
        unet.class_embedding.augmentation.weight.normal_()
        untouched = unet(images, t, class_labels={"classes": classes, "augmentation": 0 * labels}).sample
        told = unet(images, t, class_labels={"classes": classes, "augmentation": labels}).sample
        with without_augmentation(unet):
            plain = unet(images, t, class_labels=classes).sample
            names = set(unet.state_dict())
    assert torch.equal(at_start, expected), "the layer starts at 0"
    assert torch.equal(untouched, expected) and torch.equal(plain, expected)
    assert (told - expected).abs().max() > 1e-3
    assert not [name for name in names if "augmentation" in name]
    assert "class_embedding.augmentation.weight" in unet.state_dict()


@pytest.mark.parametrize(
    ("classes", "ratio_source", "policy"),
    [(0, "ledger", "all"), (3, "lookahead", "band"), (0, "lookahead", "proximity")],
)
def test_labels_train_and_leave_a_plain_model(tmp_path, classes, ratio_source, policy):
    settings = AUGMENT | OPERATIONS | {
        "augmentation__policy": policy,
        "augmentation__beta": 100,
        "augmentation__ratio_source": ratio_source,
        "model__class_conditional": bool(classes),
        "training__epochs": 3,
    }  # fmt: skip
    images = toy_images(classes=classes)
    run = toy_run(tmp_path / "run", "agc", images=images, augmentation__labels=True, **settings)
    without = toy_run(tmp_path / "without", "agc", images=images, **settings)
    assert weights_of(run).keys() == weights_of(without).keys()
    assert weights_of(run, "raw").keys() == weights_of(without, "raw").keys()
    assert largest_difference(weights_of(run), weights_of(without)) > 1e-5
    pipeline = DDPMPipeline.from_pretrained(run.model_folder)
    assert pipeline.unet.config.class_embed_type is None
    assert pipeline.unet.config.num_class_embeds == (classes or None)
    if not classes:
        assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    assert "class_embedding.augmentation.weight" in final_state(run)["model"]


def test_a_model_told_of_augmentation_resumes_exactly(tmp_path):
    run = assert_resumes(
        tmp_path, "iet-agc+", augmentation__labels=True, model__class_conditional=True, images=toy_images(classes=3),
        **AUGMENT, **OPERATIONS,
    )  # fmt: skip
    assert summary_of(run)["augmented"] > 0


def test_labels_of_untouched_images_change_nothing(tmp_path, standard):
    """Told, but of operations that do nothing: the very same training, in the weights that are left."""
    nothing = {"augmentation__ops__flip": False, "augmentation__ops__shift": 0}
    told = toy_run(tmp_path / "told", augmentation__labels=True, **AUGMENT, **nothing)
    for name, tensor in weights_of(standard, "raw").items():
        assert torch.equal(weights_of(told, "raw")[name], tensor)


def test_labels_need_a_model_of_our_own(tmp_path):
    with pytest.raises(InputError, match=r"augmentation\.labels: a pretrained model can't be told"):
        toy_run(tmp_path / "run", model__pretrained="somewhere", augmentation__labels=True, **AUGMENT)


def test_every_label_reaches_the_model():
    torch.manual_seed(0)
    unet = build_unet(ModelConfig(block_out_channels=(32, 32)), resolution=8, channels=3, num_classes=None)
    tell_of_augmentation(unet, len(LABELS))
    labels = torch.eye(len(LABELS))
    prediction = unet(
        torch.randn(1, 3, 8, 8).expand(len(LABELS), -1, -1, -1), 500, class_labels={"augmentation": labels}
    )
    prediction.sample.square().sum().backward()
    gradient = unet.class_embedding.augmentation.weight.grad
    assert gradient.abs().amax(0).min() > 0


# Variants of the gate.


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("iet-agc+", {"gate__target_skip_rate": 0.3, "gate__adaptation_rate": 0.5, "ensemble__num_shards": 2}),
        ("agc", {"gate__signal": "history", "gate__soft": True, "training__gradient_accumulation_steps": 2}),
        ("iet-agc+", {"gate__soft": True, "gate__timesteps": [100, 999], "augmentation__ratio_source": "lookahead"}),
        ("agc", {"gate__absolute": 0.9}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_variants_of_the_gate_train_and_resume_exactly(tmp_path, method, settings):
    run = assert_resumes(tmp_path, method, **settings)
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    ledger, summary = run.read_ledger(), summary_of(run)
    assert 0 < ledger["skips"].sum() == summary["skipped"] < summary["samples_seen"]
    if "gate__target_skip_rate" in settings:
        values = {(line["proxy"], line["skip_ratio"]) for line in log_of(run)}
        assert len(values) > 6, "each proxy has its own, and it moves"
        assert {proxy for proxy, _ in values} == {0, 1}


@pytest.mark.parametrize("source", ["ledger", "lookahead"])
def test_a_soft_gate_trains_on_what_a_hard_one_leaves_out(tmp_path, source):
    """A threshold that nothing reaches: a hard gate takes no step after the first batch, a soft one goes on."""
    settings = {"gate__absolute": 1e9, "training__use_ema": False, "augmentation__enabled": source == "lookahead"}
    settings |= {"augmentation__ratio_source": source, "augmentation__policy": "proximity"}
    hard, soft = (toy_run(tmp_path / str(soft), "agc", gate__soft=soft, **settings) for soft in (False, True))
    assert summary_of(hard)["skipped"] == summary_of(soft)["skipped"] == 26 * 4
    assert largest_difference(weights_of(soft), weights_of(hard)) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate__timesteps": [5, 4]}, "gate: timesteps: the first, 5, is after the last, 4"),
        ({"gate__timesteps": [5, 1000]}, r"gate\.timesteps: 1000 is beyond the last timestep, 999"),
        ({"gate__absolute": 0.1, "gate__signal": "history"}, "gate: absolute: is a fixed limit"),
        ({"gate__absolute": 0.1, "gate__target_skip_rate": 0.3}, "gate: absolute: is a fixed limit"),
        ({"gate__target_skip_rate": 1.5}, r"gate\.target_skip_rate"),
    ],
)
def test_rules_that_do_not_fit_together_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        toy_run(tmp_path / "run", "agc", **settings)


# Variants of noise and targets.


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("standard", {"training__input_perturbation": 0.1, "training__timestep_bias_strategy": "later",
                      "training__timestep_bias_multiplier": 4}),
        ("agc", {"training__ambient_timestep": 300, "data__random_flip": True}),
    ],
    ids=["perturbed, later", "ambient"],
)  # fmt: skip
def test_variants_of_the_noise_train_and_resume_exactly(tmp_path, standard, method, settings):
    run = assert_resumes(tmp_path, method, **settings)
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    assert largest_difference(weights_of(run), weights_of(standard)) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training__ambient_timestep": 1000}, r"training\.ambient_timestep: must be below 1000"),
        ({"training__ambient_timestep": 300, "training__noise_offset": 0.1}, "leave out"),
        ({"training__ambient_timestep": 300} | AUGMENT, r"augmentation\.enabled=false"),
        ({"training__timestep_bias_begin": 9, "training__timestep_bias_end": 9}, r"training\.timestep_bias_end: must"),
        ({"training__timestep_bias_end": 1001}, r"training\.timestep_bias_end: must"),
    ],
)
def test_noise_that_does_not_fit_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        toy_run(tmp_path / "run", **settings)


# An outer optimizer over the rounds.


def test_the_outer_optimizer_is_sgd_with_nesterov_momentum():
    """Against torch's own, whose gradient is what each round changed."""
    outer, velocity = OuterOptimizer(0.7, 0.9), {}
    weight = torch.nn.Parameter(torch.randn(5))
    start = {"weight": weight.detach().clone(), "count": torch.tensor(3)}
    reference = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    for count in range(4):
        average = {"weight": start["weight"] + torch.randn(5), "count": torch.tensor(count)}
        weight.grad = weight.detach() - average["weight"]
        reference.step()
        start, velocity = outer.step(start, average, velocity)
        torch.testing.assert_close(start["weight"], weight.detach())
        assert start["count"] == count


def test_an_ensemble_moves_by_the_outer_optimizer(tmp_path):
    """One round at half the outer learning rate ends halfway between the start and the average."""
    settings = {"training__epochs": 2, "training__use_ema": False}
    plain = weights_of(toy_run(tmp_path / "plain", "iet", **settings))
    half = weights_of(toy_run(tmp_path / "half", "iet", ensemble__outer_learning_rate=0.5, **settings))
    torch.manual_seed(derive_seed(0, "init"))
    config = toy_run(tmp_path / "half", "iet", ensemble__outer_learning_rate=0.5, **settings).config.model
    start = build_unet(config, resolution=8, channels=3, num_classes=None).state_dict()
    assert largest_difference(half, {name: (start[name] + plain[name]) / 2 for name in plain}) < 1e-6


def test_an_ensemble_with_an_outer_optimizer_resumes_exactly(tmp_path):
    settings = {"ensemble__outer_learning_rate": 0.7, "ensemble__outer_momentum": 0.9, "ensemble__local_epochs": 1}
    run = assert_resumes(tmp_path, "iet-agc+", after=9, **settings)
    plain = toy_run(tmp_path / "plain", "iet-agc+", ensemble__local_epochs=1)
    assert largest_difference(weights_of(run, "raw"), weights_of(plain, "raw")) > 1e-3
