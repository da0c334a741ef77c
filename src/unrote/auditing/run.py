"""The audit: from images to numbers, top to bottom."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from unrote.auditing.ledger import check_ledger, join_ledger
from unrote.auditing.memorization import (
    DEFINITIONS,
    HEADLINE,
    TrainShare,
    fraction,
    image_identity,
    memorization_quantity,
    neighbour_ratio,
    train_share,
)
from unrote.auditing.quality import quality, subsample
from unrote.auditing.result import AuditReport
from unrote.auditing.verdict import certainty, verdict
from unrote.data.store import ImageStore, image_digests
from unrote.errors import InputError
from unrote.neighbours.images import Neighbours, nearest_images
from unrote.neighbours.orbit import IDENTITY, Transform, orbit

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class _View:
    """One way to compare images: as they are (``plain``) or up to augmentation (``orbit``)."""

    name: str
    train: Neighbours
    control_train: Neighbours | None = None
    control_holdout: Neighbours | None = None
    unseen: Neighbours | None = None
    control_size: int = 0

    def share(self) -> TrainShare | None:
        """Whether the nearest image is a training image, for each generated image."""
        if self.control_train is None or self.control_holdout is None:
            return None
        return train_share(self.control_train, self.control_holdout, self.control_size)


def audit(
    generated: ImageStore,
    train: ImageStore,
    holdout: ImageStore | None = None,
    *,
    num_neighbors: int = 50,
    flip: bool = True,
    max_shift: int = 2,
    seed: int = 0,
    ledger: Mapping[str, np.ndarray] | None = None,
    provenance: Mapping[str, Any] | None = None,
    name: str = "generated",
) -> AuditReport:
    """How much of the training set the generated images copy, and how good they are.

    Args:
        generated: images of the model, G of them.
        train: images the model was trained on, N of them, prepared in the same way (size, channels).
        holdout: images of the same kind it was not trained on: the control, and the reference of quality.
        num_neighbors: n of the neighbour ratio; with fewer training images all of them are used.
        flip: look for mirrored copies too.
        max_shift: look for copies shifted by up to so many pixels either way; what training augmented with.
        seed: of the subsets that make train and held-out equally large.
        ledger: columns of a run's ledger, each of length N, joined to the images that were copied.
        provenance: what made the images (sampler, steps, EMA or raw weights, ...); JSON-able, kept in the summary.
        name: what to call the generated images.

    Raises:
        InputError: a set is empty, image sizes or channels differ, or the ledger does not fit the training set.
    """
    _check_images(generated, train, holdout)
    if num_neighbors < 1:
        raise InputError(f"num_neighbors is {num_neighbors}; it must be at least 1 (the papers use 50)")
    check_ledger(ledger, len(train))
    height, width = train.images.shape[1:3]
    transforms = orbit(flip=flip, max_shift=max_shift, height=height, width=width)
    views = [_compare("plain", generated, train, holdout, num_neighbors, seed, (IDENTITY,))]
    if len(transforms) > 1:
        views.append(_compare("orbit", generated, train, holdout, num_neighbors, seed, transforms))
    else:
        views.append(replace(views[0], name="orbit"))
    identity = image_identity(image_digests(train.images) if train.digests is None else train.digests)
    curves = {key: ratios for view in views for key, ratios in _curves(view).items()}
    pairs = _pairs(generated, train, views, transforms, curves)
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "verdict": None,
        "certainty": None,
        "counts": {
            "generated": len(generated),
            "train": len(train),
            "holdout": None if holdout is None else len(holdout),
            "control": None if holdout is None else min(len(train), len(holdout)),
            "train_duplicates": int((identity != np.arange(len(train))).sum()),
        },
        "settings": {
            "num_neighbors": min(num_neighbors, len(train)),
            "num_neighbors_asked": num_neighbors,
            "flip": flip,
            "max_shift": max_shift,
            "num_transforms": len(transforms),
            "seed": seed,
            "features": "pixels in [0, 1], no resizing, L2",
        },
        "memorization": {view.name: _tables(view, curves, identity) for view in views},
        "exact_copies": {view.name: _exact_copies(view.train, identity) for view in views}
        | {"unseen": None if views[1].unseen is None else _exact_copies(views[1].unseen, identity)},
        "train_share": None if holdout is None else {view.name: _share(view) for view in views},
        "quality": quality(generated.images, train.images, None if holdout is None else holdout.images, seed),
        "ledger": join_ledger(ledger, pairs, identity),
        "data": {"generated": _origin(generated), "train": _origin(train), "holdout": _origin(holdout)},
        "provenance": dict(provenance or {}),
        "versions": {package: version(package) for package in ("unrote", "torch", "numpy")},
    }
    summary["verdict"] = verdict(summary)
    summary["certainty"] = certainty(summary)
    return AuditReport(name, summary, pairs, curves, generated, train, ledger)


def _check_images(generated: ImageStore, train: ImageStore, holdout: ImageStore | None) -> None:
    sets = {"generated": generated, "train": train, "holdout": holdout}
    present = {role: store for role, store in sets.items() if store is not None}
    for role, store in present.items():
        if len(store) == 0:
            raise InputError(f"the {role} set ({store.source}) has no images; an audit needs at least one")
    for role, store in present.items():
        if store.images.shape[1:] != train.images.shape[1:]:
            raise InputError(
                f"{role} images ({store.source}) are {_size(store)}, training images ({train.source}) are "
                f"{_size(train)}; give one --resolution (and the same number of channels) for all sets"
            )


def _size(store: ImageStore) -> str:
    height, width, channels = store.images.shape[1:]
    return f"{width}×{height} with {channels} channel{'' if channels == 1 else 's'}"


def _compare(
    view: str,
    generated: ImageStore,
    train: ImageStore,
    holdout: ImageStore | None,
    num: int,
    seed: int,
    transforms: tuple[Transform, ...],
) -> _View:
    """Neighbours among train, and among equally many training and held-out images."""

    def nearest(queries: ImageStore, references: ImageStore, what: str) -> Neighbours:
        label = f"{view}: {what}"
        return nearest_images(queries.images, references.images, num, transforms=transforms, progress=label)

    found = nearest(generated, train, "generated → train")
    if holdout is None:
        return _View(view, found)
    size = min(len(train), len(holdout))
    control_train = found
    if len(train) > size:
        control_train = nearest(generated, _chosen(train, size, seed, "control-train"), "generated → train, subset")
    control = nearest(generated, _chosen(holdout, size, seed, "control-holdout"), "generated → held-out")
    unseen_images = _chosen(holdout, min(len(generated), len(holdout)), seed, "unseen")
    unseen = nearest(unseen_images, train, "held-out → train")
    return _View(view, found, control_train, control, unseen, size)


def _chosen(store: ImageStore, size: int, seed: int, purpose: str) -> ImageStore:
    return store if size == len(store) else store.subset(subsample(len(store), size, seed, purpose))


def _curves(view: _View) -> dict[tuple[str, str, str], np.ndarray]:
    """Neighbour ratios by (view, definition, set)."""
    sets = {
        "train": view.train,
        "control-train": view.control_train,
        "holdout": view.control_holdout,
        "unseen": view.unseen,
    }
    return {
        (view.name, definition, role): neighbour_ratio(neighbours, definition)
        for role, neighbours in sets.items()
        if neighbours is not None
        for definition in DEFINITIONS
    }


def _tables(
    view: _View, curves: Mapping[tuple[str, str, str], np.ndarray], identity: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Per definition: MQ, its control, the false alarms of unseen images, and quantiles of the ratio."""
    tables: dict[str, dict[str, Any]] = {}
    for definition in DEFINITIONS:
        ratios = {role: curves[key] for key in curves if key[:2] == (view.name, definition) for role in [key[2]]}
        has_control = "holdout" in ratios
        tables[definition] = {
            "headline_threshold": HEADLINE[definition],
            "mq": memorization_quantity(ratios["train"], identity[view.train.indices[:, 0]]),
            "control": {
                "train": memorization_quantity(ratios["control-train"]),
                "holdout": memorization_quantity(ratios["holdout"]),
            }
            if has_control
            else None,
            "unseen": memorization_quantity(ratios["unseen"]) if has_control else None,
            "ratio_quantiles": {
                f"{q:g}": float(np.quantile(ratios["train"], q)) for q in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
            },
        }
    return tables


