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
import shutil
import subprocess
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
KILLS_PER_JOB = 4
PEER_TIMEOUT = "10"
COMMIT = ["git", "describe", "--always", "--dirty"]


def digest(out: Path) -> str:
    """Of everything that a run must reproduce."""
    content = repr(sorted(everything_of(Run(out)).items()))
    return hashlib.sha256(content.encode()).hexdigest()


def leftovers(out: Path) -> list[str]:
    """What nobody should find in a finished run: hidden files and folders, proxies and states that no checkpoint names.

    The lock file stays, empty.
    """
    found = {path for path in out.rglob(".*") if path != out / ".lock" or path.read_bytes()}
    named = {out / "checkpoints" / path.name for path in out.glob("checkpoints/*.json")}
    for manifest in tuple(named):
        named |= {manifest.with_suffix(".safetensors")}
        named |= {out / "proxies" / name for name in json.loads(manifest.read_text())["proxies"]}
    found |= {*out.glob("checkpoints/*"), *out.glob("proxies/*")} - named
    return sorted(str(path.relative_to(out)) for path in found)


def newest_checkpoint(out: Path) -> int:
    """Steps that it has; 0 if there is none."""
    return max((int(path.stem) for path in (out / "checkpoints").glob("*.json")), default=0)


def killed(out: Path, draw: random.Random, seconds: float) -> dict[str, Any]:
    """Start two processes, kill one or both after a time of at most ``seconds``, and wait until all have ended."""
    delay, ranks = draw.uniform(0, seconds), draw.choice([[0], [1], [0, 1]])
    job = Job(out, 2, settings=SETTINGS, UNROTE_PEER_TIMEOUT=PEER_TIMEOUT)
    began = time.monotonic()
    while job.running and time.monotonic() - began < delay:
        time.sleep(0.005)
    hit = [rank for rank in ranks if job.processes[rank].is_alive()]
    job.kill(ranks=hit)
    struck = time.monotonic()
    codes = job.wait()
    ended = round(time.monotonic() - struck, 3)
    return {
        "killed": hit,
        "after_seconds": round(delay, 4),
        "exit_codes": codes,
        "survivor_ended_after_seconds": ended,
        "newest_checkpoint": newest_checkpoint(out),
        "left": leftovers(out),
    }


def one_job(folder: Path, seed: int, seconds: float, kills: int) -> dict[str, Any]:
    """A job that is killed so often, unless it is finished before, and then left alone."""
    draw, out = random.Random(seed), folder / f"job-{seed}"
    history: list[dict[str, Any]] = []
    while len(history) < kills and not Run(out).finished:
        history.append(killed(out, draw, seconds))
    world = draw.choice([1, 2, 3])
    final = Job(out, world, settings=SETTINGS)
    codes = final.wait(600)
    result = {
        "seed": seed,
        "kills": history,
        "last_processes": world,
        "last_exit_codes": codes,
        "sha256": digest(out) if not any(codes) else None,
        "leftovers": leftovers(out),
        "messages": final.messages() if any(codes) else [],
    }
    shutil.rmtree(out)
    return result


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
    jobs: list[dict[str, Any]] = []
    while sum(counts(jobs).values()) < kills and time.monotonic() < end:
        jobs.append(one_job(folder, seed + len(jobs), seconds, min(KILLS_PER_JOB, kills)))
        state = f"{sum(counts(jobs).values())} kills, {different(jobs, expected)} of {len(jobs)} jobs different"
        print(f"seed {jobs[-1]['seed']}: {state}, left {jobs[-1]['leftovers']}", file=sys.stderr, flush=True)
    every = [kill for job in jobs for kill in job["kills"] if kill["killed"]]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(COMMIT, cwd=RESULTS, capture_output=True, text=True, check=False).stdout.strip(),
        "load_average": list(os.getloadavg()),
        "seed": seed,
        "settings": SETTINGS,
        "undisturbed_seconds": seconds,
        "undisturbed_sha256": expected,
        "undisturbed_two_processes_equal": digest(folder / "calm") == expected,
        "kills": sum(counts(jobs).values()),
        "kills_by_rank": counts(jobs),
        "kills_that_left_something": sum(bool(kill["left"]) for kill in every),
        "jobs": len(jobs),
        "jobs_that_differ": different(jobs, expected),
        "jobs_with_leftovers": sum(bool(job["leftovers"]) for job in jobs),
        "longest_survivor_seconds": max((kill["survivor_ended_after_seconds"] for kill in every), default=0.0),
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
    """Inject and write the result; 1 if any job differs or leaves anything."""
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
    failed = result["jobs_that_differ"] or result["jobs_with_leftovers"]
    return int(bool(failed) or not result["undisturbed_two_processes_equal"])


if __name__ == "__main__":
    sys.exit(main())
