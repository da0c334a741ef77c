"""Searches shared by several processes, and searches that were killed: the result is that of one calm process."""

from pathlib import Path

import numpy as np
import pytest

from forking import Command
from unrote.errors import InputError
from unrote.neighbours.features import nearest_features
from unrote.neighbours.streaming import Saved
from unrote.ranks import Ranks

PROGRAM = Path(__file__).with_name("search_program.py")


def run(kind: str, out: Path, world: int, resume: Path | None = None, kill_at: int = 0) -> int:
    out.mkdir(exist_ok=True)
    return Command([PROGRAM, kind, out, resume or "-", kill_at], world).finish().returncode


def result(out: Path, rank: int = 0) -> dict[str, np.ndarray]:
    with np.load(out / f"{rank}.npz") as saved:
        return dict(saved)


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in ("squared", "indices", "transforms", "again"):
        np.testing.assert_array_equal(actual[name], expected[name])


@pytest.fixture(scope="module", params=["images", "features", "reduced"])
def alone(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    assert run(request.param, out, 1) == 0
    return request.param, result(out)


def test_the_guard_fired_in_the_search_of_features(alone):
    kind, expected = alone
    assert expected["again"] == {"images": 0, "features": 1, "reduced": 2}[kind]


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_nothing(alone, tmp_path, world):
    kind, expected = alone
    assert run(kind, tmp_path, world) == 0
    for rank in range(world):
        assert_same(result(tmp_path, rank), expected)


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_search_goes_on_where_it_stopped(alone, tmp_path, world):
    kind, expected = alone
    resume = tmp_path / "resume"
    assert world == 1 or run(kind, tmp_path / "calm", world) == 0
    reads = int((expected if world == 1 else result(tmp_path / "calm", world - 1))["reads"])
    assert run(kind, tmp_path / "killed", world, resume, kill_at=reads * 2 // 3) != 0
    assert not (tmp_path / "killed" / f"{world - 1}.npz").exists()
    saved = list(resume.glob("*/*.npz"))
    assert saved
    assert run(kind, tmp_path / "again", world, resume) == 0
    for rank in range(world):
        assert_same(result(tmp_path / "again", rank), expected)
    # Features also need reads for the pilot sample and the candidates, which are not saved.
    assert result(tmp_path / "again", world - 1)["reads"] < (0.7 if kind == "images" else 0.95) * reads


def test_progress_is_kept_under_the_content_and_the_settings(tmp_path):
    rows, alone = np.arange(60, dtype=np.float32).reshape(20, 3), Ranks()
    changed = rows.copy()
    changed[19, 2] += 1
    folders = [
        Saved.keyed(tmp_path, ranks, queries, references, num).folder
        for ranks, queries, references, num in [
            (alone, rows, rows, 5),
            (alone, rows, rows, 6),
            (alone, rows, changed, 5),
            (alone, changed, rows, 5),
            (alone, rows, rows[:19], 5),
            (Ranks(0, 2), rows, rows, 5),
            (Ranks(1, 2), rows, rows, 5),
        ]
    ]
    assert len(set(folders)) == len(folders)
    assert Saved.keyed(tmp_path, alone, rows.copy(), rows.copy(), 5).folder == folders[0]
    assert not any(tmp_path.iterdir())


def test_without_a_process_group_there_is_a_clear_refusal():
    with pytest.raises(InputError, match="init_process_group"):
        nearest_features(np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32), 2, distributed=True)
