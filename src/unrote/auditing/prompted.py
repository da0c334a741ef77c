"""Generated images beside the training image whose caption they were made from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unrote.auditing.extracted import near_copies
from unrote.auditing.intervals import fraction
from unrote.auditing.similarity import cosines, distribution
from unrote.auditing.verdict import percent
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.files import parse_json
from unrote.neighbours.found import Neighbours
from unrote.neighbours.streaming import Rows

logger = logging.getLogger("unrote")

UNPAIRED = -1
BLOCK = 256  # images compared at a time


def read_origins(samples: Any, names: Sequence[str]) -> list[str | None] | None:
    """Name of the training image that the prompt of each generated image came from, as ``unrote sample`` wrote it.

    Args:
        samples: folder or ``.npz`` of generated images.
        names: of the generated images, as they were read.

    Returns:
        One per name, None where it is not known; None if it is known of none.
    """
    if not isinstance(samples, str | Path):
        return None
    path = Path(samples)
    file = path.with_name(f"{path.stem}.samples.jsonl") if path.suffix == ".npz" else path / "samples.jsonl"
    if not file.exists():
        return None
    try:
        rows = [parse_json(line) for line in file.read_text("utf-8").splitlines()]
        # In an archive the images have no suffix.
        known = {name: row.get("origin") for row in rows for name in (row["file"], Path(row["file"]).stem)}
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s was not written by unrote sample: where prompts came from is not known", file)
        return None
    origins = [known.get(name) for name in names]
    return origins if any(origin is not None for origin in origins) else None


def paired(origins: Sequence[str | None] | None, generated: ImageStore, train: ImageStore) -> NDArray[np.int64] | None:
    """Position in ``train`` of the image whose name is each generated image's origin, -1 where there is none. [G].

    Returns:
        None if no image has one.

    Raises:
        InputError: not one origin per generated image.
    """
    if origins is None:
        return None
    if len(origins) != len(generated):
        raise InputError(f"origins: {len(origins):,} names for {len(generated):,} generated images")
    position = {name: index for index, name in enumerate(train.names)}
    indices = np.array([UNPAIRED if name is None else position.get(name, UNPAIRED) for name in origins], dtype=np.int64)
    if (indices == UNPAIRED).all():
        example = next((name for name in origins if name is not None), None)
        logger.warning("prompts are not paired: no training image of %s is called %r", train.source, example)
        return None
    return indices


def pixel_columns(
    indices: NDArray[np.int64], generated: ImageStore, train: ImageStore, nearest: Neighbours
) -> dict[str, np.ndarray]:
    """Columns of the pairs, all [G]: the prompt's image, its L2 distance, and the ratio with it in the nearest's place.

    The ratio is that of ``ratio_l2``: the distance over the mean distance to the n nearest training images as they are.
    Equal to ``ratio_l2`` where the prompt's image is the nearest, and larger otherwise. NaN, and no name, where
    there is no such image.

    Args:
        indices: of :func:`paired`.
        generated: G images.
        train: the training images.
        nearest: those of the generated images as they are.
    """
    has = indices != UNPAIRED
    distance = np.full(len(indices), np.nan)
    for rows in np.split(np.flatnonzero(has), range(BLOCK, int(has.sum()), BLOCK)):
        difference = generated.images[rows].astype(np.int64) - train.images[indices[rows]].astype(np.int64)
        distance[rows] = np.sqrt((difference**2).sum((1, 2, 3))) / 255
    mean = nearest.distances.astype(np.float64).mean(axis=1)
    ratio = np.divide(distance, mean, out=np.where(has, 0.0, np.nan), where=has & (distance > 0) & (mean > 0))
    names = [train.names[index] if index != UNPAIRED else "" for index in indices.tolist()]
    return {
        "prompt_train_index": indices,
        "prompt_train_name": np.array(names, dtype=object),
        "prompt_distance": distance,
        "prompt_ratio_l2": ratio,
    }


def feature_similarity(indices: NDArray[np.int64], generated: Rows, train: Rows) -> np.ndarray:
    """Cosine of each generated image's features [G, D] and its prompt's image's, of [N, D]; NaN where none. [G]."""
    similarity = np.full(len(indices), np.nan)
    has = np.flatnonzero(indices != UNPAIRED)
    similarity[has] = cosines(generated, has, train, indices[has])
    return similarity


def prompted_summary(pairs: Mapping[str, np.ndarray], clusters: np.ndarray, seed: int) -> dict[str, Any]:
    """How often a prompt brings back the image that it came from. JSON-able; described in docs/audit.md.

    An image stands for its cluster of duplicates: which of them is nearest is chance. ``shuffled`` is the share that is
    expected if it were chance which generated image came from which of the prompts.

    Args:
        pairs: columns of the audit, with those of :func:`pixel_columns`.
        clusters: the least index of the duplicates each training image belongs to, int64 [N].
        seed: of the bootstrap.
    """
    has = pairs["prompt_train_index"] != UNPAIRED
    own = clusters[pairs["prompt_train_index"][has]]

    def comes_first(column: str) -> np.ndarray:
        return np.asarray(clusters[pairs[column][has]] == own)

    def row(column: str) -> dict[str, Any]:
        counts = [np.bincount(found, minlength=len(clusters)) for found in (clusters[pairs[column][has]], own)]
        by_chance = float((counts[0] * counts[1]).sum()) / len(own) ** 2
        return {**fraction(int(comes_first(column).sum()), len(own)), "shuffled": by_chance}

    searches = {"plain": "train_index", "orbit": "orbit_train_index"}
    searches |= {name.removesuffix("_train_index"): name for name in pairs if name.endswith("_train_index")}
    del searches["prompt"]
    copied = near_copies(pairs)[has] & comes_first("orbit_train_index")
    similarities = {
        name.removesuffix("_prompt_similarity"): values[has]
        for name, values in pairs.items()
        if name.endswith("_prompt_similarity")
    }
    return {
        "paired": int(has.sum()),
        "images": len(np.unique(own)),
        "nearest": {key: row(name) for key, name in searches.items()},
        "copied": {**fraction(int(copied.sum()), len(own)), "distinct": len(np.unique(own[copied]))},
        "similarity": {
            key: distribution(values, num_resamples=1000, seed=seed) for key, values in similarities.items()
        },
    }


def prompted_sentence(prompted: Mapping[str, Any]) -> str:
    """The result of :func:`prompted_summary` in plain words."""
    nearest, copied = prompted["nearest"]["orbit"], prompted["copied"]
    return (
        f"Made from the captions of {prompted['images']:,} training images: of {prompted['paired']:,} generated "
        f"images, {percent(nearest['fraction'])} are nearest to the caption's own image "
        f"({percent(nearest['shuffled'])} if the captions were shuffled), and {percent(copied['fraction'])} are "
        "near-copies of it."
    )
