"""Limits for continuous integration, to_pandas, and two folders that nobody prepared, through the command line."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from unrote.auditing import audit
from unrote.auditing.limits import Limit, exceeded, parse_limit
from unrote.data.store import in_memory_store
from unrote.errors import InputError


@pytest.fixture(scope="module")
def report():
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    generated = np.concatenate([images[:3], images[3:4, :, ::-1], 255 - images[:6]])
    return audit(in_memory_store(generated, source="g"), in_memory_store(images, source="t"), max_shift=0)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("mq@0.5=0.01", Limit("mq", 0.5, 0.01)),
        ("mq-orbit-squared@0.33=1e-3", Limit("mq-orbit-squared", 0.33, 1e-3)),
        ("exact=0", Limit("exact", None, 0.0)),
    ],
)
def test_grammar(text, limit):
    assert parse_limit(text) == limit


@pytest.mark.parametrize(
    "text",
    ["", "mq", "mq=0.1", "exact@0.5=0", "fid@2=1", "mq@0=0.1", "mq@2=0.1", "mq@0.5=2", "mq@0.5=1.2.3", "mq@0.5=-1"],
)
def test_refused(text):
    with pytest.raises(InputError, match="--fail-above"):
        parse_limit(text)


def test_counts_are_those_of_the_images(report):
    # 3 exact copies, a flipped one that only the orbit sees, 6 of something else.
    assert parse_limit("mq@0.42=0").measured(report)["count"] == 3
    assert parse_limit("mq-orbit@0.42=0").measured(report)["count"] == 4
    assert parse_limit("exact=0").measured(report)["count"] == 4


def test_exceeded_is_strict(report):
    assert exceeded(report, [parse_limit("exact=0.4")]) == []
    (sentence,) = exceeded(report, [parse_limit("exact=0.39")])
    assert sentence == "exact is 0.4 (4 of 10), above the limit of 0.39"


def test_to_pandas(report):
    try:
        import pandas
    except ImportError:
        with pytest.raises(InputError, match="pip install pandas"):
            report.to_pandas()
        return
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == list(report.pairs) and len(frame) == 10


def write_unprepared(folder):
    """Images of several sizes and modes, a broken file and a text file."""
    random = np.random.default_rng(1)
    folder.mkdir()
    for number, (shape, mode) in enumerate([((20, 30, 3), "RGB"), ((16, 16), "L"), ((40, 24, 4), "RGBA")]):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "notes.txt").write_text("nothing")


def command_line(folder, *arguments):
    command = [sys.executable, "-m", "unrote", "audit", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_two_unprepared_folders(tmp_path):
    write_unprepared(tmp_path / "a")
    write_unprepared(tmp_path / "b")
    refused = command_line(tmp_path, "a", "--train", "b")
    assert refused.returncode == 2 and "resolution" in refused.stderr and "Traceback" not in refused.stderr
    found = command_line(tmp_path, "a", "--train", "b", "--resolution", 16, "--fail-above", "exact=0.5")
    assert found.returncode == 1 and "above the limit" in found.stderr and "Traceback" not in found.stderr
    assert (tmp_path / "a-report" / "report.html").is_file()
