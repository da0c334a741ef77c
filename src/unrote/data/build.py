"""Decode a source once, in parallel, into a memory-mapped store in the cache, and find it again by a cheap key.

A store is a folder: ``images.npy`` (uint8 [N, H, W, C]), ``digests.npy``, ``labels.npy``, ``items.json`` (names,
captions, class names), ``quarantine.jsonl`` and ``meta.json``. It is made under a lock as ``KEY.partial`` and renamed
when complete, so nobody ever sees half a store, and whoever holds the lock may delete what a dead builder left.
"""

import json
import logging
import os
import shutil
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from unrote.data.decode import BadImage, DecodeSettings, Pixels
from unrote.data.sources import ImageSource, Sample, digest_of
from unrote.data.store import ImageStore, Quarantined, content_fingerprint, pixel_digest
from unrote.errors import InputError
from unrote.files import atomic_write, fsync, write_bytes, write_json
from unrote.ownership import BusyError, Ownership

log = logging.getLogger("unrote")

FORMAT = 2
"""Counts up whenever a store of the same source and settings would come out differently."""

_NAMELESS = "new-"  # builds of sources without a key
_HEADER_BYTES = 128
_AHEAD = 8  # decoded images that may wait for the writer, per thread


def cache_folder() -> Path:
    """``$UNROTE_CACHE``, or ``unrote`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if own := os.environ.get("UNROTE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "unrote"


def open_source(source: ImageSource, settings: DecodeSettings, cache_dir: Path | None = None) -> ImageStore:
    """The store of ``source`` under ``settings``: found in the cache, or decoded now.

    Raises:
        InputError: Nothing usable in the source, images of several sizes without a resolution, or no disk space.
    """
    stores = (cache_folder() if cache_dir is None else cache_dir) / "stores"
    try:
        stores.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache folder {stores} ({error.strerror}); set UNROTE_CACHE") from error
    _remove_leftovers(stores)
    known = source.key()
    own = None if known is None else digest_of(FORMAT, known, vars(settings))[:40]
    with _owned(stores, own or f"{_NAMELESS}{uuid.uuid4().hex}") as key:
        folder = stores / key
        if own is not None and (found := _open_store(folder, source.description)) is not None:
            log.info("%s: %s (decoded before: %s)", source.description, _counts(found, source), folder)
            return found
        folder = _build(source, settings, stores, key, keep_name=own is not None)
        store = _open_store(folder, source.description)
    if store is None:
        raise InputError(f"the store {folder} was changed while it was being opened; run again")
    log.info("%s: %s (decoded into %s)", source.description, _counts(store, source), folder)
    return store


def _build(source: ImageSource, settings: DecodeSettings, stores: Path, key: str, keep_name: bool) -> Path:
    partial = stores / f"{key}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        fingerprint = _decode_into(partial, source, settings)
        fsync(partial)
        if keep_name:
            final = _put(partial, stores / key)
        else:  # others may have decoded the same
            with _owned(stores, f"content-{fingerprint[:32]}") as name:
                found = _open_store(stores / name, source.description) is not None
                final = stores / name if found else _put(partial, stores / name)
    finally:  # nothing is left where it was renamed
        shutil.rmtree(partial, ignore_errors=True)
    fsync(stores)
    return final


def _put(partial: Path, final: Path) -> Path:
    """Rename a whole store, in place of one that is not."""
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def _decode_into(partial: Path, source: ImageSource, settings: DecodeSettings) -> str:
    """Write every file of a store and return its fingerprint."""
    rows = _RowWriter(partial, source, settings)
    try:
        with (partial / "images.npy").open("wb") as file:
            rows.write_all(file)
            file.flush()
            os.fsync(file.fileno())
        return rows.write_columns()
    except OSError as error:
        raise InputError(f"cannot write the decoded images to {partial.parent}: {error.strerror}") from error


class _RowWriter:
    """Receives decoded images in order and appends them to one ``.npy`` file."""

    def __init__(self, partial: Path, source: ImageSource, settings: DecodeSettings) -> None:
        self._partial = partial
        self._source = source
        self._settings = settings
        self._shape: tuple[int, ...] | None = None
        self._names: list[str] = []
        self._labels: list[int | str | None] = []
        self._captions: list[str | None] = []
        self._more_captions: list[tuple[str, ...]] = []
        self._digests: list[bytes] = []
        self._quarantined = [Quarantined(name, reason) for name, reason in source.rejected]
        self._animated = 0

    def write_all(self, file: BinaryIO) -> None:
        side, channels = self._settings.resolution, self._settings.channels
        if side is not None:
            self._check_space((side, side, channels))
        file.write(_npy_header((0, 0, 0, 0)))
        with closing(_load_all(self._source, self._settings)) as entries:
            for index, loaded in enumerate(entries):
                self._write(file, self._source.name(index), loaded)
        if self._shape is None:
            raise InputError(_nothing_usable(self._source, self._quarantined))
        file.seek(0)
        file.write(_npy_header((len(self._names), *self._shape)))

    def write_columns(self) -> str:
        assert self._shape is not None
        labels, class_names = _label_column(self._labels, self._source.class_names)
        told = any(self._captions) or any(map(any, self._more_captions))
        captions = [text or "" for text in self._captions] if told else None
        more = self._more_captions if any(self._more_captions) else None
        digests = np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, 32)
        shape = (len(self._names), *self._shape)
        fingerprint = content_fingerprint(shape, digests, self._names, labels, class_names, captions, more)
        columns = {"digests": digests} if labels is None else {"digests": digests, "labels": labels}
        for column, values in columns.items():
            with atomic_write(self._partial / f"{column}.npy") as file:
                np.save(file, values)
        items = {"names": self._names, "captions": captions, "more_captions": more, "class_names": class_names}
        write_json(self._partial / "items.json", items)
        lines = [json.dumps({"name": item.name, "reason": item.reason}) + "\n" for item in self._quarantined]
        write_bytes(self._partial / "quarantine.jsonl", "".join(lines).encode())
        meta = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "source": self._source.description,
            "settings": vars(self._settings),
            "shape": shape,
            "first_frames": self._animated,
        }
        write_json(self._partial / "meta.json", meta)
        if self._animated:
            log.info("%s: of %s animations the first frame is used", self._source.description, f"{self._animated:,}")
        return fingerprint

    def _write(self, file: BinaryIO, name: str, loaded: tuple[Sample, bytes] | BadImage) -> None:
        if isinstance(loaded, BadImage):
            self._quarantined.append(Quarantined(name, str(loaded)))
            return
        sample, digest = loaded
        self._accept_shape(sample.pixels.shape, name)
        file.write(sample.pixels.data)
        self._names.append(name)
        self._labels.append(sample.label)
        self._captions.append(sample.caption)
        self._more_captions.append(sample.more_captions)
        self._digests.append(digest)
        self._animated += sample.first_frame

    def _accept_shape(self, shape: tuple[int, ...], name: str) -> None:
        if self._shape is None:
            self._shape = shape
            self._check_space(shape)
        elif shape != self._shape:
            first, other = (f"{width} x {height}" for height, width, _ in (self._shape, shape))
            raise InputError(
                f"{self._source.description}: images differ in size ({self._names[0]} is {first}, {name} is {other}); "
                "give a resolution (--resolution)"
            )

    def _check_space(self, shape: tuple[int, ...]) -> None:
        need = len(self._source) * int(np.prod(shape, dtype=np.int64))
        free = shutil.disk_usage(self._partial).free
        if need > free:
            raise InputError(
                f"decoding {self._source.description} needs {need / 1e9:.2f} GB in {self._partial.parent} and "
                f"{free / 1e9:.2f} GB are free; make room or set UNROTE_CACHE to another disk"
            )


def _load_all(source: ImageSource, settings: DecodeSettings) -> Generator[tuple[Sample, bytes] | BadImage]:
    """Every entry in order, decoded in threads a few images ahead (Pillow and hashlib release the GIL)."""

    def load(index: int) -> tuple[Sample, bytes] | BadImage:
        try:
            sample = source.load(index, settings)
        except BadImage as error:
            return error
        return sample, pixel_digest(sample.pixels)

    with tqdm(total=len(source), desc="decoding", unit="image", disable=None, leave=False) as progress:
        if not source.thread_safe:
            for index in range(len(source)):
                yield load(index)
                progress.update()
            return
        workers = min(32, os.cpu_count() or 1)
        waiting: deque[Future[tuple[Sample, bytes] | BadImage]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="unrote-decode")
        try:
            for index in range(len(source)):
                waiting.append(pool.submit(load, index))
                if len(waiting) >= workers * _AHEAD:
                    yield waiting.popleft().result()
                    progress.update()
            while waiting:
                yield waiting.popleft().result()
                progress.update()
        finally:
            pool.shutdown(cancel_futures=True)


def _open_store(folder: Path, description: str) -> ImageStore | None:
    """The store in ``folder``; None if there is none or it is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        items = json.loads((folder / "items.json").read_bytes())
        rejected = [json.loads(line) for line in (folder / "quarantine.jsonl").read_bytes().splitlines()]
        images: Pixels = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        digests: Pixels = np.load(folder / "digests.npy", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False) if (folder / "labels.npy").exists() else None
        whole = meta["format"] == FORMAT and list(images.shape) == meta["shape"] and len(items["names"]) == len(images)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        log.warning("%s is damaged and is made again", folder)
        return None
    classes = items["class_names"]
    return ImageStore(
        images=images,
        names=items["names"],
        labels=labels,
        class_names=None if classes is None else tuple(classes),
        captions=items["captions"],
        fingerprint=meta["fingerprint"],
        source=description,
        quarantined=tuple(Quarantined(row["name"], row["reason"]) for row in rejected),
        digests=digests,
        more_captions=items.get("more_captions"),
    )


