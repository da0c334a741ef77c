"""What happens to long jobs happens to several real processes: afterwards the result is that of one calm process."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest

from forking import INTERRUPTED, UNUSABLE, Job
from launching import program
from toy import assert_same_run
from unrote.training.run import Run

MANY = {"training.epochs": 8, "training.checkpointing_steps": 2}
"""26 steps in 4 rounds."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """One undisturbed process."""
    out = tmp_path_factory.mktemp("calm") / "run"
    job = Job(out, 1, settings=MANY)
    assert job.wait() == [0], job.messages()
    return Run(out)


def checkpoints_in(out):
    return sorted(int(path.stem) for path in (out / "checkpoints").glob("*.json"))


def until(condition, job, seconds=100):
    """Wait for ``condition`` while the job runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert job.running and time.monotonic() < end, job.messages()
        time.sleep(0.005)


def goes_on(out, world, expected):
    job = Job(out, world, settings=MANY)
    assert job.wait() == [0] * world, job.messages()
    assert_same_run(Run(out), expected)


def test_some_random_kills(tmp_path):
    """The benchmark that kills hundreds of times, a few times."""
    seed = random.randrange(10**6)
    found = program("benchmarks/fault_injection").inject(tmp_path, kills=2, seed=seed, minutes=5)
    assert found["jobs_that_differ"] == found["jobs_with_leftovers"] == 0, f"seed {seed}: {found}"
    assert found["kills"] >= 2
    assert found["undisturbed_two_processes_equal"]


def test_a_request_to_stop_one_that_waits_is_passed_on(tmp_path):
    """Its only proxy has had its turn; the other process is in the first of two turns, and has seconds to go."""
    out = tmp_path / "run"
    long = {"training.epochs": 150, "ensemble.local_epochs": 150, "training.checkpointing_steps": 10**6}
    job = Job(out, 2, "iet-agc", long)
    until(lambda: list((out / "proxies").glob("proxy-0*")), job)
    job.kill(signal.SIGTERM, [0])
    assert job.wait(60) == [INTERRUPTED, INTERRUPTED], job.messages()
    assert len(list((out / "checkpoints").glob("*.json"))) == 1
    assert not list((out / "proxies").glob("proxy-2*")), "nobody went on to the end"


def test_a_request_to_stop_one_process_stops_all_after_a_checkpoint(tmp_path, calm):
    out = tmp_path / "run"
    job = Job(out, 2, settings=MANY | {"training.checkpointing_steps": 10_000})
    until(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size, job)
    job.kill(signal.SIGTERM, [1])
    assert job.wait(60) == [INTERRUPTED, INTERRUPTED], job.messages()
    assert len(checkpoints_in(out)) == 1
    final = Job(out, 3, settings=MANY | {"training.checkpointing_steps": 10_000})
    assert final.wait() == [0, 0, 0], final.messages()
    found, expected = Run(out), calm
    for name in ("ledger.csv", "model/unet/diffusion_pytorch_model.safetensors"):
        assert (found.path / name).read_bytes() == (expected.path / name).read_bytes()


@pytest.mark.parametrize("hung", [0, 1])
def test_a_process_that_stands_still_is_named(tmp_path, calm, hung):
    out, other = tmp_path / "run", 1 - hung
    job = Job(out, 2, settings=MANY, UNROTE_PEER_TIMEOUT="4")
    until(lambda: checkpoints_in(out), job)
    job.kill(signal.SIGSTOP, [hung])
    job.processes[other].join(60)
    assert job.processes[other].exitcode == UNUSABLE, job.messages()
    assert f"process {hung} of 2 has given no sign of life for 4 seconds" in job.messages()[other]
    job.kill(signal.SIGCONT, [hung])
    assert job.wait(60)[hung] != 0, "it does not go on alone"
    goes_on(out, 2, calm)


def test_the_first_process_ends_when_another_stands_still_at_the_end(tmp_path, calm):
    out = tmp_path / "run"
    job = Job(out, 2, settings=MANY, UNROTE_PEER_TIMEOUT="4")
    until(lambda: any(out.glob(".model.*")) or (out / "model").exists(), job)
    job.kill(signal.SIGSTOP, [1])
    job.processes[0].join(60)
    # It may have been through before the signal came.
    assert job.processes[0].exitcode in (0, UNUSABLE), job.messages()
    job.kill(signal.SIGCONT, [1])
    job.wait(60)
    assert_same_run(Run(out), calm)


