"""Image folders: labels, captions, and everything a folder may hold that is no usable image."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unrote.data import ImageStore, open_images
from unrote.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return pixels


def reasons(store: ImageStore) -> dict[str, str]:
    return {item.name: item.reason for item in store.quarantined}


def test_flat_folder(photos: Path) -> None:
    expected = {f"{name}.png": picture(photos / f"{name}.png", seed) for seed, name in enumerate(["b", "a", "c"])}
    (photos / "notes.md").write_text("not an image")
    (photos / ".hidden.png").write_bytes(b"")
    store = open_images(photos, resolution=8)
    assert list(store.names) == ["a.png", "b.png", "c.png"]
    for name, image in zip(store.names, store.images, strict=True):
        assert np.array_equal(image, expected[name])
    assert store.labels is None and store.captions is None and store.quarantined == ()
    assert store.source == str(photos)
    assert isinstance(store.images, np.memmap) and not store.images.flags.writeable


def test_class_subfolders_are_labels(photos: Path) -> None:
    for seed, name in enumerate(["dog/1.png", "cat/x/2.png", "cat/3.png"]):
        picture(photos / name, seed)
    store = open_images(photos, resolution=8)
    assert list(store.names) == ["cat/3.png", "cat/x/2.png", "dog/1.png"]
    assert store.class_names == ("cat", "dog")
    assert store.labels is not None and store.labels.tolist() == [0, 0, 1] and store.labels.dtype == np.int64


def test_no_labels_when_an_image_lies_outside_or_there_is_one_class(photos: Path) -> None:
    picture(photos / "only" / "1.png")
    assert open_images(photos, resolution=8).labels is None
    picture(photos / "other" / "1.png", 1)
    (photos / "broken.png").write_bytes(b"")  # outside, but not usable
    assert open_images(photos, resolution=8).class_names == ("only", "other")
    picture(photos / "outside.png", 2)
    assert open_images(photos, resolution=8).labels is None


def test_splits_are_not_mixed_into_one_set(photos: Path) -> None:
    picture(photos / "train" / "1.png")
    picture(photos / "test" / "1.png", 1)
    with pytest.raises(InputError, match=r"splits test, train; name one.*photos/test"):
        open_images(photos, resolution=8)
    assert len(open_images(photos / "train", resolution=8)) == 1


def test_metadata_captions(photos: Path) -> None:
    for seed, name in enumerate(["a.png", "sub/b.png", "c.png"]):
        picture(photos / name, seed)
    rows = [{"file_name": "sub/b.png", "text": "a bé"}, {"file_name": "a.png", "text": None, "other": 3}]
    (photos / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (photos / "c.txt").write_text("\n  from the sidecar \nsecond line\n", encoding="utf-8-sig")
    (photos / "sub/b.txt").write_text("not from here")
    store = open_images(photos, resolution=8)
    assert dict(zip(store.names, store.captions or (), strict=True)) == {
        "a.png": "",
        "c.png": "from the sidecar",
        "sub/b.png": "a bé",
    }
    (photos / "a.txt").write_text("its row has no text")
    assert "its row has no text" in open_images(photos, resolution=8).captions


def test_several_captions(photos: Path) -> None:
    for seed, name in enumerate(["a.png", "b.png", "c.png", "d.png"]):
        picture(photos / name, seed)
    texts = {"a.png": ["a cat", "red", "a cat"], "b.png": "dog", "c.png": []}
    rows = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in texts.items()]
    (photos / "metadata.jsonl").write_text("".join(rows))
    store = open_images(photos, resolution=8)
    assert store.captions == ["a cat", "dog", "", ""] and store.more_captions == [["red", "a cat"], [], [], []]
    assert store.every_caption() == [["a cat", "red", "a cat"], ["dog"], [""], [""]]
    assert open_images(photos, resolution=8).every_caption() == store.every_caption(), "from the cache"
    assert open_images(store, resolution=4).every_caption() == store.every_caption()
    few = store.subset([1, 0])
    assert few.every_caption() == [["dog"], ["a cat", "red", "a cat"]]
    (photos / "metadata.jsonl").write_text("".join(rows).replace("red", "blue"))
    assert open_images(photos, resolution=8).fingerprint != store.fingerprint
    (photos / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "dog"}\n')
    single = open_images(photos, resolution=8)
    later = '{"file_name": "b.png", "text": ["", "dog"]}\n'
    (photos / "metadata.jsonl").write_text(later)
    assert open_images(photos, resolution=8).every_caption() == [[""], ["", "dog"], [""], [""]]
    assert single.more_captions is None and single.subset([1]).fingerprint == store.subset([1]).fingerprint


def test_metadata_that_is_not_read_is_named(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(photos / "a.png", 1)
    (photos / "metadata.csv").write_text("file_name,text\na.png,red")
    assert open_images(photos, resolution=8).captions is None
    assert "metadata.csv: is not read; captions come from metadata.jsonl" in caplog.text


def test_nested_metadata_is_relative_to_its_folder(photos: Path) -> None:
    picture(photos / "sub" / "b.png")
    picture(photos / "a.png", 1)
    (photos / "sub" / "metadata.jsonl").write_text('{"file_name": "./b.png", "text": "inside"}\n')
    assert open_images(photos, resolution=8).captions == ["", "inside"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "gone.png", "text": "x"}',
            "line 2: no image file gone.png",
        ),
        ('{"file_name": "a.png", "text": "x"}\n\n{"file_name": "a.png", "text": "y"}', "line 3: second row for a.png"),
        ('{"file_name": "a.png"', "line 1: not valid JSON"),
        ('["a.png"]', 'line 1: needs a JSON object with a "file_name"'),
        ('{"text": "x"}', 'line 1: needs a JSON object with a "file_name"'),
        ('{"file_name": "../../etc/x.png", "text": "x"}', "line 1: file_name '../../etc/x.png' leads out"),
        ('{"file_name": "/etc/x.png", "text": "x"}', "line 1: file_name '/etc/x.png' leads out"),
        ('{"file_name": "a.png", "text": 3}', 'line 1: "text" must be a string or a list of strings, not int'),
        ('{"file_name": "a.png", "text": ["x", "\\ud800"]}', 'line 1: "text" has half a character'),
        ('{"file_name": "a.png", "text": ["x", 3]}', 'line 1: "text" must be a string or a list of strings, not int'),
    ],
)
def test_unusable_metadata_names_file_and_line(photos: Path, lines: str, message: str) -> None:
    picture(photos / "a.png")
    (photos / "metadata.jsonl").write_text(lines)
    with pytest.raises(InputError) as error:
        open_images(photos, resolution=8)
    assert f"{photos / 'metadata.jsonl'}, {message}" in str(error.value)


def test_metadata_may_name_an_image_that_is_quarantined(photos: Path) -> None:
    picture(photos / "a.png")
    (photos / "b.png").write_bytes(b"")
    (photos / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}')
    store = open_images(photos, resolution=8)
    assert store.captions == ["y"] and reasons(store) == {"b.png": "empty file"}


def test_caption_that_is_not_text_quarantines_its_image(photos: Path) -> None:
    picture(photos / "a.png")
    picture(photos / "b.png", 1)
    (photos / "b.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert reasons(open_images(photos, resolution=8)) == {"b.png": "its caption b.txt is not UTF-8 text under 64 KiB"}


def test_everything_bad_at_once(photos: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = picture(photos / "good.png")
    (photos / "text.png").write_text("hello")
    (photos / "zero.jpg").write_bytes(b"")
    (photos / "cut.png").write_bytes((photos / "good.png").read_bytes()[:120])
    (photos / "dangling.png").symlink_to(photos / "nowhere.png")
    (photos / "circle.png").symlink_to("circle.png")
    (photos / "sub").mkdir()
    (photos / "sub" / "up").symlink_to("..")
    (photos / "sub" / "linked.png").symlink_to("../good.png")
    os.mkfifo(photos / "pipe.png")
    (photos / "unreadable.png").symlink_to("/proc/self/mem")  # a regular file that even root cannot read from 0
    (photos / "notes.md").write_text("x")
    (photos / "more.csv").write_text("x")
    caplog.set_level("INFO", "unrote")
    store = open_images(photos, resolution=8)
    assert list(store.names) == ["good.png", "sub/linked.png"]
    assert np.array_equal(store.images[1], good)
    found = reasons(store)
    assert found.pop("cut.png").startswith("truncated or damaged")
    assert found.pop("unreadable.png").startswith("cannot be read: ")
    assert found == {
        "text.png": "not an image of a known format",
        "zero.jpg": "empty file",
        "dangling.png": "dangling symlink",
        "circle.png": "symlink loop",
        "sub/up/": "symlink loop: leads back to a folder above it",
        "pipe.png": "not a regular file",
    }
    assert "2 images, 8 quarantined, 2 other files ignored" in caplog.text
    (written,) = (cache / "stores").glob("*/quarantine.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in rows} == reasons(store)


def test_awkward_names_become_printable_and_stay_different(photos: Path) -> None:
    names = [b"new\nline.png", b"latin\xe9.png", "latiné.png".encode(), b"back\\slash.png", b"latin\\xe9.png"]
    for seed, name in enumerate(names):
        picture(photos / os.fsdecode(name), seed)
    store = open_images(photos, resolution=8)
    assert set(store.names) == {
        "new\\nline.png",
        "latin\\xe9.png",
        "latiné.png",
        "back\\\\slash.png",
        "latin\\\\xe9.png",
    }
    assert len(store) == len(names) and store.quarantined == ()
    for name in store.names:
        assert name.isprintable()
        name.encode()


def test_several_sizes_need_a_resolution(photos: Path) -> None:
    picture(photos / "a.png", size=(8, 12))
    assert open_images(photos, resolution=None).images.shape == (1, 8, 12, 3)
    picture(photos / "b.png", 1, size=(9, 9))
    with pytest.raises(InputError, match=r"a.png is 12 x 8, b.png is 9 x 9\); give a resolution"):
        open_images(photos, resolution=None)
    assert open_images(photos, resolution=4).images.shape == (2, 4, 4, 3)


def test_nothing_usable_gives_the_first_reasons(photos: Path, cache: Path) -> None:
    for index in range(7):
        (photos / f"{index}.png").write_bytes(b"")
    with pytest.raises(InputError) as error:
        open_images(photos, resolution=8)
    assert "none of 7 images is usable" in str(error.value)
    assert "0.png: empty file" in str(error.value) and "and 2 more" in str(error.value)
    assert not [entry for entry in (cache / "stores").iterdir() if entry.is_dir()]
    with pytest.raises(InputError, match="holds no images"):
        open_images(photos.parent / "cache", resolution=8)


def test_missing_path_names_the_nearest(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The names beside the missing one are proposed too: in a checkout where the demo was made, "demo" is near "emojis".
    monkeypatch.chdir(photos.parent)
    with pytest.raises(InputError, match=r"did you mean .*photos"):
        open_images(str(photos.parent / "phots"), resolution=8)
    with pytest.raises(InputError, match="did you mean emoji"):
        open_images("emojis", resolution=8)
    with pytest.raises(InputError, match="named sets are emoji, cifar10"):
        open_images("/zzzz/qqqq", resolution=8)
    (photos.parent / "file.txt").write_text("x")
    with pytest.raises(InputError, match=r"a file, but no \.npz"):
        open_images(photos.parent / "file.txt", resolution=8)


def test_animations_are_said_aloud(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(photos / "a.gif", save_all=True, append_images=frames[1:])
    caplog.set_level("INFO", "unrote")
    assert open_images(photos, resolution=8).images[0, 0, 0].tolist() == [255, 0, 0]
    assert "of 1 animations the first frame is used" in caplog.text


def test_cache_that_cannot_be_made(photos: Path, cache: Path) -> None:
    picture(photos / "a.png")
    cache.write_text("in the way")
    with pytest.raises(InputError, match=r"cannot make the cache folder .* set UNROTE_CACHE"):
        open_images(photos, resolution=8)