@contextmanager
def _owned(stores: Path, key: str, wait: bool = True) -> Iterator[str]:
    """Own ``key``, which ends with the process, however that ends. BusyError if not to wait for it."""
    file = stores / f"{key}.lock"
    with Ownership(file, "another process decodes the same images").held(wait=wait):
        try:
            yield key
        finally:
            if key.startswith(_NAMELESS):  # nobody else ever waits for this one
                file.unlink(missing_ok=True)


def _remove_leftovers(stores: Path) -> None:
    """Delete partial stores whose builder is dead: nobody owns them."""
    for partial in stores.glob("*.partial"):
        try:
            with _owned(stores, partial.stem, wait=False):
                shutil.rmtree(partial, ignore_errors=True)
        except BusyError:
            continue


def _label_column(labels: list[int | str | None], class_names: tuple[str, ...] | None) -> tuple[Any, Any]:
    if any(label is None for label in labels):
        return None, None
    if all(isinstance(label, str) for label in labels):
        names = sorted({str(label) for label in labels})
        if len(names) < 2:
            return None, None
        index = {name: position for position, name in enumerate(names)}
        return np.array([index[str(label)] for label in labels], dtype=np.int64), tuple(names)
    return np.array(labels, dtype=np.int64), class_names


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """A version 1.0 ``.npy`` header of fixed length, so that the count can be filled in after the rows are written."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (_HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(_HEADER_BYTES - 11).encode()
        + b"\n"
    )


def _counts(store: ImageStore, source: ImageSource) -> str:
    return f"{len(store):,} images, {len(store.quarantined):,} quarantined, {source.ignored:,} other files ignored"


def _nothing_usable(source: ImageSource, quarantined: list[Quarantined]) -> str:
    if not quarantined:
        others = f" ({source.ignored:,} other files)" if source.ignored else ""
        return f"{source.description} holds no images{others}"
    first = "\n".join(f"  {item.name}: {item.reason}" for item in quarantined[:5])
    more = f"\n  and {len(quarantined) - 5:,} more" if len(quarantined) > 5 else ""
    return f"{source.description}: none of {len(quarantined):,} images is usable:\n{first}{more}"
