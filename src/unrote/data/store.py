"""What every image source becomes: uint8 rows of one size, with names, labels and captions."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unrote.errors import InputError

log = logging.getLogger("unrote")

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]


class ImageRows:
    """Chosen rows of a (memory-mapped) array, read only when indexed, so that a subset of a big store costs no RAM.

    ``rows[i]`` is ``uint8 [H, W, C]``; ``rows[a:b]`` and ``rows[array]`` are ``uint8 [B, H, W, C]``, always a copy.
    """

    def __init__(self, base: Pixels, indices: Indices) -> None:
        self._base = base
        self._indices = indices

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, H, W, C)``."""
        return (len(self._indices), *self._base.shape[1:])

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """Always uint8."""
        return self._base.dtype

    @property
    def ndim(self) -> int:
        """Always 4."""
        return self._base.ndim

    @property
    def nbytes(self) -> int:
        """Bytes that reading every row would take."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, which: int | slice | Sequence[int] | NDArray[Any]) -> Pixels:
        if isinstance(which, list | tuple):
            which = np.asarray(which, dtype=np.int64)
        return np.asarray(self._base[self._indices[which]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("reading rows of a store always copies them")
        return np.asarray(self[:], dtype=dtype)

    def take(self, indices: Indices) -> "ImageRows":
        """The same base, narrowed further."""
        return ImageRows(self._base, self._indices[indices])


@dataclass(frozen=True)
class Quarantined:
    """An entry of the source that is not used.

    Attributes:
        name: Where it stood, printable.
        reason: Why it is not used.
    """

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class ImageStore:
    """A set of equally sized images. Nothing here is ever changed after it is made.

    Attributes:
        images: ``uint8 [N, H, W, C]``, C in 1, 3: an array (memory-mapped read-only when it comes from disk) or
            :class:`ImageRows`. Both give arrays for ``images[i]``, ``images[a:b]`` and ``images[int_array]``, both have
            ``shape``, ``dtype`` and ``len``, and ``numpy.asarray`` reads either whole.
        names: A unique, printable, stable name of each image (the relative path for folders).
        labels: Class of each image, ``int64 [N]``, or None.
        class_names: What the labels mean, or None.
        captions: One text per image ("" where there is none), or None.
        more_captions: Further texts of each image, where there are any; None if no image has several.
        fingerprint: Hex SHA-256 over pixels, names, labels and captions: equal exactly when they all are.
        source: How the user named it, such as ``emoji:holdout`` or ``photos/``.
        quarantined: Entries of the source that were left out, with reasons.
        digests: SHA-256 of each image's pixels, ``uint8 [N, 32]``; computed when not given.
    """

    images: Pixels | ImageRows
    names: Sequence[str]
    labels: Indices | None
    class_names: tuple[str, ...] | None
    captions: Sequence[str] | None
    fingerprint: str
    source: str
    quarantined: tuple[Quarantined, ...] = ()
    digests: Pixels | None = field(default=None, repr=False)
    more_captions: Sequence[Sequence[str]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def every_caption(self) -> list[list[str]]:
        """All texts of each image, the first first; one empty text where there is none."""
        first = [""] * len(self) if self.captions is None else self.captions
        more = [()] * len(self) if self.more_captions is None else self.more_captions
        return [[text, *others] for text, others in zip(first, more, strict=True)]

    def subset(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> "ImageStore":
        """The images at ``indices``, in that order and without copying pixels, with its own fingerprint."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = self.images if isinstance(self.images, ImageRows) else ImageRows(self.images, np.arange(len(self)))
        images = rows.take(chosen)
        digests = image_digests(images) if self.digests is None else np.asarray(self.digests[chosen])
        names = [self.names[i] for i in chosen]
        labels = None if self.labels is None else self.labels[chosen]
        captions = None if self.captions is None else [self.captions[i] for i in chosen]
        more = None if self.more_captions is None else _any_of([self.more_captions[i] for i in chosen])
        fingerprint = content_fingerprint(images.shape, digests, names, labels, self.class_names, captions, more)
        return replace(
            self,
            images=images,
            names=names,
            labels=labels,
            captions=captions,
            fingerprint=fingerprint,
            digests=digests,
            more_captions=more,
        )

    def limit(self, n: int) -> "ImageStore":
        """``n`` images chosen by a fixed hash of the position, in the original order; all of them if ``n >= len``.

        ``limit(a)`` is part of ``limit(b)`` for a <= b.

        Raises:
            InputError: ``n`` is not positive.
        """
        if n < 1:
            raise InputError(f"limit must be at least 1, not {n}")
        if n >= len(self):
            return self
        return self.subset(np.sort(np.argsort(_mixed(len(self)), kind="stable")[:n]))


