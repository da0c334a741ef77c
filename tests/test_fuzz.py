"""Inputs that were changed at random are read or refused; the program is benchmarks/fuzz.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toy import toy_run
from unrote.errors import InputError

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


def test_a_few_hundred_changed_inputs(tmp_path):
    command = [sys.executable, str(PROGRAM), "--count", "400", "--seed", "1", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == found["inputs"] >= 395
    for kind in ("image", "metadata", "config", "run", "prompts", "archive", "samples", "report", "model"):
        assert found["outcomes"][f"{kind}: read"] > 0, "some changes do no harm"
        assert found["outcomes"][f"{kind}: refused"] > 0


def test_the_watch_sees_a_stray_write(tmp_path):
    """The harness itself: a reader that writes elsewhere, connects, or unpickles is found out."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    program = f"""
import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})
import pickle
from pathlib import Path
from fuzz import Watch
watch = Watch(Path({str(inside)!r}))
watch.on = True
(Path({str(inside)!r}) / "fine").write_text("x")
assert watch.found == []
(Path({str(outside)!r}) / "stray").write_text("x")
Path({str(inside)!r}, "fine").rename(Path({str(outside)!r}) / "moved")
pickle.loads(pickle.dumps(Path("x")))
watch.on = False
assert [found.split()[0] for found in watch.found][:2] == ["open", "os.rename"], watch.found
assert watch.found[2].startswith("pickle.find_class")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("fuzz") / "run", training__epochs=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("data.json", content) for content in (b"{", b"[]", b"\xff", b'{"count": 4}')),
        *(("ledger.csv", content) for content in (b"", b"index,visits\n0\n", b"index,visits\n0,x\n", b"\xff,\n")),
        ("ledger.csv", b"visits\n" + b"9" * 40 + b"\n"),
    ],
)
def test_a_damaged_run_folder_is_named(run, name, content):
    """Found by fuzzing."""
    original = (run.path / name).read_bytes()
    (run.path / name).write_bytes(content)
    try:
        with pytest.raises(InputError, match=rf"{name}: is .*damaged"):
            _ = run.data, run.read_ledger()
    finally:
        (run.path / name).write_bytes(original)
