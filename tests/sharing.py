"""What the tests of processes that share a proxy have in common."""

import time

import torch

from forking import Job, exit_codes, free_port
from toy import largest_difference, log_of, summary_of, weights_of
from unrote.training.run import Run

TOLERANCE = 1e-5
"""Of the weights; what the sums' other order made in 13 steps of 2e-4 was up to 3e-7."""


def finished(out, world, method, settings):
    """The run of a job of W processes, which all end well."""
    job = Job(out, world, method, settings)
    assert job.wait(300) == [0] * world, job.messages()
    return Run(out)


def assert_alike(found, expected):
    """Weights equal to rounding; counts, of samples and of lines, exactly."""
    for variant in (None, "raw"):
        assert largest_difference(weights_of(found, variant), weights_of(expected, variant)) < TOLERANCE
    ledgers = found.read_ledger(), expected.read_ledger()
    for column in ("visits", "skips", "augmented", "moves"):
        assert (ledgers[0][column] == ledgers[1][column]).all(), column
    assert summary_of(found) == summary_of(expected)
    lines = [[{k: v for k, v in line.items() if k != "loss"} for line in log_of(run)] for run in (found, expected)]
    assert lines[0] == lines[1]


def until(condition, job, seconds=100):
    """Wait for it while the job runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert job.running and time.monotonic() < end, job.messages()
        time.sleep(0.005)


def checkpoints_in(out):
    """Their steps."""
    return sorted(int(path.stem) for path in (out / "checkpoints").glob("*.json"))


def members_found(member, out, world=4):
    """What W processes, which call ``member(rank, port, out)``, have saved as ``out/RANK.pt``, by rank."""
    port = free_port()
    assert exit_codes(member, [(rank, port, out) for rank in range(world)]) == [0] * world
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(world)]
