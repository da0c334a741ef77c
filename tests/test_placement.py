"""How a run lies on its processes: counted independently, and measured."""

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from forking import Command
from toy import SETTINGS, toy_images
from unrote.api import plan
from unrote.cli import cli
from unrote.config import load_config
from unrote.errors import InputError

PROGRAM = Path(__file__).with_name("memory_program.py")
CALM = {"training.lr_warmup_steps": 0, "training.checkpointing_steps": 2, "ensemble.local_epochs": 2}
"""Settings of which nothing is to be said."""


def planned(tmp_path, method="iet-agc+", *, images=None, processes=1, device_memory=None, **settings):
    changed = SETTINGS | CALM | {key.replace("__", "."): value for key, value in settings.items()}
    images = toy_images() if images is None else images
    return plan(
        load_config(method=method, overrides=changed),
        images,
        tmp_path / "run",
        processes=processes,
        device_memory=device_memory,
        device="cpu",
    )


def test_every_process_has_its_proxies_and_their_steps(tmp_path):
    found = planned(tmp_path, processes=2)  # shards of 9, 9 and 8 images, 4 epochs in rounds of 2
    first, second = found.placement.ranks
    assert [(rank.first, rank.proxies) for rank in (first, second)] == [(0, 1), (1, 2)]
    assert (first.samples_per_round, second.samples_per_round) == (18, 34)
    assert (first.steps, second.steps) == (math.ceil(36 / 8), math.ceil(36 / 8) + math.ceil(32 / 8))
    assert found.steps == first.steps + second.steps
    assert found.placement.idle == pytest.approx(1 - 52 / (2 * 34))
    assert found.placement.phases == 2


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_what_is_exchanged(tmp_path, ema, average):
    settings = {"ensemble__optimizer_state": "average" if average else "reset", "training__use_ema": ema}
    found = planned(tmp_path, processes=2, **settings)
    state = 4 * found.parameters * (1 + ema + 2 * average)
    assert found.placement.gathered_bytes == 2 * state
    assert found.placement.broadcast_bytes == state
    assert found.placement.ledger_bytes == 8 * 9 * 26
    alone = planned(tmp_path, **settings).placement
    assert (alone.gathered_bytes, alone.broadcast_bytes, alone.ledger_bytes) == (0, 0, 0)


def test_more_processes_than_proxies_share_them(tmp_path):
    found, alone = planned(tmp_path, processes=5), planned(tmp_path)
    ranks = found.placement.ranks
    assert [(rank.first, rank.members, rank.leads) for rank in ranks] == [
        (0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False), (2, 1, True),
    ]  # fmt: skip
    assert found.steps == alone.steps, "a step of a team counts once"
    assert ranks[4].samples_per_round == 16 and ranks[0].samples_per_round == 18
    assert found.placement.idle == pytest.approx(1 - (4 * 9 + 16) / (5 * 16))
    assert found.placement.gathered_bytes == 2 * 8 * found.parameters, "those who lead send theirs"
    assert found.placement.step_bytes == 4 * found.parameters, "a ring of two"
    half = alone.activation_bytes // 2
    assert ranks[0].device_bytes == alone.state_bytes + half and ranks[4].device_bytes == alone.state_bytes + 2 * half
    assert ranks[1].host_bytes > ranks[2].host_bytes, "who does not lead has the proxy in memory"
    text = "ranks 0-1 share proxy 0; ranks 2-3 share proxy 1; rank 4: 1 proxy"
    assert found.placement.to_text() == text and text in str(found) and "in each step" in str(found)
    (line,) = [line for line in str(found).splitlines() if line.startswith("of each ")]
    assert re.fullmatch(r"of each +rank 0: .+; rank 1 and 1 more: .+; rank 2: .+; rank 4: .+", line), line


def test_weights_in_parts(tmp_path):
    settings = {"ensemble__num_shards": 2, "processes": 5}
    whole, parts = (planned(tmp_path, training__fsdp=fsdp, **settings) for fsdp in (False, True))
    ranks, before, state = parts.placement.ranks, whole.placement.ranks, whole.state_bytes
    gathered = ranks[0].state_bytes - math.ceil(state / 3)
    assert [rank.members for rank in ranks] == [3, 3, 3, 2, 2]
    assert 0 < gathered < state and ranks[3].state_bytes == state // 2 + gathered, "whole blocks come and go"
    assert [rank.activation_bytes for rank in ranks] == [rank.activation_bytes for rank in before]
    weights = 4 * parts.parameters
    assert ranks[0].host_bytes - ranks[1].host_bytes == weights, "the first gathers the model to write it"
    assert ranks[3].host_bytes - ranks[4].host_bytes == 2 * weights, "who leads has the average, with that of EMA"
    assert parts.placement.step_bytes == 12 * parts.parameters * 2 // 3, "weights for either pass, and gradients"
    assert planned(tmp_path, training__fsdp=True).state_bytes == state, "nothing is shared by one process"


