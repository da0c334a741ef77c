"""How many planted copies the audit finds, by kind, and how many real images it takes for copies.

1,000 CIFAR-10 test images and 50 copies of each kind, of training images drawn by a seed, are audited against all
50,000 training images; the other 9,000 test images are held out. Needs ``unrote data get cifar10``, and for copy
detection the ``sscd`` extra. About an hour on two cores the first time, most of it SSCD's features; then three minutes.
Usage:

    python benchmarks/planted_copies.py [--encoder sscd] [--out benchmarks/results]
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unrote.auditing import AuditReport, audit
from unrote.auditing.intervals import fraction
from unrote.data import in_memory_store, open_images
from unrote.data.build import cache_folder
from unrote.encoders import load_encoder
from unrote.scanning.duplicates import shared_clusters

EACH, UNRELATED, SEED = 50, 1000, 0


def jpeg(image: np.ndarray) -> np.ndarray:
    """Through JPEG at quality 60."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def shifted(image: np.ndarray) -> np.ndarray:
    """Two pixels to the right; the border is black, which no transform of the audit makes."""
    moved = np.zeros_like(image)
    moved[:, 2:] = image[:, :-2]
    return moved


def noised(image: np.ndarray) -> np.ndarray:
    """Gaussian noise of standard deviation 0.05."""
    random = np.random.default_rng(int(image.sum()))
    return np.clip(image + random.normal(0, 0.05 * 255, image.shape), 0, 255).astype(np.uint8)


def cropped(image: np.ndarray) -> np.ndarray:
    """The inner 26×26 of 32×32 pixels, enlarged again."""
    side = len(image)
    cut = round(side * 3 / 32)
    inner = Image.fromarray(image[cut : side - cut, cut : side - cut])
    return np.asarray(inner.resize((side, side), Image.Resampling.BICUBIC))


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": np.copy,
    "JPEG q60": jpeg,
    "flipped": lambda image: image[:, ::-1],
    "shifted 2 px": shifted,
    "noise 0.05": noised,
    "cropped 26/32": cropped,
}


def main() -> None:
    """Plant, audit, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", default=[], help="as of unrote audit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    train, test = open_images("cifar10", resolution=None), open_images("cifar10:test", resolution=None)
    random = np.random.default_rng(SEED)
    originals = random.choice(len(train), EACH * len(KINDS), replace=False)
    unrelated, rest = np.split(random.permutation(len(test)), [UNRELATED])
    copies = [
        np.stack([make(train.images[index]) for index in part])
        for make, part in zip(KINDS.values(), originals.reshape(len(KINDS), EACH), strict=True)
    ]
    strangers = test.subset(np.sort(unrelated))
    # Some test images of CIFAR-10 are duplicates of training images: to find these is no mistake.
    duplicates = shared_clusters(train, strangers)[2]
    generated = in_memory_store(np.concatenate([strangers.images[:], *copies]), source="planted")
    began = time.monotonic()
    report = audit(
        generated,
        train,
        test.subset(np.sort(rest)),
        encoders=[load_encoder(name) for name in options.encoder],
        cache=cache_folder() / "features",
        name="planted copies",
    )
    seconds = time.monotonic() - began
    result = {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "cores": os.cpu_count()},
        "seconds": seconds,
        "counts": report.summary["counts"],
        "settings": report.summary["settings"],
        "duplicates": report.summary["duplicates"],
        "encoders": {key: space["encoder"] for key, space in report.summary["spaces"].items()},
        "unrelated_that_duplicate_training_images": int(duplicates.sum()),
        "detectors": {name: counts(*found, originals, duplicates) for name, found in detectors(report).items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planted_copies.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "planted_copies.md").write_text(table(result))
    print(table(result))


def detectors(report: AuditReport) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which images each rule takes for copies, bool [G], and of which training image, int64 [G]."""
    pairs, tables = report.pairs, report.summary["memorization"]
    rules = {}
    for view, prefix, label in (("plain", "", "as they are"), ("orbit", "orbit_", "over the orbit")):
        ratio, nearest = pairs[f"{prefix}ratio_squared_l2"], pairs[f"{prefix}train_index"]
        rules[f"squared-L2 ratio < 0.33, {label}"] = (ratio < 0.33, nearest)
        threshold = tables[view]["squared-l2"]["calibrated"]["threshold"]
        rules[f"squared-L2 ratio, {label}, calibrated (< {threshold:.3f})"] = (ratio < threshold, nearest)
    key = report.summary["copy_space"]
    if key is not None:
        similar, nearest = pairs[f"{key}_similarity"], pairs[f"{key}_train_index"]
        calibrated = report.summary["spaces"][key]["similarity"]["calibrated"]["threshold"]
        for threshold, label in ((0.5, "> 0.5"), (0.75, "> 0.75"), (calibrated, f"calibrated (> {calibrated:.3f})")):
            rules[f"{key} similarity {label}"] = (similar > threshold, nearest)
        ratio, threshold = pairs["orbit_ratio_squared_l2"], tables["orbit"]["squared-l2"]["calibrated"]["threshold"]
        either = (ratio < threshold) | (similar > calibrated)
        rules["either calibrated"] = (either, np.where(ratio < threshold, pairs["orbit_train_index"], nearest))
    return rules


def counts(copied: np.ndarray, nearest: np.ndarray, originals: np.ndarray, duplicates: np.ndarray) -> dict[str, Any]:
    """Recall by kind, how often the original itself was named, and unrelated images that were taken for copies."""
    unrelated = copied[:UNRELATED]
    result: dict[str, Any] = {
        "unrelated": fraction(int(unrelated.sum()), UNRELATED),
        "false positives": fraction(int((unrelated & ~duplicates).sum()), int((~duplicates).sum())),
    }
    for place, kind in enumerate(KINDS):
        part = slice(UNRELATED + place * EACH, UNRELATED + (place + 1) * EACH)
        right = nearest[part] == originals[place * EACH : (place + 1) * EACH]
        result[kind] = fraction(int(copied[part].sum()), EACH) | {"original_named": int((copied[part] & right).sum())}
    return result


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    others = UNRELATED - result["unrelated_that_duplicate_training_images"]
    heads = [*KINDS, f"taken for copies, of {UNRELATED:,} test images", f"of the {others:,} that duplicate none"]
    lines = [f"| rule | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, row in result["detectors"].items():
        cells = [f"{row[kind]['fraction']:.2f}" for kind in KINDS]
        cells += [str(row["unrelated"]["count"]), str(row["false positives"]["count"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
