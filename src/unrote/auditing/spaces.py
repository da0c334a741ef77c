"""Everything that is measured on the features of one encoder, top to bottom."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unrote.auditing.authenticity import Search, authentic, authenticity
from unrote.auditing.generalization import likelihood_gap, measure_c_t
from unrote.auditing.quality import measure_quality, subsample
from unrote.auditing.rows import Chosen
from unrote.auditing.similarity import (
    Similar,
    background,
    calibrated,
    highest_absolute,
    most_similar,
    similarity_table,
)
from unrote.encoders.base import Encoder
from unrote.errors import InputError
from unrote.neighbours.found import MEMORY_BYTES
from unrote.neighbours.streaming import Rows
from unrote.seeding import derive_seed

MAX_ASKED = 10_000  # training and held-out images that are searched for, as controls


@dataclass(frozen=True)
class Space:
    """What was measured in one feature space.

    Attributes:
        summary: JSON-able, described in docs/metrics.md.
        columns: one value per generated image; names start with the encoder's key.
        controls: similarity of held-out images (``unseen``) and between training images (``background``), if measured.
    """

    summary: dict[str, Any]
    columns: dict[str, np.ndarray]
    controls: dict[str, np.ndarray]


def measure_space(
    encoder: Encoder,
    generated: Rows,
    train: Rows,
    holdout: Rows | None,
    *,
    identity: np.ndarray,
    leaks: np.ndarray | None = None,
    seed: int,
    fpr: float = 0.01,
    num_resamples: int = 1000,
    memory_bytes: int = MEMORY_BYTES,
    device: str | torch.device = "cpu",
    progress: str | None = None,
    distributed: bool = False,
) -> Space:
    """Quality, similarity, authenticity and generalization from features of one encoder.

    Searches are exact and over all training images; what needs all pairs or a mixture uses subsets of stated size. The
    same features, identity and seed give the same numbers.

    Args:
        encoder: what the features are of.
        generated: features float32 [G, D].
        train: features float32 [N, D].
        holdout: features float32 [M, D] of images that were not trained on.
        identity: least index of the cluster of duplicates each training image belongs to, int64 [N].
        leaks: which held-out images are duplicates of training images, bool [M]; none if None.
        seed: of all subsets and resampling.
        fpr: false-positive rate of the calibrated similarity threshold, in (0, 1).
        num_resamples: of the bootstrap of mean similarities.
        memory_bytes: bound on the working memory of the searches.
        device: where the searches compute.
        progress: label of progress bars on stderr; None for no bar.
        distributed: searches are shared as in :func:`unrote.neighbours.images.nearest_images`.

    Raises:
        InputError: a set is empty, or its features have another dimension.
    """
    _check(encoder, generated, train, holdout, identity)
    search = Search(memory_bytes, device, progress, distributed)
    unseen, leaked = None, np.zeros(0, dtype=bool)
    if holdout is not None:
        asked = subsample(len(holdout), MAX_ASKED, seed, "features-unseen")
        unseen = Chosen(holdout, asked)
        leaked = np.zeros(len(asked), dtype=bool) if leaks is None else leaks[asked]
    squared, nearest = _first(search.nearest(generated, train, what="generated → train"))
    unseen_squared, unseen_nearest = None, None
    if unseen is not None:
        unseen_squared, unseen_nearest = _first(search.nearest(unseen, train, what="held-out → train"))
    similar = most_similar(generated, train, search, "generated → train, similarity")
    columns, originality = {}, None
    if identity.any():  # otherwise all training images are duplicates of the first: there is no other
        genuine = authentic(squared, nearest, train, identity, search)
        columns[f"{encoder.key}_authentic"] = genuine
        control = None
        if unseen_squared is not None and unseen_nearest is not None:
            control = authentic(unseen_squared, unseen_nearest, train, identity, search)
        originality = authenticity(genuine, control)
    generalization = None
    if holdout is not None and unseen is not None and unseen_squared is not None:
        distances = (squared, unseen_squared)
        generalization = {
            "c_t": measure_c_t(generated, train, unseen, distances, seed=seed),
            "fld": likelihood_gap(generated, train, holdout, seed=seed),
        }
    similarity: dict[str, Any] | None = None
    controls: dict[str, np.ndarray] = {}
    if encoder.copy_detection:
        columns[f"{encoder.key}_similarity"] = similar.values
        columns[f"{encoder.key}_train_index"] = similar.indices
        similarity, controls = _similarity(similar, train, unseen, leaked, identity, search, fpr, num_resamples, seed)
    absolute = highest_absolute(similar, generated, train, search)
    summary = {
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256,
        "preprocessing": encoder.preprocessing,
        "dimensions": int(train.shape[1]),
        "is_fid_inception": bool(encoder.is_fid_inception),
        "quality": measure_quality(generated, train, holdout, absolute, seed=seed),
        "similarity": similarity,
        "authenticity": originality,
        "generalization": generalization,
    }
    return Space(summary, columns, controls)


def _first(found: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return found[0][:, 0], found[1][:, 0]


def _similarity(
    similar: Similar,
    train: Rows,
    unseen: Rows | None,
    leaks: np.ndarray,
    identity: np.ndarray,
    search: Search,
    fpr: float,
    num_resamples: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Similarity of generated images, between training images, and of held-out ones; the calibrated threshold."""
    controls = {}

    def table(found: Similar, role: str) -> dict[str, Any]:
        resampling = derive_seed(seed, "audit", f"similarity-{role}")
        return similarity_table(found, identity, num_resamples=num_resamples, seed=resampling)

    between = None
    if identity.any():
        chosen = subsample(len(train), MAX_ASKED, seed, "background")
        others = background(train, identity, chosen, search)
        between, controls["background"] = table(others, "background"), others.values
    held_out = None if unseen is None else most_similar(unseen, train, search, "held-out → train, similarity")
    if held_out is not None:
        controls["unseen"] = held_out.values
    tables = {
        "generated": table(similar, "generated"),
        "background": between,
        "unseen": None if held_out is None else table(held_out, "unseen"),
        "calibrated": None if held_out is None else calibrated(similar, held_out, leaks, fpr, identity),
    }
    return tables, controls


def _check(encoder: Encoder, generated: Rows, train: Rows, holdout: Rows | None, identity: np.ndarray) -> None:
    assert len(identity) == len(train)
    sets = {"generated": generated, "training": train, "held-out": holdout}
    for role, rows in sets.items():
        if rows is None:
            continue
        if len(rows) == 0:
            raise InputError(f"there are no {role} features of {encoder.name}: give at least one image")
        if rows.shape[1:] != train.shape[1:]:
            raise InputError(
                f"{encoder.name}: {role} features have {rows.shape[1:]} values, training features {train.shape[1:]}; "
                f"an encoder must give every image the same number of features"
            )