def test_one_proxy_on_many_processes(tmp_path):
    found = planned(tmp_path, "standard", processes=3)
    assert found.placement.to_text() == "ranks 0-2 share proxy 0" and "of each " not in str(found), "they are alike"
    assert (found.placement.gathered_bytes, found.placement.broadcast_bytes, found.placement.idle) == (0, 0, 0)
    assert found.checkpoint_bytes == planned(tmp_path, "standard").checkpoint_bytes


WRONG = [
    ({"training__batch_size": 9}, "a batch of 9 holds images of a shard of 8 more than once; use at most 8"),
    ({"ensemble__local_epochs": 1}, r"half-round is 4 images of a proxy, less than a batch of 8.*use at least 2"),
    ({"ensemble__local_epochs": 3}, r"3, so images move \(MSR\) in the middle of an epoch.*such as 4"),
    ({"ensemble__local_epochs": 4}, "4 epochs are one round of 4, so proxies are averaged only once"),
    ({"training__lr_warmup_steps": 5}, "5 steps of warm-up, and a proxy takes 5 in all"),
    ({"training__checkpointing_steps": 99}, "99 is more than the 14 steps that any process takes"),
    ({"processes": 2}, r"--processes 2: 3 proxies do not divide evenly, and 24% of.*; 1 would not wait"),
    ({"processes": 4}, r"--processes 4: 3 proxies do not divide evenly, and 2\d% of.*; 3 would not wait"),
    ({"processes": 30}, r"--processes 30: 1\d of them share batches of 8, so some have nothing to do; use at most 24"),
    ({"device_memory": 1 << 20}, r"--device-memory 0.000977: training needs about .* use a smaller model"),
]


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_what_would_go_wrong_is_said(tmp_path, settings, says):
    import re

    (warning,) = [text for text in planned(tmp_path, **settings).warnings if re.search(says, text)]
    assert warning in str(planned(tmp_path, **settings))


def test_a_run_in_which_nothing_goes_wrong(tmp_path):
    assert planned(tmp_path).warnings == ()
    assert planned(tmp_path, processes=3, device_memory=1 << 30).warnings == ()


def test_the_parts_of_a_batch_that_are_recommended_fit(tmp_path):
    images = toy_images(64, side=32)
    sizes = planned(tmp_path, "standard", images=images, training__batch_size=64)
    memory = sizes.state_bytes + sizes.activation_bytes // 5
    (warning,) = planned(tmp_path, "standard", images=images, training__batch_size=64, device_memory=memory).warnings
    parts = int(warning.partition("gradient_accumulation_steps=")[2].split()[0])
    settings = {"training__batch_size": 64, "training__gradient_accumulation_steps": parts}
    fits = planned(tmp_path, "standard", images=images, device_memory=memory, **settings)
    assert fits.warnings == ()
    assert fits.activation_bytes < sizes.activation_bytes / 4


SIZE = {
    "model.block_out_channels": [128, 192],
    "training.epochs": 2,
    "training.batch_size": 4,
    "training.checkpointing_steps": 1000,
    "ensemble.num_shards": 4,
    "ensemble.local_epochs": 1,
}


@pytest.mark.parametrize(("world", "shards"), [(2, 4), (3, 2)])
def test_memory_is_as_planned(tmp_path, world, shards):
    result = Command([PROGRAM, tmp_path, json.dumps(SIZE | {"ensemble.num_shards": shards})], world).finish()
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(line["rank"] for line in lines) == list(range(world))
    for line in lines:
        assert 0.75 < line["grown"] / line["planned"] < 1.35, line


def test_a_probe_measures_and_leaves_nothing(tmp_path):
    config = load_config(method="iet-agc+", overrides=SETTINGS | CALM)
    found = plan(config, toy_images(), tmp_path / "run", processes=2, device="cpu", probe=True)
    assert list(tmp_path.iterdir()) == []
    assert found.probe is not None
    assert found.probe.steps == 20
    assert 0 < found.probe.step_seconds < 60
    second = found.placement.ranks[1]
    turns = second.proxies * 2 * found.rounds
    averaging = 3 * found.rounds * found.probe.average_seconds
    expected = second.steps * found.probe.step_seconds + turns * found.probe.switch_seconds + averaging
    assert found.seconds == pytest.approx(expected)
    assert "time  " in str(found)
    assert plan(config, toy_images(), tmp_path / "run").seconds is None


def test_the_flags(tmp_path):
    command = ["train", "--data", "emoji", "--limit", "64", "--resolution", "16", "--out", str(tmp_path / "run")]
    command += ["--method", "iet"]
    flags = ["--processes", "2", "--device-memory", "0.001"]
    result = CliRunner().invoke(cli, [*command, "--dry-run", *flags])
    assert result.exit_code == 0, result.output
    for text in ("processes    2; ranks 0-1: 2 proxies each", "go to rank 0", "--device-memory 0.001"):
        assert text in result.output
    found = json.loads(CliRunner().invoke(cli, [*command, "--dry-run", "--json", *flags]).output)
    assert [rank["first"] for rank in found["placement"]["ranks"]] == [0, 2]
    refused = CliRunner().invoke(cli, [*command, *flags])
    assert isinstance(refused.exception, InputError)
    assert "--processes: is for a plan; add --dry-run" in str(refused.exception)
