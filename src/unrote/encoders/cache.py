"""Features are extracted once: kept on disk under a hash of the images' pixels and of everything the encoder is.

One file per set and encoder, an ordinary ``.npy``. It is written block by block under another name and renamed when it
is whole; whoever owns it is the only writer, so it may go on with what a dead process left.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from unrote.data.store import ImageStore, digests_of
from unrote.encoders.base import Encoder
from unrote.encoders.custom import checked
from unrote.errors import InputError
from unrote.files import fsync
from unrote.neighbours.streaming import Rows, content_digest, release
from unrote.ownership import Ownership
from unrote.ranks import PeerLostError, Ranks

log = logging.getLogger("unrote")

FORMAT = 1
"""Counts up whenever the same images and the same encoder would give another file."""
_BLOCK_BYTES = 1 << 25
_MAX_BLOCK = 512


def pixels_digest(store: ImageStore) -> str:
    """Hex SHA-256 of shape and pixels of a store, whatever its names, labels and captions are."""
    return hashlib.sha256(repr(tuple(store.images.shape)).encode() + digests_of(store).tobytes()).hexdigest()


def features(
    encoder: Encoder,
    images: Rows,
    *,
    digest: str | None = None,
    cache: Path | None = None,
    progress: str | None = None,
    distributed: bool = False,
) -> np.ndarray:
    """Features of all images: from the cache, or extracted now in blocks and kept there.

    Args:
        encoder: what :func:`unrote.encoders.load_encoder` gives.
        images: uint8 [N, H, W, C], N > 0; read once, block by block.
        digest: of the images' pixels and shape, see :func:`pixels_digest`; computed if None (one more reading).
        cache: folder for the files; None to keep the features in memory. An encoder whose weights are ``unknown``
            is kept in memory too, unless it has a ``cache_key``.
        progress: label of a progress bar on stderr; None for no bar.
        distributed: every process of the initialized ``torch.distributed`` group calls this with the same arguments and
            extracts its share of the blocks; ``cache`` is a folder that all of them see. The blocks are those of one
            process, and so are the features.

    Returns:
        float32 [N, D], finite; a read-only memory map if cached.

    Raises:
        InputError: the encoder returned anything else, the cache cannot be written, or not all processes see it.
    """
    assert len(images) > 0, "no images"
    ranks = Ranks.here(distributed=distributed)
    cache_key = getattr(encoder, "cache_key", None)
    if cache is None or (encoder.weights_sha256 == "unknown" and cache_key is None):
        return _in_memory(encoder, images, progress, ranks)
    if digest is None:
        digest = content_digest(images, range(len(images))).hex()
    identity = (FORMAT, digest, encoder.key, encoder.name, encoder.weights_sha256, encoder.preprocessing, cache_key)
    path = cache / f"{encoder.key}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:40]}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if ranks.rank == 0:
            lock = path.with_name(f"{path.name}.lock")
            with Ownership(lock, "another process extracts the same features").held(wait=True):
                found = _extracted(path, encoder, images, progress, ranks)
        else:
            found = _extracted(path, encoder, images, progress, ranks)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot keep features in {cache} ({reason}): make room or set UNROTE_CACHE") from error
    if found is None:
        raise InputError(f"rank {ranks.rank} does not see {path}: set UNROTE_CACHE to a folder that all nodes share")
    return found


def _extracted(path: Path, encoder: Encoder, images: Rows, progress: str | None, ranks: Ranks) -> np.ndarray | None:
    """The file, written by rank 0 if it is not there; None if it is not seen here."""
    found = _open(path, len(images)) if ranks.rank == 0 else None
    if ranks.of_first(np.array([found is not None]))[0]:
        log.info("%s: features were there already (%s)", encoder.name, path)
        return found if ranks.rank == 0 else _open(path, len(images))
    if ranks.rank == 0:
        _write(path, encoder, images, progress, ranks)
    else:
        done = int(ranks.of_first(np.zeros(1, dtype=np.int64))[0])
        for _ in _blocks(encoder, images, progress, ranks, done):
            pass
    ranks.barrier()
    return _open(path, len(images))


def _in_memory(encoder: Encoder, images: Rows, progress: str | None, ranks: Ranks) -> np.ndarray:
    result: np.ndarray | None = None
    for start, block in _blocks(encoder, images, progress, ranks):
        if result is None:
            result = np.empty((len(images), block.shape[1]), dtype=np.float32)
        result[start : start + len(block)] = block
    assert result is not None
    return result


def _write(path: Path, encoder: Encoder, images: Rows, progress: str | None, ranks: Ranks) -> None:
    """Through a file, not a memory map: a full disk is then an error and no signal that kills the process.

    What a killed process wrote is gone on with, in whole blocks: the blocks are the same, and only one process writes.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("r+b" if partial.exists() else "x+b") as file:
            done = _resume(file, len(images), _block_size(images))
            ranks.of_first(np.array([done]))
            for start, block in _blocks(encoder, images, progress, ranks, done):
                if start == 0:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), block.shape[1])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(block.astype("<f4", copy=False).data)
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        fsync(path.parent)
    except PeerLostError:
        raise
    except Exception:  # an interrupt is none
        partial.unlink(missing_ok=True)
        raise


