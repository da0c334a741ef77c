"""How similar does an encoder find an image and its altered copies? For docs/encoders.md.

Usage: python benchmarks/copy_similarity.py [ENCODER] [DATA] [NUM]. Prints a Markdown table and the seconds per image.
"""

import io
import sys
import time

import numpy as np
from PIL import Image

from unrote.data import open_images
from unrote.encoders import load_encoder


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Through a JPEG file of that quality."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def shifted(image: np.ndarray, pixels: int) -> np.ndarray:
    """Right and down by reflection."""
    return np.pad(image, ((pixels, 0), (pixels, 0), (0, 0)), mode="reflect")[:-pixels, :-pixels]


def cropped(image: np.ndarray) -> np.ndarray:
    """The middle 7/8 of each side, enlarged."""
    height, width = image.shape[:2]
    box = (width // 16, height // 16, width - width // 16, height - height // 16)
    return np.asarray(Image.fromarray(image).crop(box).resize((width, height), Image.Resampling.BILINEAR))


def noised(image: np.ndarray, sigma: float) -> np.ndarray:
    """Normal noise; ``sigma`` as a share of the range."""
    noise = np.random.default_rng(int(image.sum())).normal(0, 255 * sigma, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


VARIANTS = {
    "unchanged": lambda image: image,
    "flipped": lambda image: image[:, ::-1],
    "shifted by 2 pixels": lambda image: shifted(image, 2),
    "cropped to 7/8": cropped,
    "JPEG 60": lambda image: jpeg(image, 60),
    "JPEG 40": lambda image: jpeg(image, 40),
    "noise σ = 0.05": lambda image: noised(image, 0.05),
}


def row(name: str, similarity: np.ndarray) -> str:
    """Mean, 5 % quantile, maximum, shares above the published thresholds."""
    shares = (f"{(similarity > threshold).mean():.3f}" for threshold in (0.5, 0.75))
    low, high = np.quantile(similarity, 0.05), similarity.max()
    return f"| {name} | {similarity.mean():.2f} | {low:.2f} | {high:.2f} | {' | '.join(shares)} |"


def main(encoder_name: str = "sscd", data: str = "cifar10:test", count: str = "200") -> None:
    """Print the table."""
    encoder, store = load_encoder(encoder_name), open_images(data, resolution=None)
    chosen = np.random.default_rng(0).choice(len(store), 2 * int(count), replace=False)
    images, others = np.split(np.asarray(store.images[np.sort(chosen)]), 2)
    began = time.perf_counter()
    unit = {name: normalised(encoder(np.stack([alter(x) for x in images]))) for name, alter in VARIANTS.items()}
    elsewhere = normalised(encoder(others))
    seconds = (time.perf_counter() - began) / (len(images) * (len(VARIANTS) + 1))
    print(
        f"{encoder.name}, {count} images of {data}, {images.shape[1]}×{images.shape[2]}; {seconds * 1e3:.0f} ms/image\n"
    )
    print("| | mean | 5 % | max | share > 0.5 | share > 0.75 |\n|---|---|---|---|---|---|")
    for name, altered in unit.items():
        print(row(name, (altered * unit["unchanged"]).sum(1)))
    between = unit["unchanged"] @ elsewhere.T
    print(row("another image, at random", between.ravel()))
    print(row(f"nearest of {count} other images", between.max(1)))


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    lengths: np.ndarray = np.linalg.norm(features, axis=1, keepdims=True)
    return features / lengths


if __name__ == "__main__":
    main(*sys.argv[1:])
