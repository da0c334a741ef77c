"""Image folders: class subfolders, ``metadata.jsonl`` (as Hugging Face's imagefolder) and ``.txt`` captions."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from unrote.data.decode import BadImage, DecodeSettings, decode_file
from unrote.data.sources import Sample, digest_of
from unrote.errors import InputError
from unrote.files import check_letters, parse_json

log = logging.getLogger("unrote")

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "jp2", "tga"),
    )
)
METADATA = "metadata.jsonl"
_NOT_READ = {"metadata.csv", "metadata.parquet"}  # which Hugging Face's imagefolder reads too
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout", "held-out"}
_MAX_CAPTION_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _File:
    relative: str  # with "/" between components; undecodable bytes as surrogates
    size: int
    modified_ns: int
    changed_ns: int


class FolderSource:
    """Every image under ``root``, in the order of the bytes of its relative path.

    Labels are the first path component if every usable image lies in a subfolder and there are at least two of them.
    Captions come from ``metadata.jsonl`` (``file_name`` relative to it, ``text``: one, or a list of several) and else
    from the first line of the ``.txt`` file beside an image.

    Raises:
        InputError: Unreadable root, unusable metadata, or a root that holds splits (``train/`` beside ``test/``).
    """

    class_names: tuple[str, ...] | None = None
    thread_safe = True

    def __init__(self, root: Path, description: str) -> None:
        self.root = root
        self.description = description
        self.rejected: list[tuple[str, str]] = []
        files = sorted(self._walk(root, "", ()), key=lambda file: os.fsencode(file.relative))
        by_path = {file.relative: file for file in files}
        self._images = [file for file in files if _suffix(file.relative) in IMAGE_SUFFIXES]
        self._refuse_splits()
        images = {file.relative for file in self._images}
        self._metadata = [file for file in files if PurePosixPath(file.relative).name == METADATA]
        self._texts = self._read_metadata(images)
        captions = (str(PurePosixPath(path).with_suffix(".txt")) for path in images)
        self._sidecars = {path: by_path[path] for path in captions if path in by_path}
        for file in files:
            if PurePosixPath(file.relative).name in _NOT_READ:
                log.warning("%s: is not read; captions come from metadata.jsonl", printable(file.relative))
        self.ignored = len(files) - len(self._images) - len(self._sidecars) - len(self._metadata)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The relative path, with undecodable bytes, backslashes and unprintable characters escaped."""
        return printable(self._images[index].relative)

    def load(self, index: int, settings: DecodeSettings) -> Sample:
        """Decode one file and read its caption."""
        relative = self._images[index].relative
        pixels, first_frame = decode_file(os.path.join(self.root, relative), settings)  # noqa: PTH118 - surrogates
        parts = relative.split("/")
        label = printable(parts[0]) if len(parts) > 1 else None
        texts = self._texts.get(relative, [])
        caption, *more = texts if any(texts) else (self._sidecar(relative),)
        return Sample(pixels, label, caption, first_frame, tuple(more))

    def key(self) -> str:
        """From place, names, sizes and times of everything that is read (archives may unpack with equal times)."""
        read = [*self._images, *self._metadata, *(self._sidecars[path] for path in sorted(self._sidecars))]
        rows = [(file.relative, file.size, file.modified_ns, file.changed_ns) for file in read]
        return digest_of("folder", str(self.root.resolve()), rows)

    def _walk(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[_File]:
        """Regular files under ``folder``, following symlinks but never into a folder that is being walked already."""
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError as error:
            if not prefix:
                raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
            self._reject(prefix, f"cannot be read: {error.strerror}")
            return
        here = (status.st_dev, status.st_ino)
        if here in above:
            self._reject(prefix, "symlink loop: leads back to a folder above it")
            return
        for entry in entries:
            relative = f"{prefix}{entry.name}"
            if entry.name.startswith("."):
                continue
            try:
                found = entry.stat()
            except OSError as error:
                self._reject(relative, _broken_link(error))
                continue
            if stat.S_ISDIR(found.st_mode):
                yield from self._walk(Path(entry.path), f"{relative}/", (*above, here))
            elif stat.S_ISREG(found.st_mode):
                yield _File(relative, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            elif _suffix(relative) in IMAGE_SUFFIXES:
                self._reject(relative, "not a regular file")

    def _reject(self, relative: str, reason: str) -> None:
        self.rejected.append((printable(relative), reason))

    def _refuse_splits(self) -> None:
        first = {file.relative.split("/")[0] if "/" in file.relative else "" for file in self._images}
        if len(first) > 1 and {name.lower() for name in first} <= _SPLITS:
            names = ", ".join(sorted(first))
            raise InputError(f"{self.description} holds the splits {names}; name one, such as {self.root / min(first)}")

    def _read_metadata(self, images: set[str]) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {}
        for file in self._metadata:
            path = self.root / file.relative
            folder = file.relative.removesuffix(METADATA)
            try:
                lines = path.read_bytes().splitlines()
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}") from error
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    name, text = _metadata_row(line, where)
                    self._add_text(texts, images, folder + name, text, where)
        return texts

    def _add_text(self, texts: dict[str, list[str]], images: set[str], name: str, text: list[str], where: str) -> None:
        if name in texts:
            raise InputError(f"{where}: second row for {printable(name)}")
        if name not in images and not any(printable(name) == rejected for rejected, _ in self.rejected):
            raise InputError(f"{where}: no image file {printable(name)} in {self.root}")
        texts[name] = text

    def _sidecar(self, relative: str) -> str | None:
        sidecar = str(PurePosixPath(relative).with_suffix(".txt"))
        if sidecar not in self._sidecars:
            return None
        try:
            with open(os.path.join(self.root, sidecar), "rb") as file:  # noqa: PTH118, PTH123 - surrogates
                text = file.read(_MAX_CAPTION_BYTES).decode("utf-8-sig")
        except OSError as error:
            raise BadImage(f"its caption {printable(sidecar)} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadImage(f"its caption {printable(sidecar)} is not UTF-8 text under 64 KiB") from error
        return next((line.strip() for line in text.splitlines() if line.strip()), "")


def printable(path: str) -> str:
    """A path as text that can be stored and shown anywhere; different paths stay different."""
    escaped = []
    for character in path:
        if "\udc80" <= character <= "\udcff":
            escaped.append(f"\\x{ord(character) - 0xDC00:02x}")
        elif character == "\\" or not character.isprintable():
            escaped.append(character.encode("unicode_escape").decode() if character != "\\" else "\\\\")
        else:
            escaped.append(character)
    return "".join(escaped)


def _suffix(relative: str) -> str:
    return PurePosixPath(relative).suffix.lower()


def _broken_link(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "symlink loop"
    return "dangling symlink" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"


def _metadata_row(line: bytes, where: str) -> tuple[str, list[str]]:
    """The name and the texts, at least one."""
    try:
        row: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise InputError(f'{where}: needs a JSON object with a "file_name"')
    name, text = row["file_name"], row.get("text", "")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"{where}: file_name {name!r} leads out of the folder")
    texts = text or [""] if isinstance(text, list) else [text or ""]
    wrong = next((one for one in texts if not isinstance(one, str)), None)
    if wrong is not None:
        raise InputError(f'{where}: "text" must be a string or a list of strings, not {type(wrong).__name__}')
    check_letters(texts, where)
    return str(path), texts
