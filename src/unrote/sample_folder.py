"""The folder that samples are written into: images, their notes, the settings they were made with."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unrote.errors import InputError
from unrote.files import atomic_path, atomic_write, parse_json, read_object, remove_leftovers, write_json, write_text

NOTE = "unrote"
"""The text of a PNG file that says what a copy filter found."""


def start(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or check that its samples were made with the same settings.

    What killed processes left half written is removed: no other process may be writing in the folder yet.

    Raises:
        InputError: they were not, or it holds something else.
    """
    file = folder / "sampling.json"
    if not file.exists():
        # Hidden files are what a process leaves that was killed just as it began.
        if folder.exists() and any(folder.glob("[!.]*")):
            raise InputError(f"--out {folder}: is not empty and holds no samples of ours; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        write_json(file, settings)
        return
    # Before there was a version it was 1.
    old = {"schema_version": 1} | read_object(file, "choose another --out")
    # The path of the model is no part of what the images depend on: its hash is.
    keys = [key for key in settings if key != "model" and old.get(key) != settings[key]]
    changed = [f"{key}: {old.get(key)} -> {settings[key]}" for key in keys]
    if changed:
        raise InputError(f"--out {folder}: holds samples made otherwise ({'; '.join(changed)}); choose another folder")
    remove_leftovers(folder)


def file_name(index: int) -> str:
    """Of image ``index``."""
    return f"{index:06d}.png"


def write_images(
    folder: Path, wanted: range, pixels: NDArray[np.uint8], notes: Sequence[dict[str, Any]] | None
) -> None:
    """One PNG each. A note lies in the file itself, so that neither is ever there without the other."""
    for row, (index, image) in enumerate(zip(wanted, pixels, strict=False)):
        text = PngInfo()
        if notes is not None:
            text.add_text(NOTE, json.dumps(notes[row]))
        with atomic_path(folder / file_name(index), durable=False) as temporary:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, "PNG", pnginfo=text)


def read_note(file: Path) -> dict[str, Any]:
    """What :func:`write_images` noted in an image.

    Raises:
        InputError: there is no such note.
    """
    try:
        with Image.open(file, formats=["PNG"]) as image:
            note = parse_json(image.info[NOTE])
        if isinstance(note, dict) and type(note["attempt"]) is int:
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{file}: is damaged, or was not made with this guard; remove it, and it is made again")


def indices_in(folder: Path) -> set[int]:
    """Of the images that are there, by their names."""
    found = [path.stem for path in folder.glob("[0-9]*.png") if path.stem.isdecimal()]
    return {int(stem) for stem in found if stem + ".png" == file_name(int(stem))}


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON, one a line."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def pack(folder: Path, num: int, target: Path, captions: Sequence[str]) -> None:
    """One ``.npz`` of all images and captions, with the settings beside it."""
    images = np.stack([np.atleast_3d(np.asarray(Image.open(folder / file_name(i)))) for i in range(num)])
    arrays: dict[str, Any] = {"images": images} | ({"captions": np.array(captions)} if captions else {})
    with atomic_write(target) as file:
        np.savez_compressed(file, **arrays)
    for name in ("sampling.json", "samples.jsonl"):
        (folder / name).replace(target.with_name(f"{target.stem}.{name}"))
    shutil.rmtree(folder)
