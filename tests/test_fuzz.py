"""Inputs that were changed at random are read or refused; the program is benchmarks/fuzz.py."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toy import toy_run
from unrote.cli_retest import _of_report
from unrote.data import unpack
from unrote.data.download import Archive, NamedSet, fetch
from unrote.errors import InputError
from unrote.models.pretrained import load_pretrained
from unrote.sample_folder import indices_in, read_note, start, write_images
from unrote.text.prompts import read_prompts

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


def test_a_few_hundred_changed_inputs(tmp_path):
    command = [sys.executable, str(PROGRAM), "--count", "200", "--seed", "3", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == found["inputs"] >= 195
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
from fuzz_watch import Watch
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


DEEP = b"[" * 100_000


@pytest.mark.parametrize("content", [DEEP, b"{", b"[]", b"\xff"], ids=["deep", "cut", "list", "binary"])
def test_a_damaged_file_of_a_run_or_of_samples_is_named(run, tmp_path, content):
    shutil.copytree(run.path, tmp_path / "run")
    copy = type(run)(tmp_path / "run")
    (copy.path / "base.json").write_bytes(content)
    with pytest.raises(InputError, match=r"base\.json: is damaged.*restore it"):
        copy.keep_base({"unet": "0"})
    (tmp_path / "sampling.json").write_bytes(content)
    with pytest.raises(InputError, match=r"sampling\.json: is damaged.*choose another --out"):
        start(tmp_path, {"steps": 1})
    for manifest in (copy.path / "checkpoints").glob("*.json"):
        manifest.write_bytes(content)
    for name in ("base.json", "run.json"):
        (copy.path / name).unlink()
    with pytest.raises(InputError, match=r"no checkpoint is whole.*can't be read"):
        toy_run(copy.path, training__epochs=1)


@pytest.mark.parametrize("note", [None, "{", "[" * 100_000, "[]", "{}", '{"attempt": "x"}'])
def test_an_image_without_a_note_of_ours_is_named(tmp_path, note):
    write_images(tmp_path, range(1), np.zeros((1, 4, 4, 3), np.uint8), [{"attempt": 1}])
    assert read_note(tmp_path / "000000.png") == {"attempt": 1}
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    if note is not None:
        text.add_text("unrote", note)
    Image.new("RGB", (4, 4)).save(tmp_path / "000001.png", pnginfo=text)
    (tmp_path / "000002.png").write_bytes(b"no image")
    for name in ("000001.png", "000002.png"):
        with pytest.raises(InputError, match=f"{name}: is damaged, or was not made with this guard; remove it"):
            read_note(tmp_path / name)


def test_foreign_names_are_no_samples(tmp_path):
    for name in ("000003.png", "1000000.png", "7.png", "1a.png", "0000001.png", "\u0661.png"):
        (tmp_path / name).touch()
    assert indices_in(tmp_path) == {3, 1_000_000}


@pytest.mark.parametrize("line", [DEEP, b'{"text": "\\ud800"}'], ids=["deep", "half a character"])
def test_a_prompt_that_can_not_be_read_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "a cat"}\n' + line)
    with pytest.raises(InputError, match=r"p\.jsonl, line 2: "):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("cluster", ["1e999", "null", '"x"'])
def test_a_report_with_a_wrong_position_is_named(tmp_path, cluster):
    def written(cluster):
        report = f'{{"schema_version": 2, "memorization": 0, "extracted": {{"images": [{{"cluster": {cluster}}}]}}'
        (tmp_path / "report.json").write_text(report + ', "data": {"train": {"fingerprint": "f"}}}')

    written(1)
    assert _of_report(tmp_path, 3) == ([1], "f")
    written(cluster)
    with pytest.raises(InputError, match=r"--from-report .*is no report\.json"):
        _of_report(tmp_path, 3)


def test_damage_within_an_archive_is_named_and_leaves_nothing(tmp_path):
    """A checksum that fails while a member is read, and a member under a password."""
    file = tmp_path / "set.zip"
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("x/0.png", b"an image" * 50)
    whole = file.read_bytes()
    place = whole.index(b"an image")
    locked = bytearray(whole)
    locked[6] |= 1
    locked[whole.index(b"PK\x01\x02") + 8] |= 1
    entry = NamedSet("set", "", (Archive("set.zip", unpack.laion_10k),), None)
    for content in (whole[:place] + b"?" + whole[place + 1 :], bytes(locked)):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"set\.zip is no archive that can be read: "):
            fetch(entry, tmp_path / "sets", file)
        assert list((tmp_path / "sets").iterdir()) == []


def test_a_captions_file_that_is_nested_too_deeply_counts_for_nothing(tmp_path):
    (tmp_path / "captions.json").write_bytes(DEEP)
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    with tarfile.open(tmp_path / "set.tar", "w") as packed:
        for name in ("captions.json", "0.png"):
            packed.add(tmp_path / name, name)
    entry = NamedSet("set", "", (Archive("set.tar", unpack.laion_10k),), None)
    made = fetch(entry, tmp_path / "sets", tmp_path / "set.tar")
    assert [path.name for path in (made / "train").iterdir()] == ["0.png"]


def test_damaged_weights_in_one_file_are_named(tmp_path):
    (tmp_path / "sd.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"sd\.safetensors can't be loaded"):
        load_pretrained(str(tmp_path / "sd.safetensors"))
