"""Re-test: what a memorizing model gives back is found, what it never saw is not, and the search is repeatable."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from launching import in_process
from memorizing import COUNT, pictures
from tiny_pipelines import tiny_stable_diffusion
from toy import SETTINGS, toy_images
from unrote.api import train
from unrote.auditing import audit
from unrote.auditing.intervals import wilson_interval
from unrote.cli import cli
from unrote.data import in_memory_store, open_images
from unrote.detection.retest import PERTURBATION, Settings, retest
from unrote.errors import InputError
from unrote.guards.index import PixelIndex, is_copy
from unrote.guards.prompts import EmbeddingNoise
from unrote.sampling import Denoiser, load_unet
from unrote.seeding import derive_seed

FEW = Settings(tries=40, steps=10, batch_size=16)


@pytest.fixture(scope="module")
def holdout(tmp_path_factory):
    path = tmp_path_factory.mktemp("holdout") / "holdout.npz"
    np.savez(path, images=pictures(30, seed=9).images)
    return path


@pytest.fixture(scope="module")
def searched(memorizing, holdout):
    return retest(memorizing, range(COUNT), holdout=holdout, settings=FEW)


def test_each_is_found_at_the_first_sample_that_copies_it(memorizing, searched):
    unet, schedule = load_unet(memorizing.model_folder, None, "ema")
    denoise = Denoiser(unet.eval(), schedule, "ddim", 10, 0.0, derive_seed(0, "retest"))
    images = np.concatenate([denoise(range(start, start + 16)) for start in (0, 16, 32)])[:40]
    index = PixelIndex(pictures(COUNT))
    values, nearest = index(images)
    copies = is_copy(index, values)
    assert 0 < searched["found"] < COUNT
    for target, row in enumerate(searched["images"]):
        hits = np.flatnonzero(copies & (nearest == target))
        assert row["found_after"] == (hits[0] + 1 if len(hits) else None)
        tries = row["found_after"] or 40
        assert row["tries"] == tries
        assert row["upper"] == wilson_interval(int(len(hits) > 0), tries)[1]


def test_training_images_come_back_from_more_noise_than_others(searched):
    assert len(searched["controls"]) == COUNT
    levels = searched["images"][0]["reconstruction"]["levels"]
    assert [level["t"] for level in levels] == sorted((level["t"] for level in levels), reverse=True)

    def share(rows, place):
        return np.mean([row["levels"][place]["found"] / row["levels"][place]["of"] for row in rows])

    own = [row["reconstruction"] for row in searched["images"]]
    assert share(own, 2) > share(searched["controls"], 2) + 0.3, "t = 799"
    assert share(own, -1) > 0.9, "at low noise the image is still there"
    for row in [*own, *searched["controls"]]:
        enough = [level["t"] for level in row["levels"] if 2 * level["found"] >= level["of"]]
        assert row["highest"] == (max(enough) if enough else None)


def test_the_same_search_finds_the_same_whatever_else_is_searched_for(memorizing, searched):
    settings = Settings(tries=40, steps=10, batch_size=16, reconstruct=False)
    few = retest(memorizing, [3, 0, 3], settings=settings)
    assert [row["index"] for row in few["images"]] == [3, 0]
    for row in few["images"]:
        assert row == searched["images"][row["index"]] | {"reconstruction": None}
    assert few["controls"] == []


def test_a_guard_is_searched_through(memorizing, searched):
    settings = Settings(tries=40, steps=10, batch_size=16, reconstruct=False)
    guarded = retest(memorizing, range(COUNT), settings=settings, guards=["copy-filter:tries=4"])
    assert guarded["found"] < searched["found"]


def test_duplicates_of_the_image_count_as_it(memorizing):
    images = np.concatenate([pictures(COUNT).images, pictures(COUNT).images])
    store = in_memory_store(images, source="twice")
    settings = Settings(tries=16, steps=10, batch_size=16, reconstruct=False)
    result = retest(memorizing, range(2 * COUNT), store, settings=settings)
    after = [row["found_after"] for row in result["images"]]
    assert after[:COUNT] == after[COUNT:]
    assert any(after)


def test_the_command_takes_what_an_audit_found(memorizing, tmp_path):
    from unrote.sampling import sample

    folder = sample(memorizing, 32, out=tmp_path / "samples", steps=10, batch_size=16)
    report = audit(open_images(folder, resolution=None), pictures(COUNT))
    report.save(tmp_path / "report")
    command = ["retest", str(memorizing.path), "--from-report", str(tmp_path / "report"), "--top", "2", "--tries", "40"]
    command += ["--steps", "10", "--batch-size", "16", "--no-reconstruct", "--out", str(tmp_path / "retest.json")]
    result = CliRunner().invoke(cli, [*command, "--device", "cpu"], catch_exceptions=False)
    written = json.loads((tmp_path / "retest.json").read_text())
    expected = [image["cluster"] for image in report.summary["extracted"]["images"][:2]]
    assert [row["index"] for row in written["images"]] == expected
    assert result.exit_code == (1 if written["found"] else 0)
    assert result.output.count("\n") == 3
    for row in written["images"]:
        after = row["found_after"]
        assert ("not found in 40 tries" if after is None else f"found again after {after} tries") in result.output


def test_positions_of_other_images_are_refused(memorizing, tmp_path):
    others = pictures(COUNT, seed=5)
    audit(others.subset(np.arange(8)), others).save(tmp_path / "report")
    result = CliRunner().invoke(cli, ["retest", str(memorizing.path), "--from-report", str(tmp_path / "report")])
    assert isinstance(result.exception, InputError)
    assert "others than those whose report" in str(result.exception)
    for wrong in ("--top", "--most-skipped"):
        assert "not in the range" in CliRunner().invoke(cli, ["retest", str(memorizing.path), wrong, "0"]).output


def test_an_image_of_a_class_is_searched_among_samples_of_its_class(tmp_path):
    images, settings = toy_images(), SETTINGS | {"model.class_conditional": True, "training.epochs": 1}
    classes = {"labels": np.arange(len(images)) % 3, "class_names": ("a", "b", "c")}
    store = in_memory_store(images.images, source="classes", **classes)
    run = train(store, out=tmp_path / "run", method="standard", settings=settings)
    unet, schedule = load_unet(run.model_folder, None, "ema")
    denoise = Denoiser(unet.eval(), schedule, "ddim", 2, 0.0, derive_seed(0, "retest"))
    planted = images.images.copy()
    for target, label in ((1, 1), (2, 2)):
        denoise.label = label
        planted[target] = denoise(range(4))[target]
    search = Settings(tries=4, steps=2, batch_size=4, threshold=1e-6, reconstruct=False)
    store = in_memory_store(planted, source="classes", **classes)
    found = retest(run.model_folder, [2, 0, 1], store, settings=search)["images"]
    assert [(row["index"], row["found_after"]) for row in found] == [(2, 3), (0, None), (1, 2)]
    with pytest.raises(InputError, match="the model has 3 classes"):
        retest(run.model_folder, [0], in_memory_store(planted, source="none"), settings=search)
    more = {"labels": classes["labels"] + (np.arange(len(images)) > 8), "class_names": ("a", "b", "c", "d")}
    store = in_memory_store(planted, source="more", **more)
    again = retest(run.model_folder, [2, 0, 1], store, settings=search)["images"]
    assert [row["found_after"] for row in again] == [3, None, 2], "that another image is of another class is no matter"
    with pytest.raises(InputError, match=r"--index 11: 000011 is of class 3, and the model has classes 0 to 2"):
        retest(run.model_folder, [2, 11], store, settings=search)


def test_the_command_takes_what_was_skipped_most(tmp_path):
    np.savez(tmp_path / "toy.npz", images=toy_images().images)
    run = train(tmp_path / "toy.npz", out=tmp_path / "run", method="agc", settings=SETTINGS | {"training.epochs": 8})
    command = ["retest", str(run.path), "--most-skipped", "3", "--tries", "4", "--steps", "2", "--json"]
    result = CliRunner().invoke(cli, [*command, "--no-reconstruct", "--device", "cpu"], catch_exceptions=False)
    skips = run.read_ledger()["skips"]
    found = [row["index"] for row in json.loads(result.output)["images"]]
    assert len(found) == 3
    assert skips[found].min() >= np.sort(skips)[-3]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([], {}, "give --index"),
        ([COUNT], {}, "there are 16 training images"),
        ([-1], {}, "there are 16 training images"),
        ([0], {"train": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_wrong_targets_are_named_with_the_way_out(memorizing, targets, options, message):
    with pytest.raises(InputError, match=message):
        retest(memorizing, targets, options.get("train"), settings=FEW)
    with pytest.raises(InputError, match="at least 1"):
        Settings(tries=0)


def test_a_text_to_image_model_is_asked_with_the_images_own_caption(tmp_path):
    pytest.importorskip("transformers")
    tiny_stable_diffusion(tmp_path / "tokenizer", vae_levels=2).save_pretrained(tmp_path / "sd")
    captions = ["red cat", "a dog", ""]
    settings = Settings(tries=5, steps=2, batch_size=2, threshold=1.0)
    other = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    store = in_memory_store(other, source="captioned", captions=captions)
    result = retest(tmp_path / "sd", [0, 1], store, settings=settings)
    assert result == retest(tmp_path / "sd", [0, 1], store, settings=settings)
    assert all(row["reconstruction"] is None for row in result["images"])
    # A sample of the caption as a training image is found by that caption at the first try, and not by the other one.
    from unrote.sampling import make_scheduler
    from unrote.text.generation import PromptDenoiser, load_text_to_image
    from unrote.text.prompts import Prompt

    pipeline = load_text_to_image(tmp_path / "sd", None, None)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "ddim", 2, clip_sample=False)
    denoise = PromptDenoiser(pipeline, [Prompt("red cat")], seed=derive_seed(0, "retest"), steps=2)
    planted = other.copy()
    planted[0] = denoise(range(2))[1]
    store = in_memory_store(planted, source="captioned", captions=captions)
    settings = Settings(tries=4, steps=2, batch_size=2, threshold=0.05)
    assert retest(tmp_path / "sd", [0], store, settings=settings)["images"][0]["found_after"] == 2
    with pytest.raises(InputError, match="has no caption"):
        retest(tmp_path / "sd", [2], store, settings=settings)
    # A sample of its perturbed embedding is found in the second half of the tries only.
    denoise.guards.embeddings.append(EmbeddingNoise(PERTURBATION))
    planted[0] = denoise(range(2, 4))[1]
    store = in_memory_store(planted, source="captioned", captions=captions)
    close = replace(settings, threshold=1e-6)
    assert retest(tmp_path / "sd", [0], store, settings=close)["images"][0]["found_after"] == 4


def test_guards_of_a_text_to_image_model_work_once_however_many_images_are_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from unrote.guards.guidance import AntiMemorizationGuidance

    tiny_stable_diffusion(tmp_path / "tokenizer", vae_levels=2).save_pretrained(tmp_path / "sd")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    store = in_memory_store(pixels, source="captioned", captions=["red cat", "a dog", "cat"])
    calls, whole = [], AntiMemorizationGuidance._changed

    def watched(self, step):
        calls.append(len(step.x))
        return whole(self, step)

    monkeypatch.setattr(AntiMemorizationGuidance, "_changed", watched)
    settings = Settings(tries=4, steps=2, batch_size=2, threshold=1e-6)
    result = retest(tmp_path / "sd", [0, 1, 2], store, settings=settings, guards=["amg", "random-tokens:count=1"])
    assert calls == [2] * (3 * 4 // 2 * 2), "once a step: the training images are those that are searched for"
    assert result["guards"] == ["amg", "random-tokens:count=1"]


@pytest.mark.parametrize("command", ["retest", "membership"])
def test_one_that_is_interrupted_says_that_nothing_was_written(
    command, memorizing, holdout, tmp_path, monkeypatch, capsys, request
):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    # Jobs in the background of a shell ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr("unrote.guards.index.PixelIndex.__call__", interrupted)
    monkeypatch.setattr("unrote.detection.membership.as_noise", interrupted)
    own = ["--index", 0, "--tries", 4, "--out", tmp_path / "result.json"]
    words = [command, memorizing.path, *(own if command == "retest" else ["--holdout", holdout])]
    assert in_process(words, monkeypatch) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
