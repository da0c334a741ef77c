"""A perceptual hash of images, and the search for pairs of hashes that differ in few bits."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import torch

from unrote.data.store import ImageStore

SIDE, FREQUENCIES, CHUNKS = 32, 8, 7
LUMA = (0.299, 0.587, 0.114)
MAX_BUCKET = 200


def _order() -> np.ndarray:
    """The 63 places (u, v) of the 8×8 block without the mean, low frequencies first."""
    u, v = np.meshgrid(np.arange(FREQUENCIES), np.arange(FREQUENCIES), indexing="ij")
    return np.argsort((u + v).ravel(), kind="stable")[1:]


def _cosines() -> np.ndarray:
    """The first 8 rows of the DCT-II of 32 values."""
    k, n = np.arange(FREQUENCIES)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


ORDER = _order()
MIRRORED = np.uint64(sum(1 << bit for bit, place in enumerate(ORDER) if place % FREQUENCIES % 2))
"""A mirror image has the opposite sign at odd horizontal frequencies: its hash is ``hash ^ MIRRORED``."""


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """pHash (Zauner 2010) with signs instead of the median: uint64 [B] of uint8 [B, H, W, C].

    Luma is scaled to 32×32; bit i says whether the i-th of the 63 lowest DCT-II coefficients but the mean is positive.
    """
    return _signs(_luma(images))


def _luma(images: np.ndarray) -> torch.Tensor:
    """float32 [B, 32, 32] in [0, 255]."""
    pixels = torch.from_numpy(np.array(images)).float()
    luma = pixels @ torch.tensor(LUMA) if pixels.shape[3] == 3 else pixels[..., 0]
    if luma.shape[1:] != (SIDE, SIDE):
        luma = torch.nn.functional.interpolate(luma[:, None], (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
    return luma


def _signs(luma: torch.Tensor) -> np.ndarray:
    cosines = torch.from_numpy(_cosines()).float()
    block = (cosines @ luma @ cosines.T).flatten(1)[:, torch.from_numpy(ORDER)]
    bits = (block > 0).to(torch.int64) << torch.arange(63)
    hashes: np.ndarray = bits.sum(1).numpy().astype(np.uint64)
    return hashes


def _views(luma: torch.Tensor, shift: int) -> Iterator[torch.Tensor]:
    """The images, and shifted ``shift`` pixels of 32 in eight directions by reflection. [B, 32, 32] each."""
    yield luma
    if shift == 0:
        return
    padded = torch.nn.functional.pad(luma[:, None], (shift,) * 4, mode="reflect")[:, 0]
    for down in (0, shift, 2 * shift):
        for right in (0, shift, 2 * shift):
            if (down, right) != (shift, shift):
                yield padded[:, down : down + SIDE, right : right + SIDE]


def store_hashes(images: Any, shift: int, block: int = 1024) -> np.ndarray:
    """Hashes uint64 [V, N] of a store's images as they are (first row) and shifted ``shift`` of their pixels."""
    scaled = 0 if shift == 0 else min(SIDE - 1, max(1, round(shift * SIDE / max(images[0:1].shape[1:3]))))
    parts = [
        np.stack([_signs(view) for view in _views(_luma(images[start : start + block]), scaled)])
        for start in range(0, len(images), block)
    ]
    return np.concatenate(parts, axis=1)


def near_pairs(hashes: np.ndarray, max_bits: int) -> np.ndarray:
    """Pairs i < j of images of which some views' hashes differ in at most ``max_bits``. int64 [P, 2], sorted.

    The bits are dealt to seven chunks of nine; candidates agree in two whole chunks with the other's first view, as it
    is or mirrored. So all pairs within 5 bits are found, of those within 6 to ``max_bits`` most. Buckets are found by
    sorting, so the cost is N log N as long as images differ; where very many share a bucket, each meets 200 of them.

    Args:
        hashes: of :func:`store_hashes`.
        max_bits: the largest Hamming distance.
    """
    stored = hashes[0]
    count = len(stored)
    found = []
    for first, second in combinations(range(CHUNKS), 2):
        mask = np.uint64(sum(1 << bit for bit in range(63) if bit % CHUNKS in (first, second)))
        order = np.argsort(stored & mask, kind="stable")
        keys = (stored & mask)[order]
        for view in hashes:
            for queries in (view, view ^ MIRRORED):
                rows, columns = _bucket_pairs(queries & mask, keys)
                columns = order[columns]
                near = np.bitwise_count(queries[rows] ^ stored[columns]) <= max_bits
                low, high = np.minimum(rows, columns)[near], np.maximum(rows, columns)[near]
                found.append(np.unique((low * count + high)[low != high]))
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs // count, pairs % count], axis=1).astype(np.int64)


def _bucket_pairs(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Query i beside every place in the sorted ``keys`` that equals it, at most MAX_BUCKET of each."""
    first = np.searchsorted(keys, queries, side="left")
    sizes = np.minimum(np.searchsorted(keys, queries, side="right") - first, MAX_BUCKET)
    rows = np.repeat(np.arange(len(queries)), sizes)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rows, first[rows] + places


def constant_images(store: ImageStore) -> np.ndarray:
    """Indices of images of which all pixels are alike (at most one level of 255 apart). int64."""
    flat = [
        start + np.flatnonzero(np.ptp(np.asarray(store.images[start : start + 1024]), axis=(1, 2)).max(1) <= 1)
        for start in range(0, len(store), 1024)
    ]
    return np.concatenate(flat).astype(np.int64)