def _resume(file: BinaryIO, count: int, size: int) -> int:
    """Go to the end of the last whole block of a file begun earlier, or to the beginning; how many rows there are."""
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        row = shape[1] * dtype.itemsize
        fits = (shape[0], len(shape), dtype.str) == (count, 2, "<f4")
    except Exception:  # numpy's reader of headers raises whatever the garbage makes of it
        fits = False
    offset, done = 0, 0
    if fits:
        offset = file.tell()
        done = (file.seek(0, 2) - offset) // (size * row) * size
        done = done if done <= count else 0
    file.truncate(offset + done * row if done else 0)
    file.seek(0, 2)
    return done


def _block_size(images: Rows) -> int:
    """Images in a block: by their shape only, so that a later process makes the same blocks."""
    return min(_MAX_BLOCK, max(1, _BLOCK_BYTES // int(np.prod(images.shape[1:]))))


def _blocks(
    encoder: Encoder, images: Rows, progress: str | None, ranks: Ranks, first: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Checked features from ``first`` on, with the position of each block's first; processes take blocks in turn."""
    size = _block_size(images)
    dimensions: int | None = None
    quiet = True if progress is None or ranks.rank else None
    with tqdm(total=len(images), initial=first, desc=progress, unit="img", leave=False, disable=quiet) as bar:
        for start in range(first, len(images), size * ranks.world):
            own = _block(encoder, images, start + ranks.rank * size, size)
            if dimensions is None:
                dimensions = int(ranks.of_first(np.array([0 if own is None else own.shape[1]]))[0])
            if own is not None and own.shape[1] != dimensions:
                raise InputError(f"encoder {encoder.name} returned {dimensions} features, then {own.shape[1]}")
            for rank, block in enumerate(_of_all(own, size, dimensions, ranks)):
                position = start + rank * size
                if position < len(images):
                    yield position, block[: len(images) - position]
                    bar.update(min(size, len(images) - position))


def _block(encoder: Encoder, images: Rows, start: int, size: int) -> np.ndarray | None:
    """Features of the images from ``start`` on; None behind the last."""
    if start >= len(images):
        return None
    rows = np.asarray(images[start : start + size])
    block = checked(np.ascontiguousarray(encoder(rows), dtype=np.float32), len(rows), encoder.name)
    release(images)
    return block


def _of_all(own: np.ndarray | None, size: int, dimensions: int, ranks: Ranks) -> Iterator[np.ndarray]:
    """Every process's block, filled up with zeros to ``size`` rows where there are several."""
    if ranks.world == 1:
        assert own is not None
        yield own
        return
    filled = np.zeros((size, dimensions), dtype=np.float32)
    if own is not None:
        filled[: len(own)] = own
    for share in ranks.shares({"block": filled}):
        yield share["block"]


def _open(path: Path, count: int) -> np.ndarray | None:
    """The features in ``path``; None if there are none or the file is not whole."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        whole = found.ndim == 2 and len(found) == count and found.dtype == np.float32
        if whole and path.stat().st_size == found.offset + found.nbytes:  # type: ignore[attr-defined]
            return found
        reason = f"{found.dtype} {list(found.shape)}, {path.stat().st_size:,} bytes"
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception as error:  # numpy's reader of headers raises whatever the garbage makes of it
        reason = f"{type(error).__name__}: {error}"
    log.warning("%s is damaged (%s): its features are extracted again", path, reason)
    return None
