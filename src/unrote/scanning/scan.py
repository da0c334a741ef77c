"""A look at a data set before training: duplicates, leaks, unusable images, and which images are at risk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.data.store import ImageStore, digests_of
from unrote.errors import InputError
from unrote.scanning.duplicates import Joined, clusters, duplicate_pairs, largest_shift

MAX_REFERENCES = 20_000
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ScanReport:
    """What :func:`scan` found.

    Attributes:
        summary: counts, settings and provenance; JSON-able.
        risk: columns of equal length N, one entry per image: ``risk``, ``copies`` (images in its cluster, itself
            included), ``cluster`` (least index in it), ``isolation``, ``leak``, with a ledger ``skip_rate`` and
            ``mean_ratio``.
        pairs: duplicates among the images and held-out images (these count on from N), int64 [P, 2].
        correlations: of the pairs, float32 [P]; 1 is the same but for flip, shift and brightness.
        keep: indices of the images to train on: the first of each cluster, no constant ones, no leaks. int64.
        images: the images.
        holdout: the held-out images, or None.
    """

    summary: dict[str, Any]
    risk: dict[str, np.ndarray]
    pairs: np.ndarray
    correlations: np.ndarray
    keep: np.ndarray
    images: ImageStore = field(repr=False)
    holdout: ImageStore | None = field(default=None, repr=False)

    def name(self, index: int) -> str:
        """The name of image ``index``; held-out images count on from N."""
        own = len(self.images)
        return str(self.images.names[index]) if index < own else str(self.holdout.names[index - own])  # type: ignore[union-attr]

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, C] of image ``index``."""
        own = len(self.images)
        return np.asarray(self.images.images[index] if index < own else self.holdout.images[index - own])  # type: ignore[union-attr]

    def groups(self) -> list[list[int]]:
        """Clusters of two and more, the largest first."""
        count = len(self.images) + (0 if self.holdout is None else len(self.holdout))
        members: dict[int, list[int]] = {}
        labels = clusters(self.pairs, count)
        for index in np.unique(self.pairs).tolist():
            members.setdefault(int(labels[index]), []).append(index)
        return sorted(members.values(), key=lambda group: (-len(group), group[0]))

    def save(self, out: Path) -> Path:
        """Write scan.json, clusters.json, risk.csv, keep.txt and scan.html into ``out``; returns the page's path."""
        from unrote.report.scan_page import write_scan

        return write_scan(self, Path(out))

    def __str__(self) -> str:
        found = self.summary["found"]
        return (
            f"{self.summary['counts']['images']:,} images: {found['exact_duplicates']:,} exact duplicates, "
            f"{found['near_duplicates']:,} more near-duplicates, in {found['clusters']:,} clusters; "
            f"{found['leaks']:,} are also held out; "
            f"{found['constant']:,} constant; {found['unreadable']:,} unreadable. "
            f"{len(self.keep):,} are left to train on."
        )


