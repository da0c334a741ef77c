"""Sampling by several processes: the files are those of one process, also after one of them was killed."""

import time

import pytest

from forking import Command
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
    assert process.finish().returncode != 0
    assert not (out / "samples.jsonl").exists()
    # What is whole stays as it is.
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png")}
    first = {path: kept[path] for path in sorted(kept)[: len(kept) // 4 * 4] if int(path.stem) < 4}
    assert Command(command(run, out), 3).finish().returncode == 0
    found = {name: content for name, content in files_in(out).items() if not name.startswith(".")}
    assert found == alone
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


def test_a_launcher_without_addresses(run, tmp_path):
    result = Command(command(run, tmp_path / "samples"), WORLD_SIZE="2").finish()
    assert result.returncode == 2
    assert "WORLD_SIZE is 2" in result.stderr
    assert "start them with torchrun or accelerate launch" in result.stderr
