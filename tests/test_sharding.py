"""Members of a team that hold parts of the weights each: what one process gives, to rounding, in less memory."""

import json
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from forking import UNUSABLE, Job
from sharing import TOLERANCE, assert_alike, checkpoints_in, finished, members_found, until
from tiny_pipelines import tiny_stable_diffusion_3
from toy import final_state, largest_difference, summary_of, toy_images
from unrote.config import load_config
from unrote.errors import InputError
from unrote.models.denoiser import build_unet
from unrote.tensorfiles import own_part
from unrote.training.sharding import hold
from unrote.training.team import Parts, form

PARTS = {"training.fsdp": True}
CASES = [
    # A batch that leaves some member fewer samples than others, or none; an end of odd size.
    (2, "agc", {"training.batch_size": 7, "training.gradient_accumulation_steps": 4, "gate.reference": 0.2}),
    (3, "agc", {"training.batch_size": 2, "training.epochs": 1, "training.max_grad_norm": 0.1}),
    (3, "iet-agc+", {"ensemble.num_shards": 2, "ensemble.optimizer_state": "average", "training.snapshots": 2}),
    (
        2,
        "gap",
        {
            "augmentation.enabled": True,
            "augmentation.ratio_source": "lookahead",
            "training.batch_size": 3,
            "training.gradient_checkpointing": True,
            "training.epochs": 2,
        },
    ),
]


@pytest.mark.parametrize(("world", "method", "settings"), CASES, ids=lambda value: str(value))
def test_parts_give_what_one_process_gives(tmp_path, world, method, settings):
    alone, team = (finished(tmp_path / str(count), count, method, settings | PARTS) for count in (1, world))
    assert_alike(team, alone)
    assert summary_of(alone)["skipped"] > 0


@pytest.mark.parametrize("kind", ["LoRA", "full", "flow"])
def test_a_text_model_in_parts(request, tmp_path, kind):
    """Adapters beside frozen weights of another precision, all weights, and a transformer; looked at on the way."""
    lora = kind == "LoRA"
    if kind == "flow":
        base = tmp_path / "base"
        tiny_stable_diffusion_3(tmp_path / "tokenizer").save_pretrained(base)
    else:
        base = request.getfixturevalue("base")
    settings = {
        **PARTS, "model.pretrained": str(base), "model.train": "lora" if lora else "full", "model.lora.rank": 2,
        "training.mixed_precision": "bf16" if lora else "no", "training.epochs": 2, "training.batch_size": 13,
        "training.use_ema": kind == "full", "monitor.every": 1, "monitor.samples": 2, "monitor.steps": 2,
        "monitor.max_overhead": 100.0, "monitor.stop_when": "mq@0.9 > 0.99", "ensemble.local_epochs": 1,
    }  # fmt: skip
    alone, team = (finished(tmp_path / str(world), world, "agc", settings) for world in (1, 2))
    part = "transformer" if kind == "flow" else "unet"
    name = "pytorch_lora_weights" if lora else f"{part}/diffusion_pytorch_model"
    found, expected = (load_file(run.model_folder / f"{name}.safetensors") for run in (team, alone))
    # In bf16 each member rounds its gradients before they are added up.
    assert largest_difference(found, expected) < (2e-3 if lora else TOLERANCE)
    assert summary_of(team)["samples_seen"] == summary_of(alone)["samples_seen"]
    looks = [json.loads((run.path / "monitor.json").read_text())["looks"] for run in (team, alone)]
    assert len(looks[0]) == 2 and [look["samples"] for look in looks[0]] == [look["samples"] for look in looks[1]]


def test_half_precision_finds_the_same_scale(tmp_path):
    settings = {"training.mixed_precision": "fp16", "training.epochs": 1} | PARTS
    alone, team = (finished(tmp_path / str(world), world, "standard", settings) for world in (1, 2))
    assert final_state(team)["scaler"] == final_state(alone)["scaler"]


