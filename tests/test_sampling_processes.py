"""Sampling by several processes: the files are those of one process, also after one of them was killed."""

import signal
import time

import pytest

from forking import UNUSABLE, Command
from toy import toy_run
from unrote.sampling import sample

AGREEING = """
import torch
from unrote.errors import InputError
from unrote.ranks import joined

with joined(torch.device("cpu")) as ranks:
    ranks.agree({"same": 1})
    try:
        ranks.agree({"rank": ranks.rank // 2})
    except InputError as error:
        print(error)
"""


WAITING = """
import os, sys, time
import torch
from unrote.errors import InputError
from unrote.ranks import joined

with joined(torch.device("cpu")) as ranks:
    os.environ["UNROTE_PEER_TIMEOUT"] = "2"
    if ranks.rank:
        time.sleep(6)
    try:
        ranks.barrier()
    except InputError as error:
        sys.exit(f"rank {ranks.rank}: {error}")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("run") / "run")


def command(run, out, num=22, steps=4):
    return ["-m", "unrote", "sample", run.path, "-n", num, "--out", out, "--steps", steps, "--batch-size", 4]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    out = sample(run, 22, out=tmp_path_factory.mktemp("alone") / "samples", steps=4, batch_size=4)
    assert len(files_in(out)) == 22 + 2
    return files_in(out)


def test_the_number_of_processes_changes_nothing(run, alone, tmp_path):
    out = tmp_path / "samples"
    result = Command(command(run, out), 2).finish()
    assert result.returncode == 0, result.stderr
    assert files_in(out) == alone
    assert result.stdout.count("22 images") == 1, "only one process says so"


def test_after_a_kill_any_number_of_processes_goes_on(run, alone, tmp_path):
    out = tmp_path / "samples"
    process = Command(command(run, out), 2, UNROTE_PEER_TIMEOUT="10")
    while process.poll() is None and not list(out.glob("0*.png")):
        time.sleep(0.01)
    process.kill(ranks=[1])
    done = process.finish()
    assert process.codes == [UNUSABLE, -signal.SIGKILL], done.stderr
    assert "another process of this job has stopped, and its own message says why" in done.stderr
    assert not (out / "samples.jsonl").exists()
    # What is whole stays as it is.
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png")}
    first = {path: kept[path] for path in sorted(kept)[: len(kept) // 4 * 4] if int(path.stem) < 4}
    (out / ".000021.png.4711.0badcafe.tmp").write_bytes(b"half of it")
    assert Command(command(run, out), 4).finish().returncode == 0
    assert files_in(out) == alone, "also nothing that the killed one left"
    assert all(path.stat().st_mtime_ns == written for path, written in first.items())


def test_one_file_is_written_by_one_process(run, tmp_path):
    sample(run, 9, out=tmp_path / "1.npz", steps=4, batch_size=4)
    assert Command(command(run, tmp_path / "2.npz", num=9), 2).finish().returncode == 0
    assert (tmp_path / "2.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
    assert (tmp_path / "2.samples.jsonl").read_text() == (tmp_path / "1.samples.jsonl").read_text()


def test_processes_that_were_told_different_things(tmp_path):
    script = tmp_path / "agreeing.py"
    script.write_text(AGREEING)
    result = Command([script], 3).finish()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rank 2: was given other settings or another model than rank 0") == 3


def test_who_waits_too_long_gives_up_and_does_not_say_that_the_other_has_stopped(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    process = Command([script], 2)
    result = process.finish(60)
    assert process.codes[0] == 1, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("rank 0: ")]
    assert (
        "or gave no answer in time ([Rank 0]: Rank 1 failed to pass" in said
        and "raise UNROTE_PEER_TIMEOUT if it is only slow" in said
    )


def test_a_launcher_without_addresses(run, tmp_path):
    result = Command(command(run, tmp_path / "samples"), WORLD_SIZE="2").finish()
    assert result.returncode == 2
    assert "WORLD_SIZE is 2" in result.stderr
    assert "start them with torchrun or accelerate launch" in result.stderr
