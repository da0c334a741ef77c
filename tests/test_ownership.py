"""One owner at a time, where files have locks, and where the filesystem says that it has none."""

import errno
import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from toy import toy_images, toy_run
from unrote import ownership
from unrote.data import open_images
from unrote.encoders import features, load_encoder
from unrote.errors import InputError
from unrote.ownership import BusyError, Ownership
from unrote.training.run import Run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds become tenths."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 0.8)
    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.3)


def flock_says(number, monkeypatch):
    """As a mount without locks does, whoever asks."""

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=lambda number: errno.errorcode[number])
def lockless(request, monkeypatch):
    flock_says(request.param, monkeypatch)


@pytest.mark.usefixtures("lockless")
def test_without_locks_a_run_has_one_process_by_its_beats(tmp_path):
    run = Run(tmp_path / "run")
    with run.locked():
        time.sleep(0.3)
        begun = time.monotonic()
        with pytest.raises(InputError, match="another process is training in this folder, on "), Run(run.path).locked():
            pass
        assert time.monotonic() - begun < 0.8, "as soon as the owner moves"
        run.ownership.check()
    begun = time.monotonic()
    with Run(run.path).locked():
        assert time.monotonic() - begun < 0.8, "who has left is not watched"


@pytest.mark.usefixtures("lockless")
def test_without_locks_who_was_killed_is_watched_and_followed(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / ".lock").write_text(Ownership(tmp_path / ".lock", "taken")._mark)
    begun = time.monotonic()
    with Run(tmp_path).locked():
        assert time.monotonic() - begun > 0.8


@pytest.mark.usefixtures("lockless")
def test_without_locks_only_one_of_those_who_come_at_once_gets_in(tmp_path):
    ready, entered = threading.Barrier(4), []

    def come(number):
        ready.wait()
        try:
            with Ownership(tmp_path / "lock", "taken").held():
                entered.append(number)
                time.sleep(1)
        except BusyError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(come, range(4))) == len(entered) == 1


def test_training_goes_on_without_locks(tmp_path, monkeypatch):
    flock_says(errno.ENOSYS, monkeypatch)
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "toy.npz", images=toy_images().images)
    images = open_images(tmp_path / "toy.npz", resolution=8)
    assert toy_run(tmp_path / "run", images=images, training__epochs=1).finished
    assert not list((tmp_path / "cache").rglob("*.partial"))


class Means:
    """An encoder that takes its time and counts its calls."""

    cache_key = "means/1"

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        time.sleep(0.5)
        return images.mean((1, 2))


@pytest.mark.parametrize("locks", [True, False])
def test_features_are_extracted_once_by_those_who_come_at_once(tmp_path, monkeypatch, locks):
    if not locks:
        flock_says(errno.ENOLCK, monkeypatch)
    means, images = Means(), np.random.default_rng(0).integers(0, 256, (700, 6, 6, 3), dtype=np.uint8)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: features(load_encoder(means), images, cache=tmp_path), range(3)))
    assert means.calls == 2, "of two blocks"
    assert all(np.array_equal(one, found[0]) for one in found)


def test_another_reason_not_to_lock_is_an_error(tmp_path, monkeypatch):
    flock_says(errno.EIO, monkeypatch)
    with pytest.raises(InputError, match=r"\.lock: cannot be locked \(Input/output error\)"), Run(tmp_path).locked():
        pass
