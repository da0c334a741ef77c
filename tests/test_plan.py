"""The plan of a run: it is what then happens, its sizes are bounds, and what can't work is refused before it begins."""

import resource
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from toy import SETTINGS, log_of, stop_in_step, summary_of, toy_images, toy_run
from unrote.api import plan, train
from unrote.config import METHODS, load_config
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.models.denoiser import build_unet
from unrote.tensorfiles import load_state
from unrote.training.checkpoints import Checkpoints
from unrote.training.plan import make_plan

Usage = namedtuple("Usage", "total used free")


def toy_config(method="standard", **settings):
    return load_config(method=method, overrides=SETTINGS | {k.replace("__", "."): v for k, v in settings.items()})


def planned(out, method="standard", *, images=None, **settings):
    return make_plan(toy_config(method, **settings), toy_images() if images is None else images, out)


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# The plan is what then happens.


CASES = [
    *((method, {}) for method in METHODS),
    ("iet", {"training__epochs": 2.5, "ensemble__local_epochs": 0.7}),
    ("iet-agc+", {"training__epochs": 3, "ensemble__num_shards": 5, "training__batch_size": 7}),
    ("iet-agc+", {"training__epochs": 0.05}),
    ("iet", {"ensemble__num_shards": 1}),
    ("standard", {"training__batch_size": 100, "training__gradient_accumulation_steps": 3}),
    ("iet-agc", {"training__use_ema": False, "training__checkpointing_steps": 2}),
    ("iet-agc+", {"training__checkpointing_steps": 1, "training__checkpoints_total_limit": 3}),
    ("standard", {"training__snapshots": 9}),
]


@pytest.mark.parametrize(("method", "settings"), CASES, ids=str)
def test_the_plan_is_what_then_happens(tmp_path, method, settings):
    expected = planned(tmp_path / "run", method, **settings)
    assert not (tmp_path / "run").exists()
    run = toy_run(tmp_path / "run", method, **settings)
    summary = summary_of(run)
    assert (summary["samples_seen"], summary["steps"]) == (expected.samples_seen, expected.steps)
    newest = max((run.path / "checkpoints").glob("*.safetensors"))
    assert load_state(newest)["ensemble"]["round"] == expected.rounds
    assert log_of(run)[-1]["samples"] == expected.samples_seen
    assert sum(expected.shard_sizes) + expected.reference == expected.images == 26
    assert expected.reference == (3 if method in ("gap", "gap+") else 0)
    assert len(expected.shard_sizes) == run.config.num_shards
    assert (expected.shape, expected.quarantined) == ((8, 8, 3), 0)
    assert bytes_in(run.path) <= expected.disk_bytes


def test_the_disk_is_never_fuller_than_planned(tmp_path, monkeypatch):
    """Also in the middle, between a new checkpoint and the removal of the oldest."""
    settings = {"training__checkpointing_steps": 1, "ensemble__num_shards": 4}
    bound = planned(tmp_path / "run", "iet-agc+", **settings).disk_bytes
    peak = 0

    def measured(*arguments):
        nonlocal peak
        peak = max(peak, bytes_in(tmp_path / "run"))
        return original(*arguments)

    original = Checkpoints._prune
    monkeypatch.setattr(Checkpoints, "_prune", measured)
    run = toy_run(tmp_path / "run", "iet-agc+", **settings)
    assert peak > bytes_in(run.model_folder)
    assert max(peak, bytes_in(run.path)) <= bound


def test_parameters_and_state_are_counted(tmp_path):
    found = planned(tmp_path / "run")
    unet = build_unet(toy_config().model, resolution=8, channels=3, num_classes=None)
    assert found.parameters == sum(weight.numel() for weight in unet.parameters())
    # Weights, gradients, two moments, average.
    assert found.state_bytes == 5 * 4 * found.parameters
    assert planned(tmp_path / "run", training__use_ema=False).state_bytes == 4 * 4 * found.parameters


def test_memory_grows_with_the_batch_and_not_with_the_shards(tmp_path):
    base = planned(tmp_path / "run")
    double = planned(tmp_path / "run", training__batch_size=16)
    split = planned(tmp_path / "run", training__batch_size=16, training__gradient_accumulation_steps=2)
    half = planned(tmp_path / "run", training__mixed_precision="bf16")
    assert 1.9 < double.activation_bytes / base.activation_bytes < 2.1
    assert split.activation_bytes == base.activation_bytes
    assert half.activation_bytes == base.activation_bytes // 2
    many = planned(tmp_path / "run", "iet", ensemble__num_shards=13)
    few = planned(tmp_path / "run", "iet", ensemble__num_shards=2)
    assert (many.state_bytes, many.activation_bytes) == (few.state_bytes, few.activation_bytes)
    assert many.disk_bytes > few.disk_bytes > base.disk_bytes


