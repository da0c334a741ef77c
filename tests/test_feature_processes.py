"""Features extracted, and an audit made, by several processes: what one process gives, also after a kill."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from forking import Command, exit_codes, variables_of
from toy import toy_images
from unrote.encoders.base import Encoder
from unrote.encoders.cache import features
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.ranks import joined

COUNT = 1300
"""In blocks of 512, the last of them short."""


class Mortal(RandomConvEncoder):
    """Kills its process at the second block."""

    calls = 0

    def __call__(self, images):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), 9)
        return super().__call__(images)


def rows() -> np.ndarray:
    return np.asarray(toy_images(COUNT).images)


def work(variables: dict[str, str], cache: Path | None, out: Path, encoder: type[Encoder]) -> None:
    os.environ.update(variables)
    with joined(torch.device("cpu")) as ranks:
        found = features(encoder(), rows(), cache=cache, distributed=ranks.world > 1)
        np.save(out / f"{ranks.rank}.npy", found)


def extract(world: int, cache: Path | None, out: Path, dies: int | None = None) -> list[int]:
    """Exit codes."""
    out.mkdir()
    encoders = [Mortal if rank == dies else RandomConvEncoder for rank in range(world)]
    each = zip(variables_of(world), encoders, strict=True)
    return exit_codes(work, [(variables, cache, out, encoder) for variables, encoder in each])


@pytest.fixture(scope="module")
def expected():
    return features(RandomConvEncoder(), rows())


@pytest.mark.parametrize(("world", "cached"), [(2, True), (3, False), (4, True)])
def test_the_number_of_processes_changes_nothing(tmp_path, expected, world, cached):
    cache = tmp_path / "cache" if cached else None
    assert extract(world, cache, tmp_path / "out") == [0] * world
    for rank in range(world):
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{rank}.npy"), expected)
    if cache is not None:
        (file,) = cache.glob("*.npy")
        features(RandomConvEncoder(), rows(), cache=tmp_path / "alone")
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


@pytest.mark.parametrize("dies", [0, 1])
def test_after_a_kill_whole_blocks_are_kept(tmp_path, expected, dies):
    cache = tmp_path / "cache"
    codes = extract(2, cache, tmp_path / "killed", dies)
    # Of three blocks the first process has two and the second has one.
    assert codes == ([-9, 1] if dies == 0 else [0, 0])
    if dies == 0:
        (partial,) = cache.glob(".*.partial")
        assert partial.stat().st_size > 1024 * expected.shape[1] * 4
    assert extract(3, cache, tmp_path / "again") == [0, 0, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "2.npy"), expected)
    assert not list(cache.glob(".*.partial"))


def test_an_audit_by_two_processes(tmp_path):
    for name, seed, count in (("generated", 1, 40), ("train", 0, 60), ("holdout", 2, 60)):
        np.savez(tmp_path / f"{name}.npz", images=toy_images(count, seed=seed).images)
    for world in (1, 2):
        sets = [tmp_path / "generated.npz", "--train", tmp_path / "train.npz", "--holdout", tmp_path / "holdout.npz"]
        command = ["-m", "unrote", "audit", *sets, "--out", tmp_path / str(world), "--max-shift", "1"]
        result = Command(command, world, UNROTE_CACHE=str(tmp_path / f"cache-{world}")).finish()
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("report.html") == 1, "one process speaks for all"
    for name in ("report.json", "pairs.csv"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
