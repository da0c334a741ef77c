"""Writes that are either complete or absent: temporary file, fsync, rename. And the lines of text files."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from unrote.errors import InputError

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp|\.tmp\w{6}")
"""Names that :func:`temporary_path` gives, and safetensors while it writes a file."""


def temporary_path(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process uses, and :func:`remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in ``folder``; nobody may be writing there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def fsync(path: Path) -> None:
    """Make a file's content, or a rename inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` for a file or a folder; it becomes ``path`` only if the block succeeds.

    ``durable=False`` leaves out the fsync: whole or absent after the process is killed, but not after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        if durable:
            for part in [*temporary.rglob("*"), temporary]:
                fsync(part)
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; it replaces ``path`` only if the block succeeds."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, whatever an editor put first or at their ends.

    Raises:
        InputError: it cannot be read, or is no such text; only the reason, so that who asked says what for.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(str(error.strerror)) from None
    except UnicodeDecodeError:
        raise InputError("it is not UTF-8 text") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or nested deeper than Python follows.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_letters(texts: Iterable[str], where: str) -> None:
    """Raises InputError, naming ``where``, for half a character, which JSON can hold and no tokenizer reads."""
    if any("\ud800" <= letter <= "\udfff" for one in texts for letter in one):
        raise InputError(f'{where}: "text" has half a character (a lone surrogate), which no tokenizer reads')


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """The object that a JSON file consists of.

    Raises:
        OSError: it cannot be read.
        InputError: it is no such file; the message ends in ``way_out``.
    """
    try:
        found = parse_json(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: is damaged, or was not written by unrote; {way_out}")
    return found


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` atomically, as indented ASCII JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_back(path: Path) -> str:
    """Hex SHA-256 of a file as it is on the disk: written out, and not read from the system's memory if it can be."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sha256_file(path)


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex SHA-256 of a file's bytes; ``progress`` is called with the size of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()
