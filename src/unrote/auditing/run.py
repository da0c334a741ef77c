"""The audit: from images to numbers, top to bottom."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from unrote.auditing.compare import View, compare
from unrote.auditing.extracted import duplicate_facts, extracted_images
from unrote.auditing.intervals import bootstrap_mean, fraction
from unrote.auditing.ledger import check_ledger, join_ledger
from unrote.auditing.memorization import DEFINITIONS, HEADLINE, calibrated, image_identity, memorization_quantity
from unrote.auditing.prompted import feature_similarity, paired, pixel_columns, prompted_summary
from unrote.auditing.reading import SCHEMA_VERSION
from unrote.auditing.result import AuditReport
from unrote.auditing.searching import References
from unrote.auditing.spaces import Space, measure_space
from unrote.auditing.verdict import certainty, verdict
from unrote.data.store import ImageStore, count_trained_on, digests_of, same_pixels
from unrote.encoders import Encoder, features
from unrote.encoders.cache import pixels_digest
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.errors import InputError
from unrote.neighbours.found import Neighbours
from unrote.neighbours.orbit import BRIGHTNESS, IDENTITY, SCALES, Transform, orbit
from unrote.scanning.duplicates import near_clusters, shared_clusters


def audit(
    generated: ImageStore,
    train: ImageStore,
    holdout: ImageStore | None = None,
    *,
    num_neighbors: int = 50,
    flip: bool = True,
    max_shift: int = 2,
    scales: Sequence[float] = SCALES,
    brightness: Sequence[float] = BRIGHTNESS,
    near_duplicates: bool = True,
    encoders: Sequence[Encoder] = (),
    false_positive_rate: float = 0.01,
    seed: int = 0,
    ledger: Mapping[str, np.ndarray] | None = None,
    clip_model: str | None = None,
    origins: Sequence[str | None] | None = None,
    device: str = "cpu",
    provenance: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    resume: Path | None = None,
    distributed: bool = False,
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
        scales: look for copies zoomed by these factors.
        brightness: look for copies whose pixels are multiplied by these factors.
        near_duplicates: count training images that are nearly the same (:func:`near_clusters`) as one where copies are
            told apart; otherwise only those with the same pixels.
        encoders: feature spaces to measure in, besides random convolutions.
        false_positive_rate: of the calibrated thresholds, in (0, 1): what share of held-out images may pass them.
        seed: of the subsets that make train and held-out equally large, and of resampling.
        ledger: columns of a run's ledger, each of length N, joined to the images that were copied.
        clip_model: folder or Hub id of a CLIP model, to score how well generated images fit their captions.
        origins: name of the training image whose caption each generated image was made from; None where not known.
        device: where encoders' features are searched, and CLIP runs.
        provenance: what made the images (sampler, steps, EMA or raw weights, ...); JSON-able, kept in the summary.
        cache: folder that keeps features, and what is found of held-out images; None computes all of it each time.
        resume: folder that keeps the progress of the searches, so that the same call goes on after it was killed.
        distributed: every process of the initialized ``torch.distributed`` group calls this with the same arguments;
            they share the searches and the extraction of features, and all get the same report.
        name: what to call the generated images.

    Raises:
        InputError: a set is empty, all held-out images are training images, image sizes or channels differ, two
            encoders have one key, a number is out of range, or the ledger or the origins do not fit the images.
    """
    _check_images(generated, train, holdout)
    if num_neighbors < 1:
        raise InputError(f"num_neighbors is {num_neighbors}; it must be at least 1 (the papers use 50)")
    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate is {false_positive_rate}; it must lie between 0 and 1, such as 0.01")
    encoders = _all_encoders(encoders)
    check_ledger(ledger, len(train))
    if clip_model is not None and generated.captions is None:
        raise InputError(f"a CLIP score needs the prompts: {generated.source} has no captions (metadata.jsonl, .txt)")
    prompted = paired(origins, generated, train)
    height, width = train.images.shape[1:3]
    transforms = orbit(flip=flip, max_shift=max_shift, scales=scales, brightness=brightness, height=height, width=width)
    references, control = _references(train, holdout, near_duplicates)
    shared: dict[str, Any] = {"resume": resume, "cache": cache, "distributed": distributed}
    views = [compare("plain", generated, references, control, num_neighbors, seed, (IDENTITY,), **shared)]
    if len(transforms) > 1:
        # What a shift brings in at the border is unknown, so no view is compared there.
        asked = (generated, references, control, num_neighbors, seed, transforms)
        views.append(compare("orbit", *asked, margin=max_shift, **shared))
    else:
        views.append(replace(views[0], name="orbit"))
    identity = _identity(train)
    curves = {key: ratios for view in views for key, ratios in view.curves().items()}
    stores = (generated, train, holdout)
    spaces = {
        encoder.key: _space(
            encoder,
            stores,
            references.clusters,
            None if control is None else control.leaks,
            prompted,
            rate=false_positive_rate,
            seed=seed,
            cache=cache,
            device=device,
            distributed=distributed,
        )
        for encoder in encoders
    }
    pairs = _pairs(generated, train, views, transforms, curves)
    if prompted is not None:
        pairs |= pixel_columns(prompted, generated, train, views[0].train.plain)
    for key, space in spaces.items():
        pairs = _with_space(pairs, space, train)
        curves |= {(key, "similarity", role): values for role, values in space.controls.items()}
    if clip_model is not None:
        pairs["clip_score"] = _clip_scores(clip_model, generated, device)
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
            "leaks": None if control is None or control.leaks is None else int(control.leaks.sum()),
            "train_duplicates": int((identity != np.arange(len(train))).sum()),
        },
        "settings": {
            "num_neighbors": min(num_neighbors, len(train)),
            "num_neighbors_asked": num_neighbors,
            "flip": flip,
            "max_shift": max_shift,
            "scales": list(scales),
            "brightness": list(brightness),
            "num_transforms": len(transforms),
            "near_duplicates": near_duplicates,
            "false_positive_rate": false_positive_rate,
            "encoders": [encoder.key for encoder in encoders],
            "seed": seed,
            "features": "pixels in [0, 1], no resizing, L2",
        },
        "memorization": {view.name: _tables(view, curves, references.clusters, false_positive_rate) for view in views},
        "exact_copies": {view.name: _exact_copies(view.train.plain, identity) for view in views}
        | {"unseen": None if views[1].unseen is None else _exact_copies(views[1].unseen.plain, identity)},
        "train_share": None if holdout is None else {view.name: _share(view) for view in views},
        "duplicates": duplicate_facts(references.clusters, near=near_duplicates),
        "extracted": extracted_images(pairs, references.clusters, train.names),
        "spaces": {key: space.summary for key, space in spaces.items()},
        "quality_space": next((e.key for e in encoders if e.is_fid_inception), encoders[0].key),
        "copy_space": next((e.key for e in encoders if e.copy_detection), None),
        "clip_score": None if clip_model is None else _clip_score(clip_model, pairs["clip_score"], seed),
        "prompted": None if prompted is None else prompted_summary(pairs, references.clusters, seed),
        "ledger": join_ledger(ledger, pairs, references.clusters),
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
    if holdout is not None:
        count_trained_on(holdout, train)