def test_the_monitor_sees_and_keeps_the_same(tmp_path):
    np.savez(tmp_path / "holdout.npz", images=toy_images(12, seed=5).images)
    settings = PARTS | {
        "monitor.every": 1, "monitor.samples": 6, "monitor.steps": 4, "monitor.max_overhead": 100.0,
        "monitor.stop_when": "mq@0.9 > 0.99", "monitor.keep_best": "pareto",
        "monitor.holdout": str(tmp_path / "holdout.npz"), "ensemble.local_epochs": 1,
    }  # fmt: skip
    alone, team = (finished(tmp_path / str(world), world, "standard", settings) for world in (1, 2))
    found, expected = (json.loads((run.path / "monitor.json").read_text()) for run in (team, alone))
    assert len(found["looks"]) == 4
    assert found["model_samples"] == expected["model_samples"]
    distances = [[look["monitor"]["frechet"] for look in looks["looks"]] for looks in (found, expected)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
    assert_alike(team, alone)


def test_killed_and_gone_on_with_in_other_numbers_of_processes(tmp_path):
    """Four processes in two teams of two; then two without teams, then three, of which two share."""
    settings = PARTS | {"training.epochs": 5, "training.checkpointing_steps": 2, "ensemble.num_shards": 2}
    out, calm = tmp_path / "run", finished(tmp_path / "calm", 1, "iet-agc+", settings)
    before = 0
    for world, killed in ((4, 3), (2, 0)):
        job = Job(out, world, settings=settings)
        until(lambda: checkpoints_in(out) and checkpoints_in(out)[-1] > before, job)  # noqa: B023
        job.kill(ranks=[killed])
        codes = job.wait(100)
        others = [rank for rank in range(world) if rank != killed]
        assert codes == [-signal.SIGKILL if rank == killed else UNUSABLE for rank in range(world)], job.messages()
        assert all(f"process {killed} of {world} has died" in job.messages()[rank] for rank in others), job.messages()
        before = checkpoints_in(out)[-1]
    assert_alike(finished(out, 3, "iet-agc+", settings), calm)


def test_a_team_in_parts_diverges_together(tmp_path):
    job = Job(tmp_path / "run", 2, "agc", {"training.learning_rate": 1e30} | PARTS)
    assert job.wait(100) == [UNUSABLE] * 2, job.messages()
    assert all("training has diverged" in message for message in job.messages())


@pytest.mark.parametrize(
    "settings", [{"training.compile": True}, {"training.channels_last": True}, {"ensemble.outer_learning_rate": 0.7}]
)
def test_what_does_not_go_with_parts_is_refused(settings):
    with pytest.raises(InputError, match=r"training\.fsdp: .*" + next(iter(settings)).rpartition(".")[2]):
        load_config(method="iet-agc+", overrides=settings | PARTS)


class Network:
    """A task's model."""

    def __init__(self):
        config = load_config(method="standard", overrides={"model.block_out_channels": [32, 32]}).model
        self.denoiser = self.trained = build_unet(config, resolution=8, channels=3, num_classes=None)


def _member(rank, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=4)
    parts = Parts("cpu", lambda doing: nullcontext(), nullcontext)
    team = form([range(0, 1), range(1, 4)], rank, 60.0, lambda work: work.wait(), parted=parts)
    task = Network()
    whole = sum(weight.numel() for weight in task.denoiser.parameters())
    hold(task, team, torch.device("cpu"))
    optimizer = torch.optim.AdamW(task.trained.parameters(), fused=True)
    if rank:
        task.denoiser(torch.ones(1, 3, 8, 8), torch.zeros(1)).sample.sum().backward()
        optimizer.step()
    held = [own_part(weight) for weight in task.trained.parameters()]
    held += [own_part(weight.grad) for weight in task.trained.parameters() if weight.grad is not None]
    held += [own_part(value) for state in optimizer.state.values() for value in state.values()]
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held}
    every = [team.every(rank != 2), team.every(True)]
    torch.save({"whole": whole, "bytes": sum(memory.values()), "every": every}, out / f"{rank}.pt")
    dist.barrier()


def test_a_member_holds_its_part_of_weights_gradients_and_moments(tmp_path):
    alone, *members = members_found(_member, tmp_path)
    assert alone["bytes"] == 4 * alone["whole"], "who is alone has all weights"
    for member in members:
        # Rows are dealt out, and a layer may have few of them; moments have a count each.
        assert 4 * 4 * member["whole"] / 3 * 0.9 < member["bytes"] < 4 * 4 * member["whole"] / 3 * 1.15
        assert member["every"] == [False, True]
    assert alone["every"] == [True, True]
