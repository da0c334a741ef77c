"""Changes images, metadata, configurations and checkpoints at random and reads them: no crash, hang, or stray write.

    python benchmarks/fuzz.py --count 10000 --seed 0 --out benchmarks/results/fuzz.json

Every input must be read or be refused by the error that says so (`BadImage` for one image, `InputError` otherwise),
within the time limit. An audit hook of Python watches meanwhile: writes outside the working folder, unpickling,
processes and connections are failures whatever else happens. Input n of a seed is always the same.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import unrote
from unrote.config import load_config, parse_assignment
from unrote.data.decode import BadImage, DecodeSettings, decode_stream
from unrote.data.folder import FolderSource
from unrote.errors import InputError
from unrote.files import sha256_file
from unrote.method.slots import FolderSlots
from unrote.training.checkpoints import Checkpoints
from unrote.training.run import Run

SHARES = {"image": 0.45, "metadata": 0.15, "config": 0.2, "arrays": 0.05, "run": 0.15}
TOKENS = [
    b"../", b"/etc/passwd", b"\x00", b"\xff\xfe", b"1e999", b"-1", b"NaN", b"9" * 400, b"[" * 3000, b"{" * 300, b'"',
    b"null", b"!!python/object/apply:os.system ['false']", b"&a [*a, *a]", b"<<: *a", b"\xed\xa0\x80", b"=cmd()",
    b"\r\n", b": ", b"- ",
]  # fmt: skip


class Watch:
    """Forbids what no input may bring about."""

    def __init__(self, folder: Path) -> None:
        self.allowed, self.found, self.on = str(folder.resolve()), [], False
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) if flags else 0
            if (writes or (mode and set(mode) & set("wax+"))) and not isinstance(path, int):
                self._inside(event, path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._inside(event, args[1])
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            self._inside(event, args[0])
        elif event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"):
            self.found.append(f"{event} {args!r:.80}")

    def _inside(self, event: str, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith((self.allowed, "/dev/null")):
            self.found.append(f"{event} {real}")


def mutated(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """``content`` after one to six changes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        at = draw.randrange(len(data) + 1)
        size = min(draw.choice((1, 2, 4, 16, 200)), len(data) - at)
        match draw.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + size] = draw.randbytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size] * draw.choice((1, 2, 50))
            case 4:
                del data[at:]
            case 5:
                data[at : at + 4] = draw.choice((b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"))
            case 6:
                data[at : at + draw.choice((0, size))] = draw.choice(TOKENS)
            case 7:
                data[at:] = draw.choice(others)[at:]
    return bytes(data)


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


class Inputs:
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
        self.run = self._train()
        self.originals = {
            path.relative_to(self.run): path.read_bytes() for path in self.run.rglob("*") if path.is_file()
        }

    def _npz(self, **arrays: Any) -> bytes:
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        return stream.getvalue()

    def _train(self) -> Path:
        out = self.folder / "run"
        settings = {
            "model.block_out_channels": [32], "training.epochs": 2, "training.mixed_precision": "no",
            "ensemble.num_shards": 2, "ensemble.local_epochs": 1, "training.checkpointing_steps": 1,
        }  # fmt: skip
        unrote.train(np.zeros((4, 8, 8, 3), np.uint8), out=out, settings=settings)
        return out

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

    def run_folder(self) -> None:
        """A run folder, one of whose files was changed; mostly with the checksums of checkpoints made good."""
        contents = list(self.originals.values())
        name = self.draw.choice([name for name in self.originals if "model" not in name.parts])
        try:
            (self.run / name).write_bytes(mutated(self.originals[name], self.draw, contents))
            if name.suffix == ".safetensors" and self.draw.random() < 0.7:
                self._sign()
            run = Run(self.run)
            _ = run.config, run.data, run.read_ledger()
            slots = FolderSlots(self.run / "proxies")
            Checkpoints(self.run / "checkpoints", slots, 2).load_newest()
            for part in sorted((self.run / "proxies").iterdir()):
                slots.load_state_dict({"files": {"proxy": part.name}, "version": 9})
                slots.get("proxy").whole()
        finally:
            for other, content in self.originals.items():
                (self.run / other).write_bytes(content)

    def _sign(self) -> None:
        for manifest in (self.run / "checkpoints").glob("*.json"):
            values = json.loads(manifest.read_text())
            values["state"] = sha256_file(manifest.with_suffix(".safetensors"))
            values["proxies"] = {name: sha256_file(self.run / "proxies" / name) for name in values["proxies"]}
            manifest.write_text(json.dumps(values))


def _too_long(*_: object) -> None:
    raise TimeoutError("took longer than the limit")


def fuzz(count: int, seed: int, limit: float, work: Path) -> dict[str, Any]:
    """Read ``count`` changed inputs; what came of each kind, and every failure."""
    os.environ["UNROTE_CACHE"] = str(work / "cache")
    os.environ["TMPDIR"] = tempfile.tempdir = str(work)
    inputs = Inputs(work, random.Random(seed))
    watch = Watch(work)
    readers: dict[str, Callable[[], None]] = {
        "image": inputs.image, "metadata": inputs.metadata, "config": inputs.config, "arrays": inputs.arrays_file,
        "run": inputs.run_folder,
    }  # fmt: skip
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * count))]
    random.Random(seed).shuffle(kinds)
    outcomes, failures, slowest, shown = Counter[str](), [], 0.0, 0
    signal.signal(signal.SIGALRM, _too_long)
    for number, kind in enumerate(kinds):
        inputs.draw = random.Random(f"{seed}/{number}")
        started, watch.found = time.perf_counter(), []
        signal.setitimer(signal.ITIMER_REAL, limit)
        watch.on = True
        outcome = "read"
        try:
            readers[kind]()
        except (BadImage, InputError):
            outcome = "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "failed"
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{kind} {number}: {type(error).__name__}: {error!s:.120} ({last.filename}:{last.lineno})")
        finally:
            watch.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        failures += [f"{kind} {number}: {what}" for what in watch.found]
        if len(failures) > shown:
            print(*failures[shown:], sep="\n", file=sys.stderr, flush=True)
            shown = len(failures)
        slowest = max(slowest, time.perf_counter() - started)
        outcomes[f"{kind}: {outcome}"] += 1
        # Everything that was decoded is kept in the cache; it would fill the disk.
        if number % 200 == 199:
            shutil.rmtree(work / "cache", ignore_errors=True)
    return {
        "inputs": len(kinds), "seed": seed, "limit_seconds": limit, "outcomes": dict(sorted(outcomes.items())),
        "failures": failures, "slowest_seconds": round(slowest, 3),
    }  # fmt: skip


def main() -> None:
    """Run, print, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds an input may take")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        result = fuzz(args.count, args.seed, args.limit, Path(work))
    result["seconds"] = round(time.perf_counter() - started, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
