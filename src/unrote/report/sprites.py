"""Thumbnails: many small images in one PNG that a style sheet cuts up again."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

MAX_SIDE = 96
COLUMNS = 16


@dataclass(frozen=True)
class Sheet:
    """A grid of equally large tiles; ``css`` defines the class ``css_class``, ``tile(i)`` shows tile i."""

    css_class: str
    count: int
    css: str

    def tile(self, index: int, label: str) -> str:
        """HTML of a tile; ``label`` is what a reader who does not see it is told (escaped here)."""
        rows = -(-self.count // COLUMNS)
        x, y = index % COLUMNS / (COLUMNS - 1), index // COLUMNS / max(1, rows - 1)
        position = f"{100 * x:.4f}% {100 * y:.4f}%"
        return (
            f'<span class="tile {self.css_class}" role="img" aria-label="{escape(label)}" '
            f'style="background-position:{position}"></span>'
        )


def make_sheet(css_class: str, images: np.ndarray) -> Sheet:
    """A sheet of uint8 images [N, H, W, C]; larger ones than 96 pixels are scaled down."""
    tiles = [_thumbnail(image) for image in images]
    rows = -(-len(tiles) // COLUMNS)
    height, width = tiles[0].shape[:2]
    sheet = np.zeros((rows * height, COLUMNS * width, 3), dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // COLUMNS * height, index % COLUMNS * width
        sheet[top : top + height, left : left + width] = tile
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    css = (
        f".{css_class}{{background-image:url(data:image/png;base64,{data});"
        f"background-size:{100 * COLUMNS}% {100 * rows}%;aspect-ratio:{width}/{height}}}"
    )
    return Sheet(css_class, len(tiles), css)


def thumbnail_bytes(shape: Sequence[int]) -> int:
    """Bytes of one image [H, W, C] in a sheet before compression."""
    scale = min(1.0, MAX_SIDE / max(shape[0], shape[1]))
    return max(1, int(shape[0] * scale)) * max(1, int(shape[1] * scale)) * 3


def _thumbnail(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)
