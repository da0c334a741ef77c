"""The gate that goes by unseen images: they are never trained on, and the bank holds their loss and nothing else."""

import copy

import numpy as np
import pytest
import torch

from toy import SETTINGS, assert_same_run, toy_images, toy_run
from unrote.config import load_config
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.method.bank import LossBank
from unrote.method.shards import split_shards
from unrote.models.making import make_task
from unrote.seeding import generator
from unrote.training.reference import reference_of
from unrote.training.step import TrainingStep

GAP = {"gate__reference": 0.2, "gate__signal": "history"}


def config_of(**settings):
    overrides = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    return load_config(method="agc", overrides=overrides)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("split", ["iid", "contiguous", "stratified"])
def test_what_is_left_out_is_in_no_shard(num_shards, split):
    left_out, labels = torch.tensor([0, 7, 8, 22]), torch.arange(23) % 3
    shards = split_shards(23, num_shards, split, labels=labels, left_out=left_out)
    assert torch.cat([*shards, left_out]).sort().values.tolist() == list(range(23))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_reference_images_are_a_random_share_of_those_that_are_there_once():
    images = toy_images(40)
    twice = in_memory_store(np.concatenate([images.images, images.images[:10]]), source="with copies")
    chosen = reference_of(config_of(gate__reference=0.5), twice)
    assert len(chosen) == 25 and set(chosen.tolist()) <= set(range(10, 40))
    assert not torch.equal(chosen, reference_of(config_of(gate__reference=0.5, seed=1), twice))
    assert len(reference_of(config_of(), twice)) == 0
    with pytest.raises(InputError, match=r"gate\.reference: 0\.5 of 20 images are 10, and only 0 are there once"):
        reference_of(config_of(gate__reference=0.5), twice.subset([*range(10), *range(40, 50)]))
    with pytest.raises(InputError, match=r"of 1 images leaves none to train on.*--method agc"):
        reference_of(load_config(method="gap+"), toy_images(1))


@pytest.mark.parametrize("method", ["agc", "iet-agc+"])
def test_they_are_never_visited_and_the_budget_stays(tmp_path, method):
    run = toy_run(tmp_path / "run", method, images=toy_images(40), **GAP)
    visits = run.read_ledger()["visits"]
    reference = reference_of(run.config, toy_images(40)).numpy()
    assert len(reference) == 8 and (np.flatnonzero(visits == 0) == reference).all()
    assert visits.sum() == 4 * 40


def test_the_bank_holds_their_loss_and_nothing_else():
    config, images, device = (
        config_of(gate__reference=0.25, training__batch_size=8),
        toy_images(20),
        torch.device("cpu"),
    )
    torch.manual_seed(0)
    task = make_task(config, images, device)
    reference = reference_of(config, images)
    step = TrainingStep(config, task, len(images), device, 10, reference)
    expected = LossBank(1000, bins=4, warm_start=True)
    for number in range(1, 4):
        before = copy.deepcopy(task.denoiser.state_dict())
        step(torch.arange(8), proxy=0, step=number)
        after = copy.deepcopy(task.denoiser.state_dict())
        # Two of eight, as a quarter of the images are reference; drawn and judged by the weights before the step.
        draw = generator(config.seed, "reference", 0, number)
        rows = reference[torch.randint(len(reference), (2,), generator=generator(config.seed, "chosen", 0, number))]
        clean = torch.from_numpy(images.images[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=draw)
        timesteps = torch.randint(1000, (2,), generator=draw)
        task.denoiser.load_state_dict(before)
        with torch.no_grad():
            losses = task.loss(task.denoiser, clean, noise, timesteps, {})
        task.denoiser.load_state_dict(after)
        expected.update(timesteps, losses)
        torch.testing.assert_close(step.gate.bank.values, expected.values, rtol=1e-5, atol=1e-7)


def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    images, settings = toy_images(40), {"training__checkpointing_steps": 3, **GAP}
    whole = toy_run(tmp_path / "whole", "iet-agc+", images=images, **settings)
    call, steps = TrainingStep.__call__, []

    def failing(self, *arguments, **named):
        steps.append(arguments)
        if len(steps) == 11:
            raise OSError("a fault")
        return call(self, *arguments, **named)

    monkeypatch.setattr(TrainingStep, "__call__", failing)
    with pytest.raises(OSError, match="a fault"):
        toy_run(tmp_path / "run", "iet-agc+", images=images, **settings)
    assert_same_run(toy_run(tmp_path / "run", "iet-agc+", images=images, **settings), whole)
