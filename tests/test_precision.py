"""``training.mixed_precision: auto`` is settled before a run begins, and stays what it was."""

import pytest
import torch

from toy import SETTINGS, toy_images
from unrote.api import plan, train_config
from unrote.config import load_config
from unrote.training.precision import multiplies_bf16, settled
from unrote.training.run import Run

CPU = torch.device("cpu")
HERE = "bf16" if multiplies_bf16(CPU) else "no"
OTHER = "no" if HERE == "bf16" else "bf16"


def configured(precision):
    settings = SETTINGS | {"training.epochs": 1, "training.mixed_precision": precision}
    return load_config(method="standard", overrides=settings)


def test_a_run_computes_in_what_the_device_has_and_says_so(tmp_path):
    run = train_config(configured("auto"), toy_images(), tmp_path / "run", "cpu")
    assert run.config.training.mixed_precision == HERE
    asked, known = plan(configured("auto"), toy_images(), tmp_path), plan(configured(HERE), toy_images(), tmp_path)
    assert asked.activation_bytes == known.activation_bytes


def test_a_run_that_was_begun_goes_on_in_its_own_precision(tmp_path):
    begun = Run(tmp_path / "run")
    with begun.locked():
        begun.start(configured(OTHER), toy_images())
    assert settled(configured("auto"), begun, CPU) == configured(OTHER)


@pytest.mark.parametrize("asked", ["no", "bf16", "fp16"])
def test_what_was_asked_for_stays(tmp_path, asked, caplog):
    config = configured(asked)
    assert settled(config, Run(tmp_path / "run"), CPU) is config
    slow = asked == "bf16" and HERE == "no"
    assert ("no instructions for bf16" in caplog.text) == slow


def test_presets_for_a_cpu_leave_it_to_the_device():
    for preset in ("tiny", "demo", "small-data"):
        assert load_config(preset=preset).training.mixed_precision == "auto"
