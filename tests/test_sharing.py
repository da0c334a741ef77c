"""More processes than proxies: those that share one give what one process gives, to rounding, and count it once."""

import json
import os
import signal
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from forking import INTERRUPTED, UNUSABLE, Job
from sharing import assert_alike, checkpoints_in, finished, members_found, until
from toy import final_state, largest_difference, summary_of, weights_of
from unrote.training.team import form

CASES = [
    # A batch of odd size, and one smaller than the team at the end: 26 x 4 = 14 x 7 + 6.
    (2, "agc", {"training.batch_size": 7}),
    (5, "agc", {"training.batch_size": 3, "training.epochs": 1}),
    pytest.param(
        3,
        "standard",
        {"training.dp_noise_multiplier": 0.1, "training.batch_size": 2, "training.epochs": 0.5},
        marks=pytest.mark.skipif(find_spec("opacus") is None, reason="needs Opacus"),
    ),
    (3, "iet-agc+", {"ensemble.num_shards": 2, "training.gradient_accumulation_steps": 2}),
    (2, "agc", {"augmentation.enabled": True, "augmentation.ratio_source": "lookahead", "gate.target_skip_rate": 0.5}),
    (2, "gap+", {"training.epochs": 2}),
]


@pytest.mark.parametrize(("world", "method", "settings"), CASES, ids=lambda value: str(value))
def test_a_team_gives_what_one_process_gives(tmp_path, world, method, settings):
    alone, team = (finished(tmp_path / str(count), count, method, settings) for count in (1, world))
    assert_alike(team, alone)
    assert method == "standard" or summary_of(alone)["skipped"] > 0


def test_half_precision_is_scaled_alike(tmp_path):
    """The first scales are too large: that a step is left out because of it, all members find."""
    settings = {"training.mixed_precision": "fp16", "training.epochs": 1}
    alone, team = (finished(tmp_path / str(world), world, "standard", settings) for world in (1, 2))
    assert final_state(team)["scaler"] == final_state(alone)["scaler"]
    # Gradients are rounded to 11 bits before they are added up, and Adam makes steps of 2e-4 of the smallest ones.
    assert largest_difference(weights_of(team, "raw"), weights_of(alone, "raw")) < 4 * 2 * 2e-4


MANY = {"training.epochs": 8, "training.checkpointing_steps": 2, "ensemble.num_shards": 2}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """One undisturbed process."""
    return finished(tmp_path_factory.mktemp("calm") / "run", 1, "iet-agc+", MANY)


def test_stopped_and_killed_and_gone_on_with_in_more_and_fewer_processes(tmp_path, calm):
    """A member that does not lead is asked to stop; then it is killed; then one process alone finishes."""
    out = tmp_path / "run"
    job = Job(out, 3, settings=MANY)
    until(lambda: checkpoints_in(out), job)
    job.kill(signal.SIGTERM, [1])
    assert job.wait(100) == [INTERRUPTED] * 3, job.messages()
    stopped = checkpoints_in(out)[-1]
    job = Job(out, 5, settings=MANY)
    until(lambda: checkpoints_in(out)[-1] > stopped, job)
    job.kill(ranks=[1])
    codes = job.wait(100)
    assert codes == [UNUSABLE, -signal.SIGKILL, UNUSABLE, UNUSABLE, UNUSABLE], job.messages()
    assert all("process 1 of 5 has died" in job.messages()[rank] for rank in (0, 2, 3, 4)), job.messages()
    assert_alike(finished(out, 1, "iet-agc+", MANY), calm)


def test_a_member_that_stands_still_is_named(tmp_path):
    out = tmp_path / "run"
    job = Job(out, 2, "agc", MANY | {"training.epochs": 1000}, UNROTE_PEER_TIMEOUT="4")
    until(lambda: checkpoints_in(out), job)
    job.kill(signal.SIGSTOP, [1])
    job.processes[0].join(60)
    assert "process 1 of 2 has given no sign of life for 4 seconds" in job.messages()[0], job.messages()
    job.kill(signal.SIGCONT, [1])
    assert job.wait(60) == [UNUSABLE, UNUSABLE], "it does not go on alone"


def test_a_team_diverges_together(tmp_path):
    job = Job(tmp_path / "run", 3, "iet-agc", {"ensemble.num_shards": 2, "training.learning_rate": 1e30})
    assert job.wait(100) == [UNUSABLE] * 3, job.messages()
    assert all("training has diverged" in message for message in job.messages())
    lines = [json.loads(line) for line in (tmp_path / "run" / "diverged.jsonl").read_text().splitlines()]
    assert len({(line["proxy"], line["retries"]) for line in lines}) == len(lines), "each is noted once"


def _member(rank, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=4)
    team = form([range(0, 1), range(1, 4)], rank, 60.0, lambda work: work.wait())
    draw = torch.Generator().manual_seed(rank)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((9, 4, 3, 3), (7,), (3,))]
    parameters[0].grad = torch.randn(9, 4, 3, 3, generator=draw).to(memory_format=torch.channels_last)
    parameters[1].grad = torch.randn(7, generator=draw) if rank == 2 else None
    before = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    team.add_up(parameters)
    span = team.span(2)
    whole = team.whole(2, torch.full((span.stop - span.start,), float(rank)))[0]
    asked = [team.agree(rank == 3), team.whole(2, whole[span]), team.agree(False)]
    found = {"before": before, "after": [parameter.grad for parameter in parameters]}
    torch.save(found | {"span": span, "whole": whole, "asked": asked[::2]}, out / f"{rank}.pt")
    dist.barrier()  # the first one, which is alone, has the store that the others may still need


def test_what_members_do_together(tmp_path):
    alone, *members = members_found(_member, tmp_path)
    for one in members:
        for mine, first in zip(one["after"], members[0]["after"], strict=True):
            assert mine is first is None or torch.equal(mine, first), "the same to the last bit"
        assert one["after"][0].stride() == one["before"][0].stride() and one["after"][2] is None
        assert one["whole"].tolist() == [2.0, 3.0] and one["asked"] == [False, True]
    total = sum(one["before"][0] for one in members)
    assert torch.allclose(members[0]["after"][0], total, atol=1e-6)
    assert torch.equal(members[0]["after"][1], members[1]["before"][1])
    assert [one["span"] for one in members] == [slice(0, 0), slice(0, 1), slice(1, 2)]
    assert torch.equal(alone["after"][0], alone["before"][0]) and alone["asked"] == [False, False]
