"""Thumbnails: many small images in few PNG or JPEG sheets that a style sheet cuts up again."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

MAX_SIDE = 96
COLUMNS = 16
SHEET_TILES = 1024  # a browser decodes a sheet as a whole, and only when one of its tiles is on the screen
LOSSLESS_BYTES = 1_500_000  # before compression: what comes first on a page is never made worse by JPEG
READ_BYTES = 1 << 25  # of whole images in memory at a time
JPEG_BLOCK = 16  # tiles start at multiples of this, so that no tile bleeds into its neighbour

Key = tuple[Any, ...]
"""Names an image of a report: ("generated", index), ("train", index) or ("matched", index, transform)."""


@dataclass(frozen=True)
class Encoding:
    """How thumbnails are stored: longest side in pixels, and JPEG quality (None: PNG, lossless)."""

    side: int
    quality: int | None

    @property
    def words(self) -> str:
        """For the reader of the page."""
        if self.quality is None:
            return "lossless"
        return f"JPEG quality {self.quality}" + (f", at most {self.side} pixels" if self.side < MAX_SIDE else "")


LADDER = (
    Encoding(MAX_SIDE, None),
    *(Encoding(MAX_SIDE, quality) for quality in (92, 85, 75, 65)),
    *(Encoding(64, quality) for quality in (80, 65)),
    *(Encoding(48, quality) for quality in (75, 60)),
    *(Encoding(32, quality) for quality in (75, 60, 45)),
)
"""From the best to the smallest; an album takes the first with which all its images fit."""


@dataclass(frozen=True)
class Sheet:
    """A grid of equally large tiles; ``css`` defines the class ``css_class``, ``tile(i)`` shows tile i.

    ``steps`` are the per cent of background position from one column, and one row, to the next.
    """

    css_class: str
    count: int
    css: str
    steps: tuple[float, float]

    def tile(self, index: int, label: str) -> str:
        """HTML of a tile; ``label`` is what a reader who does not see it is told (escaped here)."""
        x, y = index % COLUMNS * self.steps[0], index // COLUMNS * self.steps[1]
        return (
            f'<span class="tile {self.css_class}" role="img" aria-label="{escape(label)}" '
            f'style="background-position:{x:.4f}% {y:.4f}%"></span>'
        )


def make_sheet(css_class: str, images: np.ndarray, encoding: Encoding = LADDER[0]) -> Sheet:
    """A sheet of uint8 images [N, H, W, C]; larger ones than ``encoding.side`` are scaled down."""
    tiles = [_thumbnail(image, encoding.side) for image in images]
    height, width = tiles[0].shape[:2]
    block = 1 if encoding.quality is None else JPEG_BLOCK
    down, right = -(-height // block) * block, -(-width // block) * block
    rows = -(-len(tiles) // COLUMNS)
    sheet = np.zeros((rows * down, COLUMNS * right, 3), dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // COLUMNS * down, index % COLUMNS * right
        padding = ((0, down - height), (0, right - width), (0, 0))
        sheet[top : top + down, left : left + right] = np.pad(tile, padding, mode="edge")
    kind, data = _encoded(sheet, encoding)
    css = (
        f".{css_class}{{background-image:url(data:image/{kind};base64,{data});"
        f"background-size:{100 * COLUMNS * right / width:.4f}% {100 * rows * down / height:.4f}%;"
        f"aspect-ratio:{width}/{height}}}"
    )
    steps = (100 * right / (COLUMNS * right - width), 100 * down / max(1, rows * down - height))
    return Sheet(css_class, len(tiles), css, steps)


def _encoded(sheet: np.ndarray, encoding: Encoding) -> tuple[str, str]:
    """Format and base64 of a picture [H, W, 3]."""
    file = io.BytesIO()
    if encoding.quality is None:
        kind = "png"
        Image.fromarray(sheet).save(file, "PNG", optimize=True)
    else:
        kind = "jpeg"
        # Thumbnails are so small that colour at half the resolution shows; only strong compression has to. (Pillow's
        # buffer for optimised tables can be too small for good quality.)
        strong = encoding.quality < 85
        subsampling = 2 if strong else 0
        Image.fromarray(sheet).save(file, "JPEG", quality=encoding.quality, subsampling=subsampling, optimize=strong)
    return kind, base64.b64encode(file.getvalue()).decode()


class Album:
    """The thumbnails of one report, in as few bytes as it was given; the images named first are the best preserved.

    Args:
        css_class: prefix of the classes of its sheets.
        keys: the images wanted, the most important first; repeated ones are stored once.
        extra: images to store where room is left, but not at the cost of the others' quality.
        load: uint8 images [n, H, W, C] of n keys.
        budget: bytes of style sheet to stay below.

    Attributes:
        css: the style sheet.
        sheets: the sheets; tile number n is tile n - (tiles of the sheets before) of its sheet.
        words: how the images after the first, lossless ones are stored; None if all are lossless.
    """

    def __init__(
        self,
        css_class: str,
        keys: Sequence[Key],
        extra: Sequence[Key],
        load: Callable[[Sequence[Key]], np.ndarray],
        budget: int,
    ) -> None:
        self._css_class, self._load, self._budget = css_class, load, budget
        self.sheets: list[Sheet] = []
        self.words: str | None = None
        wanted = list(dict.fromkeys(keys))
        every = list(dict.fromkeys([*wanted, *extra]))
        if wanted:
            self._fill(wanted, every[len(wanted) :])
        self.css = "".join(sheet.css for sheet in self.sheets)
        stored = every[: sum(sheet.count for sheet in self.sheets)]
        self._numbers = {key: number for number, key in enumerate(stored)}

    def number(self, key: Key) -> int:
        """The tile number of an image; -1 if there was no room for it."""
        return self._numbers.get(key, -1)

    def tile(self, key: Key, label: str) -> str:
        """HTML of an image, or of an empty tile where there was no room."""
        number = self.number(key)
        if number < 0:
            return f'<span class="tile missing" role="img" aria-label="{escape(label)}: not in this file"></span>'
        for sheet in self.sheets:
            if number < sheet.count:
                return sheet.tile(number, label)
            number -= sheet.count
        raise AssertionError("a numbered tile is on a sheet")

    def _fill(self, wanted: list[Key], extra: list[Key]) -> None:
        each = thumbnail_bytes(self._load(wanted[:1]).shape[1:])
        first = max(COLUMNS, min(LOSSLESS_BYTES, self._budget * 3 // 8) // each)
        room = self._add(wanted[:first], LADDER[0], self._budget)
        rest = wanted[first:] or extra
        if rest:
            encoding = self._best_encoding(rest, room)
            self.words = None if encoding.quality is None else encoding.words
            self._add(wanted[first:] + extra, encoding, room)

    def _small(self, keys: list[Key], side: int) -> np.ndarray:
        """Thumbnails [n, h, w, 3], from images read a few at a time."""
        size = int(np.prod(self._load(keys[:1]).shape[1:]))
        step = max(1, READ_BYTES // size)
        blocks = (self._load(keys[start : start + step]) for start in range(0, len(keys), step))
        return np.stack([_thumbnail(image, side) for block in blocks for image in block])

    def _best_encoding(self, keys: list[Key], room: int) -> Encoding:
        """The first of the ladder with which a sample of the images, scaled up to all, fits into ``room``."""
        sample = self._small(keys[:: -(-len(keys) // 256)], MAX_SIDE)
        largest, seen = max(sample.shape[1:3]), set()
        for encoding in LADDER:
            same = (min(encoding.side, largest), encoding.quality)
            if same in seen:
                continue
            seen.add(same)
            if 1.05 * len(make_sheet("x", sample, encoding).css) * len(keys) / len(sample) < room:
                return encoding
        return LADDER[-1]

    def _add(self, keys: list[Key], encoding: Encoding, room: int) -> int:
        """Store images sheet by sheet while there is room; returns what room is left."""
        for start in range(0, len(keys), SHEET_TILES):
            images = self._small(keys[start : start + SHEET_TILES], encoding.side)
            sheet = make_sheet(f"{self._css_class}-{len(self.sheets)}", images, encoding)
            if len(sheet.css) > room:
                images = images[: int(0.95 * len(images) * room / len(sheet.css))]
                sheet = make_sheet(sheet.css_class, images, encoding) if len(images) else sheet
                if len(sheet.css) <= room:
                    self.sheets.append(sheet)
                return 0
            self.sheets.append(sheet)
            room -= len(sheet.css)
        return room


def thumbnail_bytes(shape: Sequence[int]) -> int:
    """Bytes of one image [H, W, C] in a sheet before compression."""
    scale = min(1.0, MAX_SIDE / max(shape[0], shape[1]))
    return max(1, int(shape[0] * scale)) * max(1, int(shape[1] * scale)) * 3


def _thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(picture)
