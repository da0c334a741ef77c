"""A tiny model that has learned about half of its samples by rote, for tests of what finds or prevents that."""

from pathlib import Path

import numpy as np

from toy import SETTINGS
from unrote.api import train
from unrote.data.store import in_memory_store

COUNT = 16
LONG = {key: value for key, value in SETTINGS.items() if key.startswith(("model", "training"))} | {
    "training.epochs": 280,
    "training.batch_size": 16,
    "training.learning_rate": 2e-3,
    "training.ema_decay": 0.99,
    "training.checkpointing_steps": 100_000,
    "model.prediction_type": "v_prediction",
    "model.beta_schedule": "squaredcos_cap_v2",
}


def pictures(count, *, seed=0, **more):
    """Blotches of colour, 8×8, that do not resemble each other."""
    random = np.random.default_rng(seed)
    blotches = np.kron(random.uniform(0, 255, (count, 4, 4, 3)), np.ones((1, 2, 2, 1)))
    pixels = np.clip(blotches + random.normal(0, 6, blotches.shape), 0, 255).astype(np.uint8)
    return in_memory_store(pixels, source="pictures", **more)


def save(folder: Path, store):
    """The pictures as an ``.npz``."""
    path = folder / "pictures.npz"
    np.savez(path, images=store.images)
    return path


def memorizing_run(folder: Path, **settings):
    """A run on 16 pictures, long enough."""
    data = save(folder, pictures(COUNT))
    return train(data, out=folder / "run", method="standard", settings=LONG | settings)