def scan(
    images: ImageStore,
    holdout: ImageStore | None = None,
    *,
    max_shift: int = 2,
    seed: int = 0,
    ledger: Mapping[str, np.ndarray] | None = None,
) -> ScanReport:
    """Find duplicates, leaks and constant images, and rank the images by how likely they are to be memorized.

    ``risk`` = log2(copies) + log2(isolation), and with a ledger + z(skip rate) − z(mean loss ratio), z = (value − mean)
    / standard deviation (0 where never measured). ``isolation`` is the distance to the nearest image outside the
    own cluster, in 8×8 pixels, divided by the median of that over all images; with more than 20,000 images, the
    nearest of 20,000 drawn by the seed.

    Args:
        images: the training images.
        holdout: images that must not be among them.
        max_shift: duplicates may be shifted by up to so many pixels (at most a quarter of the side), and mirrored.
        seed: of the reference images.
        ledger: columns of a run on exactly these images.

    Raises:
        InputError: sets of different shapes, a negative shift, or a ledger of another length.
    """
    if holdout is not None and holdout.images.shape[1:] != images.images.shape[1:]:
        raise InputError(f"{holdout.source} and {images.source} differ in size; give --resolution")
    if ledger is not None and len(ledger["visits"]) != len(images):
        raise InputError(f"the run's ledger has {len(ledger['visits'])} images, {images.source} has {len(images)}")
    if max_shift < 0:
        raise InputError(f"max_shift is {max_shift}; it must be 0 (none) or more")
    max_shift = min(max_shift, largest_shift(images.images.shape))
    own = len(images)
    stores = [images] if holdout is None else [images, holdout]
    digests = np.concatenate([digests_of(store) for store in stores])
    pairs, correlations = duplicate_pairs(Joined(stores), digests, shift=max_shift, own=own)
    constant = constant_images(images)
    everywhere = clusters(pairs, len(digests))
    leaks = np.isin(everywhere[:own], everywhere[own:])
    inside = (pairs < own).all(1)
    labels = clusters(pairs[inside], own)
    columns = {
        "copies": np.bincount(labels, minlength=own)[labels],
        "cluster": labels,
        "isolation": isolation(images, labels, seed),
        "leak": leaks,
    }
    risk = np.log2(columns["copies"]) + np.log2(np.maximum(columns["isolation"], 2.0**-8))
    if ledger is not None:
        columns["skip_rate"] = ledger["skips"] / np.maximum(ledger["visits"], 1)
        columns["mean_ratio"] = ledger["mean_ratio"]
        risk = risk + _standard(columns["skip_rate"]) - _standard(columns["mean_ratio"])
    first = labels == np.arange(own)
    keep = np.setdiff1d(np.flatnonzero(first & ~leaks), constant)
    exact = own - len(np.unique(digests[:own], axis=0))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "counts": {"images": own, "holdout": None if holdout is None else len(holdout), "keep": len(keep)},
        "found": {
            "exact_duplicates": exact,
            "near_duplicates": int((~first).sum()) - exact,
            "clusters": int((np.bincount(labels) > 1).sum()),
            "leaks": int(leaks.sum()),
            "constant": len(constant),
            "unreadable": len(images.quarantined),
        },
        "constant": [str(images.names[index]) for index in constant.tolist()],
        "leaks": [str(images.names[index]) for index in np.flatnonzero(leaks).tolist()],
        "unreadable": [{"name": bad.name, "reason": bad.reason} for bad in images.quarantined],
        "settings": {"max_shift": max_shift, "seed": seed, "ledger": ledger is not None},
        "data": [{"source": s.source, "fingerprint": s.fingerprint, "shape": list(s.images.shape)} for s in stores],
    }
    return ScanReport(summary, {"risk": risk, **columns}, pairs, correlations, keep, images, holdout)


def constant_images(store: ImageStore) -> np.ndarray:
    """Indices of images of which all pixels are alike (at most one level of 255 apart). int64."""
    flat = [
        start + np.flatnonzero(np.ptp(np.asarray(store.images[start : start + 1024]), axis=(1, 2)).max(1) <= 1)
        for start in range(0, len(store), 1024)
    ]
    return np.concatenate(flat).astype(np.int64)


def isolation(images: ImageStore, labels: np.ndarray, seed: int) -> np.ndarray:
    """Distance to the nearest image of another cluster over the median of that, float64 [N]; see :func:`scan`."""
    count = len(images)
    small = [_small(np.asarray(images.images[start : start + 1024])) for start in range(0, count, 1024)]
    features = torch.cat(small)
    random = np.random.default_rng(seed)
    chosen = (
        np.sort(random.choice(count, MAX_REFERENCES, replace=False)) if count > MAX_REFERENCES else np.arange(count)
    )
    references, groups = features[torch.from_numpy(chosen)], torch.from_numpy(labels)
    nearest = torch.full((count,), torch.inf)
    for start in range(0, count, 1024):
        part = slice(start, start + 1024)
        distances = torch.cdist(features[part], references)
        distances[groups[part, None] == groups[torch.from_numpy(chosen)][None]] = torch.inf
        nearest[part] = distances.amin(1)
    finite = nearest[nearest.isfinite()]
    middle = float(finite.median()) if len(finite) else 0.0
    relative = torch.where(nearest.isfinite(), nearest / middle, 1.0) if middle > 0 else torch.ones(count)
    result: np.ndarray = relative.double().numpy()
    return result


def _small(images: np.ndarray) -> torch.Tensor:
    """Images in 8×8 pixels, float32 [B, 64·C] in [0, 1]."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.interpolate(pixels, (8, 8), mode="bilinear", antialias=True).flatten(1)


def _standard(values: np.ndarray) -> np.ndarray:
    """(value − mean) / standard deviation; 0 where not measured or nothing differs."""
    known = np.isfinite(values)
    spread = float(np.std(values[known])) if known.any() else 0.0
    if spread == 0:
        return np.zeros(len(values))
    centre = float(np.mean(values[known]))
    return np.where(known, (np.nan_to_num(values) - centre) / spread, 0.0)