def _all_encoders(encoders: Sequence[Encoder]) -> list[Encoder]:
    """Random convolutions first, then the others."""
    every = [RandomConvEncoder(), *(encoder for encoder in encoders if not isinstance(encoder, RandomConvEncoder))]
    keys = [encoder.key for encoder in every]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise InputError(f"two encoders are called {twice[0]!r}: run one audit for each")
    return every


def _references(train: ImageStore, holdout: ImageStore | None, near: bool) -> tuple[References, References | None]:
    """Both sets with their clusters of duplicates, and which held-out images are duplicates of training images."""
    if holdout is None:
        return References(train, near_clusters(train) if near else _identity(train)), None
    if near:
        ours, theirs, leaks = shared_clusters(train, holdout)
        return References(train, ours), References(holdout, theirs, leaks)
    return References(train, _identity(train)), References(holdout, _identity(holdout), same_pixels(holdout, train))


def _identity(store: ImageStore) -> np.ndarray:
    """The least index of the images with the same pixels, for each image."""
    return image_identity(digests_of(store))


def _space(
    encoder: Encoder,
    stores: Sequence[ImageStore | None],
    clusters: np.ndarray,
    leaks: np.ndarray | None,
    prompted: np.ndarray | None,
    *,
    rate: float,
    seed: int,
    cache: Path | None,
    device: str,
    distributed: bool,
) -> Space:
    """Everything that one encoder sees."""
    generated, train, holdout = (
        None
        if store is None
        else features(
            encoder,
            store.images,
            digest=pixels_digest(store),
            cache=cache,
            progress=f"{encoder.key}: {role}",
            distributed=distributed,
        )
        for role, store in zip(("generated", "training", "held-out"), stores, strict=True)
    )
    assert generated is not None and train is not None
    space = measure_space(
        encoder,
        generated,
        train,
        holdout,
        identity=clusters,
        leaks=leaks,
        seed=seed,
        fpr=rate,
        device=device,
        distributed=distributed,
    )
    if prompted is None or not encoder.copy_detection:
        return space
    own = {f"{encoder.key}_prompt_similarity": feature_similarity(prompted, generated, train)}
    return replace(space, columns=space.columns | own)


def _clip_scores(model: str, generated: ImageStore, device: str) -> np.ndarray:
    assert generated.captions is not None
    from unrote.encoders.clip_score import clip_scores

    return clip_scores(model, generated.images, generated.captions, device=device)


def _clip_score(model: str, scores: np.ndarray, seed: int) -> dict[str, Any]:
    return {"model": model, "num": len(scores), **bootstrap_mean(scores, 1000, seed)}