def in_memory_store(
    images: Pixels,
    *,
    source: str,
    names: Sequence[str] | None = None,
    labels: Indices | None = None,
    class_names: tuple[str, ...] | None = None,
    captions: Sequence[str] | None = None,
    more_captions: Sequence[Sequence[str]] | None = None,
) -> ImageStore:
    """A store around ``uint8 [N, H, W, C]`` as it is; names default to ``000000``, ``000001``, ..."""
    names = numbered(len(images)) if names is None else names
    digests = image_digests(images)
    more = None if more_captions is None else _any_of(more_captions)
    fingerprint = content_fingerprint(images.shape, digests, names, labels, class_names, captions, more)
    return ImageStore(images, names, labels, class_names, captions, fingerprint, source, (), digests, more)


def numbered(count: int) -> list[str]:
    """Names for images that have none: their position, zero-padded to at least six digits."""
    width = max(6, len(str(count - 1)))
    return [f"{index:0{width}d}" for index in range(count)]


def image_digests(images: Pixels | ImageRows) -> Pixels:
    """SHA-256 of each image's pixels, ``uint8 [N, 32]``."""
    digests = b"".join(pixel_digest(images[index]) for index in range(len(images)))
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


def digests_of(images: ImageStore) -> Pixels:
    """SHA-256 of each image's pixels, ``uint8 [N, 32]``: those the store has, or computed now."""
    return image_digests(images.images) if images.digests is None else np.asarray(images.digests)


def same_pixels(images: ImageStore, others: ImageStore) -> NDArray[np.bool_]:
    """Which of ``images`` have the pixels of one of ``others``, ``bool [N]``."""
    known = {digest.tobytes() for digest in digests_of(others)}
    return np.array([digest.tobytes() in known for digest in digests_of(images)])


def count_trained_on(holdout: ImageStore, train: ImageStore) -> int:
    """How many of the held-out images are training images; more than none is a warning.

    Raises:
        InputError: all of them are, so nothing can be told by them.
    """
    shared = int(same_pixels(holdout, train).sum())
    if shared == len(holdout):
        raise InputError(f"--holdout {holdout.source}: all of its images are training images; give others")
    if shared:
        log.warning(
            "%s of the %s held-out images are training images: they hide copying", f"{shared:,}", f"{len(holdout):,}"
        )
    return shared


def pixel_digest(image: Pixels) -> bytes:
    """SHA-256 of one image's pixels in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def content_fingerprint(
    shape: tuple[int, ...],
    digests: Pixels,
    names: Sequence[str],
    labels: Indices | None,
    class_names: tuple[str, ...] | None,
    captions: Sequence[str] | None,
    more_captions: Sequence[Sequence[str]] | None = None,
) -> str:
    """Hex SHA-256 of everything that makes two stores the same data."""
    whole = hashlib.sha256()
    texts = [list(shape), list(names), class_names, None if captions is None else list(captions)]
    for part in (np.ascontiguousarray(digests).tobytes(), *(json.dumps(text).encode() for text in texts)):
        whole.update(hashlib.sha256(part).digest())
    if more_captions is not None:
        whole.update(json.dumps([list(texts) for texts in more_captions]).encode())
    if labels is not None:
        whole.update(hashlib.sha256(labels.astype("<i8").tobytes()).digest())
    return whole.hexdigest()


def _any_of(more: Sequence[Sequence[str]]) -> Sequence[Sequence[str]] | None:
    """None if no image has further texts, so that how a store came about does not count for its fingerprint."""
    return more if any(more) else None


def _mixed(count: int) -> NDArray[np.uint64]:
    """SplitMix64 of 0..count-1: a shuffle key that is the same on every platform and for every NumPy."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
