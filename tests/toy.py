"""What the tests of training share: tiny images, a model that trains in a second, runs compared bit for bit."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from unrote.api import train
from unrote.data.store import in_memory_store
from unrote.tensorfiles import load_state
from unrote.training.step import TrainingStep

SETTINGS = {
    "model.block_out_channels": [32, 32],
    "training.mixed_precision": "no",
    "training.epochs": 4,
    "training.batch_size": 8,
    "training.lr_warmup_steps": 2,
    "training.log_every_steps": 3,
    "ensemble.num_shards": 3,
    "ensemble.local_epochs": 2,
    "gate.skip_ratio": 0.9,
    "gate.bank.bins": 4,
    "gate.bank.warm_start": True,
}
"""On 26 images: 13 steps of 8, in shards of 9, 9 and 8; few bins, so that the gate has something to go by at once."""

WALL_CLOCK = {"time", "seconds", "images_per_second", "overhead"}


def toy_images(count=26, *, side=8, channels=3, classes=0, seed=0):
    """A store of smooth images with some noise, labelled in turn if there are classes."""
    random = np.random.default_rng(seed)
    ramps = np.linspace(0, 1, side)[:, None, None] * random.uniform(0, 200, (count, 1, side, channels))
    pixels = (ramps + random.uniform(0, 50, ramps.shape)).astype(np.uint8)
    labels = np.arange(count) % classes if classes else None
    names = tuple(f"class {k}" for k in range(classes)) or None
    return in_memory_store(pixels, source="toy", labels=labels, class_names=names)


def captioned_images(count=15):
    """A store of larger ones with a caption each."""
    captions = [("red cat", "a dog", "cat")[index % 3] for index in range(count)]
    return in_memory_store(toy_images(count, side=16).images, source="toy", captions=captions)


def toy_run(out: Path, method="standard", *, images=None, **settings):
    """Train a tiny model; settings are dotted fields with ``__`` for the dot."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return train(toy_images() if images is None else images, out=out, method=method, settings=SETTINGS | changed)


def stop_in_step(number, monkeypatch):
    """The training step of this number, counted from here on, is interrupted; those after it are not."""
    calls, original = 0, TrainingStep.__call__

    def stopped(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(TrainingStep, "__call__", stopped)


def weights_of(run, variant=None):
    """The saved weights, by name."""
    name = f"diffusion_pytorch_model{'' if variant is None else '.' + variant}.safetensors"
    return load_file(run.model_folder / "unet" / name)


def final_state(run):
    """What the last checkpoint knows of the model that the run ended with: its parts by name."""
    files = load_state(max((run.path / "checkpoints").glob("*.safetensors")))["ensemble"]["slots"]["files"]
    return load_state(run.path / "proxies" / files["global" if "global" in files else "live-0"])


def log_of(run):
    """The lines of the log without what the clock says."""
    lines = (run.path / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in WALL_CLOCK} for line in lines]


def summary_of(run):
    """What run.json says."""
    return json.loads((run.path / "run.json").read_text())


def everything_of(run):
    """Every byte that a run must reproduce, by file name, and its log without the clock."""
    files = [run.path / "ledger.csv", run.path / "run.json", *sorted(run.model_folder.rglob("*.safetensors"))]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files} | {"log": log_of(run)}


def assert_same_run(found, expected):
    """The two runs have equal weights, averaged and not, ledger, counts and log."""
    assert everything_of(found).keys() == everything_of(expected).keys()
    for name, content in everything_of(expected).items():
        assert everything_of(found)[name] == content, name


def largest_difference(found, expected):
    """Between two sets of weights."""
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)
