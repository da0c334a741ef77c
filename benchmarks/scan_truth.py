"""Whether the scan finds duplicates that are planted among real images, and what else it finds.

Of COUNT images, drawn by the seed, altered copies of each kind are added to a data set, and the duplicates of all are
looked for. A copy is found if it lands in its original's cluster. Pairs between images that were in the data set
before are what the scan takes for duplicates there; --pairs writes a picture of them to judge by eye.

    python benchmarks/scan_truth.py cifar10:train [--count 200] [--pairs found.png]
"""

import argparse
import io
import resource
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

import unrote
from unrote.data.store import image_digests
from unrote.scanning.duplicates import clusters, duplicate_pairs


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """As it comes back from a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved, with reflection at the border."""
    size = max(abs(down), abs(right))
    padded = np.pad(image, ((size, size), (size, size), (0, 0)), mode="reflect")
    height, width = image.shape[:2]
    return padded[size - down : size - down + height, size - right : size - right + width]


def cropped(image: np.ndarray, share: float) -> np.ndarray:
    """The middle, scaled up."""
    height, width = image.shape[:2]
    rows, columns = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
    middle = Image.fromarray(image[rows : height - rows, columns : width - columns])
    return np.asarray(middle.resize((width, height), Image.Resampling.BICUBIC))


def scaled(image: np.ndarray, gain: float) -> np.ndarray:
    """Brighter or darker."""
    return np.clip(image * gain, 0, 255).round().astype(np.uint8)


def kinds(random: np.random.Generator) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What is done to the copies."""

    def noised(image: np.ndarray, size: float) -> np.ndarray:
        return np.clip(image + random.normal(0, size * 255, image.shape), 0, 255).round().astype(np.uint8)

    return {
        "same pixels": lambda image: image,
        "flipped": lambda image: image[:, ::-1],
        "shifted by (1, -1)": lambda image: shifted(image, 1, -1),
        "shifted by (2, 2)": lambda image: shifted(image, 2, 2),
        "shifted by (0, -2)": lambda image: shifted(image, 0, -2),
        "flipped and shifted by (2, 1)": lambda image: shifted(image[:, ::-1], 2, 1),
        "JPEG, quality 60": lambda image: jpeg(image, 60),
        "JPEG, quality 30": lambda image: jpeg(image, 30),
        "noise of 0.03": lambda image: noised(image, 0.03),
        "noise of 0.06": lambda image: noised(image, 0.06),
        "brightness x 1.1": lambda image: scaled(image, 1.1),
        "brightness x 1.25": lambda image: scaled(image, 1.25),
        "brightness x 0.75": lambda image: scaled(image, 0.75),
        "middle 90 %, scaled up": lambda image: cropped(image, 0.9),
    }


def main() -> None:
    """Plant, look, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shift", type=int, default=2)
    parser.add_argument("--pairs", help="PNG file")
    options = parser.parse_args()
    store = unrote.open_images(options.data, resolution=None, limit=options.limit)
    clean, random = np.asarray(store.images), np.random.default_rng(options.seed)
    made = kinds(random)
    chosen = random.choice(len(clean), options.count * len(made), replace=False).reshape(len(made), -1)
    copies = [make(clean[i]) for make, which in zip(made.values(), chosen, strict=True) for i in which]
    images = np.concatenate([clean, np.stack(copies)])
    digests, begin = image_digests(images), time.process_time()
    pairs, correlations = duplicate_pairs(images, digests, shift=options.max_shift)
    seconds = time.process_time() - begin
    labels = clusters(pairs, len(images))
    places = len(clean) + np.arange(chosen.size).reshape(chosen.shape)
    print(f"{len(images):,} images of {images.shape[1]}x{images.shape[2]}: {seconds:.1f} s of CPU time, at most "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB in all")  # fmt: skip
    for name, originals, copied in zip(made, chosen, places, strict=True):
        found = labels[originals] == labels[copied]
        print(f"{name:<30} {found.sum():>5} of {len(found)}  {found.mean():.3f}")
    between = pairs[(pairs < len(clean)).all(1)]
    truth = clusters(np.concatenate([between, np.stack([chosen.ravel(), places.ravel()], axis=1)]), len(images))
    other = np.flatnonzero((pairs < len(clean)).all(1))
    wrong = np.flatnonzero(truth[pairs[:, 0]] != truth[pairs[:, 1]])
    print(f"pairs that join images of the set itself: {len(other)}")
    print(f"pairs of a copy with neither its original nor what that is joined with: {len(wrong)}")
    print(f"largest cluster: {np.bincount(labels).max()} images")
    if options.pairs and len(other):
        rows = other[np.argsort(correlations[other])][:120]
        tiles = [np.concatenate([images[left], images[right]], axis=1) for left, right in pairs[rows].tolist()]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 12)
        grid = [np.concatenate(tiles[start : start + 12], axis=1) for start in range(0, len(tiles), 12)]
        sheet = Image.fromarray(np.concatenate(grid))
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(options.pairs)


if __name__ == "__main__":
    main()
