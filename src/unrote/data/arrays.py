"""Images that are already arrays: in memory, or in an ``.npz`` that is streamed row by row."""

import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from unrote.data.decode import DecodeSettings, to_pixels
from unrote.data.sources import Sample, digest_of
from unrote.data.store import Indices, numbered
from unrote.errors import InputError

IMAGE_KEYS = ("images", "arr_0", "x", "data", "x_train")
LABEL_KEYS = ("labels", "label", "y", "arr_1", "y_train")
CAPTION_KEYS = ("captions", "caption", "texts", "text")
NAME_KEYS = ("names",)
CLASS_KEYS = ("class_names",)
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class ArraySource:
    """Rows of one array ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` (anything :func:`to_pixels` takes)."""

    thread_safe = True
    ignored = 0

    def __init__(
        self,
        images: Any,
        description: str,
        *,
        names: Sequence[str] | None = None,
        labels: Indices | None = None,
        class_names: tuple[str, ...] | None = None,
        captions: Sequence[str] | None = None,
        more_captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.description = description
        self.class_names = class_names
        self.rejected: list[tuple[str, str]] = []
        self._images = images
        self._names = numbered(len(images)) if names is None else names
        self._labels = labels
        self._captions = captions
        self._more_captions = more_captions

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Given, or the position."""
        return self._names[index]

    def load(self, index: int, settings: DecodeSettings) -> Sample:
        """Convert one row."""
        label = None if self._labels is None else int(self._labels[index])
        caption = None if self._captions is None else self._captions[index]
        more = () if self._more_captions is None else tuple(self._more_captions[index])
        return Sample(to_pixels(self._images[index], settings), label, caption, more_captions=more)

    def key(self) -> None:
        """Memory has no cheap key."""


class NpzSource:
    """An ``.npz`` with images under ``images``, ``arr_0`` or ``x``, and optional labels, captions, names, class_names.

    Rows are read one after another from the archive, so that the file need not fit into memory.

    Raises:
        InputError: Unreadable, without images, or with columns of another length.
    """

    thread_safe = False
    ignored = 0

    def __init__(self, path: Path, description: str) -> None:
        self.path = path
        self.description = description
        self.rejected: list[tuple[str, str]] = []
        try:
            zipfile.ZipFile(path).close()  # of anything else NumPy says that it could be unpickled
            with np.load(path, allow_pickle=False) as archive:
                self._member = _first_key(archive, IMAGE_KEYS)
                if self._member is None:
                    keys = ", ".join(archive) or "nothing"
                    raise InputError(
                        f"{path} holds {keys}, but no images: name the array 'images' (uint8 [N, H, W, C])"
                    )
                self._shape, _, _ = self._header()
                self._read_columns(archive)
        except (OSError, ValueError, EOFError, NotImplementedError, *_DAMAGE) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read {path} as .npz: {error}") from error
        self._rows = self._stream()

    def __len__(self) -> int:
        return self._shape[0]

    def name(self, index: int) -> str:
        """From ``names``, or the position."""
        return self._names[index]

    def load(self, index: int, settings: DecodeSettings) -> Sample:
        """Read the next row (``index`` must grow one by one)."""
        if index == 0:
            self._rows = self._stream()
        label = None if self._labels is None else int(self._labels[index])
        caption = None if self._captions is None else self._captions[index]
        return Sample(to_pixels(next(self._rows), settings), label, caption)

    def key(self) -> str:
        """From place, size and times of the file."""
        status = self.path.stat()
        place = str(self.path.resolve())
        return digest_of("npz", place, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def _read_columns(self, archive: Any) -> None:
        count = self._shape[0]
        names = _texts(archive, NAME_KEYS)
        self._names = numbered(count) if names is None else names
        self._captions = _texts(archive, CAPTION_KEYS)
        classes = _texts(archive, CLASS_KEYS)
        self.class_names = None if classes is None else tuple(classes)
        labels = _first_key(archive, LABEL_KEYS)
        self._labels = None if labels is None else archive[labels]
        if self._labels is not None and (self._labels.dtype.kind not in "iu" or self._labels.shape != (count,)):
            shape = f"{self._labels.dtype} {list(self._labels.shape)}"
            raise InputError(f"{self.path}: {labels} must be integers [{count}], not {shape}")
        for what, column in (("names", names), ("captions", self._captions)):
            if column is not None and len(column) != count:
                raise InputError(f"{self.path}: {len(column)} {what} for {count} images")
        if len(set(self._names)) != count:
            raise InputError(f"{self.path}: names are not unique")

    def _header(self) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self._member}.npy") as file:
            shape, column_major, dtype = _read_header(file)
        if len(shape) not in (3, 4) or dtype.hasobject:
            raise InputError(f"{self.path}: {self._member} is {dtype} {list(shape)}, not images [N, H, W, C]")
        if column_major:
            raise InputError(f"{self.path}: {self._member} is stored column by column; save np.ascontiguousarray of it")
        return shape, column_major, dtype

    def _stream(self) -> Iterator[NDArray[Any]]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self._member}.npy") as file:
            shape, _, dtype = _read_header(file)
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for index in range(shape[0]):
                row = _read_exactly(file, size, f"{self.path}, image {index}")
                yield np.frombuffer(row, dtype=dtype).reshape(shape[1:])


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_exactly(file: IO[bytes], size: int, where: str) -> bytes:
    try:
        row = file.read(size)
    except (OSError, EOFError, ValueError, *_DAMAGE) as error:
        raise InputError(f"{where}: the archive is damaged ({error})") from error
    if len(row) != size:
        raise InputError(f"{where}: the archive is damaged (ends too early)")
    return row


def _first_key(archive: Any, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in archive), None)


def _texts(archive: Any, keys: Sequence[str]) -> list[str] | None:
    key = _first_key(archive, keys)
    return None if key is None else [str(text) for text in archive[key]]
