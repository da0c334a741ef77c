"""Whether the scan's risk says which training images come back: AUC against what a run's samples copy.

An image came back if it, or a duplicate of it, is the nearest training image of a sample whose squared-L2 neighbour
ratio (n = 50, over flips and shifts) is below 0.33. The AUC is the chance that a cluster of duplicates that came back
has a higher value than one that did not; its interval is a bootstrap over clusters.

    python benchmarks/scan_risk.py RUN...             # finished runs that have samples
    python benchmarks/scan_risk.py --make RUN [--data cifar10:train]    # trains one, with images that repeat, first
"""

import argparse
from pathlib import Path

import numpy as np
from scan_truth import jpeg, scaled, shifted

import unrote
from unrote.auditing.memorization import neighbour_ratio
from unrote.data.store import in_memory_store
from unrote.detection.roc import separation
from unrote.neighbours.images import nearest_images
from unrote.neighbours.orbit import orbit
from unrote.scanning.scan import scan
from unrote.training.run import Run

SIDE, SINGLE, REPEATED, TIMES = 16, 150, 10, 8
EPOCHS, BATCH = 150, 32


def repeating(data: str, seed: int) -> np.ndarray:
    """150 images that are there once, and 10 that are there eight times, altered: flip, shift, JPEG, brightness."""
    store, random = unrote.open_images(data, resolution=SIDE), np.random.default_rng(seed)
    images = np.asarray(store.images[np.sort(random.choice(len(store), SINGLE + REPEATED, replace=False))])
    alterations = [
        lambda image: image,
        lambda image: image[:, ::-1],
        lambda image: shifted(image, 1, 0),
        lambda image: jpeg(image, 80),
        lambda image: scaled(image, 1.1),
    ]
    copies = [alterations[time % 5](image) for image in images[SINGLE:] for time in range(1, TIMES)]
    return np.concatenate([images, np.stack(copies)])


def measure(run: Run, images: np.ndarray | None) -> None:
    """Print the AUC of everything that the risk is made of."""
    from unrote.training.images import training_images

    train = training_images(run.config) if images is None else in_memory_store(images, source="repeating")
    samples = unrote.open_images(run.path / "samples", resolution=None)
    views = orbit(flip=True, max_shift=2, height=train.images.shape[1], width=train.images.shape[2])
    found = nearest_images(samples.images, train.images, 50, transforms=views)
    copies = neighbour_ratio(found, "squared-l2") < 0.33
    for ledger in (None, run.read_ledger()):
        report = scan(train, ledger=ledger)
        clusters = report.risk["cluster"]
        first = np.unique(clusters)
        came = np.isin(first, clusters[found.indices[copies, 0]])
        if ledger is None:
            print(f"{run.path}: {copies.sum()} of {len(samples)} samples are near-copies")
            print(f"{came.sum()} of {len(first)} clusters came back")
        for name in ("copies", "isolation", "risk") if ledger is None else ("skip_rate", "mean_ratio", "risk"):
            values = np.array([np.nanmax(report.risk[name][clusters == label]) for label in first], dtype=np.float64)
            if came.all() or not came.any():
                print("nothing to tell apart")
                return
            result = separation(values[came], values[~came])
            low, high = result["auc_interval"]
            with_ledger = "" if ledger is None else " (with the ledger)"
            print(f"{name}{with_ledger}: AUC {result['auc']:.3f} ({low:.3f}-{high:.3f})")


def main() -> None:
    """Train if asked to, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--data", default="cifar10:train")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = repeating(options.data, options.seed) if options.make else None
    for path in options.runs:
        run = Run(path)
        if images is not None:
            settings = {
                "training.epochs": EPOCHS,
                "training.ema_decay": 0.99,
                "training.batch_size": BATCH,
                "seed": options.seed,
            }
            run = unrote.train(images, out=path, method="standard", settings=settings)
            unrote.sample(run, 512, out=path / "samples")
        measure(run, images)


if __name__ == "__main__":
    main()