def _exact_copies(train: Neighbours, identity: np.ndarray) -> dict[str, Any]:
    """Generated images at distance 0 of a training image, and how many distinct images those are."""
    exact = train.squared[:, 0] == 0
    copied = identity[train.indices[exact, 0]]
    return {**fraction(int(exact.sum()), len(exact)), "distinct": len(np.unique(copied))}


def _share(view: _View) -> dict[str, Any]:
    share = view.share()
    assert share is not None
    return share.summary()


def _pairs(
    generated: ImageStore,
    train: ImageStore,
    views: list[_View],
    transforms: tuple[Transform, ...],
    curves: Mapping[tuple[str, str, str], np.ndarray],
) -> dict[str, np.ndarray]:
    """One entry per generated image; documented in docs/audit.md."""
    names, labels = np.array(train.names, dtype=object), np.array([view.label for view in transforms], dtype=object)
    pairs: dict[str, np.ndarray] = {"index": np.arange(len(generated)), "name": np.array(generated.names, dtype=object)}
    for view, prefix in zip(views, ("", "orbit_"), strict=True):
        nearest = view.train.indices[:, 0]
        pairs[f"{prefix}train_index"] = nearest
        pairs[f"{prefix}train_name"] = names[nearest]
        if view.name == "orbit":
            pairs["orbit_transform"] = labels[view.train.transforms[:, 0]]
        pairs[f"{prefix}distance"] = view.train.distances[:, 0]
        for definition in DEFINITIONS:
            pairs[f"{prefix}ratio_{definition.replace('-', '_')}"] = curves[view.name, definition, "train"]
        share = view.share()
        if share is not None and view.control_holdout is not None:
            pairs[f"{prefix}control_distance"] = view.control_holdout.distances[:, 0]
            pairs[f"{prefix}control_nearer_to"] = np.array(["holdout", "tie", "train"], dtype=object)[
                (2 * share.wins).astype(np.int64)
            ]
    return pairs


def _origin(store: ImageStore | None) -> dict[str, Any] | None:
    if store is None:
        return None
    return {
        "source": store.source,
        "fingerprint": store.fingerprint,
        "shape": list(store.images.shape),
        "quarantined": len(store.quarantined),
    }
