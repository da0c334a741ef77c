"""Inputs of fuzz.py that are data: images, captions, settings, arrays, prompts, archives."""

import gzip
import io
import json
import random
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_changes import changed_json, mutated
from PIL import Image

import unrote
from unrote.config import load_config, parse_assignment
from unrote.data import unpack
from unrote.data.decode import DecodeSettings, decode_stream
from unrote.data.download import Archive, NamedSet, fetch
from unrote.data.folder import FolderSource
from unrote.text.prompts import read_prompts


def image_seeds() -> list[bytes]:
    """Small pictures in every format and mode that is read."""
    ramp = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)
    rgb = Image.fromarray(ramp)
    kinds = [
        (rgb, {"format": name}) for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "TGA", "JPEG2000")
    ]
    kinds += [(rgb.convert(mode), {"format": "PNG"}) for mode in ("L", "P", "1", "RGBA", "LA", "I;16")]
    kinds += [(rgb.convert("CMYK"), {"format": "JPEG"}), (rgb, {"format": "TIFF", "compression": "tiff_lzw"})]
    kinds += [(rgb, {"format": "WEBP", "lossless": True}), (rgb, {"format": "JPEG", "progressive": True})]
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds += [
        (rgb, {"format": "JPEG", "exif": exif}),
        (rgb, {"format": "GIF", "save_all": True, "append_images": [rgb]}),
    ]
    seeds = []
    for picture, options in kinds:
        stream = io.BytesIO()
        picture.save(stream, **options)
        seeds.append(stream.getvalue())
    return seeds


