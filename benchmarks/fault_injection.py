"""Kill training processes at random, again and again, and compare what comes out with an undisturbed run.

A job trains toy images by IET-AGC+ in two processes. One of them or both are killed (SIGKILL) after a random time; the
survivor must notice and end by itself. The same job then is started again, and killed again; after some kills it is
left alone, in one, two or three processes. Weights, averaged weights, ledger, counts and log must be those of one
undisturbed process, byte for byte.

    python benchmarks/fault_injection.py --kills 200
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unrote.files import write_json
from unrote.training.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from forking import Job
from toy import everything_of

RESULTS = Path(__file__).parent / "results"
SETTINGS = {"training.epochs": 8, "training.checkpointing_steps": 2, "training.log_every_steps": 2}
KILLS_PER_JOB = 3


def digest(out: Path) -> str:
    """Of everything that a run must reproduce."""
    content = repr(sorted(everything_of(Run(out)).items()))
    return hashlib.sha256(content.encode()).hexdigest()


def leftovers(out: Path) -> list[str]:
    """Files of a finished run that nobody should find: half-written ones, markers of a process that was there."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*") if path.name != ".lock")


def newest_checkpoint(out: Path) -> int:
    """Steps that it has; 0 if there is none."""
    return max((int(path.stem) for path in (out / "checkpoints").glob("*.json")), default=0)


def killed(out: Path, draw: random.Random, seconds: float, steps: int) -> dict[str, Any]:
    """Start two processes, kill some, and wait until all have ended.

    The time is drawn from what the job still needs, of ``seconds`` for all ``steps``.
    """
    delay = draw.uniform(0, seconds * (1 - newest_checkpoint(out) / steps))
    job = Job(out, 2, settings=SETTINGS, UNROTE_PEER_TIMEOUT="20")
    ranks = draw.choice([[0], [1], [0, 1]])
    began = time.monotonic()
    while job.running and time.monotonic() - began < delay:
        time.sleep(0.005)
    hit = [rank for rank in ranks if job.processes[rank].is_alive()]
    job.kill(hit)
    struck = time.monotonic()
    codes = job.wait()
    ended = round(time.monotonic() - struck, 3)
    return {
        "killed": hit,
        "after_seconds": round(delay, 4),
        "exit_codes": codes,
        "survivor_ended_after_seconds": ended,
        "newest_checkpoint": newest_checkpoint(out),
    }


def one_job(folder: Path, seed: int, seconds: float, steps: int, kills: int) -> dict[str, Any]:
    """A job that is killed so often and then left alone."""
    draw, out = random.Random(seed), folder / f"job-{seed}"
    history = [killed(out, draw, seconds, steps) for _ in range(kills)]
    world = draw.choice([1, 2, 3])
    final = Job(out, world, settings=SETTINGS)
    codes = final.wait(600)
    return {
        "seed": seed,
        "kills": history,
        "last_processes": world,
        "last_exit_codes": codes,
        "sha256": digest(out) if not any(codes) else None,
        "leftovers": leftovers(out),
        "messages": final.messages() if any(codes) else [],
    }


def inject(folder: Path, kills: int, seed: int, minutes: float) -> dict[str, Any]:
    """Jobs until there were so many kills, or the time is over."""
    end = time.monotonic() + 60 * minutes
    alone = Job(folder / "alone", 1, settings=SETTINGS)
    assert alone.wait(600) == [0], alone.messages()
    expected = digest(folder / "alone")
    began = time.monotonic()
    calm = Job(folder / "calm", 2, settings=SETTINGS)
    assert calm.wait(600) == [0, 0], calm.messages()
    seconds = time.monotonic() - began
    steps = newest_checkpoint(folder / "calm")
    jobs: list[dict[str, Any]] = []
    while sum(counts(jobs).values()) < kills and time.monotonic() < end:
        jobs.append(one_job(folder, seed + len(jobs), seconds, steps, min(KILLS_PER_JOB, kills)))
        state = f"{sum(counts(jobs).values())} kills, {different(jobs, expected)} of {len(jobs)} jobs different"
        print(state, file=sys.stderr, flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()),
        "seed": seed,
        "settings": SETTINGS,
        "undisturbed_seconds": seconds,
        "undisturbed_sha256": expected,
        "undisturbed_two_processes_equal": digest(folder / "calm") == expected,
        "kills": sum(counts(jobs).values()),
        "kills_by_rank": counts(jobs),
        "jobs": len(jobs),
        "jobs_that_differ": different(jobs, expected),
        "jobs_with_leftovers": sum(bool(job["leftovers"]) for job in jobs),
        "longest_survivor_seconds": max(kill["survivor_ended_after_seconds"] for job in jobs for kill in job["kills"]),
        "history": jobs,
    }


def counts(jobs: list[dict[str, Any]]) -> dict[str, int]:
    """Kills that met a running process, by who was killed."""
    found = {"0": 0, "1": 0, "0, 1": 0}
    for kill in (kill for job in jobs for kill in job["kills"] if kill["killed"]):
        found[", ".join(map(str, kill["killed"]))] += 1
    return found


def different(jobs: list[dict[str, Any]], expected: str) -> int:
    """Jobs whose result is not that of the undisturbed run."""
    return sum(job["sha256"] != expected for job in jobs)


def main() -> int:
    """Inject and write the result; 1 if any job differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "fault_injection.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = inject(Path(folder), arguments.kills, arguments.seed, arguments.minutes)
    write_json(arguments.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "history"}, indent=2))
    return int(bool(result["jobs_that_differ"]) or not result["undisturbed_two_processes_equal"])


if __name__ == "__main__":
    sys.exit(main())
