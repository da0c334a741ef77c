"""The command, killed or stopped at random moments and given again, ends as an undisturbed run does, bit for bit."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
import yaml

from forking import Command
from toy import SETTINGS, assert_same_run, toy_images
from unrote.training.run import Run

SEED = 20261124
METHODS = ("standard", "iet-agc+")
FAST = {"training.checkpointing_steps": 3, "training.epochs": 16, "training.log_every_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    np.savez(path, images=toy_images().images)
    return path


def start(out, data, method, **changed):
    """The training command in a process of its own."""
    settings = SETTINGS | FAST | {key.replace("__", "."): value for key, value in changed.items()}
    command = ["-m", "unrote", "train", "--data", str(data), "--out", str(out), "--method", method]
    for key, value in settings.items():
        command += ["--set", f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]
    return Command(command, UNROTE_CACHE=str(out.parent / "cache"))


def finish(out, data, method, **changed):
    """Run the command to its end."""
    done = start(out, data, method, **changed).finish(300)
    assert done.returncode == 0, done.stderr


def wait_for_steps(out, process, steps):
    """Until the log reaches ``steps``; False if the process ended first."""
    while process.poll() is None:
        if lines_of(out) and json.loads(lines_of(out)[-1])["step"] >= steps:
            return True
        time.sleep(0.005)
    return False


def lines_of(out):
    """Whole lines of the log."""
    path = out / "log.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def steps_of(out):
    lines = lines_of(out)
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """One run per method that nothing happened to; they run beside the tests, which wait for them when they compare."""
    folder = tmp_path_factory.mktemp("undisturbed")
    processes = {method: start(folder / method, data, method) for method in METHODS}

    def of(method):
        done = processes[method].finish(300)
        assert done.returncode == 0, done.stderr
        return Run(folder / method)

    return of


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_it_ends_the_same(method, tmp_path, data, undisturbed):
    draw, out, kills = random.Random(f"{SEED} {method}"), tmp_path / "run", 0
    for _ in range(2):
        process = start(out, data, method)
        if wait_for_steps(out, process, steps_of(out) + draw.randint(2, 20)):
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
            kills += 1
        process.finish(300)
    assert kills > 0, f"seed {SEED}"
    finish(out, data, method)
    assert_same_run(Run(out), undisturbed(method))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_writes_a_checkpoint_first(number, tmp_path, data, undisturbed):
    out = tmp_path / "run"
    process = start(out, data, "iet-agc+", training__checkpointing_steps=10_000)
    assert wait_for_steps(out, process, 4)
    process.kill(number)
    done = process.finish()
    assert done.returncode == 130 and "goes on" in done.stderr and "Traceback" not in done.stderr
    assert len(list((out / "checkpoints").glob("*.json"))) == 1
    finish(out, data, "iet-agc+", training__checkpointing_steps=10_000)
    assert_same_run(Run(out), undisturbed("iet-agc+"))


def test_another_configuration_or_other_images_are_refused(tmp_path, data, undisturbed):
    out = undisturbed("standard").path
    done = start(out, data, "standard", training__learning_rate=0.5).finish()
    assert done.returncode == 2 and "training.learning_rate: " in done.stderr and "0.5" in done.stderr
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    images = toy_images().images.copy()
    images[3, 2, 2] ^= 255
    backup = data.read_bytes()
    try:
        np.savez(data, images=images)
        done = start(copy, data, "standard").finish()
    finally:
        data.write_bytes(backup)
    assert done.returncode == 2 and "not those the run was started on" in done.stderr


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, data):
    out = tmp_path / "run"
    first = start(out, data, "standard", training__epochs=100_000)
    assert wait_for_steps(out, first, 2)
    second = start(out, data, "standard", training__epochs=100_000).finish()
    first.kill()
    first.finish()
    assert second.returncode == 2 and "another process" in second.stderr