def stands_still_while_averaging(rank):
    from unrote.training import distributed

    def send(*_):
        os.kill(os.getpid(), signal.SIGSTOP)

    if rank == 1:
        distributed.send = send


def test_who_stands_still_while_proxies_are_averaged_is_named(tmp_path, calm):
    out = tmp_path / "run"
    job = Job(out, 2, settings=MANY, before=stands_still_while_averaging, UNROTE_PEER_TIMEOUT="3")
    job.processes[0].join(60)
    message = job.messages()[0]
    assert job.processes[0].exitcode == UNUSABLE, message
    assert "process 1 of 2 has given no sign of life for 3 seconds, last heard of averaging" in message
    job.kill(ranks=[1])
    job.wait(60)
    goes_on(out, 3, calm)


ADDRESSES = ("10.83.0.1", "10.83.1.1")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines():
    """Two network namespaces with a router between them, and what makes it forward or swallow everything."""
    router, *hosts = (f"unrote-{os.getpid()}-{name}" for name in ("router", "a", "b"))

    def forward(number):
        command = ["netns", "exec", router, "sh", "-c", f"echo {number} > /proc/sys/net/ipv4/ip_forward"]
        ip(*command)

    try:
        try:
            for name in (router, *hosts):
                ip("netns", "add", name)
            for host, address in zip(hosts, ADDRESSES, strict=True):
                gateway, port = f"{address.rpartition('.')[0]}.254", f"port{address[-3]}"
                ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", router)
                for name, link, its in ((host, "eth0", address), (router, port, gateway)):
                    ip("-n", name, "addr", "add", f"{its}/24", "dev", link)
                    ip("-n", name, "link", "set", link, "up")
                ip("-n", host, "link", "set", "lo", "up")
                ip("-n", host, "route", "add", "default", "via", gateway)
            forward(1)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: they need root and iproute2 ({error})")
        yield hosts, forward
    finally:
        for name in (router, *hosts):
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_network_that_is_cut(tmp_path, calm, machines):
    """Packets vanish, no connection is reset: each side gives the other up, and later both go on."""
    hosts, forward = machines
    out, options = tmp_path / "run", {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "eth0"}
    job = Job(out, 2, settings=MANY, hosts=hosts, UNROTE_PEER_TIMEOUT="4", **options)
    until(lambda: checkpoints_in(out), job)
    forward(0)
    cut = time.monotonic()
    assert job.wait(60) == [UNUSABLE, UNUSABLE], job.messages()
    # The time-out, up to a second until the next look, and up to 5 for the others to read why.
    assert time.monotonic() - cut < 4 + 1 + 5 + 3
    for rank, message in enumerate(job.messages()):
        assert f"process {1 - rank} of 2" in message, message
    assert not Run(out).finished and checkpoints_in(out)
    assert [path.name for path in out.rglob(".*")] == [".lock"] and (out / ".lock").read_text() == ""
    forward(1)
    again = Job(out, 2, settings=MANY, hosts=hosts, UNROTE_PEER_TIMEOUT="20", **options)
    assert again.wait() == [0, 0], again.messages()
    assert_same_run(Run(out), calm)
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def test_a_second_run_in_the_folder_refuses_and_the_first_goes_on(tmp_path, calm):
    out = tmp_path / "run"
    first = Job(out, 2, settings=MANY)
    until(lambda: (out / "log.jsonl").exists(), first)
    second = Job(out, 2, settings=MANY)
    codes, messages = second.wait(60), second.messages()
    assert codes == [UNUSABLE, UNUSABLE], messages
    assert all("another process is training in this folder" in message for message in messages)
    assert first.wait() == [0, 0], first.messages()
    assert_same_run(Run(out), calm)


def disk_is_full(which, rank):
    """One process can't write files larger than 64 KiB: the log fits, no state does."""
    if rank == which:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_is_full_at_a_checkpoint(tmp_path, calm, which):
    out = tmp_path / "run"
    first = Job(out, 2, settings=MANY)
    until(lambda: checkpoints_in(out), first)
    first.kill(ranks=[0, 1])
    first.wait()
    kept = checkpoints_in(out)
    full = Job(out, 2, settings=MANY, before=partial(disk_is_full, which))
    codes, messages = full.wait(60), full.messages()
    assert codes == [UNUSABLE, UNUSABLE], messages
    assert "File too large" in messages[which] and f"process {which}" in messages[1 - which], messages
    assert checkpoints_in(out) == kept, "what was whole is still there"
    goes_on(out, 2, calm)
    assert [path.name for path in out.rglob(".*")] == [".lock"]
