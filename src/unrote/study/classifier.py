"""A small classifier as a feature space for quality: it knows what images of a data set differ in, and has seen none
of those that are compared.
"""

import hashlib
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrote.data import ImageStore
from unrote.data.build import cache_folder
from unrote.ownership import Ownership
from unrote.seeding import derive_seed, generator
from unrote.tensorfiles import load_state, save_state, weights_hash
from unrote.training.precision import multiplies_bf16

logger = logging.getLogger("unrote")

VERSION = 1
"""Of the architecture and of how it is trained."""
MIN_IMAGES = 5000
"""Labelled images below which no classifier is worth training."""
FEATURES = 64
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 10, 128, 4e-3, 1e-2
TEST_SHARE = 0.1


class Network(nn.Module):
    """Five 3×3 convolutions with batch norm, 0.37 M parameters; the mean of the last one's outputs is the features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 48, 96, 128, 128, FEATURES)
        pooled = (True, True, False, True, False)
        layers: list[nn.Module] = []
        for before, after, pool in zip(widths, widths[1:], pooled, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
        self.body, self.head = nn.Sequential(*layers), nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] → [B, 64]."""
        means: Tensor = self.body(images).mean((2, 3))
        return means

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits


class ClassifierEncoder:
    """The penultimate layer of a trained :class:`Network`: 64 features.

    Args:
        network: trained.
        accuracy: on labelled images that it was not trained on.
        trained_on: in words.
    """

    key = "classifier"
    name = f"classifier-{FEATURES}/{VERSION}, unscaled"
    preprocessing = "none (images at their own size)"
    copy_detection = False
    is_fid_inception = False

    def __init__(self, network: Network, accuracy: float, trained_on: str) -> None:
        self.network, self.weights_sha256 = network.eval(), weights_hash(network)
        self.accuracy, self.trained_on = accuracy, trained_on

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, 64] of uint8 images [n, H, W, C]."""
        batches = [images[start : start + 256] for start in range(0, len(images), 256)]
        rows = [self.network.features(_pixels(batch)) for batch in batches]
        features: np.ndarray = torch.cat(rows).numpy()
        return features


def trained_classifier(images: ImageStore, cache: Path | None = None) -> ClassifierEncoder | None:
    """The classifier of labelled images: trained now (a few minutes on one core), or found in the cache.

    Args:
        images: labelled, of one size.
        cache: folder of its weights; by default in the cache folder of this package.

    Returns:
        The encoder; None if there are no labels, or fewer than 5,000 images.
    """
    if images.labels is None or len(images) < MIN_IMAGES:
        return None
    folder = cache_folder() / "classifiers" if cache is None else cache
    file = folder / f"{hashlib.sha256(repr((VERSION, images.fingerprint)).encode()).hexdigest()[:32]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with Ownership(file.with_suffix(".lock"), "another process trains the same classifier").held(wait=True):
        if not file.exists():
            network, accuracy = _train(images)
            save_state(file, {"network": network.state_dict(), "accuracy": accuracy})
    state = load_state(file)
    network = Network(images.images.shape[3], int(images.labels.max()) + 1)
    network.load_state_dict(state["network"])
    return ClassifierEncoder(network, state["accuracy"], f"{len(images):,} images of {images.source}")


def _train(images: ImageStore) -> tuple[Network, float]:
    """A network and its accuracy on a tenth of the images, left out; the same each time on the same machine."""
    assert images.labels is not None
    started = time.monotonic()
    order = np.random.default_rng(derive_seed(0, "classifier", "split")).permutation(len(images))
    pixels, labels = _pixels(np.asarray(images.images)[order]), torch.from_numpy(images.labels[order])
    test = round(TEST_SHARE * len(order))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "classifier", "init"))
        network = Network(pixels.shape[1], int(labels.max()) + 1)
    _fit(network, pixels[test:], labels[test:])
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch in torch.split(pixels[:test], 256)])
    accuracy = float((logits.argmax(1) == labels[:test]).double().mean())
    took = time.monotonic() - started
    logger.info("classifier of %s: accuracy %.1f %% on others (%.0f s)", images.source, 100 * accuracy, took)
    return network, accuracy


def _fit(network: Network, pixels: Tensor, labels: Tensor) -> None:
    steps = EPOCHS * (len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    network.train()
    # Where bf16 is emulated it takes many times as long as float32.
    fast = multiplies_bf16(torch.device("cpu"))
    for step in range(steps):
        epoch, place = divmod(step, len(pixels) // BATCH)
        if place == 0:
            order = torch.randperm(len(pixels), generator=generator(0, "classifier", "order", epoch))
        rows = order[place * BATCH : (place + 1) * BATCH]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = network(_varied(pixels[rows], step))
        loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _varied(images: Tensor, step: int) -> Tensor:
    """Each image mirrored or not; all of the batch moved by up to two pixels."""
    random = generator(0, "classifier", "augmentation", step)
    mirrored = torch.rand(len(images), generator=random) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    down, right = (int(shift) for shift in torch.randint(0, 5, (2,), generator=random))
    height, width = images.shape[2:]
    return F.pad(images, (2, 2, 2, 2), mode="reflect")[:, :, down : down + height, right : right + width]


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