def _size(store: ImageStore) -> str:
    height, width, channels = store.images.shape[1:]
    return f"{width}×{height} with {channels} channel{'' if channels == 1 else 's'}"


def _tables(
    view: View, curves: Mapping[tuple[str, str, str], np.ndarray], clusters: np.ndarray, rate: float
) -> dict[str, dict[str, Any]]:
    """Per definition: MQ, its control, the false alarms of unseen images, and quantiles of the ratio."""
    tables: dict[str, dict[str, Any]] = {}
    originals = clusters[view.train.plain.indices[:, 0]]
    deduplicated = 1 < len(np.unique(clusters)) < len(clusters)
    for definition in DEFINITIONS:
        plain, distinct = (
            {role: ratios for (name, kind, role), ratios in curves.items() if (name, kind) == (key, definition)}
            for key in (view.name, f"{view.name}-distinct")
        )
        tables[definition] = {
            "headline_threshold": HEADLINE[definition],
            **_table(plain, originals),
            "calibrated": _calibrated(view, plain, rate, originals),
            "distinct_aware": _table(distinct, originals) if deduplicated else None,
            "ratio_quantiles": {
                f"{q:g}": float(np.quantile(plain["train"], q)) for q in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
            },
        }
    return tables


def _calibrated(
    view: View, ratios: Mapping[str, np.ndarray], rate: float, originals: np.ndarray
) -> dict[str, Any] | None:
    if view.leaks is None:
        return None
    return calibrated(ratios["train"], ratios["unseen"], view.leaks, rate, originals)


def _table(ratios: Mapping[str, np.ndarray], originals: np.ndarray) -> dict[str, Any]:
    has_control = "holdout" in ratios
    control = {"train": "control-train", "holdout": "holdout"}
    return {
        "mq": memorization_quantity(ratios["train"], originals),
        "control": {side: memorization_quantity(ratios[role]) for side, role in control.items()}
        if has_control
        else None,
        "unseen": memorization_quantity(ratios["unseen"]) if has_control else None,
    }


def _exact_copies(train: Neighbours, identity: np.ndarray) -> dict[str, Any]:
    """Generated images at distance 0 of a training image, and how many distinct images those are."""
    exact = train.squared[:, 0] == 0
    copied = identity[train.indices[exact, 0]]
    return {**fraction(int(exact.sum()), len(exact)), "distinct": len(np.unique(copied))}


def _share(view: View) -> dict[str, Any]:
    share = view.share()
    assert share is not None
    return share.summary()


def _pairs(
    generated: ImageStore,
    train: ImageStore,
    views: Sequence[View],
    transforms: Sequence[Transform],
    curves: Mapping[tuple[str, str, str], np.ndarray],
) -> dict[str, np.ndarray]:
    """One entry per generated image; documented in docs/audit.md."""
    labels = np.array([view.label for view in transforms], dtype=object)
    pairs: dict[str, np.ndarray] = {"index": np.arange(len(generated)), "name": np.array(generated.names, dtype=object)}
    for view, prefix in zip(views, ("", "orbit_"), strict=True):
        found = view.train.plain
        pairs[f"{prefix}train_index"] = found.indices[:, 0]
        pairs[f"{prefix}train_name"] = _names(train, found.indices[:, 0])
        if view.name == "orbit":
            pairs["orbit_transform"] = labels[found.transforms[:, 0]]
        pairs[f"{prefix}distance"] = found.distances[:, 0]
        for definition in DEFINITIONS:
            pairs[f"{prefix}ratio_{definition.replace('-', '_')}"] = curves[view.name, definition, "train"]
        pairs[f"{prefix}ratio_distinct"] = curves[f"{view.name}-distinct", "squared-l2", "train"]
        share = view.share()
        if share is not None and view.control_holdout is not None:
            pairs[f"{prefix}control_distance"] = view.control_holdout.plain.distances[:, 0]
            pairs[f"{prefix}control_nearer_to"] = np.array(["holdout", "tie", "train"], dtype=object)[
                (2 * share.wins).astype(np.int64)
            ]
    return pairs


def _with_space(pairs: dict[str, np.ndarray], space: Space, train: ImageStore) -> dict[str, np.ndarray]:
    """The pairs with a space's columns; a column of training indices is followed by the names."""
    for column, values in space.columns.items():
        pairs[column] = values
        if column.endswith("_train_index"):
            pairs[column.removesuffix("index") + "name"] = _names(train, values)
    return pairs


def _names(store: ImageStore, indices: np.ndarray) -> np.ndarray:
    return np.array([store.names[index] for index in indices.tolist()], dtype=object)


def _origin(store: ImageStore | None) -> dict[str, Any] | None:
    if store is None:
        return None
    return {
        "source": store.source,
        "fingerprint": store.fingerprint,
        "shape": list(store.images.shape),
        "quarantined": len(store.quarantined),
    }