def test_a_plan_can_be_printed_and_is_plain_data(tmp_path):
    found = planned(tmp_path / "run", "iet")
    text = str(found)
    for word in ("26 images of 8x8, 3 channels", "0 quarantined", "3 of 8 to 9 images; 2 rounds", "104 samples seen"):
        assert word in text
    assert found.to_dict()["shard_sizes"] == (9, 9, 8)
    assert "3 of 8 images" in str(planned(tmp_path / "run", "iet", images=toy_images(24)))


def test_the_plan_of_arrays_and_files(tmp_path):
    pixels = np.asarray(toy_images().images)
    np.savez(tmp_path / "toy.npz", images=pixels)
    of_store = planned(tmp_path / "run")
    of_array = plan(toy_config(), pixels, tmp_path / "run")
    of_file = plan(toy_config(), str(tmp_path / "toy.npz"), tmp_path / "run")
    free = {"free_disk_bytes": 0}
    assert of_store.to_dict() | free == of_array.to_dict() | free == of_file.to_dict() | free


def test_planning_makes_nothing_and_draws_nothing(tmp_path):
    before = torch.random.get_rng_state()
    planned(tmp_path / "a" / "b" / "run", "iet-agc+")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


def test_a_huge_model_is_planned_without_its_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = planned(tmp_path / "run", model__block_out_channels=[512, 1024, 1024], model__layers_per_block=4)
    assert found.state_bytes > 4 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# What is refused before it begins.


def refused(tmp_path, says, method="standard", *, images=None, **settings):
    """Neither planned nor trained, and the folder is not made."""
    images = toy_images() if images is None else images
    with pytest.raises(InputError, match=says):
        planned(tmp_path / "run", method, images=images, **settings)
    with pytest.raises(InputError, match=says):
        toy_run(tmp_path / "run", method, images=images, **settings)
    assert not (tmp_path / "run").exists()


def test_too_little_disk(tmp_path, monkeypatch):
    need = planned(tmp_path / "run").disk_bytes
    asked = []

    def usage(path, free):
        asked.append(path)
        return Usage(1 << 40, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path, need - 1))
    refused(tmp_path, r"(?s)needs up to .* the disk has .*Free some space.*checkpoints_total_limit")
    assert set(asked) == {tmp_path}, "the disk that is asked is that of the run folder"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path, need))
    assert planned(tmp_path / "run").free_disk_bytes == need


def test_a_run_that_could_begin_can_go_on_and_be_asked_for_again(tmp_path, monkeypatch, caplog):
    """The disk has just the room that the run needs; what it has written is no longer free."""
    out, settings, others = tmp_path / "run", {"method": "iet-agc+", "training__checkpointing_steps": 4}, 0
    need = planned(out, **settings).disk_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need, 0, max(0, need - bytes_in(tmp_path) - others)))
    with monkeypatch.context() as patch:
        stop_in_step(9, patch)
        with pytest.raises(KeyboardInterrupt):
            toy_run(out, **settings)
    (out / ".model.4711.0badcafe.tmp").mkdir()
    (out / ".model.4711.0badcafe.tmp" / "weights").write_bytes(bytes(1 << 16))
    assert "are there already)" in str(planned(out, **settings))
    others = need // 2
    with pytest.raises(InputError, match=r"needs up to .* more and the disk has .* free"):
        toy_run(out, **settings)
    others = 0
    assert toy_run(out, **settings).finished
    others = need
    with caplog.at_level("INFO", "unrote"):
        assert toy_run(out, **settings).finished
    assert "nothing to do" in caplog.text


def test_fewer_images_than_shards(tmp_path):
    refused(tmp_path, "between 1 and the number of samples, 2, not 3", "iet", images=toy_images(2))
    assert planned(tmp_path / "run", "iet", images=toy_images(3)).shard_sizes == (1, 1, 1)


def test_images_that_are_not_square(tmp_path):
    wide = in_memory_store(np.zeros((26, 8, 12, 3), np.uint8), source="wide")
    refused(tmp_path, "wide: images of 8x12 are not square; give --resolution", images=wide)
    assert train(wide, out=tmp_path / "square", method="standard", settings=SETTINGS | {"data.resolution": 8}).finished


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_resolution_that_can_not_be_halved(tmp_path, levels):
    says = rf"data.resolution: 9 can't be halved {levels - 1} times.*use a multiple of {2 ** (levels - 1)}"
    refused(tmp_path, says, images=toy_images(side=9), model__block_out_channels=[32] * levels)


def test_classes_without_labels(tmp_path):
    refused(
        tmp_path,
        "toy has no labels; put the images into subfolders, one per class, at least two",
        model__class_conditional=True,
    )
    labelled = planned(tmp_path / "run", images=toy_images(classes=3), model__class_conditional=True)
    assert labelled.parameters > planned(tmp_path / "run").parameters


def test_stratified_without_labels(tmp_path):
    refused(tmp_path, 'needs a label for every sample; use "iid"', "iet", ensemble__split="stratified")
    found = planned(tmp_path / "run", "iet", images=toy_images(classes=3), ensemble__split="stratified")
    assert found.shard_sizes == (9, 9, 8)
