"""The decoded store: what it is keyed by, what its fingerprint means, and that no half-built one is ever used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unrote.data import ImageRows, ImageStore, in_memory_store, open_images
from unrote.errors import InputError


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


def make_folder(folder: Path, count: int = 6, size: int = 8) -> np.ndarray:
    folder.mkdir(parents=True)
    images = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return images


def built(stores: Path) -> list[str]:
    return sorted(entry.name for entry in stores.iterdir() if entry.is_dir())


def test_second_opening_decodes_nothing(tmp_path: Path, stores: Path) -> None:
    images = make_folder(tmp_path / "p")
    first = open_images(tmp_path / "p", resolution=8)
    (folder,) = built(stores)
    stamp = (stores / folder / "images.npy").stat().st_mtime_ns
    again = open_images(tmp_path / "p", resolution=8)
    assert (stores / folder / "images.npy").stat().st_mtime_ns == stamp and built(stores) == [folder]
    assert again.fingerprint == first.fingerprint and again.names == first.names
    assert np.array_equal(np.load(stores / folder / "images.npy"), images)


def test_other_settings_are_another_store(tmp_path: Path, stores: Path) -> None:
    make_folder(tmp_path / "p")
    seen = {
        open_images(tmp_path / "p", resolution=8, channels=channels, center_crop=crop).fingerprint
        for channels in (1, 3)
        for crop in (True, False)
    }
    assert len(built(stores)) == 4
    assert len(seen) == 2  # square images: cropping and stretching come to the same pixels


def test_touching_and_copying_change_the_key_but_not_the_fingerprint(tmp_path: Path, stores: Path) -> None:
    make_folder(tmp_path / "p")
    first = open_images(tmp_path / "p", resolution=8)
    os.utime(tmp_path / "p" / "000000.png", (1, 1))
    touched = open_images(tmp_path / "p", resolution=8)
    shutil.copytree(tmp_path / "p", tmp_path / "q")
    copied = open_images(tmp_path / "q", resolution=8)
    assert len(built(stores)) == 3
    assert first.fingerprint == touched.fingerprint == copied.fingerprint


def test_any_change_of_content_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    images = make_folder(folder)
    seen = [open_images(folder, resolution=8).fingerprint]
    (folder / "000001.txt").write_text("a caption")
    seen.append(open_images(folder, resolution=8).fingerprint)
    (folder / "000001.txt").write_text("b caption")
    seen.append(open_images(folder, resolution=8).fingerprint)
    (folder / "000002.png").rename(folder / "000009.png")
    seen.append(open_images(folder, resolution=8).fingerprint)
    changed = images[3].copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(folder / "000003.png")
    seen.append(open_images(folder, resolution=8).fingerprint)
    (folder / "000005.png").unlink()
    seen.append(open_images(folder, resolution=8).fingerprint)
    assert len(set(seen)) == len(seen)


def test_same_content_from_elsewhere_has_the_same_fingerprint(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "p")
    folder = open_images(tmp_path / "p", resolution=8)
    names = [f"{index:06d}.png" for index in range(6)]
    assert in_memory_store(images, source="x", names=names).fingerprint == folder.fingerprint
    np.savez(tmp_path / "x.npz", images=images, names=names)
    assert open_images(tmp_path / "x.npz", resolution=8).fingerprint == folder.fingerprint


def test_labels_and_class_names_count_for_the_fingerprint() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    labels = np.array([0, 1])
    variants: list[ImageStore] = [
        in_memory_store(images, source="x"),
        in_memory_store(images, source="x", labels=labels),
        in_memory_store(images, source="x", labels=labels[::-1].copy()),
        in_memory_store(images, source="x", labels=labels, class_names=("a", "b")),
        in_memory_store(images, source="x", captions=["", ""]),
        in_memory_store(images.reshape(2, 8, 2, 3), source="x"),
    ]
    assert len({store.fingerprint for store in variants}) == len(variants)


def test_subset_reads_rows_only_when_asked(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "p", 20)
    store = open_images(tmp_path / "p", resolution=8)
    subset = store.subset([3, 17, 3])
    assert isinstance(subset.images, ImageRows) and len(subset) == 3
    assert subset.images.shape == (3, 8, 8, 3) and subset.images.ndim == 4 and subset.images.dtype == np.uint8
    assert subset.images.nbytes == 3 * 8 * 8 * 3
    assert list(subset.names) == ["000003.png", "000017.png", "000003.png"]
    assert np.array_equal(subset.images[np.array([1, 0])], images[[17, 3]])
    assert np.array_equal(subset.images[[2, 1]], images[[3, 17]])
    assert np.array_equal(subset.images[1:], images[[17, 3]])
    assert np.array_equal(subset.images[-2], images[17])
    assert np.array_equal(np.asarray(subset.images), images[[3, 17, 3]])
    assert np.array_equal(np.stack(list(subset.images)), images[[3, 17, 3]])
    assert type(store.images[np.array([1, 2])]) is np.ndarray
    again = subset.subset(np.array([1]))
    assert again.names == ["000017.png"] and np.array_equal(again.images[0], images[17])
    assert store.subset(np.arange(20)).fingerprint == store.fingerprint
    assert again.fingerprint == in_memory_store(images[17:18], source="x", names=["000017.png"]).fingerprint


def test_limit_is_fixed_ordered_nested_and_spread() -> None:
    store = in_memory_store(np.zeros((1000, 1, 1, 1), dtype=np.uint8), source="x")
    chosen = [int(name) for name in store.limit(100).names]
    assert chosen == sorted(chosen) and len(set(chosen)) == 100
    assert set(chosen) < {int(name) for name in store.limit(200).names}
    assert chosen[:4] == [int(name) for name in store.limit(100).names][:4]
    assert abs(np.mean(chosen) - 500) < 90
    assert store.limit(1000) is store and store.limit(5000) is store
    assert len(open_images(store, resolution=1, channels=1, limit=7)) == 7
    with pytest.raises(InputError, match="at least 1"):
        store.limit(0)


def test_a_damaged_store_is_made_again(tmp_path: Path, stores: Path) -> None:
    images = make_folder(tmp_path / "p")
    open_images(tmp_path / "p", resolution=8)
    (folder,) = built(stores)
    for damage in ("meta.json", "images.npy", "items.json"):
        path = stores / folder / damage
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert np.array_equal(open_images(tmp_path / "p", resolution=8).images, images), damage
        (stores / folder / damage).unlink()
        assert np.array_equal(open_images(tmp_path / "p", resolution=8).images, images), damage


def test_disk_space_is_checked_before_decoding(tmp_path: Path, stores: Path) -> None:
    make_folder(tmp_path / "p", 3)
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"needs [\d.]+ GB in .*stores and .* free; make room or set UNROTE_CACHE"):
        open_images(tmp_path / "p", resolution=3_000_000)
    assert time.perf_counter() - start < 5
    assert built(stores) == []


BUILDER = """
import json, sys
from pathlib import Path
from unrote.data import open_images
store = open_images(Path(sys.argv[1]), resolution=48)
print(json.dumps([store.fingerprint, len(store), int(store.images[:].sum())]))
"""


def builder(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_builders_at_once(tmp_path: Path, stores: Path) -> None:
    make_folder(tmp_path / "p", 120, 160)
    builders = [builder(tmp_path / "p") for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in builders]
    assert all(process.returncode == 0 for process in builders), answers
    assert len({answer for answer, _ in answers}) == 1
    assert len(built(stores)) == 1


def test_killed_build_leaves_nothing_that_is_used(tmp_path: Path, stores: Path) -> None:
    make_folder(tmp_path / "p", 150, 256)
    make_folder(tmp_path / "other", 2)
    process = builder(tmp_path / "p")
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 100_000 for path in stores.glob("*.partial/images.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = built(stores)
    assert leftover.endswith(".partial")
    open_images(tmp_path / "other", resolution=8)  # anybody cleans up after the dead
    (other,) = built(stores)
    assert not other.endswith(".partial")
    after = open_images(tmp_path / "p", resolution=48)
    whole = open_images(tmp_path / "p", resolution=48, cache_dir=tmp_path / "elsewhere")
    assert len(after) == 150 and after.fingerprint == whole.fingerprint
    assert np.array_equal(after.images, whole.images)


def test_leftovers_of_a_living_builder_are_left_alone(tmp_path: Path, stores: Path) -> None:
    make_folder(tmp_path / "p", 150, 256)
    make_folder(tmp_path / "other", 2)
    process = builder(tmp_path / "p")
    deadline = time.monotonic() + 60
    while not list(stores.glob("*.partial/images.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    open_images(tmp_path / "other", resolution=8)
    answer, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(answer)[1] == 150


def test_of_a_source_without_a_key_too_however_many_others_look(tmp_path: Path, stores: Path) -> None:
    """Whoever finds that it is being decoded must not take away what says so: the next one would remove it."""
    make_folder(tmp_path / "other", 2)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)

    class Slow:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index == 2:
                assert list(stores.glob("*.partial"))
                for size in (4, 5, 6):
                    open_images(tmp_path / "other", resolution=size)
            return Image.fromarray(images[index]), index

    assert np.array_equal(open_images(Slow(), resolution=8).images, images)


MEASURED = """
import resource, sys
from pathlib import Path
from unrote.data import open_images
small, big = (Path(argument) for argument in sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open_images(small, resolution=192)
before = peak()
store = open_images(big, resolution=192)
print((peak() - before) * 1024, store.images.nbytes)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    # Small files on disk (flat colours), 110 kB each once decoded.
    for name, count in (("small", 100), ("big", 1500)):
        (tmp_path / name).mkdir()
        for index in range(count):
            colour = (index % 251, index % 13, index % 7)
            Image.new("RGB", (200, 192), colour).save(tmp_path / name / f"{index}.png", compress_level=1)
    arguments = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "big")]
    grown, size = map(int, subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split())
    assert size > 160_000_000
    assert grown < 0.1 * size


def test_importing_the_data_layer_loads_neither_torch_nor_datasets() -> None:
    code = "import sys, unrote.data, unrote.data.download; print({'torch', 'datasets', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
