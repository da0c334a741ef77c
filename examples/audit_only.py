"""Audit images that any model made: does the set contain copies of the training images?

    python examples/audit_only.py

Nothing is trained. Both sets are arrays here; folders, .npz files and data sets work the same. Two of the "generated"
images are planted: an exact copy of a training image and a mirrored one.
"""

import tempfile

import numpy as np

import unrote


def blobs(count: int, seed: int) -> np.ndarray:
    """Smooth random images, uint8 [N, 32, 32, 3]."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 3)).astype(np.float64)
    for axis in (1, 2):
        coarse = np.repeat(coarse, 8, axis=axis)
        coarse = sum(np.roll(coarse, shift, axis=axis) for shift in range(-4, 4)) / 8
    return coarse.astype(np.uint8)


def main() -> None:
    train, held_out, generated = blobs(256, seed=0), blobs(256, seed=1), blobs(64, seed=2)
    generated[0] = train[10]
    generated[1] = train[20][:, ::-1]

    report = unrote.audit(generated, train=train, holdout=held_out, name="any model")
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        print("report:", report.save(f"{folder}/report"), "(in a temporary folder, removed now)")


if __name__ == "__main__":
    main()
