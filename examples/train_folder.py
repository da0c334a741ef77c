"""Train on a folder of images, sample, and measure what was copied: the five-line API.

    python examples/train_folder.py

The images are made here, in a temporary folder; put your own folders in their place. The settings are those of a toy:
leave them out, all but ``data.resolution``, for a real run.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import unrote

TOY = {
    "data.resolution": 16,
    "model.block_out_channels": [32, 32],
    "training.epochs": 4,
    "training.batch_size": 16,
    "ensemble.num_shards": 2,
    "ensemble.local_epochs": 2,
}


def make_photos(folder: Path, count: int, seed: int) -> Path:
    """Discs of random place, size and colour, as PNG files."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    rows, columns = np.mgrid[:16, :16]
    for number in range(count):
        (row, column), radius = random.uniform(4, 12, 2), random.uniform(3, 6)
        disc = np.hypot(rows - row, columns - column) < radius
        colours = random.integers(0, 256, (2, 3), dtype=np.uint8)
        Image.fromarray(colours[disc.astype(int)]).save(folder / f"{number:04d}.png")
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        photos, held_out = make_photos(work / "photos", 64, seed=0), make_photos(work / "held-out", 64, seed=1)

        run = unrote.train(photos, method="iet-agc+", out=work / "run", settings=TOY)  # the same call again resumes
        images = unrote.sample(run, num=32, seed=0, steps=10)
        report = unrote.audit(images, train=run, holdout=held_out)
        print(report)
        print("report:", report.save(work / "report"), "(in a temporary folder, removed now)")


if __name__ == "__main__":
    main()
