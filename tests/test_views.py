"""Encoded views of a pretrained model: kept if the budget allows it, each the one that is its visit's turn."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from forking import Job
from test_text_to_image import SETTINGS, captioned, saved, tuned
from toy import assert_same_run, largest_difference, log_of, stop_in_step, summary_of
from unrote.config import load_config
from unrote.data.augmentations import augment
from unrote.models.making import make_task
from unrote.models.pretrained import load_pretrained
from unrote.models.sizing import size_of
from unrote.models.views import Views, view_cache
from unrote.seeding import generator
from unrote.training.plan import make_plan
from unrote.training.run import Run

pytestmark = pytest.mark.usefixtures("module_cache")
CPU = torch.device("cpu")
BUDGET = {"augmentation.cache_budget": 0.01, "augmentation.cached_views": 3}


def config_of(base, method="iet-agc+", **settings):
    return load_config(method=method, overrides=SETTINGS | BUDGET | {"model.pretrained": str(base)} | settings)


def test_the_budget_decides_and_says_why(base):
    fits = view_cache(config_of(base), 1000, 256)
    assert fits.kept and fits.bytes == 1000 * 3 * 2 * 4 * 256
    assert str(fits) == (
        "encoded once: 3 views of each of 1,000 images take 0.00572 GiB, within augmentation.cache_budget=0.01"
    )
    large = view_cache(config_of(base), 10_000, 256)
    assert not large.kept and "encoded at each visit: 3 views of each of 10,000 images" in str(large)
    assert "more than augmentation.cache_budget=0.01" in str(large)
    by_degrees = view_cache(config_of(base, **{"augmentation.policy": "proximity"}), 10, 256)
    assert not by_degrees.kept and "every strength" in by_degrees.reason
    uncached = view_cache(config_of(base, **{"data.cache_latents": False}), 10, 256)
    assert not uncached.kept and "cache_latents" in uncached.reason
    assert view_cache(config_of(base, "iet-agc"), 10, 256) is None


def test_a_view_is_a_function_of_seed_image_and_number(base):
    images = captioned().images
    config = config_of(base, **{"data.random_flip": True, "augmentation.ops.flip": False})
    views = Views(images, config)
    assert len(views) == 18 * 3 and views.shape == (54, 16, 16, 3)
    whole = views[:]
    assert np.array_equal(np.concatenate([views[:7], views[7:20], views[20:]]), whole)
    assert len({view.tobytes() for view in whole}) > 45, "views differ"
    other = Views(images, config_of(base, seed=1))
    assert other.key != views.key and not np.array_equal(other[:], whole)
    draw = generator(0, "view", 2, 1)
    mirrored = torch.rand(1, generator=draw) < 0.5
    pixels = torch.from_numpy(images[2:3]).permute(0, 3, 1, 2) / 127.5 - 1
    pixels = pixels.flip(-1) if mirrored else pixels
    expected, _ = augment(pixels, torch.ones(1), draw, **config.augmentation.ops.model_dump())
    assert np.array_equal(views[7:8], expected.permute(0, 2, 3, 1).numpy())


def test_a_visit_trains_on_the_latents_of_its_view(base):
    images, config = captioned(), config_of(base)
    task = make_task(config, images, CPU)
    assert task._latents.vae is None, "nothing is left to encode"
    indices, visits = torch.tensor([4, 0, 9, 4]), torch.tensor([0, 5, 7, 3])
    strength = torch.tensor([1.0, 1.0, 0.0, 1.0])
    clean = torch.randn(4, 4, 8, 8)
    draws = [torch.Generator().manual_seed(1) for _ in range(3)]
    found, _ = task.augmented(clean, {}, indices, None, visits, strength, draws[0])
    again, _ = task.augmented(clean, {}, indices, None, visits, strength, draws[1])
    assert torch.equal(found, again) and torch.equal(found[2], clean[2])
    vae, views = load_pretrained(str(base)).vae, Views(images.images, config)
    # Visits 0 and 3 of image 4 both see its first view, drawn anew from the posterior.
    chosen = np.concatenate([views[n : n + 1] for n in (4 * 3 + 0, 0 * 3 + 2, 4 * 3 + 0)])
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(chosen).permute(0, 3, 1, 2)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=draws[2])
    expected = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    torch.testing.assert_close(found[[0, 1, 3]], expected, rtol=1e-4, atol=1e-5)


def test_without_augmentation_the_budget_changes_no_bit(tmp_path, base):
    plain = tuned(tmp_path / "plain", base, "agc", training__epochs=1)
    budget = {key.replace(".", "__"): value for key, value in BUDGET.items()}
    again = tuned(tmp_path / "again", base, "agc", training__epochs=1, **budget)
    assert largest_difference(saved(again), saved(plain)) == 0 and log_of(again) == log_of(plain)


def test_kept_views_train_and_a_stopped_run_goes_on_bit_for_bit(tmp_path, base, monkeypatch):
    """By look-ahead; by the ledger they do in the test of processes."""
    settings = {key.replace(".", "__"): value for key, value in BUDGET.items()}
    settings |= {"augmentation__ratio_source": "lookahead", "data__random_flip": True}
    expected = tuned(tmp_path / "whole", base, "iet-agc+", "lora", **settings)
    assert summary_of(expected)["augmented"] > 0
    stop_in_step(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "run", base, "iet-agc+", "lora", **settings)
    assert_same_run(tuned(tmp_path / "run", base, "iet-agc+", "lora", **settings), expected)


def test_the_number_of_processes_is_no_part_of_it(tmp_path, base):
    settings = {"training.batch_size": 5, "gate.bank.bins": 1, "model.pretrained": str(base), **BUDGET}
    jobs = [Job(tmp_path / str(world), world, "iet-agc+", settings) for world in (1, 2)]
    assert [job.wait(300) for job in jobs] == [[0], [0, 0]], [job.messages() for job in jobs]
    alone, both = (Run(tmp_path / str(world)) for world in (1, 2))
    assert summary_of(alone)["augmented"] > 0
    assert_same_run(both, alone)


def test_the_plan_says_which_it_is_and_what_it_takes(tmp_path, base, monkeypatch):
    images = captioned()
    with_views, without = (
        make_plan(config_of(base, **{"augmentation.cache_budget": gib}), images, tmp_path / "run") for gib in (0.01, 0)
    )
    assert with_views.views.kept and not without.views.kept
    assert "views        encoded once: 3 views of each of 18 images" in str(with_views)
    assert "views        encoded at each visit: 3 views" in str(without)
    vae = sum(weight.numel() for weight in load_pretrained(str(base)).vae.parameters())
    assert without.frozen_bytes - with_views.frozen_bytes == 4 * vae
    assert with_views.to_dict()["views"]["kept"] is True
    few = make_plan(config_of(base, **{"training.epochs": 2}), images, tmp_path / "run").warnings
    assert any("visited 2 times; use at most 2" in warning for warning in few)
    assert not any("cached_views" in warning for warning in (*with_views.warnings, *without.warnings))
    assert make_plan(config_of(base, "iet"), images, tmp_path / "run").views is None

    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    make_task(config_of(base), images, CPU)
    files = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy"))
    # Beside three short headers: the plan counts texts by CLIP's 77 tokens, and this tokenizer has 12.
    assert files <= with_views.cache_bytes
    latents = size_of(config_of(base), images).cache_bytes - size_of(config_of(base, "iet"), images).cache_bytes
    assert latents == with_views.views.bytes == 18 * 3 * 8 * 4 * 8 * 8
