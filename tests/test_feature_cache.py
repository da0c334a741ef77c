"""The cache of features: hits, damage, death, full disks, several processes, bounded memory."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unrote.data import in_memory_store
from unrote.encoders import features, load_encoder
from unrote.encoders.cache import pixels_digest
from unrote.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (700, 6, 6, 3), dtype=np.uint8)


class Counting:
    """A user's function with a cache key, that counts its calls."""

    cache_key = "means/1"

    def __init__(self):
        self.rows = 0

    def __call__(self, images):
        self.rows += len(images)
        return images.mean((1, 2))


@pytest.fixture
def counting():
    return Counting()


def files(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_extracted_once_and_read_only(tmp_path, counting):
    encoder = load_encoder(counting)
    first = features(encoder, IMAGES, cache=tmp_path)
    assert isinstance(first, np.memmap) and not first.flags.writeable and first.dtype == np.float32
    np.testing.assert_allclose(first, IMAGES.mean((1, 2)), rtol=1e-6)
    again = features(encoder, IMAGES.copy(), cache=tmp_path)
    np.testing.assert_array_equal(again, first)
    assert counting.rows == 700 and len(files(tmp_path)) == 1
    np.testing.assert_array_equal(features(encoder, IMAGES), first)
    assert counting.rows == 1400  # without a cache


def test_other_pixels_shape_or_encoder_are_other_files(tmp_path, counting):
    encoder = load_encoder(counting)
    changed = IMAGES.copy()
    changed[-1, -1, -1, -1] ^= 1
    for images in (IMAGES, changed, IMAGES.reshape(700, 3, 12, 3), IMAGES[:699]):
        features(encoder, images, cache=tmp_path)
    assert len(files(tmp_path)) == 4
    features(load_encoder("pixels"), IMAGES, cache=tmp_path)
    counting.cache_key = "means/2"
    features(load_encoder(counting), IMAGES, cache=tmp_path)
    assert len(files(tmp_path)) == 6


def test_digest_is_of_pixels_not_of_names(tmp_path, counting):
    stores = [in_memory_store(IMAGES, source=name, names=[f"{name}{i}" for i in range(700)]) for name in "ab"]
    assert stores[0].fingerprint != stores[1].fingerprint
    for store in stores:
        features(load_encoder(counting), store.images, digest=pixels_digest(store), cache=tmp_path)
    assert counting.rows == 700
    assert pixels_digest(stores[0].subset(range(3))) == pixels_digest(stores[1].subset(range(3)))
    assert pixels_digest(stores[0].subset([1, 0])) != pixels_digest(stores[0].subset([0, 1]))


def test_a_function_without_cache_key_is_not_kept(tmp_path):
    found = features(load_encoder(lambda images: images.mean((1, 2))), IMAGES, cache=tmp_path)
    assert found.shape == (700, 3) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "longer", "garbage", "empty", "other array", "header"])
def test_damaged_files_are_made_again(tmp_path, counting, damage, caplog):
    encoder = load_encoder(counting)
    expected = np.array(features(encoder, IMAGES, cache=tmp_path))
    path = tmp_path / files(tmp_path)[0]
    content = path.read_bytes()
    if damage == "other array":
        np.save(path, np.zeros((3, 3)))
    else:
        cases = {"truncated": content[:-40], "longer": content + b"x", "garbage": b"\x00" * 500, "empty": b"",
                 "header": content[:10] + b"(" * 118 + content[128:]}  # fmt: skip
        path.write_bytes(cases[damage])
    with caplog.at_level(logging.WARNING, logger="unrote"):
        np.testing.assert_array_equal(features(encoder, IMAGES, cache=tmp_path), expected)
    assert "is damaged" in caplog.text and counting.rows == 1400
    assert path.read_bytes() == content


def test_an_encoder_that_fails_leaves_nothing(tmp_path, counting):
    def broken(images):
        result = counting(images)
        return result if counting.rows < 600 else np.full_like(result, np.inf)

    broken.cache_key = "broken"
    with pytest.raises(InputError, match="NaN or infinity"):
        features(load_encoder(broken), IMAGES, cache=tmp_path)
    assert files(tmp_path) == []


PROGRAM = """
import os, resource, signal, sys, time
from pathlib import Path
import numpy as np
from unrote.encoders import features, load_encoder

folder, what, log = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
images = np.random.default_rng(0).integers(0, 256, (2000, 6, 6, 3), dtype=np.uint8)
calls = 0

def means(images):
    global calls
    calls += 1
    if calls == 3 and what == "die":
        log.write_text("ready")
        time.sleep(60)
    with log.open("a") as file:
        file.write("x")
    if what == "slow":
        time.sleep(0.2)
    return np.repeat(images.mean((1, 2)), 400, axis=1)

means.cache_key = "means"
if what == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
print(features(load_encoder(means), images, cache=folder).sum())
"""


def start(folder, what, log):
    command = [sys.executable, "-c", PROGRAM, str(folder), what, str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_process_leaves_no_features_and_the_next_goes_on(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    with start(folder, "die", log) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text() == "ready"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    (partial,) = files(folder)
    assert partial.startswith(".") and partial.endswith(".partial")
    torn = Path(shutil.copytree(folder, tmp_path / "torn"))
    os.truncate(torn / partial, (torn / partial).stat().st_size - 1)
    with start(folder, "go", tmp_path / "log 2") as process, start(torn, "go", tmp_path / "log 3") as other:
        assert process.wait(60) == other.wait(60) == 0
    assert [(tmp_path / name).read_text() for name in ("log 2", "log 3")] == ["xx", "xxx"]  # of four blocks
    (whole,) = files(folder)
    assert f".{whole}.partial" == partial and files(torn) == [whole]
    assert (folder / whole).read_bytes() == (torn / whole).read_bytes()
    images = np.random.default_rng(0).integers(0, 256, (2000, 6, 6, 3), dtype=np.uint8)
    np.testing.assert_allclose(np.load(folder / whole), np.repeat(images.mean((1, 2)), 400, axis=1), rtol=1e-6)


def test_two_processes_extract_once(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    with start(folder, "slow", log) as first, start(folder, "slow", log) as second:
        results = [process.communicate(timeout=60) for process in (first, second)]
    assert first.returncode == second.returncode == 0 and results[0][0] == results[1][0] != ""
    assert log.read_text() == "x" * 4 and len(files(folder)) == 1


def test_full_disk_is_said_and_leaves_nothing(tmp_path):
    folder = tmp_path / "cache"
    with start(folder, "full", tmp_path / "log") as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "InputError: cannot keep features in" in error and "make room" in error
    assert files(folder) == []


def test_folder_that_cannot_be_made(tmp_path, counting):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep features in"):
        features(load_encoder(counting), IMAGES, cache=tmp_path / "file/cache")


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from unrote.encoders import features, load_encoder

def wide(images):
    return np.repeat(images.reshape(len(images), -1)[:, :1], 2048, axis=1)

class Rows:
    def __init__(self, count): self.shape = (count, 8, 8, 3)
    def __len__(self): return self.shape[0]
    def __getitem__(self, rows): return np.zeros((len(range(*rows.indices(len(self)))), 8, 8, 3), np.uint8)

wide.cache_key = "wide"
for count in (2_000, 24_000):
    features(load_encoder(wide), Rows(count), cache=Path(sys.argv[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """24,000 x 2,048 float32 are 188 MiB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    small, large = map(int, run.stdout.split())
    assert large < small + 40
    assert sum(path.stat().st_size for path in Path(tmp_path).glob("*.npy")) > 200e6
