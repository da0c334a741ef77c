"""A perceptual hash of images, and the search for pairs of hashes that differ in few bits."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import torch

SIDE, FREQUENCIES = 32, 8
CHUNKS, CHUNK_BITS = 7, 9
LUMA = (0.299, 0.587, 0.114)
MAX_BUCKET = 200
BLOCK = 1 << 12


def _places() -> np.ndarray:
    """For each bit, from the lowest, its place in the 8×8 block without the mean.

    The 63 places, low frequencies first, are dealt to the chunks in turn, so that every chunk has some of each. Inside
    a chunk the lowest frequency, the most reliable one, is the highest bit.
    """
    u, v = np.meshgrid(np.arange(FREQUENCIES), np.arange(FREQUENCIES), indexing="ij")
    order = np.argsort((u + v).ravel(), kind="stable")[1:]
    return np.concatenate([order[chunk::CHUNKS][::-1] for chunk in range(CHUNKS)])


def _cosines() -> np.ndarray:
    """The first 8 rows of the DCT-II of 32 values."""
    k, n = np.arange(FREQUENCIES)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


PLACES = _places()
MIRRORED = np.uint64(sum(1 << bit for bit, place in enumerate(PLACES.tolist()) if place % FREQUENCIES % 2))
"""A mirror image has the opposite sign at odd horizontal frequencies: its hash is ``hash ^ MIRRORED``."""


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """pHash (Zauner 2010) with signs instead of the median: uint64 [B] of uint8 [B, H, W, C].

    Luma is scaled to 32×32; a bit says whether one of the 63 lowest DCT-II coefficients but the mean is positive.
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
    block = (cosines @ luma @ cosines.T).flatten(1)[:, torch.from_numpy(PLACES)]
    bits = (block > 0).to(torch.int64) << torch.arange(63)
    hashes: np.ndarray = bits.sum(1).numpy().astype(np.uint64)
    return hashes


def _views(luma: torch.Tensor, shift: int) -> Iterator[torch.Tensor]:
    """The images [B, 32, 32], and moved by ``shift`` pixels of 32 in eight directions and by half of it in four."""
    yield luma
    padded = torch.nn.functional.pad(luma[:, None], (shift,) * 4, mode="reflect")[:, 0]
    moves = {(down * shift, right * shift) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    moves |= {(down * (shift // 2), right * (shift // 2)) for down in (-1, 1) for right in (-1, 1)}
    for down, right in sorted(moves - {(0, 0)}):
        yield padded[:, shift + down : shift + down + SIDE, shift + right : shift + right + SIDE]


def store_hashes(images: Any, shift: int, block: int = 1024) -> np.ndarray:
    """Hashes uint64 [V, N] of images as they are (first row) and shifted by up to ``shift`` of their own pixels."""
    scaled = 0 if shift == 0 else min(SIDE - 1, max(1, round(shift * SIDE / max(images.shape[1:3]))))
    parts = [
        np.stack([_signs(view) for view in _views(_luma(images[start : start + block]), scaled)])
        for start in range(0, len(images), block)
    ]
    return np.concatenate(parts, axis=1)


def near_pairs(hashes: np.ndarray, max_bits: int) -> Iterator[np.ndarray]:
    """Pairs i < j of images of which some views' hashes differ in at most ``max_bits``: int64 [P, 2], part by part.

    The bits are dealt to seven chunks of nine; candidates agree in two whole chunks with the other's first view, as it
    is or mirrored. So all pairs within 5 bits are found, of those within 6 to ``max_bits`` most. Buckets are found by
    sorting, so the cost is N log N as long as images differ. Where very many share a bucket, each meets the 200 whose
    other bits, low frequencies first, sort nearest to its own. No pair is twice in one part, but may be in several.

    Args:
        hashes: of :func:`store_hashes`.
        max_bits: the largest Hamming distance.
    """
    count = hashes.shape[1]
    for first, second in combinations(range(CHUNKS), 2):
        stored = _arranged(hashes[0], first, second)
        order = np.argsort(stored, kind="stable")
        index = _Buckets(stored[order])
        mirrored = _arranged(np.array([MIRRORED]), first, second)
        for start in range(0, count, BLOCK):
            found = []
            for view in hashes[:, start : start + BLOCK]:
                for queries in (plain := _arranged(view, first, second), plain ^ mirrored):
                    rows, places = index.near(queries, max_bits)
                    rows, columns = rows + start, order[places]
                    low, high = np.minimum(rows, columns), np.maximum(rows, columns)
                    found.append(np.unique((low * count + high)[low != high]))
            pairs = np.unique(np.concatenate(found))
            yield np.stack([pairs // count, pairs % count], axis=1).astype(np.int64)


def _arranged(hashes: np.ndarray, first: int, second: int) -> np.ndarray:
    """The same bits with two chunks on top."""
    result = np.zeros_like(hashes)
    for chunk in (first, second, *(other for other in range(CHUNKS) if other not in (first, second))):
        part = (hashes >> np.uint64(CHUNK_BITS * chunk)) & np.uint64((1 << CHUNK_BITS) - 1)
        result = (result << np.uint64(CHUNK_BITS)) | part
    return result


class _Buckets:
    """Sorted hashes; those that agree in the two chunks on top are a bucket."""

    REST = np.uint64(CHUNK_BITS * (CHUNKS - 2))

    def __init__(self, ordered: np.ndarray) -> None:
        self._ordered = ordered
        sizes = np.bincount((ordered >> self.REST).astype(np.int64), minlength=1 << (2 * CHUNK_BITS))
        self._ends = np.concatenate([[0], np.cumsum(sizes)])

    def near(self, queries: np.ndarray, max_bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Query i beside the places of its bucket that differ in at most ``max_bits``, of MAX_BUCKET around it."""
        top = (queries >> self.REST).astype(np.int64)
        low, high = self._ends[top], self._ends[top + 1]
        middle = np.searchsorted(self._ordered, queries) - MAX_BUCKET // 2
        begin = np.maximum(low, np.minimum(middle, high - MAX_BUCKET))
        sizes = np.minimum(high - begin, MAX_BUCKET)
        rows = np.repeat(np.arange(len(queries)), sizes)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes - begin, sizes)
        near = np.bitwise_count(queries[rows] ^ self._ordered[places]) <= max_bits
        return rows[near], places[near]
