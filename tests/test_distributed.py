"""The command in several processes gives what it gives in one, bit for bit; also by the launchers of users."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.distributed import HashStore, TCPStore

from forking import CONTEXT, INTERRUPTED, UNUSABLE, Command, free_port
from toy import SETTINGS, assert_same_run, log_of, summary_of, toy_images
from unrote.config import load_config
from unrote.errors import InputError
from unrote.training.budget import Budget, Progress
from unrote.training.distributed import Group
from unrote.training.journal import Journal
from unrote.training.run import Run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def command_of(out, data, method="iet-agc+", **changed):
    """The training command, without what runs it."""
    settings = SETTINGS | {"training.checkpointing_steps": 3} | changed
    command = ["-m", "unrote", "train", "--data", str(data), "--out", str(out), "--method", method]
    for key, value in settings.items():
        command += ["--set", f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]
    return command


def launch(processes, out, *arguments, **changed):
    """Start the command in so many processes."""
    return Command(command_of(out, *arguments, **changed), processes, **variables_for(out))


def variables_for(out):
    return {"OMP_NUM_THREADS": "1", "UNROTE_CACHE": str(out.parent / "cache"), "UNROTE_PEER_TIMEOUT": "20"}


def finished(done, out):
    """The run of a command that has ended."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run.json") <= 1, "one process speaks for all"
    return Run(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    np.savez(path, images=toy_images().images)
    return path


def test_more_processes_than_proxies_share_the_batches_and_say_so(tmp_path, data):
    out = tmp_path / "run"
    done = launch(2, out, data, "standard").finish()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ranks 0-1 share proxy 0, each on its part of every batch") == 1
    assert summary_of(Run(out))["samples_seen"] == log_of(Run(out))[-1]["samples"] == 26 * 4


@pytest.mark.parametrize("total", [1, 7, 100, 105, 1001])
@pytest.mark.parametrize("local", [0.5, 30.0, 104.0, 5000.0])
@pytest.mark.parametrize("sizes", [(1,), (9, 9, 8), (1,) * 20])
@pytest.mark.parametrize("parts", [(1.0,), (0.5, 1.0)])
def test_where_everyone_stands_is_what_counting_gives(total, local, sizes, parts):
    budget = Budget(total, local, sizes)
    progress = Progress(budget, batch_size=4)
    counts = [[0, 0] for _ in sizes]
    for r in range(min(budget.num_rounds, 10)):
        for part in parts:
            for k in range(len(sizes)):
                others = progress.of_others(k, r, part)
                theirs = [count for j, count in enumerate(counts) if j != k]
                assert [others.samples, others.steps] == [sum(column) for column in zip([0, 0], *theirs, strict=True)]
                end = budget.target(k, budget.num_rounds, 1.0)
                while counts[k][0] < budget.target(k, r, part):
                    counts[k] = [min(counts[k][0] + 4, end), counts[k][1] + 1]
            progress.advance(r, part)
            assert [progress.whole.samples, progress.whole.steps] == [
                sum(column) for column in zip(*counts, strict=True)
            ]


# Faults.

LONG = {"training.epochs": 16, "training.log_every_steps": 2}


@pytest.fixture(scope="module")
def long_alone(tmp_path_factory, data):
    """The longer run in one process, beside the first test that it is for."""
    out = tmp_path_factory.mktemp("long") / "run"
    process = launch(1, out, data, **LONG)
    return lambda: finished(process.finish(300), out)


def workers_of(process):
    """Process ids by rank of what torchrun started."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")}
    return found


def wait_for_checkpoints(out, process, count):
    """Until there is one that is ``count`` steps further than the newest was; False if the process ended first."""
    newest = max((int(path.stem) for path in (out / "checkpoints").glob("*.json")), default=0)
    while process.poll() is None:
        if any(int(path.stem) >= newest + count for path in (out / "checkpoints").glob("*.json")):
            return True
        time.sleep(0.01)
    return False


def test_killed_stopped_and_gone_on_with_in_fewer_processes(tmp_path, data, long_alone):
    """One of three is killed; then one of two is asked to stop; then one alone goes on: the result is the same."""
    out = tmp_path / "run"
    process = launch(3, out, data, **LONG)
    assert wait_for_checkpoints(out, process, 10)
    process.kill(ranks=[1])
    process.kill(signal.SIGTERM, [0, 2])  # as torchrun does then
    done = process.finish()
    assert process.codes == [UNUSABLE, -signal.SIGKILL, UNUSABLE], done.stderr
    assert done.stderr.count("process 1 of 3 has died; the same command goes on from here") >= 2, done.stderr
    process = launch(2, out, data, **LONG)
    assert wait_for_checkpoints(out, process, 10), process.finish().stderr
    steps = max(int(path.stem) for path in (out / "checkpoints").glob("*.json"))
    process.kill(signal.SIGTERM, [1])
    done = process.finish()
    assert process.codes == [INTERRUPTED, INTERRUPTED], done.stderr
    assert done.stderr.count("the same command goes on") >= 1, done.stderr
    assert max(int(path.stem) for path in (out / "checkpoints").glob("*.json")) > steps
    run = finished(launch(1, out, data, **LONG).finish(), out)
    assert_same_run(run, long_alone())


def test_a_machine_disappears_and_torchrun_goes_on_with_the_other(tmp_path, data, long_alone):
    """Elastic: of two machines with one worker each, one is killed; torchrun restarts the other, alone (W = 2, 1)."""
    out = tmp_path / "run"
    patience = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"
    launcher = [*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=1"]
    # The meeting point of the launchers is the first machine's, which stays.
    first, second = (
        subprocess.Popen(
            [*launcher, f"--rdzv-conf={patience},is_host={host}", *command_of(out, data, **LONG)],
            env=os.environ | variables_for(out),
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in ("true", "false")
    )
    try:
        assert wait_for_checkpoints(out, first, 10)
        found = [second.pid, *workers_of(second).values()]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        second.communicate(timeout=60)
        _, errors = first.communicate(timeout=400)
    finally:
        for process in (first, second):
            process.kill()
    assert first.returncode == 0, errors
    assert "going on at" in errors, "it was started again"
    assert_same_run(Run(out), long_alone())
    assert not any(Path(f"/proc/{pid}").exists() for pid in found), "no orphans"
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint_and_more_processes_go_on(tmp_path, data, long_alone):
    """As Slurm and Kubernetes tell it: torchrun passes the signal on, and waits. Then three where there were two."""
    out = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *command_of(out, data, **LONG)]
    launcher = subprocess.Popen(command, env=os.environ | variables_for(out), stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for_checkpoints(out, launcher, 10)
        workers = workers_of(launcher)
        assert sorted(workers) == [0, 1]
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=100)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert "stopped; the same command goes on" in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values()), "no orphans"
    assert not Run(out).finished and (out / ".lock").read_text() == ""
    run = finished(launch(3, out, data, **LONG).finish(), out)
    assert_same_run(run, long_alone())


def test_accelerate_launch_gives_the_same_also_when_one_of_two_was_killed(tmp_path, data, long_alone):
    """What an attempt has left in the launcher's store, as that it failed, is none of the next one's business."""
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    command += ["--max_restarts=3", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    command += command_of(out, data, **LONG)
    variables = os.environ | variables_for(out)
    launcher = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_for_checkpoints(out, launcher, 10)
        os.kill(workers_of(launcher)[1], signal.SIGKILL)
        _, errors = launcher.communicate(timeout=400)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, errors
    assert errors.count("going on at") == 2, errors  # once, of each
    run = Run(out)
    assert summary_of(run)["moved"] > 0 and {line["proxy"] for line in log_of(run)} == {0, 1, 2}
    assert_same_run(run, long_alone())
    assert not [path.name for path in out.iterdir() if path.name.startswith(".shared")]
    manifest = json.loads(max((out / "checkpoints").glob("*.json")).read_text())
    names = {name.split(".")[0] for name in manifest["proxies"]}
    assert names == {"global", "initial", "proxy-0", "proxy-1", "proxy-2"}


def test_a_process_that_hangs_between_speaking_and_being_counted_is_named():
    store = HashStore()
    store.set("meeting/1/1", "null")
    group = Group(store, 0, 2, 1.5, [])
    with pytest.raises(InputError, match=r"process 1 of 2 has given no sign of life for 1\.5 seconds"):
        group.gather(None)


def test_who_works_long_is_waited_for(tmp_path):
    store = HashStore()
    first, second = (Group(store, rank, 2, 2.5, []) for rank in range(2))

    def work():
        with second.working("looking at the model"):
            time.sleep(4)
        return second.gather("second")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(work)
        assert first.gather("first") == other.result() == ["first", "second"]


def hang_at_work(port):
    group = Group(TCPStore("127.0.0.1", port, 2, is_master=False), 1, 2, 60.0, [])
    with group.one_per_machine_first():
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGSTOP)


def test_who_hangs_while_its_machine_waits_for_it_is_named():
    port = free_port()
    store = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    process = CONTEXT.Process(target=hang_at_work, args=(port,))
    process.start()
    try:
        store.wait(["beat/1"], timedelta(seconds=120))
        with pytest.raises(InputError, match=r"process 1 of 2 has given no sign of life.*last heard of making the mod"):
            Group(store, 0, 2, 3.0, []).gather(None)
    finally:
        process.kill()
        process.join()


def test_more_lines_wait_than_a_message_of_the_store_may_hold(tmp_path):
    """As after a checkpoint amid a round of 300 proxies, and more of them come: all by the real store of two."""
    waiting = {k: [line(k, step) for step in range(100)] for k in range(300)}
    assert len(json.dumps(waiting)) > 8 << 20, "its limit"
    config, port = load_config(method="iet-agc", overrides=SETTINGS), free_port()
    stores = [TCPStore("127.0.0.1", port, 2, is_master=first, wait_for_workers=False) for first in (True, False)]

    def process(rank):
        group = Group(stores[rank], rank, 2, 60.0, [])
        journal = Journal(group, Run(tmp_path), config, 0, {"waiting": waiting, "length": 0})
        for k in range(150, 300) if rank else ():
            journal.add(k, line(k, 100))
        saved = journal.save()
        journal.settle()
        journal.close()
        return saved

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    every = {k: waiting[k] + [line(k, 100)] * (k >= 150) for k in waiting}
    assert (first["waiting"], second) == (every, {}), "only who writes them has them"
    assert list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())) == [*chain(*every.values())]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def line(proxy, step):
    """Of the log, as long as they are."""
    return {"step": step, "proxy": proxy, **{f"reading {n}": 1 / (2 + step + n) for n in range(8)}}


def test_what_one_process_fails_of_is_said_by_the_others(tmp_path, data):
    out = tmp_path / "run"
    done = launch(2, out, data, "iet-agc", **LONG | {"training.learning_rate": 1e30}).finish()
    assert done.stderr.count("training has diverged") >= 2
    assert not (out / "model").exists()
    assert (out / ".lock").read_text() == ""