class DataInputs:
    """What is changed, and how each kind is read. Everything happens in ``folder``."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.images = image_seeds()
        self.rows = [
            b'{"file_name": "0.png", "text": "a cat"}\n{"file_name": "sub/1.png", "text": ["one", "two"]}\n',
            b'{"file_name": "1.png", "text": ""}\n\n{"file_name": "0.png", "label": 3}\n',
            '\ufeff{"file_name": "0.png", "text": "Grüße"}\r\n'.encode(),
        ]
        self.configs = [load_config().to_yaml().encode(), b"seed: 3\ngate: {skip_ratio: 0.5}\n"]
        self.configs += [
            path.read_bytes() for path in sorted((Path(unrote.__file__).parent / "presets").glob("*.yaml"))
        ]
        self.photos = folder / "photos"
        (self.photos / "sub").mkdir(parents=True)
        for name in ("0.png", "1.png", "sub/1.png"):
            (self.photos / name).write_bytes(self.images[0])
        self.arrays = [
            self._npz(images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3), captions=np.array(["a"] * 3))
        ]
        self.arrays.append(self._npz(arr_0=np.zeros((2, 3, 8, 8), np.float32)))
        self.archives = archive_seeds()

    def _npz(self, **arrays: Any) -> bytes:
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        return stream.getvalue()

    def image(self) -> None:
        """One image file."""
        content = mutated(self.draw.choice(self.images), self.draw, self.images)
        settings = DecodeSettings(self.draw.choice((None, 16)), channels=self.draw.choice((1, 3)))
        pixels, _ = decode_stream(io.BytesIO(content), settings)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3

    def metadata(self) -> None:
        """A folder with metadata.jsonl and a caption."""
        content = mutated(self.draw.choice(self.rows), self.draw, self.rows)
        (self.photos / "metadata.jsonl").write_bytes(content)
        (self.photos / "0.txt").write_bytes(mutated(b"a caption\n", self.draw, self.rows))
        FolderSource(self.photos, "photos").key()
        unrote.open_images(str(self.photos), resolution=8)

    def config(self) -> None:
        """A YAML file, and a setting of the command line."""
        content = mutated(self.draw.choice(self.configs), self.draw, self.configs)
        file = self.folder / "config.yaml"
        file.write_bytes(content)
        setting = content[:60].decode("utf-8", "replace")
        try:
            parse_assignment(f"gate.skip_ratio={setting}")
        finally:
            config = load_config(file=file)
            assert load_config(file=self._written(config.to_yaml())) == config

    def _written(self, text: str) -> Path:
        path = self.folder / "again.yaml"
        path.write_text(text, "utf-8")
        return path

    def arrays_file(self) -> None:
        """An .npz file."""
        file = self.folder / "data.npz"
        file.write_bytes(mutated(self.draw.choice(self.arrays), self.draw, self.arrays))
        unrote.open_images(str(file), resolution=8)

    def prompts(self) -> None:
        """A file of prompts."""
        lines = [line for rows in self.rows for line in rows.splitlines()]
        content = mutated(changed_json(self.draw.choice(lines), self.draw) + b"\n", self.draw, lines)
        file = self.folder / self.draw.choice(("prompts.jsonl", "prompts.txt"))
        file.write_bytes(content)
        for prompt in read_prompts(file):
            prompt.text.encode()

    def archive(self) -> None:
        """An archive of a named set; mostly changed inside, under a packing that is whole."""
        name = self.draw.choice(list(self.archives))
        convert, members = self.archives[name]
        members, inside = dict(members), self.draw.random() < 0.5
        link = None
        if inside:
            key = self.draw.choice(list(members))
            match self.draw.randrange(4):
                case 0:
                    members[self._elsewhere(key)] = members.pop(key)
                case 1:
                    link = key, self._elsewhere(key)
                case _:
                    members[key] = self._member(members[key], list(members.values()))
        packed = packed_as(self.draw.choice(("zip", "tar", "tar.gz")), members, link)
        file = self.folder / "set.archive"
        file.write_bytes(packed if inside else mutated(packed, self.draw, [packed]))
        try:
            made = fetch(NamedSet(name, "", (Archive("set.archive", convert),), None), self.folder / "sets", file)
            assert not [path for path in made.rglob("*") if path.is_symlink()]
        finally:
            left = {path.name for path in (self.folder / "sets").iterdir()}
            shutil.rmtree(self.folder / "sets", ignore_errors=True)
            assert left <= {name}, left

    def _elsewhere(self, name: str) -> str:
        """The name of a member, as one who wants to write outside would have it."""
        plain = self.draw.choice((name, Path(name).name, "x.png"))
        before = self.draw.choice(("../", "../../../", "/", "a/../../", "./", "\\..\\", "C:\\", "a\0"))
        return self.draw.choice((before + plain, before, "n" * 300 + plain, plain + "/", plain + "/x.png", ".."))

    def _member(self, content: bytes, others: list[bytes]) -> bytes:
        return changed_json(content, self.draw) if content[:1] in b"[{" else mutated(content, self.draw, others)


def archive_seeds() -> dict[str, tuple[Any, dict[str, bytes]]]:
    """What unpacks each layout, and the members of the smallest archive that has it."""
    record, stream, photo = bytes(range(256)) * 12, io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((2, 1024, 3), np.uint8)).save(stream, "PNG")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photo, "PNG")
    batches = {f"a/data_batch_{n}.bin": b"\3" + record for n in range(1, 6)} | {"a/test_batch.bin": b"\0" + record}
    pages = {f"a/data_batch_{n}.png": stream.getvalue() for n in range(1, 6)} | {"a/test_batch.png": stream.getvalue()}
    labels = {"a/train_lables.json": json.dumps([1] * 10).encode(), "a/test_lables.json": b"[0, 9]"}
    fine = {"a/train.bin": b"\1\2" + record, "a/test.bin": b"\0\0" + record}
    captions = {"l/captions.json": b'{"/x/0.png": ["a cat", "two"], "1.png": "a dog"}'}
    photos = {f"l/{name}.png": photo.getvalue() for name in range(2)}
    return {
        "cifar10": (unpack.cifar10_binary, batches),
        "cifar10-npm": (unpack.cifar10_npm, pages | labels),
        "cifar100": (unpack.cifar100_binary, fine | {"a/fine_label_names.txt": b"apple\nbear\nsea\n"}),
        "afhq-dog": (unpack.afhq_dog, {f"{part}/dog/{part}.png": photo.getvalue() for part in ("train", "val")}),
        "laion-10k": (unpack.laion_10k, photos | captions),
    }


def packed_as(kind: str, members: dict[str, bytes], link: tuple[str, str] | None = None) -> bytes:
    """The members as one file; that of a ``link``, if it is of a kind that has them, is one to somewhere else."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as container:
            for name, content in members.items():
                container.writestr(zipfile.ZipInfo(name), content)
        return stream.getvalue()
    # Without the time in gzip's header: input n of a seed is always the same.
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if link is not None and name == link[0]:
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, link[1], 0
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue() if kind == "tar" else gzip.compress(stream.getvalue(), mtime=0)
