"""The one idea behind every input: a numbered list of entries, each of which loads as one image or gives a reason.

The kinds are :class:`FolderSource` (``folder.py``), :class:`ArraySource` and :class:`NpzSource` (``arrays.py``), and
:class:`HuggingFaceSource` and :class:`MapDatasetSource` (``datasets.py``).
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

from unrote.data.decode import DecodeSettings, Pixels


@dataclass(frozen=True, slots=True)
class Sample:
    """One loaded entry.

    Attributes:
        pixels: ``uint8 [H, W, C]``.
        label: Class index, or class name where the source has no list of classes beforehand.
        caption: Text, or None.
        more_captions: Further texts for the same image.
        first_frame: The image is the first of several frames.
    """

    pixels: Pixels
    label: int | str | None = None
    caption: str | None = None
    first_frame: bool = False
    more_captions: tuple[str, ...] = ()


class ImageSource(Protocol):
    """A numbered list of entries that may each be unusable.

    Attributes:
        description: How the user named the source.
        class_names: What integer labels mean, if known beforehand.
        thread_safe: ``load`` may run in several threads and any order; otherwise it is called for 0, 1, 2, ...
        rejected: (name, reason) of what is known to be unusable before anything is loaded.
        ignored: How many other files were passed over.
    """

    description: str
    class_names: tuple[str, ...] | None
    thread_safe: bool
    rejected: list[tuple[str, str]]
    ignored: int

    def __len__(self) -> int:
        """Number of entries."""

    def name(self, index: int) -> str:
        """Unique printable name of an entry."""

    def load(self, index: int, settings: DecodeSettings) -> Sample:
        """Load an entry; raises :class:`~unrote.data.decode.BadImage` with the reason if it cannot be used."""

    def key(self) -> str | None:
        """Changes whenever the content may have changed, and costs no decoding; None if there is no such thing."""


def digest_of(*parts: Any) -> str:
    """Hex SHA-256 of JSON-able ``parts``."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
