"""Changes everything that is read at random and reads it: no crash, hang, or stray write.

    python benchmarks/fuzz.py --count 10000 --seed 0 --out benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --count 600 --kinds archive,prompts

Every input must be read or be refused by the error that says so (`BadImage` for one image, `InputError` otherwise),
within the time limit. An audit hook of Python watches meanwhile: writes outside the working folder, unpickling,
processes and connections are failures whatever else happens. Input n of a seed is always the same. Needs the extra
`dev`: pipelines are made by what the tests make them with.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers
from fuzz_data import DataInputs
from fuzz_models import ModelInputs
from fuzz_watch import Watch

from unrote.data.decode import BadImage
from unrote.errors import InputError

SHARES = {
    "image": 0.30, "metadata": 0.10, "config": 0.12, "arrays": 0.04, "prompts": 0.06, "archive": 0.08, "run": 0.12,
    "model": 0.05, "samples": 0.05, "report": 0.04, "pipeline": 0.02, "file": 0.02,
}  # fmt: skip
"""Kinds of inputs, and which part of them each is."""

OWN_FILES = {"config.yaml", "again.yaml", "data.npz", "prompts.jsonl", "prompts.txt", "set.archive"}
"""Inputs that are written into the working folder; nothing else may come to lie beside them."""


def _too_long(*_: object) -> None:
    raise TimeoutError("took longer than the limit")


def readers_in(work: Path, draw: random.Random) -> tuple[tuple[DataInputs, ModelInputs], dict[str, Callable[[], None]]]:
    """What changes the inputs, and what reads each kind."""
    data, models = DataInputs(work, draw), ModelInputs(work, draw)
    return (data, models), {
        "image": data.image, "metadata": data.metadata, "config": data.config, "arrays": data.arrays_file,
        "prompts": data.prompts, "archive": data.archive, "run": models.run_folder, "model": models.model,
        "samples": models.samples, "report": models.report_json, "pipeline": models.pipeline,
        "file": models.single_file,
    }  # fmt: skip


def fuzz(count: int, seed: int, limit: float, work: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Read ``count`` changed inputs of the kinds ``wanted``; what came of each kind, and every failure."""
    # What libraries import late would be compiled into files, which are no writes of ours.
    sys.dont_write_bytecode = True
    os.environ["UNROTE_CACHE"] = str(work / "cache")
    os.environ["TMPDIR"] = tempfile.tempdir = str(work / "tmp")
    (work / "tmp").mkdir()
    inputs, readers = readers_in(work, random.Random(seed))
    watch = Watch(work)
    whole = sum(SHARES[kind] for kind in wanted)
    kinds = [kind for kind in wanted for _ in range(round(SHARES[kind] / whole * count))]
    random.Random(seed).shuffle(kinds)
    outcomes, failures, slowest, shown = Counter[str](), [], 0.0, 0
    signal.signal(signal.SIGALRM, _too_long)
    known = {path.name for path in work.iterdir()} | {"cache"} | OWN_FILES
    for number, kind in enumerate(kinds):
        for part in inputs:
            part.draw = random.Random(f"{seed}/{number}")
        started, watch.found = time.perf_counter(), []
        signal.setitimer(signal.ITIMER_REAL, limit)
        watch.on = True
        outcome = "read"
        try:
            readers[kind]()
        except (BadImage, InputError):
            outcome = "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "failed"
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{kind} {number}: {type(error).__name__}: {error!s:.120} ({last.filename}:{last.lineno})")
        finally:
            watch.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        strays = sorted({path.name for path in work.iterdir()} - known)
        failures += [f"{kind} {number}: {what}" for what in (*watch.found, *(f"left {name}" for name in strays))]
        if len(failures) > shown:
            print(*failures[shown:], sep="\n", file=sys.stderr, flush=True)
            shown = len(failures)
        slowest = max(slowest, time.perf_counter() - started)
        outcomes[f"{kind}: {outcome}"] += 1
        # Everything that was decoded is kept in the cache; it would fill the disk.
        if number % 200 == 199:
            shutil.rmtree(work / "cache", ignore_errors=True)
    return {
        "inputs": len(kinds), "seed": seed, "limit_seconds": limit, "outcomes": dict(sorted(outcomes.items())),
        "failures": failures, "slowest_seconds": round(slowest, 3),
    }  # fmt: skip


def main() -> None:
    """Run, print, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds an input may take")
    parser.add_argument("--kinds", default=",".join(SHARES), help="some of them, between commas")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # What libraries have to say of thousands of damaged files is nobody's reading.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        result = fuzz(args.count, args.seed, args.limit, Path(work), args.kinds.split(","))
    result["seconds"] = round(time.perf_counter() - started, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
